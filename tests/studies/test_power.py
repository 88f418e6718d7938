"""The number of seeds from baselines alone: their deviation, what it asks for, and where that is said."""

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import chi2

from tests.studies.toy import STUDY, ran
from workbench.engines import HERE
from workbench.errors import InputError
from workbench.lib.measures.statistics import seeds_needed
from workbench.studies.core import Power
from workbench.studies.power import SEEDS

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(autouse=True)
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))


def test_only_the_baselines_run_and_their_rows_are_kept_for_the_study():
    found = STUDY.measure_power("smoke")
    assert sorted(ran()) == sorted(f"{arm}-{seed}" for arm in ("one", "other") for seed in range(SEEDS))
    assert STUDY.execute("smoke").origin == {"kept": 4, "run": 2}
    rows = STUDY.execute("smoke", seeds=SEEDS).rows
    differences = [a - b for a, b in zip(rows.of("one"), rows.of("other"), strict=True)]
    assert found.deviation == pytest.approx(statistics.stdev(differences)) and found.seeds == SEEDS
    scale = found.deviation * (SEEDS - 1) ** 0.5
    assert (found.low, found.high) == pytest.approx([scale / chi2.ppf(p, SEEDS - 1) ** 0.5 for p in (0.95, 0.05)])
    assert found.needed == seeds_needed(found.deviation, 0.5) < found.at_most and found.has == 2
    assert f"takes {found.needed} seeds ({found.at_most} at the upper end); smoke has 2." in str(found)
    assert found.to_dict()["baselines"] == ["one", "other"] and found.to_dict()["needed"] == found.needed
    assert STUDY.measure_power("smoke").deviation == found.deviation and len(ran()) == 3 * SEEDS


def test_what_was_found_is_printed_with_every_result_of_that_preset():
    study = replace(STUDY, power=Power(("one", "other"), 0.5, deviation={"smoke": (0.4, 12)}))
    needed = seeds_needed(0.4, 0.5)
    line = (
        f"Seeds: {needed} are needed to see 0.5 points with 80% power, by the deviation of 0.4 between one and other "
        "over 12 seeds; smoke has 2."
    )
    result = study.execute("smoke")
    assert line in str(result) and line in result._repr_markdown_()
    assert "Seeds:" not in str(study.execute("small", workers=HERE)) and "Seeds:" not in str(STUDY.execute("smoke"))


def test_wrong_declarations_are_named():
    with pytest.raises(InputError, match="slug 'toy' names no baselines"):
        replace(STUDY, power=None).measure_power("smoke")
    with pytest.raises(InputError, match="arm 'on' is unknown; did you mean 'one'"):
        replace(STUDY, power=Power(("on", "other"), 0.5)).measure_power("smoke")
    with pytest.raises(InputError, match="preset 'smal' is unknown"):
        STUDY.measure_power("smal")
    assert ran() == []
