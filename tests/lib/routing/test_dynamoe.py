"""Exact properties of the published gate, of gates that do vary, and of the stack (2603.01697)."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.lib.core.budget import count_params
from workbench.lib.core.experts import MLPExperts
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.schedules import SCHEDULES
from workbench.lib.core.task import Classification
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.types import Arrays
from workbench.lib.routing.dynamoe import (
    Calibrate,
    DynaMoEStack,
    PercentileGate,
    ThresholdGate,
    calibrate,
    counts_histogram,
    expert_schedule,
    gradient_noise,
    percentile,
    percentile_count,
)

seeds = st.integers(0, 2**31)
taus = st.floats(0, 1)
D, H = 8, 12


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decided(gate, seed=0):
    """The gate with unit-variance logits, so that its choices are far from ties."""
    torch.manual_seed(seed)
    torch.nn.init.normal_(gate.projection.weight, std=gate.projection.in_features**-0.5)
    return gate


def no_ties(gates):
    return bool((gates.sort(-1).values.diff(dim=-1) > 0).all())


# 1. The published gate is top-K


@pytest.mark.parametrize("n, counts", [(8, [6, 4, 2, 1]), (16, [12, 8, 4, 2])])
def test_1_counts_of_the_published_gate(n, counts):
    for tau, count in zip([0.25, 0.5, 0.75, 0.9], counts, strict=True):
        routing = decided(PercentileGate(D, n, tau))(randn(200, D))
        assert set(routing.active_counts.tolist()) == {count} == {percentile_count(n, tau)}


@given(seeds, st.integers(1, 40), taus)
def test_1_the_percentile_gate_gives_every_token_the_same_number(seed, n, tau):
    gate = decided(PercentileGate(D, n, tau), seed)  # in training mode: the noise changes which, never how many
    routing = gate(randn(30, D, seed=seed))
    assume(no_ties(routing.probs))
    expected = max(1, n - 1 - math.floor(round(tau * (n - 1), 9)))
    assert set(routing.active_counts.tolist()) == {expected}
    assert counts_histogram(routing).tolist() == [30 * (k == expected) for k in range(1, n + 1)]


def test_1_the_noise_changes_which_experts_pass_but_not_how_many():
    gate, x = decided(PercentileGate(D, 8)), randn(50, D)
    torch.manual_seed(0)
    first, second = gate(x), gate(x)
    assert not torch.equal(first.mask(), second.mask())
    assert torch.equal(first.active_counts, second.active_counts)


@pytest.mark.parametrize("rule, level", [("relative", 0.5), ("top_p", 0.7), ("absolute", 1.0)])
def test_1_threshold_gates_do_vary(rule, level):
    counts = decided(ThresholdGate(D, 8, rule, level))(randn(200, D)).active_counts
    assert 1 <= counts.min() < counts.max() <= 8


@given(seeds, st.integers(1, 20), taus)
def test_1_the_percentile_is_that_of_numpy(seed, n, tau):
    gates = randn(5, n, seed=seed, dtype=torch.float64)
    expected = np.quantile(gates.numpy(), tau, axis=-1)
    assert np.allclose(percentile(gates, tau)[:, 0].numpy(), expected, atol=1e-7)


def test_1_the_percentile_is_taken_over_the_token_s_own_gates():
    gate, x = decided(PercentileGate(D, 8)).eval(), randn(20, D)
    alone = torch.cat([gate(row[None]).mask() for row in x])
    assert torch.equal(gate(x).mask(), alone)  # no token depends on the others in its batch


# 2. In eval mode it is top-K


@given(seeds, st.integers(2, 16), taus)
def test_2_in_eval_mode_the_set_is_that_of_top_k(seed, n, tau):
    gate, x = decided(PercentileGate(D, n, tau), seed).eval(), randn(20, D, seed=seed)
    routing = gate(x)
    assume(no_ties(routing.probs))
    top = routing.probs.topk(percentile_count(n, tau), -1).indices
    assert torch.equal(routing.mask(), torch.zeros(20, n, dtype=torch.bool).scatter(1, top, True))


@pytest.mark.parametrize("tau", [0.25, 0.5, 0.75, 0.9])
def test_2_with_renormalised_weights_the_layer_is_a_standard_top_k_layer(tau):
    gate = decided(PercentileGate(D, 8, tau, weight="renorm")).eval()
    top_k = LinearRouter(D, 8, percentile_count(8, tau), renormalize=True)
    with torch.no_grad():
        top_k.projection.weight.copy_(gate.projection.weight / gate.temperature)
    experts, x = MLPExperts(8, D, H), randn(40, D)
    assert torch.allclose(MoELayer(gate, experts)(x), MoELayer(top_k, experts)(x), atol=1e-6)


def test_2_the_noise_comes_after_the_softmax():
    gate, x = decided(PercentileGate(D, 8)), randn(50, D)
    torch.manual_seed(3)
    routing = gate(x)
    torch.manual_seed(3)
    clean = (gate.projection(x) / 0.5).softmax(-1)
    noisy = clean + 0.1 * torch.randn(50, 8)
    assert torch.allclose(routing.probs, clean)
    assert torch.equal(routing.mask(), noisy > percentile(noisy, 0.5))
    inside = torch.exp(noisy) * routing.mask()
    assert torch.allclose(routing.dense(), inside / inside.sum(-1, keepdim=True), atol=1e-6)


# 3. Weights


def gates_of(n, weight):
    yield PercentileGate(D, n, 0.6, weight=weight)
    for rule, level in [("relative", 0.7), ("top_p", 0.6), ("absolute", 1.2)]:
        yield ThresholdGate(D, n, rule, level, k_max=max(1, n // 2), weight=weight)


@given(seeds, st.integers(1, 12), st.sampled_from(["softmax", "renorm"]))
def test_3_weights_are_a_distribution_on_the_active_set_of_at_least_one(seed, n, weight):
    for gate in gates_of(n, weight):
        routing = decided(gate, seed)(randn(20, D, seed=seed))
        dense, mask = routing.dense(), routing.mask()
        assert int(routing.active_counts.min()) >= 1
        assert bool((dense >= 0).all()) and bool((dense[~mask] == 0).all())
        assert torch.allclose(dense.sum(-1), torch.ones(20))


@pytest.mark.parametrize("weight", ["softmax", "renorm"])
def test_3_tied_gates_still_give_every_token_an_expert(weight):
    for gate in gates_of(6, weight):
        torch.nn.init.zeros_(gate.projection.weight)
        routing = gate.eval()(randn(5, D))
        assert int(routing.active_counts.min()) >= 1
        assert torch.allclose(routing.dense().sum(-1), torch.ones(5))


def test_3_k_max_keeps_the_best():
    gate = decided(ThresholdGate(D, 8, "top_p", 1.0, k_max=3))
    routing = gate(randn(20, D))
    assert torch.equal(routing.mask(), torch.zeros(20, 8).scatter(1, routing.probs.topk(3, -1).indices, 1) > 0)


# 4. Schedules: the shapes themselves are tested in tests/lib/core/test_schedules.py


def test_4_all_schedules_stand_at_one_total_also_for_one_and_two_layers():
    for kind in SCHEDULES:
        assert expert_schedule(kind, 1, 2, 8, total=5) == [5]
        assert sum(expert_schedule(kind, 2, 2, 8, total=9)) == 9
        assert sum(expert_schedule(kind, 6, 2, 8, total=30)) == 30


# 5. Parameters


def test_5_parameters_follow_the_formula_and_are_equal_across_matched_schedules():
    found = set()
    for kind in SCHEDULES:
        schedule = expert_schedule(kind, 6, 2, 8, total=30)
        stack = DynaMoEStack(schedule, lambda n: PercentileGate(D, n), D, H)
        assert [layer.n_experts for layer in moe_layers(stack).values()] == schedule
        found.add(count_params(stack))
    assert found == {30 * (2 * D * H + H + D) + 30 * D + 6 * 2 * D}


# 6. Dispatch


@pytest.mark.parametrize("width, dtype, tolerance", [(8, torch.float32, 1e-6), (7, torch.float64, 1e-12)])
def test_6_sparse_dispatch_equals_the_dense_masked_sum_with_its_gradients(width, dtype, tolerance):
    torch.manual_seed(0)
    layer = MoELayer(decided(ThresholdGate(width, 5, "relative", 0.4)), MLPExperts(5, width, H)).to(dtype)
    x = randn(30, width, dtype=dtype)
    routing, bank = layer.router(x), layer.experts
    assert len(set(routing.active_counts.tolist())) > 1
    hidden = torch.relu(torch.einsum("nd,ehd->neh", x, bank.up) + bank.up_bias)
    outputs = torch.einsum("neh,edh->ned", hidden, bank.down) + bank.down_bias
    dense = torch.einsum("ne,ned->nd", routing.dense(), outputs)
    sparse, parameters = layer(x), list(layer.parameters())
    assert torch.allclose(sparse, dense, atol=tolerance)
    target = randn(30, width, seed=1, dtype=dtype)
    for a, b in zip(
        torch.autograd.grad((sparse * target).sum(), parameters),
        torch.autograd.grad((dense * target).sum(), parameters),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=10 * tolerance)


def test_6_two_passes_in_eval_mode_are_identical_and_in_training_mode_are_not():
    torch.manual_seed(0)
    stack = DynaMoEStack([4, 3], lambda n: PercentileGate(D, n), D, H)
    x = randn(10, D)
    assert not torch.equal(stack(x), stack(x))
    stack.eval()
    assert torch.equal(stack(x), stack(x))


def test_6_an_expert_without_a_token_gets_a_zero_gradient_and_a_batch_may_have_any_shape():
    bank = MLPExperts(3, D, H)
    routing = Routing.fixed(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), 3)
    bank(randn(4, D), routing).sum().backward()
    assert bank.up.grad[0].abs().sum() > 0 and bank.up.grad[1:].abs().sum() == 0
    assert DynaMoEStack([3], lambda n: PercentileGate(D, n), D, H)(randn(2, 5, D)).shape == (2, 5, D)


# 7. Limits of the thresholds


@given(seeds, st.integers(1, 12))
def test_7_limits_of_the_threshold_rules(seed, n):
    x = randn(20, D, seed=seed)
    active = {}
    for name, rule, level in [
        ("all", "relative", 0.0),
        ("p", "top_p", 1.0),
        ("one", "relative", 1.0),
        ("0", "top_p", 0.0),
    ]:
        routing = decided(ThresholdGate(D, n, rule, level), seed)(x)
        assume(no_ties(routing.probs))
        active[name] = routing.mask()
    assert bool(active["all"].all()) and bool(active["p"].all())
    best = torch.zeros_like(active["one"]).scatter(1, routing.probs.argmax(-1, keepdim=True), True)
    assert torch.equal(active["one"], best) and torch.equal(active["0"], best)


def test_7_top_p_is_the_smallest_set_that_holds_p_by_hand():
    gate = ThresholdGate(4, 4, "top_p", 0.7)
    gates = torch.tensor([[0.1, 0.5, 0.3, 0.1], [0.75, 0.15, 0.05, 0.05], [0.25, 0.25, 0.25, 0.25]])
    assert gate.active(gates).sum(-1).tolist() == [2, 1, 3]
    assert gate.active(gates)[0].tolist() == [False, True, True, False]


def test_7_absolute_compares_with_the_uniform_share():
    gate = ThresholdGate(4, 4, "absolute", 1.0)
    assert gate.active(torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])).sum(-1).tolist() == [2, 0]


# Calibration to a fixed-K arm


@given(seeds, st.sampled_from(["relative", "top_p", "absolute"]), st.floats(1, 8))
def test_calibration_meets_the_mean_number_of_a_fixed_k_router(seed, rule, target):
    gate = ThresholdGate(D, 8, rule)
    gates = (2 * randn(400, 8, seed=seed)).softmax(-1)
    reached = calibrate(gate, gates, target)
    assert reached == pytest.approx(target, abs=0.01)
    routing_counts = gate.active(gates).sum(-1).clamp(min=1).double().mean()
    assert float(routing_counts) == reached


def test_the_level_is_saved_and_loaded():
    gate, other = ThresholdGate(D, 8), ThresholdGate(D, 8)
    calibrate(gate, (2 * randn(400, 8)).softmax(-1), 3.0)
    other.load_state_dict(copy.deepcopy(gate.state_dict()))
    assert float(other.level) == float(gate.level) != 0.5


def digits(n=200):
    x, y = randn(n, D), torch.arange(n) % 4
    x = x + 3 * torch.eye(4).repeat(1, D // 4)[y]
    arrays = {split: (x, y) for split in ("train", "validation", "test")}
    return Classification(Arrays("blobs", arrays, tuple("abcd"), {}))


class Classifier(torch.nn.Module):
    def __init__(self, stack):
        super().__init__()
        self.stack, self.head = stack, torch.nn.Linear(D, 4)

    def forward(self, x, context=None):
        return self.head(self.stack(x, context))


def test_calibration_while_training_keeps_the_mean_near_the_target_in_every_layer():
    torch.manual_seed(0)
    model, task = Classifier(DynaMoEStack([8, 6], lambda n: ThresholdGate(D, n), D, H)), digits()
    held = next(iter(task.batches("validation", 200)))
    train(model, task, TrainConfig(steps=21, batch_size=32), hooks=[Calibrate(held, [3.0, 2.0], every=5)])
    assert model.training
    counts = []
    for layer in moe_layers(model).values():
        layer.observe(lambda layer, routing, context: counts.append(float(routing.active_counts.double().mean())))
    task.loss(model.eval(), held)
    assert counts == pytest.approx([3.0, 2.0], abs=0.3)


# Gradient noise


def test_gradient_noise_is_the_variance_over_the_squared_mean_per_layer_gate_and_experts_apart():
    torch.manual_seed(0)
    model, task = Classifier(DynaMoEStack([4, 3], lambda n: ThresholdGate(D, n), D, H)), digits()
    batches = [task.batch("train", 16, torch.Generator().manual_seed(i)) for i in range(5)]
    noise = gradient_noise(model, task, batches)
    assert set(noise) == {f"stack.layers.{i}/{part}" for i in range(2) for part in ("router", "experts")}
    assert all(p.grad is None for p in model.parameters())
    for name, value in noise.items():
        layer, part = name.split("/")
        parameters = list(getattr(model.get_submodule(layer), part).parameters())
        rows = [torch.autograd.grad(task.loss(model, batch)[0], parameters) for batch in batches]
        flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
        assert value == pytest.approx(float(flat.var(0).mean() / flat.mean(0).square().mean()), rel=1e-6)


def test_gradient_noise_is_zero_for_equal_batches_and_undefined_without_a_gradient():
    torch.manual_seed(0)
    model, task = Classifier(DynaMoEStack([4, 2], lambda n: PercentileGate(D, n).eval(), D, H)).eval(), digits()
    batch = task.batch("train", 16, torch.Generator().manual_seed(0))
    noise = gradient_noise(model, task, [batch, batch])
    assert noise["stack.layers.0/experts"] == pytest.approx(0, abs=1e-9)
    # two experts, one active: its weight is the constant 1 and the gate has no gradient at all
    assert math.isnan(noise["stack.layers.1/router"])
    with pytest.raises(InputError, match="1 minibatches"):
        gradient_noise(model, task, [batch])


# Wrong input


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PercentileGate(D, 0), "n_experts is 0"),
        (lambda: PercentileGate(D, 8, tau=1.5), "tau is 1.5"),
        (lambda: PercentileGate(D, 8, noise=-1.0), "noise is -1.0"),
        (lambda: PercentileGate(D, 8, temperature=0), "temperature is 0"),
        (lambda: PercentileGate(D, 8, weight="soft"), "weight 'soft' is unknown; did you mean 'softmax'"),
        (lambda: ThresholdGate(D, 8, "topp"), "rule 'topp' is unknown; did you mean 'top_p'"),
        (lambda: ThresholdGate(D, 8, "top_p", 1.1), "level is 1.1"),
        (lambda: ThresholdGate(D, 8, k_max=9), "k_max is 9"),
        (lambda: calibrate(ThresholdGate(D, 8, k_max=4), torch.ones(2, 8) / 8, 5.0), "mean_active is 5.0"),
        (lambda: PercentileGate(D, 8)(torch.full((2, D), math.nan)), "logits hold 16 values"),
        (lambda: PercentileGate(D, 8)(torch.ones(0, D)), "at least one token"),
        (lambda: MLPExperts(0, D, H), "must all be at least 1"),
        (lambda: PercentileGate(D, 8, coefficients={"lbll": 1.0}), "balance loss 'lbll' is unknown"),
    ],
)
def test_wrong_input_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_balance_loss_is_off_by_default_and_joins_the_loss_when_asked_for():
    torch.manual_seed(0)
    x, context = randn(20, D), Context()
    assert PercentileGate(D, 8)(x).losses == {}
    MoELayer(PercentileGate(D, 8, coefficients={"lbl": 0.5}), MLPExperts(8, D, H))(x, context)
    assert context.aux.item() > 0
