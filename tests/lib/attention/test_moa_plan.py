"""The planner of MoA: rules cost what the cache keeps, plans keep their bounds, and the programme finds the best."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels.span_attention.reference import visible
from workbench.lib.attention.moa import Plan, SpanRule, solve_spans, span_rules
from workbench.lib.attention.moa_plan import span_losses

BLOCK = 4


def importance(lengths=(8, 16), layers=2, heads=2, seed=0) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.rand(layers, heads, n // BLOCK, n // BLOCK, generator=generator, dtype=torch.float64).tril()
        for n in lengths
    }


RULES = [SpanRule(4, 0, 0), SpanRule(8, 0, 0), SpanRule(0, 0.5, 0), SpanRule(0, 1, 0)]


# rules and layouts


@settings(max_examples=50, deadline=None)
@given(blocks=st.integers(1, 12), alpha=st.integers(-64, 64), eighths=st.integers(0, 8), sinks=st.integers(0, 3))
def test_moa_layouts_are_a_band_and_a_sink_and_cost_what_the_cache_keeps(blocks, alpha, eighths, sinks):
    n, rule = blocks * 8, SpanRule(alpha, eighths / 8, sinks * 8)
    layout = rule.layout(n, 8)
    band = max(int((alpha + eighths / 8 * n) // 8), 1)
    for i, j in itertools.product(range(blocks), repeat=2):
        assert layout[i, j] == (j <= i and (i - j < band or j < sinks))
    if (alpha + eighths / 8 * n) % 8 == 0 and alpha + eighths / 8 * n >= 8:
        assert rule.kept(n) == int(layout.sum(1).max()) * 8
        shown = visible(n, rule.span(n), rule.sink).unflatten(0, (-1, 8)).unflatten(-1, (-1, 8))
        inside = shown.all(3).all(1) | torch.eye(blocks, dtype=torch.bool) & layout
        assert (inside >= layout).all()  # attention over tokens keeps all that the plan counts on


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 100), sink=st.sampled_from([0, 4, 8]))
def test_moa_loss_falls_as_the_span_grows(seed, sink):
    rules = [SpanRule(alpha, 0, sink) for alpha in range(1, 17)]
    losses = span_losses(importance(seed=seed)[16], rules, 16, BLOCK)
    assert (losses.diff(dim=-1) <= 0).all() and not losses[..., -1].any()


def test_moa_rules_of_the_search_space():
    rules = span_rules((32, 64), alpha_step=8, sink=4)
    assert all(rule.alpha + rule.beta * 64 <= 64 and rule.alpha + rule.beta * 32 > 0 for rule in rules)
    costs = [tuple(rule.kept(n) for n in (32, 64)) for rule in rules]
    assert len(set(costs)) == len(costs) and costs == sorted(costs)
    assert costs[-1] == (32, 64) and {rule.beta for rule in rules} > {0, 0.5}
    assert {rule.beta for rule in span_rules((32, 64), alpha_step=8, betas=(0.0,))} == {0}


# plans


def all_plans(values, rules, density, limit=2, least=0.9):
    """Every choice of rules that meets the bounds, with its losses: brute force."""
    n_layers, n_heads = next(iter(values.values())).shape[:2]
    loss = torch.stack([span_losses(v, rules, n, BLOCK) for n, v in values.items()]).flatten(1, 2)
    kept = []
    for choice in itertools.product(range(len(rules)), repeat=n_layers * n_heads):
        layers = [choice[i * n_heads : (i + 1) * n_heads] for i in range(n_layers)]
        share = {n: sum(rules[c].kept(n) for c in choice) / len(choice) / n for n in density}
        if all(len(set(layer)) <= limit for layer in layers) and all(
            least * rho - 1e-9 <= share[n] <= rho + 1e-9 for n, rho in density.items()
        ):
            kept.append((choice, loss[:, range(len(choice)), choice].sum(1)))
    return kept


def dominates(a: Tensor, b: Tensor) -> bool:
    return bool((a <= b + 1e-9).all() and (a < b - 1e-9).any())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limit", [1, 2])
def test_moa_the_programme_finds_what_brute_force_finds(seed, limit):
    """2 layers x 2 heads x 4 rules: the best for each length, and only plans that no other of all 256 dominates."""
    values, density = importance(seed=seed), {8: 0.8, 16: 0.7, 32: 0.75}
    plans = solve_spans(values, RULES, density, BLOCK, limit, least=0.6)
    found = [torch.tensor(list(plan.losses.values()), dtype=torch.float64) for plan in plans]
    everything = all_plans(values, RULES, density, limit, least=0.6)
    losses = torch.stack([loss for _, loss in everything])
    assert len(everything) > 2
    assert torch.allclose(torch.stack(found).amin(0), losses.amin(0), atol=1e-9)
    for loss in found:
        assert not any(dominates(other, loss) for other in losses)
        assert any(torch.allclose(loss, other, atol=1e-9) for other in losses)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), rho=st.sampled_from([0.4, 0.5, 0.7]))
def test_moa_every_plan_keeps_its_bounds_and_none_dominates(seed, rho):
    lengths = (16, 32)
    values = importance(lengths, layers=2, heads=3, seed=seed)
    rules = span_rules((*lengths, 64), alpha_step=8, sink=4)
    plans = solve_spans(values, rules, dict.fromkeys((*lengths, 64), rho), BLOCK, least=0.8, gap=1e-3)
    for plan in plans:
        assert len(plan.rules) == 2 and all(len(layer) == 3 and len(set(layer)) <= 2 for layer in plan.rules)
        assert list(plan.density) == [*lengths, 64]
        for n, share in plan.density.items():
            assert 0.8 * rho - 1e-9 <= share <= rho + 1e-9
            spans = [span for layer in plan.spans(n) for span in layer]
            assert share == pytest.approx(sum(min(n, 4 + span) for span in spans) / 6 / n)
        for n, value in values.items():
            left_out = sum(
                float(value[i, h][~plan.rules[i][h].layout(n, BLOCK)].sum()) for i in range(2) for h in range(3)
            )
            assert plan.losses[n] == pytest.approx(left_out)
    losses = [torch.tensor(list(plan.losses.values())) for plan in plans]
    assert not any(dominates(a, b) for a in losses for b in losses)


@pytest.mark.parametrize("seed", range(3))
def test_moa_uniform_rules_are_one_window_for_all(seed):
    """One rule for the whole model, by the same code: the best sliding window and sink of that density."""
    values = importance((16,), seed=seed)
    rules = [SpanRule(alpha, 0, 4) for alpha in (2, 4, 6, 8)]
    (plan,) = solve_spans(values, rules, {16: 0.7}, BLOCK, uniform=True, least=0)
    allowed = [rule for rule in rules if rule.kept(16) <= 0.7 * 16]
    best = min(allowed, key=lambda rule: float(span_losses(values[16], [rule], 16, BLOCK).sum()))
    assert {rule for layer in plan.rules for rule in layer} <= {
        r for r in allowed if r.layout(16, 4).equal(best.layout(16, 4))
    }
    assert len({rule for layer in plan.rules for rule in layer}) == 1
    free = solve_spans(values, rules, {16: 0.7}, BLOCK, least=0)[0]
    assert free.losses[16] <= plan.losses[16] + 1e-9


def test_moa_plans_are_plain_values():
    plan = Plan.of([[RULES[0], RULES[3]]] * 2, importance(), BLOCK, 32)
    text = json.loads(json.dumps(plan.to_dict()))
    assert text["rules"][0][1] == {"alpha": 0, "beta": 1, "sink": 0}
    assert plan.spans(32) == [[4, 32]] * 2 and plan.density[32] == (4 + 32) / 64


def test_moa_bad_plans_are_named():
    values = importance()
    with pytest.raises(InputError, match=r"no choice of the rules gives; alone they give 0\.25 to 1 at 16"):
        solve_spans(values, RULES, {16: 0.1}, BLOCK)
    with pytest.raises(InputError, match="length is 18 but must be a multiple of block = 4"):
        solve_spans({18: values[16]}, RULES, {16: 0.5}, BLOCK)
    with pytest.raises(InputError, match=r"importance\[8\] has shape \(2, 2, 4, 4\)"):
        solve_spans({8: values[16]}, RULES, {16: 0.5}, BLOCK)
    with pytest.raises(InputError, match=r"importance\[16\] must be finite and at least 0"):
        solve_spans({16: values[16] * float("nan")}, RULES, {16: 0.5}, BLOCK)
    with pytest.raises(InputError, match=r"density\[16\] is 1.5 but must be above 0 and at most 1"):
        solve_spans(values, RULES, {16: 1.5}, BLOCK)
    with pytest.raises(InputError, match="max_rules_per_layer is 0"):
        solve_spans(values, RULES, {16: 0.5}, BLOCK, 0)
    with pytest.raises(InputError, match="must each hold at least one entry"):
        solve_spans(values, [], {16: 0.5}, BLOCK)
    with pytest.raises(InputError, match="beta is 2 but must be between 0 and 1"):
        SpanRule(0, 2)
    with pytest.raises(InputError, match="sink is -1"):
        SpanRule(0, 1, -1)
    with pytest.raises(InputError, match="length is 3 but must be a multiple of block = 4, at least one block"):
        SpanRule(0, 1).layout(3, 4)
    with pytest.raises(InputError, match="alpha_step is 0"):
        span_rules((8,), alpha_step=0)
