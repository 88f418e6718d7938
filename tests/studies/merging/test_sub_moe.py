"""The study of Sub-MoE: it runs, its arms do what they say, and its rule says what it says."""

import json

import pytest
import torch

from workbench.beds import byte_domains as bed
from workbench.beds.byte_domains import DOMAINS
from workbench.lib.core.experts import GLUExperts, expert_outputs
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter
from workbench.lib.merging.sub_moe import ExpertStats, merge_experts
from workbench.studies.merging.mixtures import INITS, upcycled, with_experts
from workbench.studies.merging.sub_moe import (
    ARMS,
    AVERAGED,
    ENERGIES,
    MARGIN,
    PRESETS,
    PRUNED,
    RANDOM,
    Calibrated,
    aligned,
    hierarchical_labels,
    judge,
    output_labels,
    places,
    pruned,
    random_labels,
    router_labels,
)
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.004, -0.002, 0.002)
BITS = {arm: 3.0 for arm in ARMS} | {"whole": 2.5, PRUNED: 3.3, RANDOM: 3.2, AVERAGED: 3.1}
SMOKE = PRESETS["smoke"]
NAMES = list(places(SMOKE))


def judged(seeds=4, noise=None, **bits):
    rows = []
    for i, (arm, value) in enumerate((BITS | {name.replace("_", " "): value for name, value in bits.items()}).items()):
        for seed in range(seeds):
            own = (noise or {}).get(arm, [0.1 * i * part for part in NOISE])[seed]
            metric = value + NOISE[seed] + own
            extra = dict.fromkeys(NAMES, metric) | {"by_domain": dict.fromkeys(DOMAINS, metric), "after": 100}
            if arm == "sub-moe":
                energies = {f"{energy:g}": {"validation": 3.0, "test": 2 + energy} for energy in ENERGIES}
                extra |= {"chosen": "0.9", "candidates": dict.fromkeys(NAMES, energies)}
            if arm == "whole":
                extra |= {f"{init} {what}": [[1.0]] for init in INITS for what in ("similarity", "frequency")}
            rows.append(Row(arm, seed, 1, 1, 0, 0, metric, extra))
    return judge(Rows(rows), SMOKE)


SUB = "sub-moe"


def test_sub_moe_study_reproduces_if_the_basis_gains_on_the_same_clusters_and_on_pruning_and_random_ones():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(-0.1, abs=0.002)
    assert result.details["by_energy"]["0.9"] == pytest.approx(2.9)
    assert result.details["retained"]["whole"][NAMES[0]] == 1
    json.dumps(result.details)


def test_sub_moe_study_does_not_reproduce_if_the_basis_gains_nothing_or_something_else_is_better():
    assert judged(**{SUB: 3.1}, noise={SUB: [0.0] * 4, AVERAGED: [0.0] * 4}).verdict == NOT_REPRODUCED
    within = judged(**{SUB: 3.1 - MARGIN / 2}, noise={SUB: [0.0] * 4, AVERAGED: [0.0] * 4})
    assert within.ci[1] < 0 and within.verdict == NOT_REPRODUCED  # a gain, but one that was to count as none
    assert judged(**{SUB: 3.15}).verdict == NOT_REPRODUCED
    assert judged(**{PRUNED: 2.8}).verdict == NOT_REPRODUCED
    assert judged(**{RANDOM: 2.8}).verdict == NOT_REPRODUCED


def test_sub_moe_study_resolves_nothing_if_nothing_was_lost_or_the_intervals_are_wide():
    assert judged(whole=3.3).verdict == NOT_RESOLVED
    assert judged(whole=3.4).verdict == NOT_RESOLVED
    assert judged(noise={SUB: (0.3, -0.3, 0.3, -0.3)}).verdict == NOT_RESOLVED
    assert judged(**{PRUNED: 3.001}, noise={PRUNED: (0.02, -0.02, 0.02, -0.02)}).verdict == NOT_RESOLVED
    assert judged(seeds=1).verdict == NOT_RESOLVED


def layer_of(experts=6, seed=0):
    torch.manual_seed(seed)
    layer = MoELayer(LinearRouter(8, experts, 2), GLUExperts(experts, 8, 10))
    torch.nn.init.normal_(layer.router.projection.weight)
    return layer


def test_alignment_puts_hidden_units_in_order_and_changes_no_expert():
    layer, x = layer_of(), torch.randn(30, 8)
    labels, frequency = torch.tensor([0, 1, 0, 1, 0, 2]), torch.tensor([5, 1, 2, 3, 1, 1])
    order = torch.randperm(10)
    with torch.no_grad():  # expert 2 is expert 0 with its units in another order
        gate, up = layer.experts.gate_up[0].chunk(2)
        layer.experts.gate_up[2] = torch.cat([gate[order], up[order]])
        layer.experts.down[2] = layer.experts.down[0][:, order]
    made = aligned(layer, labels, frequency)
    torch.testing.assert_close(expert_outputs(made.experts, x), expert_outputs(layer.experts, x), atol=1e-5, rtol=1e-5)
    assert torch.equal(made.experts.gate_up[2], layer.experts.gate_up[0])
    assert torch.equal(made.experts.down[2], layer.experts.down[0])
    assert torch.equal(made.experts.gate_up[3], layer.experts.gate_up[3])  # the leader of its cluster


def test_pruning_keeps_the_experts_used_most_and_their_rows():
    layer = layer_of()
    made = pruned(layer, torch.tensor([1, 9, 3, 7, 0, 3]), 3)
    kept = [1, 2, 3]  # of the two used alike the first
    assert torch.equal(made.experts.gate_up, layer.experts.gate_up[kept])
    assert torch.equal(made.experts.down, layer.experts.down[kept])
    assert torch.equal(made.router.projection.weight, layer.router.projection.weight[kept])


def test_every_grouping_finds_two_kinds_of_experts_where_there_are_two():
    layer = layer_of()
    kinds = torch.tensor([0, 1, 0, 1, 1, 0])
    with torch.no_grad():
        for weight in (layer.experts.gate_up, layer.experts.down, layer.router.projection.weight):
            weight.copy_(weight[kinds] + 1e-3 * torch.randn_like(weight))
    stats, x = ExpertStats(layer), torch.randn(100, 8)
    stats.update(x)
    logits = torch.nn.functional.normalize(layer.router(x).logits.double(), dim=0)
    found = Calibrated(layer, stats, (logits.T @ logits).detach(), 0)
    for grouping in (output_labels, router_labels, hierarchical_labels):
        assert grouping(found, 2).tolist() == kinds.tolist(), grouping
        assert len(grouping(found, 4).unique()) == 4
    drawn = random_labels(found, 2)
    assert drawn.bincount().tolist() == [3, 3] and drawn.tolist() != kinds.tolist()
    other = Calibrated(layer, stats, found.logits, 1)
    assert not torch.equal(random_labels(other, 2), drawn)


def test_an_upcycled_model_says_what_its_dense_one_said_and_its_experts_are_one():
    torch.manual_seed(0)
    dense, mixture = bed.make_model(SMOKE), with_experts(bed.make_model(SMOKE), SMOKE)
    rows = torch.randint(256, (2, SMOKE["seq_len"]))
    before = dense(rows)
    made = upcycled(dense, mixture)
    torch.testing.assert_close(made(rows), before, atol=1e-5, rtol=1e-5)  # the weights of two slots are of sum 1
    layer = made.blocks[0].ffn
    merged = merge_experts(layer, torch.zeros(8, dtype=torch.int64), torch.ones(8))
    torch.testing.assert_close(merged.layer.experts.down[0], layer.experts.down[3])


@pytest.mark.study
def test_sub_moe_study_rows_say_what_their_arms_did(smoke):
    rows = {row.arm: row for row in smoke("sub-moe").rows if row.seed == 0}
    assert rows["whole"].params > rows[AVERAGED].params > rows[PRUNED].params  # of a router of all, and of half
    assert rows["mean router"].params == rows[PRUNED].params
    assert rows["sub-moe"].extra["after"] <= rows[AVERAGED].extra["after"] < rows["whole"].extra["after"]
    assert list(rows["sub-moe"].extra["candidates"][NAMES[0]]) == [f"{energy:g}" for energy in ENERGIES]
    # experts that have hardly parted have their units in one order; others are other models, whatever is done
    assert len({row.extra["independent 1/2"] for row in rows.values()}) == len(ARMS)
    assert rows["whole"].extra["upcycled 1/2"] == rows["whole"].extra["upcycled 3/4"]
