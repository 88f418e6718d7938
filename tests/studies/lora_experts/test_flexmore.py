"""The study of FlexMoRE: it runs, its arms match, and its rule says what it says."""

import json

import pytest

from workbench.beds.byte_domains import DOMAINS, make_model
from workbench.lib.core.adapt import adapt
from workbench.lib.lora_experts.flexmore import break_even_rank, count_parameters
from workbench.studies.lora_experts.flexmore import (
    ARMS,
    CHOICES,
    LORA,
    MARGIN,
    PRESETS,
    RANKS,
    TARGETS,
    THIRD,
    chosen,
    judge,
)
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.004, -0.002, 0.002)
BITS = {arm: 3.0 for arm in ARMS} | {"public": 4.0}
PAIR = {"public": 4.0, **{str(rank): 3.5 for rank in RANKS}, "8": 3.2, "32": 3.1, "full": 3.0}


def judged(seeds=4, noise=None, full=3.0, cut=3.0, public=4.0):
    rows = []
    for i, (arm, value) in enumerate((BITS | {"full": full, "chosen ranks": cut, "public": public}).items()):
        for seed in range(seeds):
            own = (noise or {}).get(arm, [0.1 * i * part for part in NOISE])[seed]
            extra = {"by_domain": dict.fromkeys(DOMAINS, value)}
            if arm != "public":
                extra |= {"share": 0.2, "ranks": [8] * len(DOMAINS), "two active": 5.0}
            if arm == "chosen ranks":
                extra["pairs"] = {domain: {"validation": PAIR, "test": PAIR} for domain in DOMAINS}
                extra["energy"] = {domain: [0.5] * len(RANKS) for domain in DOMAINS}
            rows.append(Row(arm, seed, 1, 1, 1, 1, value + NOISE[seed] + own, extra))
    return judge(Rows(rows), {})


def test_flexmore_study_reproduces_if_the_cut_costs_less_than_the_margin_and_the_mixture_has_learned():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(0, abs=0.002)
    assert result.details["kept"]["facts"]["8"] == pytest.approx(0.8)
    assert result.details["ranks"] == dict.fromkeys(DOMAINS, [8] * 4)
    json.dumps(result.details)
    assert judged(cut=2.5).verdict == REPRODUCED  # better than full


def test_flexmore_study_does_not_reproduce_if_the_cut_costs_more_than_the_margin_or_all_it_has_learned():
    assert judged(cut=3.0 + 2 * MARGIN).verdict == NOT_REPRODUCED
    assert judged(full=3.99, cut=4.005, noise={"chosen ranks": [0.0] * 4, "public": [-0.001] * 4}).verdict == (
        NOT_REPRODUCED
    )


def test_flexmore_study_resolves_nothing_if_the_margin_is_inside_or_the_experts_have_learned_nothing():
    assert judged(cut=3.0 + MARGIN).verdict == NOT_RESOLVED
    assert judged(noise={"chosen ranks": (0.3, -0.3, 0.3, -0.3)}).verdict == NOT_RESOLVED
    assert judged(public=3.0).verdict == NOT_RESOLVED
    assert judged(public=2.0).verdict == NOT_RESOLVED
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_flexmore_study_chooses_ranks_on_the_validation_split_and_within_a_third():
    test = dict.fromkeys(PAIR, 0.0)
    assert chosen({"validation": PAIR, "test": test}) == 8  # 32 is better but more than a third
    assert chosen({"validation": PAIR | {"2": 3.2}, "test": PAIR}) == 2
    assert max(CHOICES) == THIRD


@pytest.mark.parametrize("preset", ["small", "full"])
def test_flexmore_study_compares_what_a_third_of_the_parameters_can_do(preset):
    settings = PRESETS[preset]
    layers = adapt(make_model(settings), "flexmore", TARGETS, rank=THIRD).layers
    assert len(layers) == settings["n_layers"]
    shapes = [(2 * settings["d_hidden"], settings["d_model"]), (settings["d_model"], settings["d_hidden"])]
    assert 3 * count_parameters(shapes, [THIRD]) == count_parameters(shapes, [0])
    assert max(RANKS) < break_even_rank(settings["d_model"], settings["d_hidden"])


@pytest.mark.study
def test_flexmore_study_rows_say_what_their_arms_did(smoke):
    rows = {row.arm: row for row in smoke("flexmore").rows}
    assert rows["full"].params > rows["rank 1"].params > rows["public"].params
    assert rows["full"].extra["share"] == 1 and rows[f"rank {THIRD}"].extra["share"] == pytest.approx(1 / 3)
    assert rows["chosen ranks"].extra["share"] <= 1 / 3 + 1e-9
    assert rows["full"].metric != rows["rank 1"].metric != rows[LORA].metric
    assert "pairs" not in rows["full"].extra
