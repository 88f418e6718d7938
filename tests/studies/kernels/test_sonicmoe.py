"""The study of SonicMoE: it runs, its arms match, it counts bytes and padded rows, and its rule says what it says."""

import json

import pytest
import torch

from workbench.kernels.memory import saved_bytes
from workbench.lib.core.budget import count_params
from workbench.lib.core.experts import GLUExperts
from workbench.lib.kernels.sonicmoe import SonicRouter, padded_fraction, predicted_saved_bytes, topk_routing
from workbench.studies.kernels.sonicmoe import PRESETS, arms, build, judge, waste, waste_table
from workbench.studies.kernels.sonicmoe_memory import layers, memory
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.004, -0.003, 0.001)
LOSS = {"tc": 2.0, "nearest-8": 2.001, "nearest-32": 2.002, "nearest-128": 2.3, "down-32": 2.01, "up-32": 2.0}
LOSS |= {"stochastic-32": 2.0, "tc E=32 K=2": 1.9, "tc E=64 K=4": 1.9, "tc E=64 K=8": 1.9}
MEMORY = [
    {"top_k": 2, "d_hidden": 256, "gather": 100, "scatter": 80, "ours": 50},
    {"top_k": 8, "d_hidden": 64, "gather": 200, "scatter": 150, "ours": 52},
]


def judged(loss=None, memory=None, padded=(0.3, 0.0), spread=1.0, seeds=4):
    waste = {
        "n_tokens": 4096,
        "n_experts": 8,
        "top_k": 2,
        "tiles": {"128": {"tc": padded[0], "rounding": padded[1], "changed": 0.1}},
    }
    rows = []
    for arm, value in (LOSS | (loss or {})).items():
        for seed in range(seeds):
            extra = {"pairs_per_token": 2.0, "tokens_without_expert": 0.0}
            extra |= {"memory": memory or MEMORY} if arm == "tc" else {}
            extra |= {"waste": waste} if arm.startswith("tc") else {}
            own = 1 if arm == "tc" else -1  # so that differences have a spread
            rows.append(Row(arm, seed, 1, 1, 1, 1, value + own * spread * NOISE[seed], extra))
    return judge(Rows(rows), PRESETS["small"])


def test_reproduced_if_memory_is_flat_no_row_is_wasted_and_quality_is_equal():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(0.001)  # nearest-32 minus tc, NOISE has a mean of 0.0005
    assert "The claim is about nearest-8 and nearest-32" in result.reason  # 128 rows: one tile to the mean expert
    assert result.details["memory_saving"] == {
        "top_k": 8,
        "gather": pytest.approx(0.74),
        "scatter": pytest.approx(0.6533333),
    }
    json.dumps(result.details)


def test_the_breakdown_at_the_largest_tile_is_shown_but_not_judged():
    result = judged()
    assert result.details["nats_per_byte"]["nearest-128"]["mean"] == pytest.approx(0.299)
    assert result.verdict == REPRODUCED


@pytest.mark.parametrize("arm", ["nearest-8", "nearest-32"])
def test_not_reproduced_if_rounding_to_a_small_tile_is_worse(arm):
    assert judged({arm: 2.04}).verdict == NOT_REPRODUCED


@pytest.mark.parametrize(
    "change",
    [
        {"memory": [MEMORY[0], MEMORY[1] | {"ours": 56}]},  # grows
        {"memory": [MEMORY[0], MEMORY[1] | {"scatter": 110}]},  # nothing to save
        {"padded": (0.3, 0.01)},  # rounding pads
        {"padded": (0.0, 0.0)},  # token choice does not pad
    ],
)
def test_not_reproduced_if_memory_or_waste_fails(change):
    assert judged(**change).verdict == NOT_REPRODUCED


@pytest.mark.parametrize(
    "change",
    [{"loss": {"nearest-32": 2.025}}, {"spread": 10.0}, {"seeds": 1}, {"loss": {"nearest-8": 2.04}, "spread": 20}],
)
def test_not_resolved_if_the_interval_reaches_beyond_the_margin(change):
    assert judged(**change).verdict == NOT_RESOLVED


def test_worse_arms_of_other_modes_do_not_decide():
    assert judged({"down-32": 2.2, "up-32": 2.2}).verdict == REPRODUCED


@pytest.mark.parametrize("preset", ["small", "full"])
def test_the_arms_have_the_same_active_parameters_and_the_rounded_ones_the_same_weights(preset):
    settings = PRESETS[preset]
    width = settings["width"]
    states = {}
    for arm in arms(settings):
        torch.manual_seed(0)
        with torch.device("meta") if preset == "full" else torch.device("cpu"):
            model = build(arm, settings)
        for block in model.blocks:
            router, bank = block.ffn.router, block.ffn.experts
            assert isinstance(router, SonicRouter)
            assert count_params(bank) * router.top_k == router.n_experts * 3 * width * settings["d_model"]
        if "E=" not in arm:
            states[arm] = model.state_dict()
    if preset == "small":
        for state in states.values():
            assert all(torch.equal(state[name], states["tc"][name]) for name in state)


@pytest.mark.parametrize("preset", ["smoke", "small", "full"])
def test_the_rule_has_a_tile_to_judge_and_the_grid_is_fine_enough(preset):
    settings = PRESETS[preset]
    mean_rows = settings["batch_size"] * settings["seq_len"] * settings["top_k"] / settings["n_experts"]
    assert any(mean_rows >= 2 * tile for mode, tile in settings["rounding"] if mode == "nearest")
    assert all(settings["width"] % k == 0 for _, k in settings["grid"])
    assert all(settings["memory"]["width"] % k == 0 for k in settings["memory"]["top_k"])


# the layers of the memory part


def reference(x, bank, routing):
    y = torch.zeros_like(x)
    for t, e, w in zip(routing.token, routing.expert, routing.weight, strict=True):
        gate, up = (bank.gate_up[e] @ x[t]).chunk(2)
        y = y.index_add(0, t[None], w * (bank.down[e] @ (torch.nn.functional.silu(gate) * up))[None])
    return y


def test_the_three_layers_compute_the_same_outputs_and_gradients():
    generator = torch.Generator().manual_seed(0)
    bank = GLUExperts(4, 8, 4).double()
    x = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    logits = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    found = {}
    for name, layer in {"loop": lambda x, routing: reference(x, bank, routing), **layers(bank)}.items():
        routing = topk_routing(logits, 2)
        leaf, routing.weight = x.clone().requires_grad_(), routing.weight.detach().requires_grad_()
        y = layer(leaf, routing)
        parts = (leaf, routing.weight, *bank.parameters())
        found[name] = (y, *torch.autograd.grad(y.square().sum(), parts))
    for name in ("gather", "scatter", "ours"):
        for ours, loop in zip(found[name], found["loop"], strict=True):
            assert torch.allclose(ours, loop, atol=1e-10), name


def test_saved_bytes_counts_each_storage_once_and_leaves_out_the_weights():
    a, w = torch.randn(16, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    assert saved_bytes(lambda: a @ w) == 4 * (16 * 4 + 4 * 4)
    assert saved_bytes(lambda: a @ w, [w]) == 4 * 16 * 4
    assert saved_bytes(lambda: a[:8] * a[8:]) == 4 * 16 * 4
    assert saved_bytes(lambda: a + a) == 0


def test_the_gathering_and_the_scattering_layer_keep_what_their_design_says():
    """Besides index lists: rows, 2H before the activation, silu(gate), H activated, outputs; x in place of the rows."""
    n, d, width, k = 64, 16, 32, 4
    (row,) = memory(d, n, 8, width, (k,))
    pairs, hidden = n * k, n * width
    values = 4 * hidden + pairs  # 2H + H + H each, and the weights
    indices = row["gather"] - 4 * (pairs * d + values + pairs * d)
    assert 0 <= indices <= 8 * 3 * pairs
    indices = row["scatter"] - 4 * (n * d + values + pairs * d)
    assert 0 <= indices <= 8 * 3 * pairs + 8 * 8
    assert row["ours"] == sum(predicted_saved_bytes(n, d, width // k, 8, pairs).values())


# runs


@pytest.mark.study
def test_a_run_reports_its_loads(smoke):
    first = smoke("sonicmoe").rows.arm("tc E=8 K=4")[0]
    assert first.extra["pairs_per_token"] == 4 and first.extra["tokens_without_expert"] == 0
    assert first.extra["waste"]["n_tokens"] == 64 * PRESETS["smoke"]["seq_len"]  # a batch of the evaluation
    table = waste_table([first])
    assert [(cell["n_experts"], cell["top_k"], cell["tile"]) for cell in table] == [(8, 4, 16), (8, 4, 32)]
    assert all(cell["rounding"] == 0 for cell in table)


def test_the_waste_is_that_of_the_loads():
    settings = PRESETS["smoke"]
    logits = torch.randn(3, 64, settings["n_experts"], generator=torch.Generator().manual_seed(0))
    routings = [*(topk_routing(part, 2) for part in logits), topk_routing(logits[0, :9], 2)]  # the last one is short
    found = waste(routings, settings)
    expected = padded_fraction(torch.stack([routing.counts for routing in routings[:3]]), 32).mean().item()
    assert found["tiles"]["32"]["tc"] == pytest.approx(expected) and found["n_tokens"] == 64
    assert found["tiles"]["32"]["rounding"] == 0
