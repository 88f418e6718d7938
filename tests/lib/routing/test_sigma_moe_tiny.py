"""Exact properties of the balance losses, of loss-free balancing and of progressive sparsification (2512.16248)."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.balance import LossFreeBias, switch_lbl, top1_lbl
from workbench.lib.core.budget import count_params
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import Hook, TrainConfig, make_optimizer, train
from workbench.lib.data.types import TextDomains
from workbench.lib.routing.sigma_moe_tiny import (
    GlobalBatchRouter,
    LoadWindow,
    Sparsify,
    SparsityPlan,
    active_parameters,
    example,
    geometric_low,
    global_batch_lbl,
)

seeds = st.integers(0, 2**31)
E, D, H = 6, 8, 12


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer_of(top_k=1, seed=0, **options):
    torch.manual_seed(seed)
    layer = MoELayer(LinearRouter(D, E, top_k, renormalize=False, **options), GLUExperts(E, D, H)).double()
    nn.init.normal_(layer.router.projection.weight)
    return layer


def model_of(n_layers=4, top_k=1):
    torch.manual_seed(0)

    def ffn(_):
        return MoELayer(GlobalBatchRouter(D, E, top_k, coefficients={"lbl": 0.01}), GLUExperts(E, D, H))

    return DecoderLM(256, D, n_layers, 2, ffn, seq_len=8)


def task():
    text = torch.randint(97, 123, (400,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    splits = {split: {"letters": text} for split in ("train", "validation", "test")}
    return LanguageModelling(TextDomains("letters", ("letters",), splits, {}), seq_len=8)


# 1. The top-1 loss


@given(st.integers(2, 8))
def test_1_top1_lbl_is_one_for_one_hot_balanced_logits(n_experts):
    logits = 1e3 * torch.eye(n_experts, dtype=torch.float64).repeat(3, 1)
    assert top1_lbl(logits).item() == pytest.approx(1.0)


@given(st.integers(2, 8), st.floats(-5, 5))
def test_1_top1_lbl_is_e_for_equal_logits_and_for_a_one_hot_collapse(n_experts, level):
    assert top1_lbl(torch.full((7, n_experts), level, dtype=torch.float64)).item() == pytest.approx(n_experts)
    collapsed = torch.zeros(7, n_experts, dtype=torch.float64)
    collapsed[:, 1] = 1e3
    assert top1_lbl(collapsed).item() == pytest.approx(n_experts)


@given(seeds, st.integers(2, 9), st.integers(1, 20), st.floats(0.05, 20), st.floats(0.1, 20))
def test_1_top1_lbl_lies_between_one_and_e_and_ignores_the_order_of_the_experts(seed, n_experts, n, temperature, scale):
    logits = scale * randn(n, n_experts, seed=seed)
    value = top1_lbl(logits, temperature).item()
    assert 1 - 1e-9 <= value <= n_experts + 1e-9
    order = torch.randperm(n_experts, generator=torch.Generator().manual_seed(seed))
    assert top1_lbl(logits[:, order], temperature).item() == pytest.approx(value)


# 2. The shortcut of the usual loss


@given(seeds, st.integers(2, 9))
def test_2_switch_lbl_at_uniform_p_is_one_for_any_load_even_total_collapse(seed, n_experts):
    probs = torch.full((12, n_experts), 1 / n_experts, dtype=torch.float64)
    collapse = torch.zeros(n_experts, dtype=torch.int64)
    collapse[0] = 12
    some = torch.randint(1, 9, (n_experts,), generator=torch.Generator().manual_seed(seed))
    assert switch_lbl(probs, collapse).item() == pytest.approx(1.0)
    assert switch_lbl(probs, some).item() == pytest.approx(1.0)


def test_2_switch_lbl_has_no_gradient_through_the_load_only_through_p():
    logits = randn(20, E).requires_grad_()
    routing = Routing.fixed(*reversed(logits.softmax(-1).topk(1, -1)), E)
    assert not routing.counts.requires_grad  # f is detached by construction
    share = routing.counts.double() / 20
    (actual,) = torch.autograd.grad(switch_lbl(logits.softmax(-1), routing.counts), logits)
    (expected,) = torch.autograd.grad(E * (share * logits.softmax(-1).mean(0)).sum(), logits)
    assert torch.allclose(actual, expected)


def test_2_top1_lbl_is_at_its_maximum_where_switch_lbl_is_fooled():
    uniform = torch.zeros(20, E, dtype=torch.float64)
    assert top1_lbl(uniform).item() == pytest.approx(E)
    assert all(top1_lbl(uniform + 0.3 * randn(20, E, seed=seed)).item() < E for seed in range(10))


def test_2_the_global_loss_counts_the_load_over_the_whole_window_not_per_micro_batch():
    first = Routing.fixed(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), 2)
    second = Routing.fixed(torch.ones(4, 1, dtype=torch.int64), torch.ones(4, 1), 2)
    probs = torch.tensor([[0.9, 0.1]]).expand(4, 2)
    window = LoadWindow(2)
    window.count(first)
    assert global_batch_lbl(window, probs).item() == pytest.approx(switch_lbl(probs, first.counts).item())
    window.count(second)
    assert global_batch_lbl(window, probs).item() == pytest.approx(1.0)  # (4, 4): balanced over the window
    assert switch_lbl(probs, second.counts).item() == pytest.approx(0.2)  # while the micro-batch alone is not
    window.after_step()
    assert window.counts.tolist() == [0, 0]


def test_2_the_router_counts_its_window_in_training_and_closes_it_after_the_step():
    torch.manual_seed(0)
    router = GlobalBatchRouter(D, E, coefficients={"lbl": 0.01})
    batches = [torch.randn(5, D) for _ in range(2)]
    first, second = (router(x, Context()) for x in batches)
    expected = switch_lbl(second.probs, first.counts + second.counts)
    assert torch.equal(second.losses["lbl"], expected)
    assert int(router.window.counts.sum()) == 10
    evaluated = router.eval()(batches[0], Context())
    assert int(router.window.counts.sum()) == 10  # held-out tokens are not counted
    assert torch.equal(evaluated.losses["lbl"], switch_lbl(evaluated.probs, evaluated.counts))
    router.window.after_step()
    assert int(router.window.counts.sum()) == 0


# 3. The combine weights


def test_3_all_experts_without_renormalisation_are_the_dense_softmax_mixture():
    layer, x = layer_of(top_k=E), randn(10, D)
    probs = layer.router.projection(x).softmax(-1)
    outputs = []
    for gate_up, down in zip(layer.experts.gate_up, layer.experts.down, strict=True):
        gate, up = (x @ gate_up.T).chunk(2, -1)
        outputs.append((nn.functional.silu(gate) * up) @ down.T)
    dense = torch.einsum("ne,end->nd", probs, torch.stack(outputs))
    assert torch.allclose(layer(x), dense, atol=1e-12)


@pytest.mark.parametrize("renormalize, moves", [(False, True), (True, False)])
def test_3_the_top_1_router_learns_from_the_task_exactly_if_its_weight_is_not_renormalised(renormalize, moves):
    layer = layer_of()
    layer.router.renormalize = renormalize
    layer(randn(10, D)).square().sum().backward()
    gradient = layer.router.projection.weight.grad
    assert bool(gradient.abs().max() > 1e-14) == moves  # zero up to the rounding of w / w


def test_3_the_report_s_router_never_renormalises():
    router = GlobalBatchRouter(D, E, top_k=3)
    routing = router(torch.randn(4, D))
    assert torch.equal(routing.weights, routing.probs.topk(3, -1).values)


# 4. The plan


def test_4_progressive_switches_once_and_in_the_lower_layers_only():
    plan = SparsityPlan.progressive(n_layers=6, total_steps=100, low=[4, 4, 2], switch_at=0.8)
    assert plan.switches == (80,) and plan.n_layers == 6
    assert {plan.at(step) for step in range(80)} == {(4, 4, 2, 1, 1, 1)}
    assert {plan.at(step) for step in range(80, 120)} == {(1,) * 6}
    assert [plan.top_k(2, step) for step in (0, 79, 80)] == [2, 2, 1]
    assert SparsityPlan.constant(3).stages == ((0, (1, 1, 1)),)


def test_4_geometric_low_descends_from_k_max_to_two_over_a_seventh_of_the_layers():
    assert geometric_low(56, 8) == [8, 7, 5, 4, 4, 3, 2, 2]
    assert geometric_low(6, 4, n_low=3) == [4, 3, 2]
    assert geometric_low(6, 4) == [4]


def test_4_active_parameters_follow_the_plan():
    model = model_of()
    plan = SparsityPlan.progressive(4, total_steps=10, low=[4, 2], switch_at=0.5)
    per_expert = 3 * D * H
    rest = count_params(model) - 4 * E * per_expert
    assert active_parameters(model, plan, 4) == rest + (4 + 2 + 1 + 1) * per_expert
    assert active_parameters(model, plan, 5) == rest + 4 * per_expert


def test_4_the_switch_changes_no_parameter_and_keeps_the_optimizer_state():
    model, plan = model_of(), SparsityPlan.progressive(4, total_steps=6, low=[4, 2], switch_at=0.5)
    config = TrainConfig(steps=6, batch_size=4, warmup=0)
    optimizer = make_optimizer(model, config)

    class Watch(Hook):
        def before_step(self, state):
            self.before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            self.top_k = [layer.router.top_k for layer in moe_layers(model).values()]

    class Compare(Hook):
        seen = ()

        def before_step(self, state):
            weights, moments = watch.before
            assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
            for key, entry in optimizer.state_dict()["state"].items():
                assert all(torch.equal(value, moments["state"][key][name]) for name, value in entry.items())
            top_k = [layer.router.top_k for layer in moe_layers(model).values()]
            self.seen += ((watch.top_k, top_k),)

    watch, compare = Watch(), Compare()
    train(model, task(), config, hooks=[watch, Sparsify(plan), compare], optimizer=optimizer)
    assert compare.seen[3] == ([4, 2, 1, 1], [1, 1, 1, 1])
    steps = {int(entry["step"]) for entry in optimizer.state.values()}
    assert steps == {6}  # the moments were never reset


def test_4_a_resumed_run_is_at_the_right_stage():
    model, plan = model_of(), SparsityPlan.progressive(4, total_steps=6, low=[4, 2], switch_at=0.5)
    train(model, task(), TrainConfig(steps=5, batch_size=4, warmup=0), hooks=[Sparsify(plan)], start=4)
    assert [layer.router.top_k for layer in moe_layers(model).values()] == [1, 1, 1, 1]


# 5. What the switch does to the output


@settings(deadline=None, max_examples=25)
@given(seeds, st.integers(2, E))
def test_5_at_the_switch_the_output_moves_by_exactly_the_dropped_terms(seed, top_k):
    layer, x = layer_of(top_k, seed), randn(9, D, seed=seed)
    before = layer(x)
    layer.router.set_top_k(E)
    routing = layer.router(x)
    dropped = Routing.fixed(routing.indices[:, 1:top_k], routing.weights[:, 1:top_k], E)
    layer.router.set_top_k(1)
    assert torch.allclose(before - layer(x), layer.experts(x, dropped), atol=1e-10)


# 6. Loss-free balancing


@given(seeds, st.floats(-10, 10))
def test_6_a_constant_added_to_every_bias_changes_nothing(seed, constant):
    layer, x = layer_of(2, bias_rate=1e-3), randn(9, D, seed=seed)
    layer.router.bias.bias.copy_(0.1 * randn(E, seed=seed + 1))
    before, output = layer.router(x), layer(x)
    layer.router.bias.bias += constant
    after = layer.router(x)
    assert torch.equal(before.mask(), after.mask()) and torch.allclose(layer(x), output, atol=1e-12)


@given(seeds)
def test_6_the_combine_weights_never_contain_the_bias(seed):
    layer, x = layer_of(2, bias_rate=1e-3), randn(9, D, seed=seed)
    layer.router.bias.bias.copy_(randn(E, seed=seed + 1))
    routing = layer.router(x)
    assert torch.equal(routing.weights, routing.probs.gather(-1, routing.indices))


@given(st.lists(st.integers(0, 9), min_size=2, max_size=8))
def test_6_each_update_is_exactly_the_rate_or_zero_and_balance_moves_nothing(load):
    bias = LossFreeBias(len(load), rate=0.125)
    bias.update(torch.tensor(load))
    assert set(bias.bias.abs().tolist()) <= {0.0, 0.125}
    mean = sum(load) / len(load)
    assert all((b > 0) == (n < mean) and (b < 0) == (n > mean) for b, n in zip(bias.bias.tolist(), load, strict=True))


# Capacity must not hide imbalance


def test_the_load_is_counted_before_capacity_dropping():
    layer = MoELayer(GlobalBatchRouter(D, E), GLUExperts(E, D, H), capacity_factor=0.5)
    seen = []
    layer.observe(lambda layer, routing, context: seen.append(routing))
    layer(torch.ones(12, D))  # equal tokens: all to one expert
    assert sorted(seen[0].counts.tolist()) == [0, 0, 0, 0, 0, 12] and int(seen[0].kept.sum()) == 1


# Wrong input


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SparsityPlan([]), "must start at 0"),
        (lambda: SparsityPlan([(5, [1])]), "must start at 0"),
        (lambda: SparsityPlan([(0, [1]), (0, [2])]), "and rise"),
        (lambda: SparsityPlan([(0, [1]), (3, [1, 1])]), "all have the same"),
        (lambda: SparsityPlan([(0, [1, 0])]), "at least 1"),
        (lambda: SparsityPlan.progressive(2, 100, low=[4, 4, 2]), "low has 3 entries"),
        (lambda: SparsityPlan.progressive(2, 100, low=[4], switch_at=1.0), "switch_at is 1.0"),
        (lambda: geometric_low(6, 1), "k_max is 1"),
        (lambda: geometric_low(6, 4, n_low=7), "n_low is 7"),
        (lambda: SparsityPlan.constant(3).apply(model_of(), 0), "3 layers but the model has 4"),
        (lambda: SparsityPlan.constant(4, E + 1).apply(model_of(), 0), "top_k is 7"),
    ],
)
def test_wrong_input_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_the_example_starts_in_the_first_stage():
    assert example().router.top_k == 4
