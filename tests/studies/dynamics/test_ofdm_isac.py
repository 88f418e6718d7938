"""The study of OFDM under phase noise: its rule on rows made by hand, arms of one seed on one draw, closed forms."""

import json

import pytest
import torch

from workbench.lib.dynamics.range_doppler import MEASURES
from workbench.studies.dynamics.ofdm_isac import (
    ARMS,
    CENTRAL,
    NOISES,
    ORDERS,
    PRESETS,
    delay_of,
    expected,
    generator_of,
    judge,
)
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

SETTINGS = PRESETS["smoke"]
SPACINGS = len(SETTINGS["df"])
NOISE = (0.0, 0.02, -0.02, 0.01)

FOUND = {
    "bistatic": {"islr_d": -5.0, "islr_r": -40.0, "pplr": -2.0},
    "monostatic": {"islr_d": -45.0, "islr_r": -50.0},
    "bistatic-cpe": {"islr_d": -55.0, "pplr": -0.02},
}
WEAK = {"bistatic": 0.1, "bistatic-cpe": 1.0}


def judged(change=None, weak=None, floors=(-60.0, -63.0, -66.0), noise=1.0, seeds=4):
    """Rows of the expected kind, but for the measures in `change`: arm -> measure -> value, of both oscillators."""
    rows = []
    for i, arm in enumerate(ARMS):
        for seed in range(seeds):
            found = {name: -30.0 for name in MEASURES} | FOUND.get(arm, {}) | (change or {}).get(arm, {})
            wobble = noise * NOISE[(seed + i) % 4]
            extra = {f"{kind}_{name}": [found[name] + wobble] * SPACINGS for kind in NOISES for name in MEASURES}
            # of its own, or the difference of two measures of one row would be without any deviation
            extra |= {f"{kind}_islr_d": [found["islr_d"] + 2 * wobble] * SPACINGS for kind in NOISES}
            steps = [floor + wobble * (j + 1) for j, floor in enumerate(floors)]
            extra |= {f"{kind}_isr": steps for kind in NOISES}
            extra |= {"order_isr": [-30.0] * len(ORDERS)}
            extra["weak_share"] = (WEAK | (weak or {})).get(arm, 1.0) + wobble / 10
            rows.append(Row(arm, seed, 1, 1, 1, 1, extra["wiener_islr_d"][0], extra))
    return judge(Rows(rows), SETTINGS)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ({}, REPRODUCED),
        ({"change": {"bistatic": {"islr_r": -4.0}}}, NOT_REPRODUCED),  # smears along range too
        ({"change": {"bistatic-cpe": {"pplr": -0.5}}}, NOT_REPRODUCED),
        ({"change": {"bistatic-cpe": {"islr_d": -20.0}}}, NOT_REPRODUCED),
        ({"floors": (-60.0, -63.0, -62.0)}, NOT_REPRODUCED),
        ({"change": {"monostatic": {"islr_d": -4.0}}}, NOT_REPRODUCED),
        ({"change": {"monostatic": {"islr_d": -12.0}}}, NOT_REPRODUCED),  # lower, by less than 10 dB
        ({"weak": {"bistatic": 1.1}}, NOT_REPRODUCED),
        ({"weak": {"bistatic": 1.0, "bistatic-cpe": 1.0}}, NOT_RESOLVED),
        ({"change": {"bistatic-pilots": {"islr_d": 5.0, "pplr": -9.0}}}, REPRODUCED),  # reported alone
    ],
)
def test_the_rule_asks_for_every_sign(found, verdict):
    result = judged(**found)
    assert result.verdict == verdict
    json.dumps(result.details, allow_nan=False)


def test_the_effect_is_the_smear_in_the_central_case():
    assert judged().effect == pytest.approx(35.0, abs=0.05)
    assert judged(noise=1500.0).verdict == judged(seeds=1).verdict == NOT_RESOLVED


def test_a_delay_is_one_time_at_every_spacing_and_fits_the_prefix():
    for preset in PRESETS.values():
        assert CENTRAL in preset["df"]
        delays = [delay_of(df, preset) for df in preset["df"]]
        assert len({delay / df for delay, df in zip(delays, preset["df"], strict=True)}) == 1
        assert max(delays) <= preset["cp"] and min(delays) > 0


def test_every_key_draws_its_own():
    first = [torch.randn(3, generator=generator_of(seed, "wiener", 1.0)).tolist() for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]


@pytest.mark.study
def test_samples_lie_at_the_closed_forms(smoke):
    result = smoke("ofdm-isac")
    of = {row.arm: row for row in result.rows if row.seed == 0}
    assert list(of) == list(ARMS)
    for noise in NOISES:
        closed = expected(noise, SETTINGS)
        assert of["bistatic-exact"].extra[f"{noise}_isr"] == pytest.approx(
            closed["independent"]["isr_corrected"], abs=1.5
        )
        assert of["monostatic"].extra[f"{noise}_pplr"] == pytest.approx(closed["shared"]["pplr"], abs=0.05)
