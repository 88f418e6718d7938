"""The study of NEAS: its rule says what it says, its arms keep to the limit, and its arms can be watched."""

import json

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.core.observe import announcing, observing
from workbench.live.arm import Arm
from workbench.studies.core import load_study
from workbench.studies.rows import Row, Rows
from workbench.studies.search.neas import (
    COMMON,
    MODES,
    PRESETS,
    common,
    judge,
    run,
    space_of,
    supernet_of,
    task_of,
)
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

SMOKE, SMALL = PRESETS["smoke"], PRESETS["small"]
ACCURACY = {"neas": 0.9, "potential": 0.88, "random": 0.87, "none": 0.86, "single": 0.8, "seeds": 0.82, "truth": 0.7}
WRONG = {"neas": 0, "potential": 1, "random": 4, "none": 6}  # neighbours that are rated the wrong way round


def judged(accuracy=None, wrong=None, spread=0.01, seeds=6):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for arm, value in (ACCURACY | (accuracy or {})).items():
        for seed in range(seeds):
            noise = float(torch.randn((), generator=generator)) * spread
            rows.append(Row(arm, seed, 1, 1, 1, 1, value + noise, extra(arm, (WRONG | (wrong or {})), seed)))
    return judge(Rows(rows), {})


def extra(arm: str, wrong: dict[str, int], seed: int) -> dict:
    truth = [i / 10 for i in range(COMMON)]
    if arm == "truth":
        return {"accuracies": truth, "macs_of_each": truth[::-1]}
    found = {"macs": 1, "genome": [2], "members": [0.5, 0.7], "disagreement": 0.1, "divergence": 0.1}
    if arm in MODES:
        rated = truth[:]
        for place in range(min(COMMON - 1, wrong[arm] + seed % 2)):
            rated[place], rated[place + 1] = rated[place + 1], rated[place]
        found["common"] = rated
    return found


def test_reproduced_if_all_is_as_claimed():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(0.1, abs=0.02)
    assert result.details["tau_of_macs"] < -0.99 and result.details["tau"]["neas"] > result.details["tau"]["none"]
    json.dumps(result.details)


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": {"single": 0.97}},
        {"accuracy": {"seeds": 0.97}},
        {"wrong": {"none": 0, "potential": 4}},
        {"wrong": {"neas": 6}},
    ],
)
def test_not_reproduced_if_one_part_is_the_other_way(change: dict):
    assert judged(**change).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("change", [{"accuracy": {"single": 0.9}}, {"spread": 0.5}, {"wrong": {"none": 1}}])
def test_not_resolved_in_between(change: dict):
    assert judged(**change).verdict == NOT_RESOLVED


@pytest.mark.parametrize("arm", ["neas", "seeds"])
def test_what_is_found_keeps_to_the_limit(arm: str):
    row = run(arm, 0, SMOKE)
    assert 0 < row.extra["macs"] <= SMOKE["max_macs"]
    assert len(row.extra["members"]) == 2 and row.flops > row.extra["search_flops"] > 0
    assert row.extra["kept"] == ([4, 5, 4, 5] if arm == "neas" else [6, 7, 6, 7])


def test_the_common_ensembles_are_of_the_space_and_fixed():
    genomes = common(space_of(SMALL))
    assert genomes == common(space_of(SMALL)) and len(set(genomes)) == COMMON
    for genome in genomes:
        genome.validate(space_of(SMALL))


def test_arms_can_be_watched():
    assert Arm("neas", preset="smoke").arm == "neas" and load_study("neas").main_arm(SMOKE) == "neas"
    with pytest.raises(InputError, match="trains nothing that could be watched"):
        Arm("neas", "truth", "smoke")
    task = task_of(0)
    supernet, shrinking = supernet_of("neas", 0, SMOKE, task)
    layers = announcing(supernet)
    assert shrinking.scores and len(layers) == 4
    with observing(layers) as seen:
        supernet(task.data.splits["test"][0][:5])
    assert all(len(decisions) == 1 and decisions[0][0].n_tokens == 5 for decisions in seen.values())
