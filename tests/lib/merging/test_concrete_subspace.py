"""Concrete subspaces: the mask's distribution and gradient, what it leaves of plain merging, and the two levels."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import workbench
from workbench.errors import InputError
from workbench.lib.core.merge import TaskVectors, merged_state
from workbench.lib.core.merge.adamerging import AdaMerging, Asked, Unlabelled, entropy_loss, learn, merged_update
from workbench.lib.core.merge.linear import TaskArithmetic
from workbench.lib.core.train import Hook
from workbench.lib.merging.concrete_subspace import ConcreteMask, ConcreteModel, ConcreteSubspace

N, CLASSES = 3, 4
SURE = 400.0
"""A logit at which every weight is kept, whatever u and the temperatures here."""


class Net(nn.Module):
    def __init__(self, drop: float = 0.0):
        super().__init__()
        self.up, self.drop, self.head = nn.Linear(6, 9), nn.Dropout(drop), nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.up(x).tanh()))


def nets(n: int = N, dtype: torch.dtype = torch.float32, drop: float = 0.0) -> tuple[Net, list[Net]]:
    torch.manual_seed(0)
    base = Net(drop).to(dtype)
    experts = [copy.deepcopy(base) for _ in range(n)]
    with torch.no_grad():
        for p in (p for expert in experts for p in expert.parameters()):
            p += 0.5 * torch.randn_like(p)
    return base, experts


def batches(n: int = N, dtype: torch.dtype = torch.float32, several: int = 2) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(16, 6, generator=generator, dtype=dtype) for _ in range(several)] for _ in range(n)]


def vectors(n: int = N, dtype: torch.dtype = torch.float32, exclude="head.*", **options) -> TaskVectors:
    return TaskVectors(*nets(n, dtype, **options), exclude=exclude)


def close(a, b, tolerance: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


class Watched(Hook):
    """The loss of every step, and how often the random numbers had been used."""

    def __init__(self):
        self.losses = []

    def after_step(self, state) -> None:
        self.losses.append(state.loss)


# -- the mask

SHAPES = {"w": torch.zeros(40, 50, dtype=torch.float64), "b": torch.zeros(7, dtype=torch.float64),
          "s": torch.zeros((), dtype=torch.float64)}  # fmt: skip


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0, 5.0])
def test_a_logit_without_end_is_no_mask_whatever_the_temperature(temperature: float):
    found = vectors()
    for granularity, plain in (
        ("fixed", TaskArithmetic(scale=0.3)),
        ("task", AdaMerging(batches(), granularity="task", steps=4, lr=0.05, seed=1)),
        ("layer", AdaMerging(batches(), steps=4, lr=0.05, seed=1)),
    ):
        merger = ConcreteSubspace(
            batches(), granularity=granularity, init_logit=SURE, temperature=temperature, mask_steps=3, steps=4, lr=0.05
        )
        assert all((m == 1).all() for m in merger.model(found).final_mask().values())
        close(merged_state(found, merger), merged_state(found, plain))


def test_the_mean_of_a_drawn_mask_is_one_in_every_tensor():
    torch.manual_seed(0)
    for x, hard in ((0.0, False), (-3.0, False), (2.0, True)):
        mask = ConcreteMask(SHAPES, x)
        for _ in range(20):
            drawn, sample = mask.draw(hard), mask.sample(hard)
            assert all(m.shape == SHAPES[name].shape for name, m in drawn.items())
            soft = mask.draw()
            assert all(abs(float(m.detach().mean()) - 1) < 1e-6 for m in (drawn["w"], soft["b"], soft["s"]))
            assert all(((m >= 0) & (m <= 1)).all() for m in sample.values())
    each = ConcreteMask(SHAPES, tasks=N).draw()
    for name, m in each.items():
        means = m.reshape(N, -1).mean(1)
        assert m.shape == (N, *SHAPES[name].shape)
        torch.testing.assert_close(means, torch.ones_like(means))


@pytest.mark.parametrize("value", [1e-6, 0.25, 1.0])
def test_a_constant_mask_of_any_value_leaves_task_vectors_as_they_are(value: float):
    found = vectors(dtype=torch.float64)
    tau = {name: found.deltas(name) for name in found.names}
    constant = {name: torch.full(found.shapes[name], value, dtype=torch.float64) for name in found.names}
    weights = torch.tensor([0.2, 0.5, 0.1], dtype=torch.float64)
    scaled = ConcreteMask({name: t[0] for name, t in tau.items()}).rescale(constant)
    close(merged_update(tau, weights, scaled), merged_update(tau, weights))
    nothing = ConcreteMask(SHAPES).rescale({name: torch.zeros_like(m) for name, m in SHAPES.items()})
    assert all((m == 0).all() for m in nothing.values())  # not 0 / 0


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("x", [-1.5, 0.0, 0.7])
def test_a_weight_is_kept_with_the_probability_of_its_logit_at_every_temperature(temperature: float, x: float):
    torch.manual_seed(3)
    draws, p = 200_000, 1 / (1 + math.exp(-x))
    mask = ConcreteMask({"w": torch.zeros(draws, dtype=torch.float64)}, x, temperature)
    kept = float((mask.sample()["w"] > 0.5).double().mean())
    assert abs(kept - p) < 3.3 * math.sqrt(p * (1 - p) / draws)
    assert mask.density()["w"] == pytest.approx(p)
    torch.manual_seed(4)
    soft = mask.sample()["w"]
    torch.manual_seed(4)
    assert torch.equal(mask.sample(hard=True)["w"], (soft > 0.5).double())  # of one u


def test_a_draw_becomes_zero_or_one_as_the_temperature_falls():
    between = []
    for temperature in (2.0, 0.5, 0.1, 0.01):
        torch.manual_seed(5)
        m = ConcreteMask({"w": torch.zeros(100_000, dtype=torch.float64)}, 0.3, temperature).sample()["w"]
        between.append(float(((m > 0.01) & (m < 0.99)).double().mean()))
    assert between == sorted(between, reverse=True) and between[-1] < 0.05 < 0.9 < between[0]


def test_at_temperature_one_and_logit_zero_a_draw_is_uniform():
    torch.manual_seed(6)
    draws = ConcreteMask({"w": torch.zeros(200_000, dtype=torch.float64)}, 0.0, 1.0).sample()["w"].detach()
    error = 3.3 / math.sqrt(12 * 200_000)
    assert abs(float(draws.mean()) - 0.5) < error
    assert abs(float((draws < 0.25).double().mean()) - 0.25) < 3.3 * math.sqrt(0.25 * 0.75 / 200_000)


def test_the_entropy_is_that_of_torch_s_distributions_and_its_limits():
    logits = torch.randn(32, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(entropy_loss(logits), torch.distributions.Categorical(logits=logits).entropy().mean())
    assert float(entropy_loss(torch.zeros(5, CLASSES))) == pytest.approx(math.log(CLASSES))
    assert float(entropy_loss(1e4 * torch.eye(CLASSES))) == 0


# -- the loss


def concrete(found: TaskVectors, inner_lr: float | None = None, tasks: int | None = None, **options) -> ConcreteModel:
    mask = ConcreteMask({name: found.deltas(name)[0] for name in found.names}, tasks=tasks)
    return ConcreteModel(found, mask, inner_lr=inner_lr, **options)


def asked(dtype: torch.dtype = torch.float32) -> Asked:
    first, second = ({i: own[k] for i, own in enumerate(batches(dtype=dtype))} for k in (0, 1))
    return Asked(first, second)


@pytest.mark.parametrize("inner_lr", [None, 0.1])
@pytest.mark.parametrize("tasks", [None, N])
def test_the_gradient_of_the_logits_is_a_finite_difference_at_one_u(inner_lr, tasks):
    model, inputs = concrete(vectors(dtype=torch.float64), inner_lr, tasks), asked(torch.float64)
    held = model.looked_ahead

    def frozen(*given):  # of first order: the weights that are looked ahead are no function of the logits
        weights.append(held(*given) if not weights else weights[0])
        return weights[0]

    weights: list[Tensor] = []
    model.looked_ahead = frozen

    def loss() -> Tensor:
        torch.manual_seed(7)
        return model.loss(inputs)

    loss().backward()
    generator, step = torch.Generator().manual_seed(8), 1e-5
    for logits in model.mask.logits:
        direction = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        expected = float((logits.grad * direction).sum())
        with torch.no_grad():
            logits += step * direction
            above = float(loss())
            logits -= 2 * step * direction
            below = float(loss())
            logits += step * direction
        assert abs(expected) > 1e-4
        assert (above - below) / (2 * step) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("granularity", ["fixed", "task", "layer"])
def test_no_gradient_and_no_change_reaches_base_experts_or_heads(granularity: str):
    base, experts = nets(drop=0.5)
    base.train(), experts[0].eval()
    heads = [nn.Linear(CLASSES, 3) for _ in experts]
    modules = (base, *experts, *heads)
    before = [copy.deepcopy(module.state_dict()) for module in modules]
    random = torch.get_rng_state()
    merger = ConcreteSubspace(
        batches(), heads, granularity=granularity, mask_lr=0.1, mask_steps=3, lr=0.1, steps=3
    )  # fmt: skip
    model = merger.learned(TaskVectors(base, experts, exclude="head.*"))
    assert all(p.grad is None for module in modules for p in module.parameters())
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert base.training and not experts[0].training and torch.equal(random, torch.get_rng_state())
    assert all(tau.grad is None and not tau.requires_grad for tau in model.tau.values())
    assert model.state_dict().keys() == {"weights", "mask.logits.0", "mask.logits.1"}


def test_all_tasks_are_merged_under_one_mask_and_a_mask_each_is_another_thing():
    found = vectors(dtype=torch.float64)
    one, each = concrete(found), concrete(found, tasks=N)
    for model, own in ((one, False), (each, True)):
        model.settle()
        # what each task alone adds, over its weight and its task vector, is its mask
        masks = []
        for i in range(N):
            weights = torch.zeros(N, dtype=torch.float64)
            weights[i] = 1
            update = merged_update(model.tau, weights, model.settled)
            masks.append({name: update[name] / model.tau[name][i] for name in update})
        for name in found.names:
            same = [torch.allclose(masks[0][name], mask[name]) for mask in masks[1:]]
            assert all(same) != own and any(same) != own
    merged = merged_update(each.tau, torch.ones(N, dtype=torch.float64), each.settled)
    for name, update in merged.items():
        torch.testing.assert_close(update, sum(each.settled[name][i] * each.tau[name][i] for i in range(N)))


# -- two levels


def test_the_inner_step_resets_the_weights_merges_and_steps_as_adam_does_first():
    model, inputs = concrete(vectors(dtype=torch.float64), 0.05), asked(torch.float64)
    mask = model.mask.draw()
    with torch.no_grad():
        model.weights.fill_(9.0)  # what they are now is of no matter
    weights = torch.full_like(model.weights, model.init, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.05)
    merged = {}
    for k, (name, tau) in enumerate(model.tau.items()):
        own = torch.einsum("n,n...->...", weights[:, k].double(), tau)
        merged[name] = model.base[name] + own * mask[name].detach()
    total = sum(
        entropy_loss(torch.func.functional_call(nets(dtype=torch.float64)[0], merged, (x,)))
        for x in inputs.before.values()
    )
    total.backward()
    optimizer.step()
    ahead = model.looked_ahead(mask, inputs)
    torch.testing.assert_close(ahead, weights.detach().to(ahead.dtype))
    assert not ahead.requires_grad and (ahead - model.init).abs().max() == pytest.approx(0.05, rel=1e-4)
    assert all(x.grad is None for x in model.mask.logits)


def test_the_outer_step_has_the_inner_step_s_mask_its_weights_and_fresh_inputs(monkeypatch):
    model, inputs = concrete(vectors(), 0.1), asked()
    draws, calls = [], []
    draw, entropy = model.mask.draw, model.entropy
    monkeypatch.setattr(model.mask, "draw", lambda *a, **k: draws.append(draw(*a, **k)) or draws[-1])
    monkeypatch.setattr(model, "entropy", lambda x, merged: calls.append((x, merged)) or entropy(x, merged))
    loss = model.loss(inputs)
    assert len(draws) == 1 and [x for x, _ in calls] == [inputs.before, inputs.now]
    ahead = model.looked_ahead(draws[0], inputs)
    for k, (name, tau) in enumerate(model.tau.items()):
        expected = model.base[name] + draws[0][name] * torch.einsum("n,n...->...", ahead[:, k], tau)
        torch.testing.assert_close(calls[1][1][name], expected)
    loss.backward()
    assert model.weights.grad is None and all((x.grad != 0).any() for x in model.mask.logits)


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_a_mask_that_does_not_learn_is_adamerging_under_a_fixed_random_mask(granularity: str):
    found, options = vectors(), {"granularity": granularity, "steps": 5, "lr": 0.05}
    merger = ConcreteSubspace(batches(), mask_lr=1e-30, mask_steps=3, seed=4, **options)  # adds nothing to a float
    learned = merger.learned(found)
    masked = copy.deepcopy(found)
    held = ConcreteMask({n: t for n, t in learned.tau.items()}).names
    drawn = merger.model(found).final_mask()
    monkey = {name: found.deltas(name) * drawn[name].detach() for name in held}
    masked.deltas = monkey.__getitem__
    plain = AdaMerging(batches(), seed=5, **options).learned(masked)
    torch.testing.assert_close(learned.weights, plain.weights, rtol=1e-5, atol=1e-6)
    close(learned.update(), plain.update(), 1e-5)
    assert (learned.weights != merger.init).any()


def test_one_expert_at_weight_one_without_a_mask_is_returned():
    base, experts = nets(1)
    merged = workbench.merge(
        base, experts, "concrete", batches=batches(1), init=1.0, init_logit=SURE, granularity="fixed", mask_steps=2
    )
    close(merged, experts[0].state_dict())


@pytest.mark.parametrize("granularity", ["fixed", "task", "layer"])
def test_what_is_learned_makes_the_merged_model_surer(granularity: str):
    found, task = vectors(), Unlabelled(batches())

    def entropy(steps: int) -> float:
        merger = ConcreteSubspace(
            batches(), granularity=granularity, mask_lr=0.3, mask_steps=steps, lr=0.05, steps=steps, inner_lr=0.05
        )
        return task.evaluate(merger.learned(found))["entropy"]

    assert entropy(40) < entropy(0) - 0.05


def test_steps_draw_masks_and_inputs_of_their_own_and_a_seed_decides_them():
    found, one, same, other = vectors(), Watched(), Watched(), Watched()
    for watched, seed in ((one, 0), (same, 0), (other, 1)):
        model = concrete(found)
        learn(model, Unlabelled(batches(several=1)), model.mask.parameters(), 1e-30, 6, seed, [watched])
    assert one.losses == same.losses != other.losses
    assert len(set(one.losses)) == 6  # nothing is learned and the inputs are the same: the draws differ


def test_the_kept_mask_is_drawn_once_and_hard_ones_are_zero_or_one():
    found = vectors()
    merger = ConcreteSubspace(batches(), granularity="fixed", mask_steps=2, hard=True, seed=3)
    model = merger.learned(found)
    assert all(len(m.unique()) == 2 for m in model.settled.values())
    close(model.update(), merged_update(model.tau, model.weights.detach(), model.settled))
    close(dict(merged_state(found, merger)), dict(merged_state(found, merger)))


def test_passes_are_counted():
    given = batches()
    assert ConcreteSubspace(given, granularity="fixed", mask_steps=7, steps=5).passes == 7
    assert ConcreteSubspace(given, mask_steps=7, steps=5).passes == 2 * 7 + 5
    # by what the model is asked
    calls = []
    merger = ConcreteSubspace(given, mask_steps=7, steps=5)
    model = merger.model(vectors())
    entropy = model.entropy
    model.entropy = lambda *a: calls.append(1) or entropy(*a)
    merger.model = lambda vectors: model
    merger.learned(vectors())
    assert len(calls) == merger.passes


def test_inputs_of_any_form_and_heads_of_any_number_of_classes():
    base, experts = nets(2)
    heads = [nn.Linear(CLASSES, 3), nn.Linear(CLASSES, 5)]
    given = [[{"x": torch.randn(4, 6)}], [(torch.randn(9, 6),)]]
    options = dict(heads=heads, mask_steps=2, steps=2, mask_lr=0.1, exclude="head.*")
    merged = workbench.merge(base, experts, "concrete-subspace", batches=given, **options)
    assert torch.equal(merged["head.weight"], base.head.weight)
    assert not torch.equal(merged["up.weight"], base.up.weight)
    # tensors of one shape are asked in one pass, and it is the same
    model, several = concrete(vectors()), batches(several=1)
    merged = model.merged()
    together = model.entropy({i: own[0] for i, own in enumerate(several)}, merged)
    apart = sum(model.entropy({i: own[0]}, merged) for i, own in enumerate(several))
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "concrete-subspace needs batches"),
        ({"batches": batches(2)}, "batches has 2 entries but must have one for each of 3"),
        ({"batches": [[], [], []]}, r"batches\[0\] is empty"),
        ({"batches": batches(), "heads": [nn.Identity()]}, "heads has 1 entries"),
        ({"batches": batches(), "temperature": 0.0}, "temperature is 0.0 but must be above 0"),
        ({"batches": batches(), "mask_steps": -1}, "mask_steps is -1 but must be at least 0"),
        ({"batches": batches(), "steps": -1}, "steps is -1 but must be at least 0"),
        ({"batches": batches(), "granularity": "tensor"}, "granularity of concrete is 'tensor' but must be 'fixed'"),
        ({"batches": batches(), "mask_lr": 3.0}, "lr is 3.0 but must be above 0 and at most 1"),
    ],
)
def test_what_does_not_fit_is_named(options: dict, message: str):
    base, experts = nets()
    with pytest.raises(InputError, match=message):
        workbench.merge(base, experts, "concrete-subspace" if not options else "concrete", **options)


def test_a_base_that_is_no_module_says_so():
    base, experts = nets()
    with pytest.raises(InputError, match="base is no module"):
        workbench.merge(base.state_dict(), experts, "concrete", batches=batches())


@pytest.mark.parametrize("options", [{"init_logit": float("nan")}, {"init_logit": float("inf")}, {"tasks": 0}])
def test_a_mask_that_cannot_be_drawn_is_refused(options):
    with pytest.raises(InputError, match="init_logit, tasks are"):
        ConcreteMask({"w": torch.zeros(3)}, **options)
