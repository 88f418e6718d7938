"""Proxy runs that are kept, resumed and spread over processes; and `workbench mix`, which searches with them."""

import json
from pathlib import Path

import pytest
import torch

from workbench.beds.text_mixtures import PURPOSE, Trainer, kinds
from workbench.cli import main, mix
from workbench.errors import InputError
from workbench.studies import proxies, sheets
from workbench.studies.proxies import Proxies

SETTINGS = {"documents": 240, "seq_len": 32, "batch_size": 4, "eval_batches": 1}
MIXTURES = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)


@pytest.fixture
def trainer(home: Path) -> Trainer:
    return Trainer.of(kinds(240), PURPOSE, SETTINGS | {"proxy": (16, 1, 5, 3, 3e-3)}, "proxy")


def files(home: Path) -> list[Path]:
    return sorted((home / "mixtures").rglob("*.json"))


def test_a_run_that_is_kept_is_read_and_gives_the_identical_number(trainer: Trainer, home: Path, monkeypatch):
    first, told = Proxies(trainer, 1), []
    scores = first.scores(MIXTURES, told.append)
    assert scores == told == [trainer.score(weights, 1) for weights in MIXTURES]
    assert (first.run, first.kept, len(files(home))) == (3, 0, 3)
    monkeypatch.setattr(Trainer, "score", lambda *args: pytest.fail("it is kept"))
    monkeypatch.setattr(proxies, "code_of", lambda run, code=first._root.name: code)
    again = Proxies(trainer, 1)
    assert again.scores(MIXTURES.flip(0)) == scores[::-1] and (again.run, again.kept) == (0, 3)


def test_a_search_that_was_killed_goes_on_where_it_was(trainer: Trainer, home: Path):
    class Killed(Exception):
        pass

    def kill(score: float) -> None:
        if len(files(home)) == 2:
            raise Killed

    with pytest.raises(Killed):
        Proxies(trainer).scores(MIXTURES, kill)
    rest = Proxies(trainer)
    rest.scores(MIXTURES)
    assert (rest.run, rest.kept) == (1, 2)


@pytest.mark.parametrize("spoil", ["cut", "changed", "another"])
def test_a_file_that_is_not_as_it_was_written_is_made_again(trainer: Trainer, home: Path, spoil: str):
    scores = Proxies(trainer).scores(MIXTURES[:1])
    (path,) = files(home)
    if spoil == "another":
        sheets.write(path, sheets.read(path) | {"recipe": {}, "score": 1.0})
    else:
        text = path.read_text()
        path.write_text(text[:40] if spoil == "cut" else text.replace('"score": ', '"score": 1'))
    again = Proxies(trainer)
    assert again.scores(MIXTURES[:1]) == scores and again.run == 1


def test_other_seeds_recipes_and_code_are_other_runs(trainer: Trainer, home: Path, monkeypatch):
    Proxies(trainer).scores(MIXTURES[:1])
    Proxies(trainer, 5).scores(MIXTURES[:1])
    longer = Trainer.of(trainer.source, PURPOSE, SETTINGS | {"proxy": (16, 1, 5, 4, 3e-3)}, "proxy")
    Proxies(longer).scores(MIXTURES[:1])
    other = Trainer.of(trainer.source, {"docs": 1.0}, SETTINGS | {"proxy": (16, 1, 5, 3, 3e-3)}, "proxy")
    Proxies(other).scores(MIXTURES[:1])
    monkeypatch.setattr(proxies, "code_of", lambda run: "another")
    Proxies(trainer).scores(MIXTURES[:1])
    assert len(files(home)) == 5


def test_processes_give_the_same_numbers(trainer: Trainer, home: Path):
    assert Proxies(trainer, jobs=2).scores(MIXTURES) == [trainer.score(weights, 0) for weights in MIXTURES]


def test_a_proxy_that_diverges_is_named(trainer: Trainer, monkeypatch):
    def diverge(self, weights, seed):
        raise FloatingPointError

    monkeypatch.setattr(Trainer, "score", diverge)
    monkeypatch.setattr(proxies, "code_of", lambda run: "any")
    with pytest.raises(InputError, match=r"mixture \(1, 0, 0\) makes the proxy diverge"):
        Proxies(trainer).scores(MIXTURES[:1])


def test_a_score_that_is_no_number_is_not_kept(trainer: Trainer, home: Path, monkeypatch):
    monkeypatch.setattr(Trainer, "score", lambda *args: float("nan"))
    monkeypatch.setattr(proxies, "code_of", lambda run: "any")
    with pytest.raises(InputError, match=r"mixture \(1, 0, 0\) makes the proxy diverge"):
        Proxies(trainer).scores(MIXTURES[:1])
    assert files(home) == []


def test_an_expert_that_diverges_is_named(trainer: Trainer, monkeypatch):
    def diverge(self, domain, seed):
        raise FloatingPointError

    monkeypatch.setattr(Trainer, "expert", diverge)
    with pytest.raises(InputError, match="the expert of 'docs' diverges"):
        proxies.expert(trainer, 1, 0)


# -- the shell


@pytest.fixture
def shell(capsys, monkeypatch, tmp_path, home):
    """In an empty folder and with the smallest proxies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mix, "SETTINGS", SETTINGS | {"initial": 12, "merge": 0.9})
    monkeypatch.setattr(mix, "WARM_STEPS", 5)

    def call(words: str) -> tuple[int, str, str]:
        status = main(["mix", *words.split()])
        return (status, *capsys.readouterr())

    return call


@pytest.mark.parametrize("search", ["climb", "regmix", "random", "optuna"])
def test_a_search_writes_all_it_tried_and_says_what_is_best(shell, search: str):
    status, out, err = shell(f"{search} --runs 7 --steps 2 --out found.json")
    assert (status, err) == (0, "") and out.count("\n") == 1
    found = json.loads(Path("found.json").read_text())
    assert out.startswith(f"found.json: {search} over {len(found['domains'])} clusters, ")
    assert f"{found['best']['score']:.4f} bits/byte at cluster" in out
    assert len(found["mixtures"]) == 7 and found["purpose"] == PURPOSE
    scores = [row["score"] for row in found["mixtures"]]
    choices = {one["how"]: one for one in found["choices"]}
    assert choices["best measured"]["score"] == min(scores)
    assert choices["best measured"]["weights"] == found["mixtures"][scores.index(min(scores))]["weights"]
    assert ("best predicted" in choices) == (search in ("climb", "regmix"))
    assert found["best"]["score"] == min(one["score"] for one in found["choices"])
    rounds = [row["round"] for row in found["mixtures"]]
    assert rounds == {"climb": [0, 0, 0, 0, 1, 1, 2], "optuna": [*range(7)]}.get(search, [0] * 7)
    assert found["run"] + found["kept"] == 7 + len(choices) - 1 + 2


def test_linear_dmo_trains_a_proxy_a_domain_and_measures_what_it_chooses(shell):
    status, out, _ = shell("linear-dmo --over kinds --steps 2 --out found.json --html map.html")
    found = json.loads(Path("found.json").read_text())
    assert status == 0 and "linear-dmo over 3 kinds, 3 experts and 3 proxy runs, 0 of them kept" in out
    assert len(found["mixtures"]) == 22 and all(row["score"] is None for row in found["mixtures"])
    liked = min(found["mixtures"], key=lambda row: row["foreseen"])
    assert found["best"]["weights"] == liked["weights"] and found["best"]["how"] == "best predicted"
    trainer = Trainer.of(kinds(240), PURPOSE, mix.SETTINGS | {"proxy": (32, 1, 5, 2, 3e-3)}, "proxy")
    assert found["best"]["score"] == trainer.score(liked["weights"], 0)


def test_the_same_search_again_runs_nothing_and_finds_the_same(shell):
    shell("climb --over kinds --runs 7 --steps 2 --out one.json")
    status, out, _ = shell("climb --over kinds --runs 7 --steps 2 --out two.json --json")
    one, two = (json.loads(Path(name).read_text()) for name in ("one.json", "two.json"))
    assert status == 0 and json.loads(out) == two and two["run"] == 0
    own = ("run", "kept")
    assert {k: v for k, v in one.items() if k not in own} == {k: v for k, v in two.items() if k not in own}


def test_the_purpose_decides(shell):
    words = "random --over kinds --runs 7 --steps 6 --out"
    shell(f"{words} code.json --purpose python=1")
    shell(f"{words} names.json --purpose names=0.9 docs=0.1")
    best = [json.loads(Path(name).read_text())["best"]["weights"] for name in ("code.json", "names.json")]
    assert best[0] != best[1]


@pytest.mark.parametrize(("over", "drawn"), [("kinds", "scatterternary"), ("clusters", "parallel")])
def test_the_picture_has_every_mixture_and_needs_no_network(shell, over: str, drawn: str):
    status, _, _ = shell(f"random --over {over} --runs 7 --steps 2 --out found.json --html map.html")
    page = Path("map.html").read_text()
    assert status == 0 and "Plotly.newPlot" in page and 'src="http' not in page
    if over == "kinds":
        assert drawn in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("clim --out a.json", "search 'clim' is unknown; did you mean 'climb'"),
        ("climb --over cluster --out a.json", "--over 'cluster' is unknown; did you mean 'clusters'"),
        ("climb --runs 6 --out a.json", "--runs: is '6' but must be a whole number from 7"),
        ("linear-dmo --runs 9 --out a.json", "--runs goes with the other searches"),
        ("climb --out a.txt", "--out is 'a.txt' but must be a new file in a folder, ending in .json"),
        ("climb --out no/a.json", "--out is 'no/a.json' but must be a new file"),
        ("climb --out there.json", "--out is 'there.json' but must be a new file"),
        ("climb --html a.htm --out a.json", "--html is 'a.htm' but must be a new file in a folder, ending in .html"),
        (f"climb --out {'a' * 300}.json", "but cannot be written: File name too long"),
        ("climb --out gone.json", "--out is 'gone.json' but must be a new file"),
        ("climb --purpose code=1 --out a.json", "--purpose: domain 'code' is unknown"),
        ("climb --purpose python=0.5 docs=0.4 --out a.json", "--purpose: weights has a sum of 0.9"),
        ("climb --purpose python=1.5 docs=-0.5 --out a.json", "--purpose: weights has -0.5 for 'docs'"),
        ("climb --purpose python --out a.json", "--purpose has 'python' but must have pairs such as docs=0.5"),
        ("climb --purpose docs=1 docs=0 --out a.json", "--purpose has 'docs' twice"),
        ("climb", "the following arguments are required: --out"),
    ],
)
def test_what_cannot_be_searched_is_one_line_and_nothing_is_written(shell, words: str, said: str):
    Path("there.json").write_text("{}")
    Path("gone.json").symlink_to("nowhere")
    status, out, err = shell(words)
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1
    assert {path.name for path in Path().iterdir()} == {"there.json", "gone.json", "home"} and Path(
        "there.json"
    ).read_text() == "{}"


def test_an_interrupted_search_says_that_it_goes_on(shell, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Proxies, "scores", interrupt)
    status, _, err = shell("random --over kinds --out a.json")
    assert status == 130 and "the proxy runs that are done are kept; the same command goes on" in err


def test_of_two_searches_the_later_leaves_the_result_of_the_first(shell, monkeypatch):
    search = mix._search

    def late(*args):
        found = search(*args)
        Path("a.json").write_text("the first one's")
        return found

    monkeypatch.setattr(mix, "_search", late)
    status, out, err = shell("random --over kinds --runs 7 --steps 2 --out a.json")
    assert (status, out) == (2, "") and "a.json is there by now, and is left as it is" in err
    assert Path("a.json").read_text() == "the first one's"


def test_a_folder_that_cannot_be_written_is_said_before_the_search(shell, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    monkeypatch.setattr(mix, "_search", lambda *args: pytest.fail("it would be lost"))
    assert "--out is 'a.json' but cannot be written: Permission denied" in shell("random --out a.json")[2]


@pytest.mark.parametrize("search", ["climb", "linear-dmo"])
def test_what_is_chosen_is_in_the_picture_with_its_score(shell, search: str):
    runs = "" if search == "linear-dmo" else "--runs 7"
    shell(f"{search} --over kinds {runs} --steps 2 --out found.json")
    found = json.loads(Path("found.json").read_text())
    rows = mix._rows(found)
    scores = {tuple(row["weights"]): row["score"] for row in rows}
    assert len(scores) == len(rows) >= len(found["mixtures"])
    assert all(scores[tuple(one["weights"])] == one["score"] for one in found["choices"])
    assert scores[tuple(found["share"])] == found["natural"] and scores[(1 / 3, 1 / 3, 1 / 3)] == found["even"]
    measured = [score for score in scores.values() if score is not None]
    assert min(measured) <= found["best"]["score"] and found["best"]["score"] in measured
