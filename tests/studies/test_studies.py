"""What every study promises, on one run of its smoke preset: it is whole, it says its verdict, it repeats itself.

And its numbers are those of golden.json; what is kept there, and how it is written anew, golden.py says.
"""

import copy
import json
from dataclasses import asdict, replace

import pytest

from tests.studies import golden
from workbench.catalogue import methods
from workbench.studies.core import load_study
from workbench.studies.verdicts import VERDICTS

pytestmark = pytest.mark.study
SLUGS = [row.slug for row in methods(status="ready")]


@pytest.fixture(scope="module")
def numbers() -> dict:
    return golden.read()


@pytest.mark.parametrize("slug", SLUGS)
def test_every_arm_runs_at_every_seed_and_the_rule_gives_a_verdict(slug, smoke):
    study, result = load_study(slug), smoke(slug)
    assert set(study.presets) == {"smoke", "small", "full"}
    arms = study.arms_of(study.presets["smoke"])
    assert [(row.arm, row.seed) for row in result.rows] == [(arm, seed) for seed in result.seeds for arm in arms]
    assert len(arms) >= 2 and result.seeds == list(range(study.presets["smoke"]["seeds"]))
    assert all(row.params > 0 and row.seconds > 0 for row in result.rows)
    assert all((row.flops > 0) == (row.steps > 0) for row in result.rows), "an arm that makes no step costs nothing"
    assert result.verdict in VERDICTS and result.verdict in str(result)
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("slug", SLUGS)
def test_an_arm_runs_twice_the_same(slug, smoke):
    """The arm that measures most, which is the method or its like: every number of its row but the seconds."""
    result = smoke(slug)
    row = max(result.rows, key=lambda row: len(json.dumps(row.extra)))
    again = result.study.run(row.arm, row.seed, result.settings)
    assert json.dumps(asdict(replace(again, seconds=0.0))) == json.dumps(asdict(replace(row, seconds=0.0)))


@pytest.mark.parametrize("slug", SLUGS)
def test_the_numbers_are_those_of_the_file(slug, smoke, numbers):
    differences = golden.compare(slug, numbers, golden.figures(smoke(slug)))
    assert not differences, "\n".join([*differences, f"if that is meant: python -m tests.studies.golden {slug}"])


def test_the_file_is_of_the_studies_there_are(numbers):
    assert sorted(numbers["studies"]) == sorted(SLUGS)
    for figures in numbers["studies"].values():
        floats = [value for values in figures["metric"].values() for value in values]
        floats += [value for row in figures["measures"].values() for value in row.values() if isinstance(value, float)]
        assert len(set(floats)) > 2, "there is something to compare"


def test_a_change_of_a_number_is_noticed(numbers):
    """Of each kind that is kept, in both directions; rounding in another order is none."""
    slug = "rmoe"
    before = numbers["studies"][slug]
    arm = next(iter(before["metric"]))

    def changed(change) -> list[str]:
        found = copy.deepcopy(before)
        change(found)
        return golden.compare(slug, numbers | {"python": golden.platform.python_version()}, found)

    assert changed(lambda found: None) == []
    assert changed(lambda found: found["metric"].update({arm: [v * (1 + 1e-5) for v in before["metric"][arm]]})) == []
    for factor in (1 + 3e-4, 1 - 3e-4):
        assert changed(lambda found, by=factor: found["metric"][arm].append(found["metric"][arm].pop() * by))
    assert changed(lambda found: found["metric"].pop(arm)) == [f"{slug}/metric/{arm} is only in the file"]
    assert changed(lambda found: found["metric"][arm].append(1.0))
    assert changed(lambda found: found["measures"][arm].update(new=1.0)) == [
        f"{slug}/measures/{arm}/new is only in the run"
    ]
    assert changed(lambda found: found["size"][arm].__setitem__(2, found["size"][arm][2] + 1))
    assert changed(lambda found: found.update(verdict="proved"))
    assert changed(lambda found: found.update(effect=float("nan")))
    assert golden.compare("no-study", numbers, before) == [
        "no-study is not in golden.json: python -m tests.studies.golden no-study"
    ]


@pytest.mark.parametrize("slug", ["rmoe", "moa", "sub-moe", "welore", "linear-dmo"])
def test_a_study_that_learns_text_of_this_python_is_known_by_what_it_imports(slug):
    assert golden.learns_python(slug)


@pytest.mark.parametrize("slug", ["stable-rps", "mixlora", "scalezero", "pcb-merging", "muon-pp", "dynamoe"])
def test_a_study_of_other_data_is_compared_under_every_python(slug, numbers):
    assert not golden.learns_python(slug)
    found = copy.deepcopy(numbers["studies"][slug])
    found["effect"] = (found["effect"] or 0.0) + 1.0
    assert len(golden.compare(slug, numbers | {"python": "2.7.18"}, found)) == 1


def test_under_another_python_the_sizes_of_a_study_of_its_text_are_compared(numbers):
    other, slug = numbers | {"python": "2.7.18"}, "rmoe"
    found = copy.deepcopy(numbers["studies"][slug])
    found["effect"] += 1.0
    assert golden.compare(slug, other, found) == []
    found["size"]["gru"][0] += 1
    assert len(golden.compare(slug, other, found)) == 1
