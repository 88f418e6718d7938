"""Results that travel with the package: whole, of their study as it is declared, judged anew, and used at once."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import workbench
from tests.studies.toy import STUDY, ran
from workbench.catalogue import methods
from workbench.cli import main
from workbench.engines import HERE
from workbench.errors import InputError
from workbench.studies import stored
from workbench.studies.core import load_study
from workbench.studies.sheets import Damaged, NotUsed, read, write
from workbench.studies.verdicts import VERDICTS

READY = [row.slug for row in methods(status="ready")]
STORED = [slug for slug in READY if stored.path_of(workbench.method(slug)).exists()]


@pytest.fixture
def package(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose one system is the toy; where its result will be."""
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(stored, "PACKAGE", tmp_path)
    monkeypatch.setattr(stored, "methods", lambda status: [STUDY.system])
    monkeypatch.setattr(stored, "method", lambda slug: STUDY.system)
    monkeypatch.setattr("workbench.catalogue.method", lambda slug: STUDY.system)
    monkeypatch.setattr("workbench.studies.core.load_study", lambda slug: STUDY)
    monkeypatch.setattr("joblib.cpu_count", lambda: 1)
    (tmp_path / "studies" / "routing").mkdir(parents=True)
    return tmp_path / "studies" / "routing" / "toy.json"


# -- those of the package


@pytest.mark.parametrize("slug", STORED)
def test_a_stored_result_belongs_to_its_study_as_it_is_declared(slug: str):
    """Where this fails the study has changed: `workbench results SLUG --store`, and a new version if numbers did."""
    found, study = stored.need(slug), load_study(slug)
    assert study.foreign(found) is None
    judged = workbench.result(slug)
    assert (judged.verdict, judged.judgement.reason) == (found.verdict, found.reason)
    assert (judged.judgement.effect, judged.judgement.ci) == (found.effect, found.ci)


@pytest.mark.parametrize("slug", READY)
def test_a_preset_has_the_seeds_that_its_deviation_asks_for(slug: str):
    study = load_study(slug)
    for preset, (deviation, found_with) in (study.power.deviation if study.power else {}).items():
        assert int(study.presets[preset]["seeds"]) >= max(study.power.seeds(deviation), found_with), preset
        assert set(study.power.baselines) <= set(study.arms_of(study.presets[preset]))


def test_no_file_is_the_result_of_no_system():
    assert [row.slug for row in workbench.results()] == STORED


# -- how they are written, read and used


def test_a_stored_result_is_shown_at_once_and_says_what_it_is(package: Path):
    ran_now = STUDY.store(workers=HERE)
    assert len(ran()) == 6 and package.exists() and ran_now.origin == {"run": 6}
    shown = STUDY.execute("small", workers=HERE)
    assert len(ran()) == 6 and shown.verdict == ran_now.verdict and shown.judgement == ran_now.judgement


def test_where_nothing_is_kept_the_stored_rows_serve(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    STUDY.store(workers=HERE)
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "elsewhere"))
    shown = STUDY.execute("small")
    assert shown.origin == {"stored": 6} and len(ran()) == 6
    note = "Rows: 6 of the stored result of version 1 (fresh=True or --fresh runs them anew)."
    assert note in str(shown) and note in shown._repr_markdown_()
    assert [line.rstrip()[-1] for line in str(shown).splitlines() if line.startswith("method")] == ["4"]  # no time
    assert STUDY.execute("small", seeds=3, workers=HERE).origin == {"stored": 6, "run": 3}
    assert STUDY.execute("smoke").origin == {"run": 6}
    assert STUDY.execute("small", workers=HERE, fresh=True).origin == {"run": 6}
    assert STUDY.execute("small", seed=101, workers=HERE).origin == {"run": 6}
    assert STUDY.execute("small").origin == {"kept": 6}  # those that ran here come first


def test_a_seed_is_all_of_one_machine(package: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    STUDY.store(workers=HERE)
    next((home / "results").rglob("one-1-*")).unlink()
    assert STUDY.execute("small").origin == {"kept": 3, "stored": 3} and len(ran()) == 6


def test_a_result_is_read_without_its_study_and_judged_anew_with_it(package: Path):
    STUDY.store(workers=HERE)
    (found,) = workbench.results()
    assert found.slug == "toy" and found.verdict in VERDICTS and found.seeds == [0, 1]
    assert repr(workbench.results()).splitlines()[0].split() == ["slug", "verdict", "effect", "interval", "seeds"]
    assert repr(workbench.results()).splitlines()[-1] == "1 results"
    judged = workbench.result("toy")
    assert judged.verdict == found.verdict and judged.origin == {"stored": 6}
    assert len(judged.rows) == 6 and math.isnan(judged.rows[0].extra["nan"])


def test_the_file_is_plain_json_with_a_row_a_line_and_no_time(package: Path):
    STUDY.store(workers=HERE)
    text = package.read_text()

    def strict(name: str) -> None:
        raise AssertionError(name)

    content = json.loads(text, parse_constant=strict)["content"]
    assert content["settings"] == {"steps": 4} and len(content["rows"]) == 6
    assert "seconds" not in text and sum('"arm"' in line for line in text.splitlines()) == 6


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.write_text(path.read_text().replace('"metric": 2', '"metric": 9')), "was changed after"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "cannot be read: it is cut off"),
        (lambda path: write(path, read(path) | {"slug": "moa"}), "is not the result of toy"),
        (lambda path: write(path, {"slug": "toy"}), "is not the result of toy"),
    ],
)
def test_a_spoilt_result_is_named_and_not_used(package: Path, spoil, why: str):
    STUDY.store(workers=HERE)
    spoil(package)
    with pytest.warns(NotUsed, match=f"{package} {why}.* not used"):
        assert workbench.results() == []
    with pytest.warns(NotUsed, match=why), pytest.raises(InputError, match="slug 'toy' has no stored result"):
        workbench.result("toy")
    with pytest.warns(NotUsed, match=why):
        assert STUDY.execute("small", seed=5, workers=HERE).origin == {"run": 6}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": 2}, "is of version 1 and the study is of version 2"),
        ({"presets": {"small": {"seeds": 2, "steps": 5}}}, "has other settings than small"),
        ({"presets": {"small": {"seeds": 3, "steps": 4}}}, "has other arms or seeds than small"),
        ({"arms": ("method", "one")}, "has other arms or seeds than small"),
    ],
)
def test_a_result_of_another_version_is_named_and_not_used(package, changes, why, monkeypatch: pytest.MonkeyPatch):
    STUDY.store(workers=HERE)
    changed = replace(STUDY, **changes)
    assert STUDY.foreign(stored.need("toy")) is None and changed.foreign(stored.need("toy")) == why
    with pytest.warns(NotUsed, match=f"{why}; not used"):
        assert "stored" not in changed.execute("small", workers=HERE).origin
    monkeypatch.setattr("workbench.studies.core.load_study", lambda slug: changed)
    with pytest.raises(InputError, match=f"slug 'toy' has a stored result that {why}; workbench study toy runs it"):
        workbench.result("toy")


def test_a_file_of_no_system_is_named(package: Path):
    STUDY.store(workers=HERE)
    package.with_name("toys.json").write_text("{}")
    with pytest.warns(NotUsed, match=r"toys\.json is the result of no system; not used"):
        assert len(workbench.results()) == 1


def test_an_unknown_slug_is_told_with_the_nearest(planned):
    with pytest.raises(InputError, match="slug 'rmoee' is unknown; did you mean 'rmoe'"):
        workbench.result("rmoee")
    with pytest.raises(InputError, match="slug 'not-yet' has no stored result; its study does not stand yet"):
        workbench.result(planned.slug)


def test_a_number_that_is_none_is_plain_json(tmp_path: Path):
    content = {"rows": [{"a": [math.nan, math.inf, -math.inf, -0.0, 0.1 + 0.2]}], "ü": "nan"}
    write(tmp_path / "x.json", content)
    found = read(tmp_path / "x.json")
    assert repr(found) == repr(content)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "y.json")
    (tmp_path / "y.json").mkdir()
    with pytest.raises(Damaged, match="cannot be read: Is a directory"):
        read(tmp_path / "y.json")


def test_the_command_prints_them_and_stores_them(package: Path, capsys: pytest.CaptureFixture):
    assert main(["results"]) == 0 and capsys.readouterr().out.splitlines()[-1] == "0 results"
    assert main(["results", "toy", "--store"]) == 0
    assert "6 run now" in capsys.readouterr().out and package.exists()
    assert main(["results", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["slug"] == "toy" and row["ci"] == [pytest.approx(stored.need("toy").ci[0]), stored.need("toy").ci[1]]
    assert main(["results", "toy"]) == 0 and "6 of the stored result of version 1" in capsys.readouterr().out
    assert main(["results", "toy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["origin"] == {"stored": 6}
    package.write_text("{")
    assert main(["results"]) == 0
    assert f"workbench: {package} cannot be read" in capsys.readouterr().err
    assert main(["results", "--store"]) == 2 and "--store needs the SLUG" in capsys.readouterr().err
