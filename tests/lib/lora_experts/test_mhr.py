"""MHR: parameters mixed by task and head, what it is told, new tasks, and peft's layer for the same weights."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.adapt import adapt, load_adapter
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.routing import Context
from workbench.lib.lora_experts.mhr import MultiHeadLinear, allocations, monitors, to_new_tasks

X = torch.randn(23, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TASKS = torch.arange(23) % 3


def put(shake: bool = True, d_out: int = 12, **options):
    """One linear layer in float64 in evaluation mode, adapted; and the handle."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, d_out)).double()
    adapted = adapt(model, "mhr", **{"experts": 4, "rank": 2, "tasks": 3, "heads": 4, "alpha": 3.0} | options)
    model.double().eval()
    if shake:
        with torch.no_grad():
            for p in adapted.layers["0"].router.parameters():
                nn.init.normal_(p, std=2.0)
            nn.init.normal_(adapted.layers["0"].experts.a), nn.init.normal_(adapted.layers["0"].experts.b)
    return adapted


def naive(layer: MultiHeadLinear, x: Tensor, mixing: Tensor) -> Tensor:
    """Row by row, with loops over heads and skills and a dense matrix for each row; mixing (N, H, S)."""
    bank, heads = layer.experts, layer.router.n_heads
    wide, tall = bank.d_in // heads, bank.d_out // heads
    rows = []
    for n in range(len(x)):
        a, b = [], []
        for h in range(heads):
            weights = mixing[n, h]
            a.append(sum(weights[s] * bank.a[s][:, h * wide : (h + 1) * wide] for s in range(bank.n_experts)))
            b.append(sum(weights[s] * bank.b[s][h * tall : (h + 1) * tall] for s in range(bank.n_experts)))
        delta = bank.scale[0] * torch.cat(b, 0) @ torch.cat(a, 1)
        rows.append(F.linear(x[n], layer.base.weight + delta, layer.base.bias))
    return torch.stack(rows)


def one_hot(adapted, skill: int) -> None:
    """Every head of every task takes one skill alone."""
    layer = adapted.layers["0"]
    with torch.no_grad():
        layer.router.logits.fill_(-1000.0)
        layer.router.logits.view(-1, layer.router.n_heads, layer.n_experts)[:, :, skill] = 1000.0


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_mhr_equals_loops_over_heads_and_skills_in_outputs_and_gradients(heads):
    adapted = put(heads=heads)
    layer, x = adapted.layers["0"], X.clone().requires_grad_()
    with adapted.given(task=TASKS):
        y = adapted.model(x)
    expected = naive(layer, x, layer.router.mixing(TASKS))
    torch.testing.assert_close(y, expected, atol=1e-11, rtol=1e-11)
    seed = torch.randn_like(y)
    wanted = [x, *adapted.parameters()]
    assert len(wanted) == 4
    for ours, theirs in zip(
        torch.autograd.grad((y * seed).sum(), wanted), torch.autograd.grad((expected * seed).sum(), wanted), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_mhr_path_by_token_equals_path_by_group():
    layer = put().layers["0"]
    mixing = layer.router.mixing(TASKS)
    torch.testing.assert_close(layer.by_token(X, mixing), layer.by_group(X[:, None], mixing)[:, 0])


def test_mhr_one_head_is_poly_the_mixture_of_whole_skills():
    layer = put(heads=1).layers["0"]
    mixing = layer.router.mixing(TASKS)
    a, b = layer.experts.merged(mixing[:, 0])
    ours_a, ours_b = layer.merged(mixing)
    torch.testing.assert_close(ours_a, a), torch.testing.assert_close(ours_b, b)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_mhr_number_of_parameters_does_not_depend_on_heads_but_for_the_router(heads):
    trained = put(heads=heads).report()["trained"]
    assert trained == 4 * 2 * (8 + 12) + 3 * heads * 4


@pytest.mark.parametrize("heads", [1, 4])
def test_mhr_one_hot_mixture_is_the_lora_of_that_skill_and_uniform_the_mean(heads):
    adapted = put(heads=heads)
    layer = adapted.layers["0"]
    bank = layer.experts
    one_hot(adapted, 2)
    with adapted.given(task=1):
        torch.testing.assert_close(adapted.model(X), layer.base(X) + X @ bank.delta(2).T, atol=1e-9, rtol=1e-9)
    mean = bank.scale[0] * bank.b.mean(0) @ bank.a.mean(0)
    torch.testing.assert_close(adapted.model(X), layer.base(X) + X @ mean.T)  # nobody says the task
    with torch.no_grad():
        layer.router.logits.fill_(0.7)
    with adapted.given(task=0):
        torch.testing.assert_close(adapted.model(X), layer.base(X) + X @ mean.T)


def test_mhr_a_single_skill_is_plain_lora_for_every_task_and_its_router_learns_nothing():
    adapted = put(experts=1)
    layer = adapted.layers["0"]
    with adapted.given(task=TASKS):
        y = adapted.model(X)
    torch.testing.assert_close(y, layer.base(X) + X @ layer.experts.delta(0).T, atol=1e-9, rtol=1e-9)
    y.square().sum().backward()
    # not exactly zero: the 1e-12 in the divisor
    assert float(layer.router.logits.grad.abs().max()) < 1e-6 < 1 < float(layer.experts.b.grad.abs().max())
    torch.testing.assert_close(adapted.merge_back()(X), y, atol=1e-9, rtol=1e-9)


def test_mhr_mixing_parameters_is_not_mixing_outputs_but_for_one_hot_mixtures():
    adapted = put(heads=1)
    layer = adapted.layers["0"]

    def outputs_mixed() -> Tensor:
        return layer.base(X) + layer.experts.gated(X, layer.router.mixing(torch.tensor([0]))[:, 0].expand(23, -1))

    with adapted.given(task=0):
        assert (adapted.model(X) - outputs_mixed()).abs().max().item() > 0.1
        one_hot(adapted, 1)
        torch.testing.assert_close(adapted.model(X), outputs_mixed(), atol=1e-9, rtol=1e-9)


def test_mhr_update_of_a_task_has_the_rank_of_one_lora():
    layer = put().layers["0"]
    a, b = layer.merged(layer.router.mixing(torch.tensor([0])))
    singular = torch.linalg.svdvals(b[0] @ a[0])
    assert int((singular > 1e-9 * singular[0]).sum()) == 2


def test_mhr_batch_of_mixed_tasks_equals_separate_batches():
    adapted = put()
    x = torch.randn(6, 5, 8, dtype=torch.float64)
    tasks = torch.tensor([2, 0, 1, 1, 0, 2])
    with adapted.given(task=tasks):
        mixed = adapted.model(x)
    for task in range(3):
        with adapted.given(task=task):
            torch.testing.assert_close(mixed[tasks == task], adapted.model(x[tasks == task]))
    with adapted.given(task=tasks.repeat_interleave(5)):  # one for each token, and rows already flat
        torch.testing.assert_close(adapted.model(x), mixed)
        torch.testing.assert_close(adapted.model(x.flatten(0, 1)), mixed.flatten(0, 1))
    changing = tasks.repeat_interleave(5).roll(2)  # tasks that change within a row
    with adapted.given(task=changing):
        expected = naive(adapted.layers["0"], x.flatten(0, 1), adapted.layers["0"].router.mixing(changing))
        torch.testing.assert_close(adapted.model(x).flatten(0, 1), expected, atol=1e-10, rtol=1e-10)


def test_mhr_tasks_ride_along_when_rows_are_repeated_for_a_beam():
    adapted = put()
    x, tasks = torch.randn(3, 5, 8, dtype=torch.float64), torch.tensor([2, 0, 1])
    with adapted.given(task=tasks):
        single = adapted.model(x)
        with pytest.raises(InputError, match="task has 3 values"):
            adapted.model(x.repeat_interleave(4, 0))
        with adapted.generating():
            beams = adapted.model(x.repeat_interleave(4, 0))  # consecutive rows, as beam search repeats them
    torch.testing.assert_close(beams, single.repeat_interleave(4, 0))


def test_mhr_workbench_model_hands_its_domain_on():
    torch.manual_seed(0)
    model = DecoderLM(20, 16, 1, 2, lambda layer: GLU(16, 24), 8).eval()
    adapted = adapt(model, "mhr", experts=3, rank=2, tasks=4)
    with torch.no_grad():
        for p in adapted.parameters():
            nn.init.normal_(p)
    tokens, domain = torch.randint(20, (3, 8)), torch.tensor([3, 0, 2])
    with_context = model(tokens, Context(domain=domain.repeat_interleave(8)))
    with adapted.given(task=domain):
        assert torch.equal(model(tokens), with_context)
    assert not torch.allclose(model(tokens), with_context)


def peft_pair(heads: int, skills: int = 3, rank: int = 2):
    """The same two layers adapted here and by peft, with the same weights (peft's scale is 1 / r: alpha 1)."""
    from peft import PolyConfig, get_peft_model

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    ours = adapt(copy.deepcopy(model), "mhr", experts=skills, rank=rank, heads=heads, tasks=5)
    config = PolyConfig(r=rank, target_modules=["0", "2"], n_tasks=5, n_skills=skills, n_splits=heads)
    theirs = get_peft_model(model, config)
    for name, layer in ours.layers.items():
        other = theirs.base_model.model.get_submodule(name)
        nn.init.normal_(layer.experts.a), nn.init.normal_(layer.experts.b), nn.init.normal_(layer.router.logits)
        with torch.no_grad():
            a = layer.experts.a.unflatten(2, (heads, -1)).permute(2, 0, 3, 1)  # (H, S, I / H, r)
            b = layer.experts.b.unflatten(1, (heads, -1)).permute(1, 0, 3, 2)  # (H, S, r, O / H)
            other.poly_lora_A["default"].copy_(a), other.poly_lora_B["default"].copy_(b)
            other.poly_router["default"].module_logits.copy_(layer.router.logits)
    return ours, theirs


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("training", [False, True])
def test_mhr_equals_peft_poly_in_outputs_and_gradients(heads, training):
    ours, theirs = peft_pair(heads)
    ours.model.train(training), theirs.train(training)
    x, tasks = torch.randn(6, 4, 8), torch.tensor([0, 4, 2, 2, 1, 3])
    torch.manual_seed(5)  # the relaxed samples are the same ones then
    with ours.given(task=tasks):
        y = ours.model(x)
    torch.manual_seed(5)
    expected = theirs.base_model(x, task_ids=tasks)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    y.square().mean().backward(), expected.square().mean().backward()
    for name, layer in ours.layers.items():
        other = theirs.base_model.model.get_submodule(name)
        a = layer.experts.a.grad.unflatten(2, (heads, -1)).permute(2, 0, 3, 1)
        b = layer.experts.b.grad.unflatten(1, (heads, -1)).permute(1, 0, 3, 2)
        torch.testing.assert_close(a, other.poly_lora_A["default"].grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(b, other.poly_lora_B["default"].grad, atol=1e-5, rtol=1e-4)
        logits = other.poly_router["default"].module_logits.grad
        torch.testing.assert_close(layer.router.logits.grad, logits, atol=1e-5, rtol=1e-4)


def test_mhr_relaxed_samples_differ_by_row_in_training_and_are_none_in_evaluation():
    adapted = put()
    router = adapted.layers["0"].router
    tasks = torch.zeros(2000, dtype=torch.int64)
    assert torch.equal(router.mixing(tasks[:2])[0], router.mixing(tasks[:2])[1])
    router.train()
    drawn = router.mixing(tasks).detach()
    assert (drawn.sum(-1) - 1).abs().max().item() < 1e-6 and not torch.equal(drawn[0], drawn[1])
    # not the same mean: the sampled mixture is a ratio of random numbers
    error = drawn.std(0) / math.sqrt(2000)
    assert float(((drawn.mean(0) - router.eval().mixing(tasks[:1])[0].detach()).abs() / error).max()) > 5
    router.relaxed = False
    assert torch.equal(router.train().mixing(tasks), router.eval().mixing(tasks))


def test_mhr_new_router_is_nearly_uniform_and_its_learning_rate_moves_it():
    def moved(router_lr: float) -> float:
        adapted = put(shake=False, router_lr=router_lr, relaxed=False)
        before = adapted.layers["0"].router.logits.detach().clone()
        assert float(before.abs().max()) <= 1e-3
        optimizer = adapted.optimizer(1e-3)
        for _ in range(20):
            with adapted.given(task=TASKS):
                loss = (adapted.model(X) - X.roll(1, 0).repeat(1, 2)[:, :12]).square().mean()
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        return (adapted.layers["0"].router.logits - before).abs().max().item()

    assert moved(100.0) > 0.5 > 0.05 > moved(1.0)


def test_mhr_task_dropout_withholds_the_task_in_training_only():
    adapted = put(task_dropout=0.4, relaxed=False)
    router = adapted.layers["0"].router
    tasks = torch.ones(2000, dtype=torch.int64)
    told = router.eval().mixing(tasks)
    drawn = router.train().mixing(tasks)
    withheld = (drawn == 0.25).all(-1).all(-1)
    assert 0.35 < float(withheld.double().mean()) < 0.45
    assert torch.equal(drawn[~withheld], told[~withheld])
    adapted.model.train()
    with adapted.given(task=1):
        assert adapted.model(X).shape == (23, 12)


def test_mhr_average_trains_exactly_as_one_adapter_under_adam():
    """MHR-mu: all skills under 1 / S move as their mean does under Adam, whose step has no scale."""
    adapted = put(tune="skills", heads=2)
    bank = adapted.layers["0"].experts
    assert {name.split(".")[-1] for name in adapted.named_parameters()} == {"a", "b"}
    base = copy.deepcopy(adapted.layers["0"].base)
    a, b = (nn.Parameter(p.detach().mean(0)) for p in (bank.a, bank.b))
    ours = torch.optim.Adam(adapted.parameters(), lr=0.01, eps=1e-30)
    theirs = torch.optim.Adam([a, b], lr=0.01, eps=1e-30)
    for step in range(30):
        target = torch.randn(23, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        with adapted.given(task=TASKS):
            loss = (adapted.model(X) - target).square().mean()
        ours.zero_grad(), loss.backward(), ours.step()
        other = (base(X) + bank.scale[0] * X @ a.T @ b.T - target).square().mean()
        theirs.zero_grad(), other.backward(), theirs.step()
    torch.testing.assert_close(bank.a.mean(0), a.detach(), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(bank.b.mean(0), b.detach(), atol=1e-10, rtol=1e-10)


def test_mhr_average_merges_back_and_a_routed_one_does_not():
    adapted = put()
    with pytest.raises(InputError, match="cannot be merged back"):
        adapted.merge_back()
    to_new_tasks(adapted, "skills")
    with adapted.given(task=0):
        expected = adapted.model(X)
    torch.testing.assert_close(adapted.merge_back()(X), expected)


def test_mhr_new_tasks_start_from_fresh_logits_and_train_what_is_wanted():
    adapted = put(heads=4)
    skills = {name: p.detach().clone() for name, p in adapted.layers["0"].experts.named_parameters()}
    to_new_tasks(adapted, "router", tasks=2)
    assert adapted.report()["trained"] == 2 * 4 * 4  # H S numbers a task
    logits = adapted.layers["0"].router.logits
    assert logits.shape == (2, 16) and float(logits.detach().abs().max()) <= 1e-3 and logits.dtype == torch.float64
    optimizer = adapted.optimizer(1e-3)
    with adapted.given(task=TASKS % 2):
        adapted.model(X).square().mean().backward()
    optimizer.step()
    assert float(logits.detach().abs().max()) > 0.05
    assert all(torch.equal(p, skills[name]) for name, p in adapted.layers["0"].experts.named_parameters())
    to_new_tasks(adapted, "all")
    assert adapted.report()["trained"] == 4 * 2 * (8 + 12) + 4 * 4


@pytest.mark.parametrize("tune", ["all", "router", "skills"])
def test_mhr_kept_and_loaded_after_new_tasks_computes_the_same(tune, tmp_path):
    adapted = put()
    to_new_tasks(adapted, tune, tasks=2)
    nn.init.normal_(adapted.layers["0"].router.logits)
    with adapted.given(task=TASKS % 2):
        expected = adapted.model(X)
    adapted.save(tmp_path / "adapter")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12)).double()
    loaded = load_adapter(model, tmp_path / "adapter")
    model.double().eval()
    with loaded.given(task=TASKS % 2):
        torch.testing.assert_close(model(X), expected, atol=1e-6, rtol=1e-6)
    assert loaded.report()["trained"] == adapted.report()["trained"]


def test_mhr_announces_the_allocation_of_the_task():
    adapted, seen = put(), []
    layer = adapted.layers["0"]
    layer.observe(lambda layer, routing, context: seen.append((routing, context)))
    with adapted.given(task=TASKS):
        adapted.model(X)
    routing, context = seen[0]
    torch.testing.assert_close(routing.probs, allocations(adapted)["0"].mean(1)[TASKS])
    torch.testing.assert_close(routing.dense(), routing.probs)
    assert routing.n_tokens == 23 and routing.top_k == 4 and torch.equal(context.domain, TASKS)
    adapted.model(X)
    torch.testing.assert_close(seen[1][0].probs, torch.full((23, 4), 0.25, dtype=torch.float64))
    again = layer.router(X, Context(domain=TASKS))
    torch.testing.assert_close(again.probs, routing.probs)


def test_mhr_monitors_know_the_extremes():
    adapted = put(heads=2)
    router = adapted.layers["0"].router
    with torch.no_grad():
        router.logits.zero_()
    undecided = monitors(router)
    assert undecided["discreteness"] == 1 and undecided["efficiency"] == pytest.approx(1)
    one_hot(adapted, 3)
    decided = monitors(router)
    # one skill of four in each of the two heads: of the eight places two are used, and alike
    assert decided["discreteness"] == 0 and decided["sparsity"] == 0.25
    assert decided["efficiency"] == pytest.approx(math.log(2) / math.log(8), abs=1e-9)


def test_mhr_monitors_are_those_of_the_public_code():
    """Of all places the mean over the tasks first, and then shares: tasks that use much weigh more."""
    router = put(heads=2).layers["0"].router
    torch.manual_seed(2)
    z = 2 * torch.randn_like(router.logits)
    router.logits.data.copy_(z)
    mean = z.sigmoid().mean(0)
    theirs = {
        "sparsity": (z.sigmoid() + 0.5).floor().mean(),
        "discreteness": torch.distributions.Bernoulli(logits=z).entropy().mean() / math.log(2),
        "efficiency": torch.distributions.Categorical(probs=mean / mean.sum()).entropy() / math.log(z.shape[1]),
    }
    assert monitors(router) == {name: pytest.approx(float(value), abs=1e-6) for name, value in theirs.items()}


def test_mhr_fits_small_layers_and_models_with_its_defaults():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    before = model(torch.ones(2, 4))
    adapted = adapt(model, "mhr")
    with adapted.given(task=[0, 31]):
        torch.testing.assert_close(model(torch.ones(2, 4)), before)
    assert [layer.router.n_heads for layer in adapted.layers.values()] == [2, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads is 3 but must divide"),
        ({"heads": 0}, "must all be at least 1"),
        ({"tasks": 0}, "must all be at least 1"),
        ({"experts": 0}, "must all be at least 1"),
        ({"rank": 9}, "rank is 9"),
        ({"task_dropout": 1.0}, "task_dropout is 1.0"),
        ({"tune": "routers"}, "router"),
    ],
)
def test_mhr_refuses_what_it_cannot_do(options, message):
    model = nn.Sequential(nn.Linear(8, 12))
    weight = model[0].weight
    with pytest.raises(InputError, match=message):
        adapt(model, "mhr", **options)
    assert type(model[0]) is nn.Linear and model[0].weight is weight


def test_mhr_refuses_tasks_it_does_not_have():
    adapted = put()
    for task in (3, -1):
        with adapted.given(task=task), pytest.raises(InputError, match="must be from 0 to tasks - 1 = 2"):
            adapted.model(X)
    with adapted.given(task=[0, 1]), pytest.raises(InputError, match="task has 2 values but a layer sees 23 rows"):
        adapted.model(X)
    for call, message in ((("half",), "tune"), (("all", 0), "tasks is 0")):
        with pytest.raises(InputError, match=message):
            to_new_tasks(adapted, *call)
    with pytest.raises(InputError, match="must be one with 'mhr'"):
        to_new_tasks(adapt(nn.Sequential(nn.Linear(8, 8)), "lora"))
