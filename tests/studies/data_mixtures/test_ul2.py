"""The study of UL2: arms that process the same tokens, and a rule that says what it says."""

import json

import pytest
import torch

from workbench.beds.denoised_text import ASKS, HOLES
from workbench.studies.data_mixtures.ul2 import ARMS, GROUND, OWN, PRESETS, SMALL_ARMS, judge, mixture, run
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

SMOKE = PRESETS["smoke"]
#: Bits by kind of hole of models of which the claim is true: each specialist is good on its ground.
BITS = {
    "causal": {"suffix": 2.0, "short": 2.6, "long": 2.6},
    "t5": {"suffix": 2.5, "short": 2.2, "long": 2.2},
    "span-lm": {"suffix": 2.2, "short": 2.4, "long": 2.4},
    "ul2": {"suffix": 2.02, "short": 2.21, "long": 2.19},
}
MODES = [[2.2, 2.3, 2.3], [2.1, 2.0, 2.1], [2.3, 2.3, 2.2]]


def judged(bits=None, modes=MODES, spread=0.002, seeds=6):
    generator, rows = torch.Generator().manual_seed(0), []
    for arm, kinds in (BITS | (bits or {})).items():
        for seed in range(seeds):
            noisy = {k: v + spread * float(torch.randn((), generator=generator)) for k, v in kinds.items()}
            extra = noisy | {f"{k}_{ask}": v for k, v in noisy.items() for ask in ASKS} | {"said": 100}
            metric = (noisy["suffix"] + (noisy["short"] + noisy["long"]) / 2) / 2
            rows.append(Row(arm, seed, 1, 1, 1, 1, metric, extra | ({"modes": modes} if arm == "ul2" else {})))
    return judge(Rows(sorted(rows, key=lambda row: row.seed)), {})


def test_reproduced_if_it_holds_every_ground_and_the_mean_and_the_modes_are_right():
    result = judged()
    assert result.verdict == REPRODUCED, result.reason
    assert result.effect == pytest.approx((2.02 + 2.2) / 2 - 2.3, abs=0.005) and result.ci[1] < 0  # the best is causal
    assert result.details["over_the_specialist"]["suffix"]["mean"] == pytest.approx(0.01, abs=0.003)
    json.dumps(result.details)


@pytest.mark.parametrize(
    "other", [{"causal": BITS["causal"] | {"short": 2.0, "long": 2.0}}, {"t5": BITS["t5"] | {"suffix": 1.8}}]
)
def test_not_reproduced_if_a_specialist_is_better_on_its_ground_and_in_the_mean(other: dict):
    mine = {"ul2": {"suffix": 2.1, "short": 2.3, "long": 2.3}}
    assert judged(other | mine).verdict == NOT_REPRODUCED


@pytest.mark.parametrize(
    "change",
    [
        {"bits": {"ul2": BITS["ul2"] | {"suffix": 2.1}}},  # beaten on a ground, and better in the mean
        {"bits": {"ul2": BITS["ul2"] | {"long": 2.265}}},  # neither within the margin nor beyond it
        {"bits": {"span-lm": {"suffix": 2.0, "short": 2.2, "long": 2.2}}},  # another mixture is better in the mean
        {"bits": {"causal": {"suffix": 2.0, "short": 2.0, "long": 2.0}}},  # better in the mean, and not on its ground
        {"modes": [MODES[0], MODES[1], [2.3, 2.1, 2.2]]},
        {"spread": 0.2},
    ],
)
def test_not_resolved_in_between(change: dict):
    assert judged(**change).verdict == NOT_RESOLVED


def test_the_grounds_are_of_arms_that_are_there():
    assert set(GROUND) == set(OWN) == set(HOLES) and set(GROUND.values()) < set(SMALL_ARMS) < set(ARMS)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("arm", ARMS)
def test_every_mixture_fits_its_preset_and_fills_the_rows(preset: str, arm: str):
    made = mixture(arm, PRESETS[preset])
    room = PRESETS[preset]["length"] + 1
    for spec, length in zip(made.specs, made.lengths, strict=True):
        given, said = spec.sizes(length)[0]
        assert room - 4 <= given + said + 1 + (not spec.goes_on) <= room


def test_arms_process_the_same_and_say_what_they_say():
    rows = {arm: run(arm, 0, SMOKE) for arm in ("causal", "prefix", "ul2-no-modes")}
    assert len({(row.params, row.flops, row.steps) for row in rows.values()}) == 1
    causal, prefix, plain = (row.extra for row in rows.values())
    rows_read = SMOKE["steps"] * SMOKE["batch_size"]
    assert causal["said"] == rows_read * (SMOKE["length"] - 1)
    assert prefix["said"] == rows_read * SMOKE["length"] // 4
    assert (causal["short"], prefix["short"], plain["short"]) == (
        causal["short_causal"],
        prefix["short_prefix"],
        plain["short_fill"],
    )
    assert plain["suffix"] == plain["suffix_prefix"] and "modes" not in plain


def test_the_metric_is_the_mean_of_going_on_and_of_filling_and_the_diagonal_is_its_own(smoke):
    extra = (row := smoke("ul2").rows.arm("ul2")[0]).extra
    assert row.metric == pytest.approx((extra["suffix"] + (extra["short"] + extra["long"]) / 2) / 2)
    assert [extra["modes"][i][i] for i in range(3)] == [extra["short"], extra["suffix"], extra["long"]]
    assert len({value for line in extra["modes"] for value in line}) == 9
