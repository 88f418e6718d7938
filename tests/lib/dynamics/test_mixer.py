"""MixER: the bank and its gate in the field, the turns, adaptation, and what may not be given."""

import copy

import pytest
import torch
from torch import nn

from workbench.beds.dynamics import forecasts
from workbench.errors import InputError
from workbench.lib.core.integrate import DivergedError, rk4
from workbench.lib.core.observe import observing
from workbench.lib.core.train import State, TrainConfig, train
from workbench.lib.dynamics.mixer import (
    Alternation,
    ContextGate,
    GEPSBank,
    MetaLearner,
    MixERField,
    OracleGate,
    SoftmaxGate,
    adapt,
    width_for,
)


def bank(n_experts=3, context=2, width=6) -> GEPSBank:
    """Experts that differ."""
    torch.manual_seed(0)
    made = GEPSBank(n_experts, 2, width, 2, context).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return made


def learner(gate=None, n_experts=3, environments=5, gated=False, **options) -> MetaLearner:
    made = bank(n_experts)
    gate = (ContextGate(2 * n_experts, n_experts).double() if gate is None else gate) if n_experts > 1 else None
    model = MetaLearner(MixERField(made, gate, gated), environments, **options).double()
    with torch.no_grad():
        model.contexts.normal_()
    return model


def grids(environments=5, points=4) -> torch.Tensor:
    return torch.linspace(0, 1, points, dtype=torch.float64).expand(environments, -1)


def forecast(model, environments=5, points=4):
    x0 = torch.randn(environments, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model(torch.arange(environments), x0, grids(environments, points))


# -- experts


def test_at_context_zero_an_expert_is_a_plain_perceptron():
    made, x = bank(), torch.randn(3, 7, 2, dtype=torch.float64)
    found = made.rates(torch.arange(3), torch.zeros(3, 2, dtype=torch.float64))(x)
    for m in range(3):
        h = x[m]
        for k in range(3):
            h = h @ made.weight[k][m].T + made.bias[k][m]
            h = nn.functional.silu(h) if k < 2 else h
        torch.testing.assert_close(found[m], h)


def test_a_context_moves_matrices_and_biases_as_the_formula_says():
    made, xi = bank(context=3), torch.randn(1, 3, dtype=torch.float64)
    plain = copy.deepcopy(made)
    with torch.no_grad():
        for weight, bias, a, b in zip(plain.weight, plain.bias, made.a, made.b, strict=True):
            weight[1] += a[1] @ torch.diag(xi[0]) @ b[1]
            bias[1] += a[1] @ xi[0]
    x = torch.randn(1, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(made.rates(torch.tensor([1]), xi)(x), plain.rates(torch.tensor([1]), 0 * xi)(x))


def test_all_experts_start_the_same_and_width_for_meets_a_number():
    made = GEPSBank(4, 2, 8, 2, 3)
    assert all(torch.equal(p[0], p[m]) for p in made.parameters() for m in range(4))
    width = width_for(1000, 2, 2, 3)
    sizes = [sum(p.numel() for p in GEPSBank(1, 2, w, 2, 3).parameters()) for w in (width - 1, width)]
    assert sizes[0] < 1000 <= sizes[1]


# -- the field


def test_the_bank_in_one_pass_is_a_loop_over_environments_and_experts():
    model = learner()
    states, experts = forecast(model), model.field.gate.assign(model.contexts)
    assert states.shape == (5, 2, 4, 2) and len(experts.unique()) > 1
    for e, m in enumerate(experts.tolist()):
        rates = model.field.experts.rates(torch.tensor([m]), model.contexts[e : e + 1, 2 * m : 2 * m + 2])
        alone = rk4(lambda _, x, rates=rates: rates(x), states[e : e + 1, :, 0].detach(), grids()[0])
        torch.testing.assert_close(states[e], alone[:, 0].movedim(0, 1))
    truth = torch.randn_like(states)
    with torch.no_grad():  # the losses start at the first point of the truth
        truth[:, :, 0] = states[:, :, 0]
    losses = model.expert_losses(truth, grids())
    chosen = (states - truth)[:, :, 1:].square().flatten(1).mean(1)
    torch.testing.assert_close(losses.gather(1, experts[:, None])[:, 0], chosen)


def test_the_gate_sees_no_state_and_multiplies_nothing():
    model = learner()
    x, environment = torch.randn(5, 3, 2, dtype=torch.float64), torch.arange(5)
    with observing([model.field]) as seen:
        model.field(torch.zeros(()), x, model.contexts, environment)
        model.field(torch.zeros(()), 100 * x, model.contexts, environment)
    (first, _), (second, _) = seen[model.field]
    assert torch.equal(first.expert, second.expert) and torch.equal(first.weight, torch.ones(5, dtype=torch.float64))
    assert first.probs.max() < 0.99


def test_no_gradient_reaches_the_refitted_gate_idle_experts_or_other_chunks():
    model = learner()
    with torch.no_grad():
        model.contexts[:, :] = model.contexts[:1]  # one context, so one expert
    forecast(model).square().sum().backward()
    assert "field.gate.weight" not in dict(model.named_parameters())
    chosen = int(model.field.gate.assign(model.contexts)[0])
    others = [m for m in range(3) if m != chosen]
    for p in model.field.experts.parameters():
        assert p.grad[chosen].any() and not p.grad[others].any()
    chunks = model.contexts.grad.view(5, 3, 2)
    assert chunks[:, chosen].any() and not chunks[:, others].any()


def test_the_plain_mixture_learns_its_gate_and_its_balance():
    gate = SoftmaxGate(6, 3).double()
    model = learner(gate, gated=True)
    forecast(model).square().sum().backward()
    assert gate.weight.grad.any()
    routing = gate(model.contexts, torch.arange(5))
    probs = routing.probs
    mean = probs.mean(0)
    torch.testing.assert_close(routing.losses["balance"], mean.var(correction=0) / mean.mean() ** 2)
    torch.testing.assert_close(routing.weight, probs.max(1).values)
    x = torch.randn(5, 3, 2, dtype=torch.float64)
    plain = MixERField(model.field.experts, OracleGate(routing.expert, 3))
    moved = model.field(torch.zeros(()), x, model.contexts, torch.arange(5))
    torch.testing.assert_close(
        moved, routing.weight[:, None, None] * plain(torch.zeros(()), x, model.contexts, torch.arange(5))
    )


# -- the turns


def small() -> tuple:
    task = forecasts(("pendulum", "duffing"), environments=3, starts=2, points=4, new=1)
    return task, task.trajectories, task.times[task.family]


def begun(model, task) -> State:
    return State(model, task, torch.optim.SGD(model.parameters(), 1e-2), TrainConfig(1))


def trained(model, steps=12, beta=1.0, **options):
    task, trajectories, times = small()
    hook = Alternation(trajectories, times, 3, 2, beta, **options)
    config = TrainConfig(steps, 6, 1e-2, warmup=1, weight_decay=0.0, eval_every=None)
    return train(model, task, config, [hook])


def test_turns_move_contexts_or_weights_and_the_extra_gradient_is_that_of_the_proximal_term():
    torch.manual_seed(0)
    task, trajectories, times = small()
    model = MetaLearner(MixERField(GEPSBank(2), ContextGate(4, 2)), 6)
    hook, state = Alternation(trajectories, times, 3, 2, beta=10.0), begun(model, task)
    with torch.no_grad():
        model.contexts.normal_()
    hook.before_step(state)
    old = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    for state.step in (1, 4):
        hook.before_step(state)
        grads = [torch.randn_like(p) for p in model.parameters()]
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = grad.clone()
        hook.before_update(state)
        for p, grad, before in zip(model.parameters(), grads, old, strict=True):
            if (p is model.contexts) == (state.step < 3):
                torch.testing.assert_close(p.grad, grad + 10 * (p.detach() - before))
            else:
                assert p.grad is None


def test_a_stronger_proximal_term_lets_a_turn_go_less_far():
    """Where a turn ends that is solved: gradient + beta (p - old) = 0, so |p - old| falls as 1 / beta."""
    task, trajectories, times = small()
    gone = []
    for beta in (1e1, 1e3, 1e5):
        model = MetaLearner(MixERField(GEPSBank(1)), 6)
        hook, state = Alternation(trajectories, times, 50, 1, beta), begun(model, task)
        for state.step in range(50):
            hook.before_step(state)
            model.contexts.grad = torch.full_like(model.contexts, 2.0)
            hook.before_update(state)
            with torch.no_grad():
                model.contexts.sub_(model.contexts.grad, alpha=0.5 / beta)
        gone.append(model.contexts.detach().abs().max().item())
    assert gone == pytest.approx([2e-1, 2e-3, 2e-5], rel=1e-3)


def test_a_mixture_of_one_is_the_plain_learner():
    models = []
    for gate in (None, ContextGate(2, 1)):
        torch.manual_seed(3)
        models.append(MetaLearner(MixERField(GEPSBank(1), gate), 6))
    models[1].load_state_dict(models[0].state_dict(), strict=False)
    for model in models:
        trained(model)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert models[1].field.gate.counts.tolist()[0] == 2


def test_training_leaves_the_tie_of_equal_experts_and_zero_contexts():
    torch.manual_seed(0)
    model = MetaLearner(MixERField(GEPSBank(2, width=16), ContextGate(4, 2)), 6)
    assert len(model.field.gate.assign(model.contexts).unique()) == 1
    trained(model, 60)
    assert len(model.field.gate.assign(model.contexts).unique()) == 2
    weight = model.field.experts.weight[1]
    assert not torch.equal(weight[0], weight[1])
    fits, skipped, _ = model.field.gate.counts.tolist()
    assert fits == 12 and skipped < 12


def test_adaptation_changes_contexts_alone_and_lowers_the_error():
    model = learner(environments=5)
    with torch.no_grad():
        truth = forecast(model)
    before = copy.deepcopy(model.state_dict())
    few, many = (adapt(model.field, truth, grids(), steps, 5e-2) for steps in (1, 80))

    def error(xi):
        rates = model.field.rates(xi, torch.arange(5))
        return (rk4(lambda _, x: rates(x), truth[:, :, 0], grids()[0]).movedim(0, 2) - truth).square().mean()

    assert error(many) < 0.7 * error(few)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(p.grad is None for p in model.parameters())


# -- what may not be given


def test_a_training_that_leaves_the_finite_numbers_stops_before_its_weights_change():
    torch.manual_seed(0)
    model = MetaLearner(MixERField(GEPSBank(2), ContextGate(4, 2)), 6)
    with torch.no_grad():
        model.contexts[4] = 1e30
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DivergedError, match="environment 4, start 0"):
        trained(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_who_leaves_the_finite_numbers_is_named():
    model = learner(names=[f"pendulum {i}" for i in range(5)])
    with torch.no_grad():
        model.contexts[3] *= 1e100
    with pytest.raises(DivergedError, match=r"pendulum 3, start 0 leaves the finite numbers by point 1"):
        forecast(model)
    losses = model.expert_losses(torch.zeros(5, 2, 4, 2, dtype=torch.float64), grids())
    assert not losses[3].isfinite().any() and losses[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GEPSBank(0), "n_experts is 0 but must be at least 1"),
        (lambda: GEPSBank(2, context_dim=0), "context_dim is 0"),
        (lambda: MixERField(GEPSBank(2)), "gate is None but must be given for 2 experts"),
        (lambda: MixERField(GEPSBank(2), ContextGate(4, 3)), "gate has 3 experts but must have the 2"),
        (lambda: MetaLearner(MixERField(GEPSBank(2), ContextGate(4, 2)), 1), "n_environments is 1 but must be"),
        (lambda: MetaLearner(MixERField(GEPSBank(1)), 0), "n_environments is 0"),
        (lambda: forecast(learner(), points=1), "times has 1 point but must have at least 2"),
        (lambda: bank_field().rates(torch.zeros(2, 5), torch.arange(2)), "xi has contexts of size 5 but must have 4"),
        (lambda: Alternation(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2), on_weights=0), "on_weights is 0"),
        (lambda: Alternation(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2), beta=-1.0), "beta is -1.0"),
        (lambda: adapt(bank_field(), torch.zeros(1, 1, 2, 2), torch.zeros(1, 2), 0), "steps is 0"),
        (lambda: adapt(bank_field(), torch.zeros(3, 1, 1, 2), torch.zeros(3, 1), 1), "trajectories has 1 point but"),
        (lambda: alternation(3, 2), r"times is \(3, 2\) but trajectories has 2 environments of 2 points"),
        (lambda: alternation(2, 3), r"times is \(2, 3\) but trajectories has 2 environments of 2 points"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(make, said):
    with pytest.raises(InputError, match=said):
        make()


def alternation(*grids: int) -> Alternation:
    """Of two environments with two points, and such grids."""
    return Alternation(torch.zeros(2, 1, 2, 2), torch.zeros(grids))


def bank_field() -> MixERField:
    return MixERField(GEPSBank(2), ContextGate(4, 2))
