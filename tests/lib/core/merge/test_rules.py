"""What every way to merge keeps, and the exact properties of each."""

import copy
import inspect
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import workbench
from tests import kinds
from workbench import catalogue
from workbench.errors import InputError
from workbench.lib.core.merge import Flat, TaskVectors, make_merger, merger, merger_class, mergers
from workbench.lib.core.merge.adamerging import AdaMerging, entropy_loss, merged_params
from workbench.lib.core.merge.calibration import fisher_diagonal, gram_matrices
from workbench.lib.core.merge.low_rank import polar
from workbench.lib.core.merge.merger import BUILT_IN
from workbench.lib.core.merge.spectral import aligned
from workbench.lib.core.merge.trimmed import Dare
from workbench.lib.core.merge.vectors import Place

N = 3


class Net(nn.Module):
    """Two linear layers, a norm with a buffer's worth of counters, and a head."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 4)
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(x).relu()))


LEARNED = ("regmean", "adamerging", "concrete-subspace")
"""Methods that are of layers, or of modules."""


def nets(n: int = N, dtype: torch.dtype = torch.float32, spread: float = 0.1) -> tuple[Net, list[Net]]:
    torch.manual_seed(0)
    base = Net().to(dtype)
    experts = [copy.deepcopy(base) for _ in range(n)]
    with torch.no_grad():
        for i, expert in enumerate(experts):
            expert.steps += i + 1
            for p in expert.parameters():
                p += spread * torch.randn_like(p)
    return base, experts


def batches(n: int = N, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(16, 6, generator=generator, dtype=dtype) * (i + 1) for _ in range(2)] for i in range(n)]


#: method -> options with which one expert is returned, and copies of an expert are that expert
RETURNING = {
    "average": {},
    "task-arithmetic": {"divide": "weights"},
    "ties": {"density": 1.0},
    "dare": {"density": 1.0, "divide": "weights"},
    "dare-ties": {"density": 1.0},
    "fisher": {},
    "regmean": {},
    "knots": {"density": 1.0},
}
#: method -> options to run it with
RUNNING = {name: {} for name in (*BUILT_IN, "pcb-merging")} | {"dare": {"seed": 3}}
DATA = ("fisher", "regmean", "adamerging")
SCALED = [name for name in RUNNING if "scale" in inspect.signature(merger_class(name)).parameters]


def with_data(method: str, options: dict, n: int = N, dtype: torch.dtype = torch.float32) -> dict:
    return options | ({"batches": batches(n, dtype)} if method in DATA else {})


def close(merged: dict[str, Tensor], model: nn.Module, tolerance: float = 2e-6) -> None:
    state = model.state_dict()
    for name, value in merged.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, state[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("method", [method for method in BUILT_IN if method != "adamerging"])  # which needs a module
@pytest.mark.parametrize("check", [
    kinds.a_merge_keeps_names_shapes_dtypes_and_integers,
    kinds.a_merge_changes_no_input_and_gives_the_same_bits_again,
    kinds.copies_of_the_base_make_the_base,
    kinds.experts_that_differ_make_another_model,
])  # fmt: skip
def test_it_is_a_merge_by_the_contract_of_its_kind(method: str, check):
    """On the state dicts of `kinds`; what the data would have given is given."""

    def build(seed: int):
        def merged(base, experts):
            options = {}
            if method == "fisher":
                options["fishers"] = [{k: v.abs() for k, v in e.items()} for e in experts]
            if method == "regmean":
                options["grams"] = [{"0": torch.eye(8) * (i + 1), "1": torch.eye(12)} for i in range(len(experts))]
            return workbench.merge(base, experts, method, **options)

        return merged

    check(build)


@pytest.mark.parametrize("method", RETURNING)
def test_one_expert_is_returned_and_so_are_copies_of_one(method: str):
    base, experts = nets()
    for given in (experts[:1], experts[:1] * 3):
        options = with_data(method, RETURNING[method], len(given))
        close(workbench.merge(base, given, method, **options), experts[0])


def test_one_expert_is_returned_by_tsv_m_and_learned_weights_of_one():
    base, experts = nets()
    close(workbench.merge(base, experts[:1], "tsv-m"), experts[0], 1e-5)
    options = {"batches": batches(1), "init": 1.0, "steps": 0}
    close(workbench.merge(base, experts[:1], "adamerging", **options), experts[0])


@pytest.mark.parametrize("method", [name for name in RUNNING if name not in ("dare", "dare-ties")])
def test_the_order_of_experts_does_not_matter(method: str):
    base, experts = nets(dtype=torch.float64)
    options = with_data(method, RUNNING[method], dtype=torch.float64)
    turned = options | ({"batches": options["batches"][::-1]} if method in DATA else {})
    merged = workbench.merge(base, experts, method, **options)
    again = workbench.merge(base, experts[::-1], method, **turned)
    for name in merged:
        torch.testing.assert_close(merged[name], again[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", SCALED)
def test_a_scale_of_zero_is_the_base(method: str):
    base, experts = nets()
    merged = workbench.merge(base, experts, method, scale=0.0)
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in merged.items())


@pytest.mark.parametrize("method", RUNNING)
def test_an_excluded_head_is_the_bases_bit_for_bit(method: str):
    base, experts = nets()
    merged = workbench.merge(base, experts, method, exclude="head.*", **with_data(method, {}))
    state = base.state_dict()
    assert all(torch.equal(merged[name], state[name]) for name in ("head.weight", "head.bias", "steps"))
    assert all(not torch.equal(merged[name], state[name]) for name in ("up.weight", "down.weight", "down.bias"))


@pytest.mark.parametrize("method", [method for method in RUNNING if method not in DATA])
def test_a_model_of_bfloat16_is_merged_in_float32(method: str):
    base, experts = nets(dtype=torch.bfloat16)
    wide = [copy.deepcopy(model).float() for model in (base, *experts)]
    merged = workbench.merge(base, experts, method)
    exact = workbench.merge(wide[0], wide[1:], method)
    assert all(torch.equal(merged[name], exact[name].to(merged[name].dtype)) for name in merged)


def ties_loops(tau: list[list[float]], density: float, weights: list[float], elect: str, divide: str) -> list[float]:
    n, p = len(tau), len(tau[0])
    trimmed = []
    for row in tau:
        kept = sorted(range(p), key=lambda k: -abs(row[k]))[: int(density * p)]
        trimmed.append([row[k] if k in kept else 0.0 for k in range(p)])
    merged = []
    for k in range(p):
        votes = {"values": lambda i: 1.0, "weighted": lambda i: weights[i]}[elect]
        sign = 1 if sum(votes(i) * trimmed[i][k] for i in range(n)) >= 0 else -1
        agree = [i for i in range(n) if trimmed[i][k] * sign > 0]
        total = sum(weights[i] * trimmed[i][k] for i in agree)
        divisor = len(agree) if divide == "count" else sum(weights[i] for i in agree)
        merged.append(total / divisor if agree else 0.0)
    return merged


@pytest.mark.parametrize("divide", ["count", "weights"])
@pytest.mark.parametrize("elect", ["values", "weighted"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_ties_is_the_loop_over_weights(elect: str, divide: str, scope: str):
    generator = torch.Generator().manual_seed(2)
    base = {"a": torch.zeros(12, dtype=torch.float64), "b": torch.zeros(3, 6, dtype=torch.float64)}
    experts = [{k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in base.items()} for _ in range(4)]
    weights = [1.0, 0.5, 2.0, 0.1]
    options = dict(density=0.4, weights=weights, elect=elect, divide=divide, scope=scope)
    merged = workbench.merge(base, experts, "ties", **options)
    rows = [[e["a"].tolist(), e["b"].flatten().tolist()] for e in experts]
    if scope == "global":
        expected = ties_loops([a + b for a, b in rows], 0.4, weights, elect, divide)
    else:
        expected = [x for part in zip(*rows, strict=True) for x in ties_loops(list(part), 0.4, weights, elect, divide)]
    found = merged["a"].tolist() + merged["b"].flatten().tolist()
    assert found == pytest.approx(expected, abs=1e-14)


def pair(*rows: list[float]) -> tuple[dict, list[dict]]:
    """A base of zeros and experts with these weights."""
    return {"w": torch.zeros(len(rows[0]))}, [{"w": torch.tensor(row)} for row in rows]


def test_the_sign_of_a_tie_is_plus_or_the_majoritys():
    base, experts = pair([1.0, 2.0, -3.0, -1.0], [-1.0, 1.0, -1.0, -2.0])
    assert workbench.merge(base, experts, "ties", density=1.0)["w"].tolist() == [1, 1.5, -2, -1.5]
    assert workbench.merge(base, experts, "ties", density=1.0, tie="majority")["w"].tolist() == [-1, 1.5, -2, -1.5]
    base, experts = pair([1.0, 2.0, -3.0, 1.0], [-1.0, 1.0, -1.0, 2.0])
    assert workbench.merge(base, experts, "ties", density=1.0, tie="majority")["w"].tolist() == [1, 1.5, -2, 1.5]


def test_signs_are_elected_by_number_where_that_is_asked_for():
    base, experts = pair([3.0, 1.0], [-1.0, 1.0], [-1.0, -5.0])
    assert workbench.merge(base, experts, "ties", density=1.0)["w"].tolist() == [3, -5]
    assert workbench.merge(base, experts, "ties", density=1.0, elect="signs")["w"].tolist() == [-1, 1]


def test_a_density_of_less_than_one_weight_keeps_none_or_one():
    base, experts = pair([1.0, 2.0, -3.0])
    assert workbench.merge(base, experts, "ties", density=0.3)["w"].tolist() == [0, 0, 0]
    assert workbench.merge(base, experts, "ties", density=0.3, least=1)["w"].tolist() == [0, 0, -3]


def test_a_task_vector_that_is_the_same_everywhere_stays_whole():
    base, experts = pair([2.0] * 5, [-1.0] * 5)
    assert workbench.merge(base, experts, "ties", density=0.2)["w"].tolist() == [2.0] * 5


@pytest.mark.parametrize(("method", "peers"), [("ties", 1.0), ("task-arithmetic", 2.0), ("average", 1.0)])
def test_two_copies_with_weights_of_one_are_once_or_twice_the_change(method: str, peers: float):
    base, experts = pair([1.0, -2.0], [1.0, -2.0])
    options = {"density": 1.0} if method == "ties" else {}
    assert workbench.merge(base, experts, method, weights=[1, 1], **options)["w"].tolist() == [peers, -2 * peers]


def test_dare_is_unbiased_and_one_seed_drops_the_same():
    """Over 2000 draws of each of four weights."""
    values = torch.tensor([[1.0, -2.0, 0.5, 3.0], [2.0, 1.0, -1.0, 0.25]])
    base, n = {"w": torch.zeros(2000, 4)}, 2000
    experts = [{"w": row.expand(n, 4)} for row in values]
    found = workbench.merge(base, experts, "dare", density=0.3, seed=7)["w"]
    sigma = (values.square().sum(0) * (1 / 0.3 - 1) / n).sqrt()
    assert ((found.mean(0) - values.sum(0)).abs() < 4 * sigma).all()
    assert torch.equal(found, workbench.merge(base, experts, "dare", density=0.3, seed=7)["w"])
    assert not torch.equal(found, workbench.merge(base, experts, "dare", density=0.3, seed=8)["w"])


def test_dare_keeps_the_sum_of_magnitudes_where_that_is_asked_for():
    generator = torch.Generator().manual_seed(4)
    base = {"a": torch.zeros(40), "b": torch.zeros(30)}
    experts = [{k: torch.randn(v.shape, generator=generator) for k, v in base.items()}]
    merged = workbench.merge(base, experts, "dare", density=0.4, rescale="l1")
    for name in base:
        kept = merged[name] != 0
        assert 0 < kept.sum() < len(kept)
        factor = experts[0][name].abs().sum() / experts[0][name][kept].abs().sum()
        torch.testing.assert_close(merged[name][kept], factor * experts[0][name][kept])
    plain = workbench.merge(base, experts, "dare", density=0.4, rescale=None)
    assert torch.equal(plain["a"][plain["a"] != 0], experts[0]["a"][plain["a"] != 0])


def test_a_piece_of_dare_drops_for_each_expert_anew():
    kept = Dare(0.5).kept(torch.ones(2, 1000), Place("w", 0, 1000, 0))
    assert 0.4 < (kept[0] == kept[1]).float().mean() < 0.6
    assert 0.4 < kept.mean() < 0.6


def test_fisher_of_equal_diagonals_is_the_average_and_of_one_alone_is_that_expert():
    base, experts = nets()
    state = experts[0].state_dict()
    equal = [{name: torch.ones_like(v, dtype=torch.float32) for name, v in state.items()}] * N
    merged, average = workbench.merge(base, experts, "fisher", fishers=equal), workbench.merge(base, experts, "average")
    for name in merged:
        torch.testing.assert_close(merged[name], average[name], rtol=1e-6, atol=1e-6)
    only = [{name: (1e6 if i == 1 else 0.0) * v for name, v in equal[0].items()} for i in range(N)]
    close(workbench.merge(base, experts, "fisher", fishers=only, floor=1e-12), experts[1])
    balanced = [{name: 10.0**i * v for name, v in equal[0].items()} for i in range(N)]
    merged = workbench.merge(base, experts, "fisher", fishers=balanced, balance=True, floor=1e-12)
    for name in merged:
        torch.testing.assert_close(merged[name], average[name], rtol=1e-6, atol=1e-6)


def test_the_fisher_diagonal_of_a_linear_model_is_its_formula():
    torch.manual_seed(1)
    model, x = nn.Linear(3, 4).double(), torch.randn(50, 3, dtype=torch.float64)
    p = model(x).softmax(-1)
    found = fisher_diagonal(model, [x[:20], x[20:]])
    torch.testing.assert_close(found["bias"], (p * (1 - p)).mean(0))
    torch.testing.assert_close(found["weight"], ((p * (1 - p))[:, :, None] * x.square()[:, None]).mean(0))
    many = fisher_diagonal(model, [x] * 40, labels="sampled", seed=5)
    assert not torch.equal(many["bias"], found["bias"])
    torch.testing.assert_close(many["bias"], found["bias"], rtol=0.15, atol=0)


def test_regmean_is_the_minimum_of_what_it_says():
    base, experts = nets(dtype=torch.float64)
    data = batches(dtype=torch.float64)
    merged = workbench.merge(base, experts, "regmean", batches=data, off_diagonal=1.0, ridge=0.0)
    grams = [gram_matrices(expert, own) for expert, own in zip(experts, data, strict=True)]
    for layer in ("up", "down", "head"):
        weight = merged[f"{layer}.weight"].clone().requires_grad_()
        pairs = zip(experts, grams, strict=True)
        gaps = [(weight - e.get_submodule(layer).weight.detach(), g[layer]) for e, g in pairs]
        sum((gap @ gram * gap).sum() for gap, gram in gaps).backward()
        assert weight.grad.abs().max() < 1e-8 and weight.grad.abs().max() < 1e-8 * max(g.max() for _, g in gaps) + 1e-8
    torch.testing.assert_close(merged["up.bias"], sum(e.up.bias.detach() for e in experts) / N)


def test_regmean_averages_where_no_input_has_been_and_says_so_without_a_ridge():
    base, experts = {"0.weight": torch.zeros(2, 3)}, [{"0.weight": torch.full((2, 3), float(i))} for i in (1, 3)]
    grams = [{"0": torch.diag(torch.tensor([1.0, 0.0, 0.0]))}, {"0": torch.diag(torch.tensor([3.0, 0.0, 0.0]))}]
    merged = workbench.merge(base, experts, "regmean", grams=grams)["0.weight"]
    torch.testing.assert_close(merged, torch.tensor([[2.5, 2.0, 2.0]] * 2), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"grams of 0\.weight .* ridge"):
        workbench.merge(base, experts, "regmean", grams=grams, ridge=0.0)


def test_gram_matrices_are_of_the_inputs():
    base, _ = nets(dtype=torch.float64)
    (data,) = batches(1, torch.float64)
    grams, x = gram_matrices(base.train(), data), torch.cat(data)
    torch.testing.assert_close(grams["up"], x.T @ x / len(x))
    hidden = base.up(x).relu()
    torch.testing.assert_close(grams["down"], (hidden.T @ hidden / len(x)).detach())
    assert base.training and not base.up._forward_pre_hooks


def test_knots_of_sums_is_task_arithmetic_and_aligns_by_one_basis():
    base, experts = nets(dtype=torch.float64)
    options = dict(weights=[0.3, 0.5, 0.9], scale=0.7)
    knots = workbench.merge(base, experts, "knots", density=1.0, elect=None, divide=None, tolerance=0.0, **options)
    plain = workbench.merge(base, experts, "task-arithmetic", **options)
    for name in (name for name in knots if name.endswith("weight")):
        torch.testing.assert_close(knots[name], plain[name])
    tau = TaskVectors(base, experts).deltas("up.weight")
    u, blocks = aligned(tau, 0.0)
    torch.testing.assert_close(u @ blocks, tau)
    torch.testing.assert_close(u.T @ u, torch.eye(u.shape[1], dtype=u.dtype))


def test_knots_trims_the_blocks_of_all_matrices_together_or_of_each():
    base, experts = nets()
    with torch.no_grad():
        for expert in experts:  # so large that a share of all is of this one
            expert.up.weight += 100 * (expert.up.weight - base.up.weight)
    both = [workbench.merge(base, experts, "knots", density=0.2, scope=scope) for scope in ("global", "tensor")]
    state = base.state_dict()
    assert torch.equal(both[0]["head.weight"], state["head.weight"])
    assert not torch.equal(both[1]["head.weight"], state["head.weight"])


def test_tsv_m_keeps_what_lies_in_orthogonal_directions():
    """Of tasks that change directions of their own, each change is kept whole."""
    torch.manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q for _ in range(2))
    base = {"w": torch.zeros(8, 8, dtype=torch.float64)}
    s = torch.linspace(4, 1, 8, dtype=torch.float64)
    experts = [{"w": u[:, part] * s[part] @ v[:, part].T} for part in (slice(0, 4), slice(4, 8))]
    merged = workbench.merge(base, experts, "tsv-m")["w"]
    torch.testing.assert_close(merged, experts[0]["w"] + experts[1]["w"])
    q = polar(torch.randn(9, 4, dtype=torch.float64))
    torch.testing.assert_close(q.T @ q, torch.eye(4, dtype=torch.float64))
    many = [{"w": torch.randn(8, 8, dtype=torch.float64)} for _ in range(10)]  # more tasks than directions
    assert workbench.merge(base, many, "tsv-m")["w"].isfinite().all()


def test_entropy_is_log_c_of_even_logits_and_torchs():
    assert entropy_loss(torch.zeros(5, 7)).item() == pytest.approx(math.log(7))
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(entropy_loss(logits), torch.distributions.Categorical(logits=logits).entropy().mean())
    assert entropy_loss(torch.tensor([[900.0, 0.0, 0.0]])).item() == 0


def test_merged_params_have_the_gradient_of_finite_differences_to_weights_and_mask_alone():
    base, experts = nets(dtype=torch.float64)
    vectors = TaskVectors(base, experts)
    deltas = {name: vectors.deltas(name) for name in vectors.names}
    values = {name: vectors.base.whole(name).requires_grad_() for name in vectors.names}
    ((x, _),) = batches(1, torch.float64)
    mask = torch.rand(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ones = {name: torch.ones_like(value) for name, value in values.items()}

    def loss(weights: Tensor, mask: Tensor) -> Tensor:
        merged = merged_params(values, deltas, weights, ones | {"up.weight": mask})
        return entropy_loss(torch.func.functional_call(base, merged, (x,)))

    for shape in ((N,), (N, len(deltas))):
        weights = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(loss, (weights, mask), fast_mode=True)
        loss(weights, mask).backward()
    assert all(value.grad is None for value in values.values())
    with pytest.raises(InputError, match="weights has shape"):
        merged_params(values, deltas, torch.ones(N + 1))


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_adamerging_makes_the_merged_model_surer_and_leaves_the_base_alone(granularity: str):
    base, experts = nets(spread=0.5)
    before = copy.deepcopy(base.state_dict())
    data = batches()
    options = dict(batches=data, granularity=granularity, lr=1e-2)

    def entropy(steps: int) -> float:
        state = workbench.merge(base, experts, "adamerging", steps=steps, **options)
        model = copy.deepcopy(base)
        model.load_state_dict(state)
        with torch.no_grad():
            return sum(float(entropy_loss(model(x))) for own in data for x in own)

    assert entropy(30) < entropy(0) - 0.01
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items()) and base.training
    weights = AdaMerging(steps=3, **options).fit(TaskVectors(base, experts))
    assert weights.shape == (N, 6) and (granularity == "layer" or (weights == weights[:, :1]).all())


def test_heads_make_logits_of_what_the_merged_model_says():
    base, experts = nets(2)
    heads = [nn.Linear(4, 3), nn.Linear(4, 5)]
    options = dict(batches=batches(2), heads=heads, steps=3, lr=0.1)
    merged = workbench.merge(base, experts, "adamerging", **options)
    assert not torch.equal(
        merged["up.weight"],
        workbench.merge(base, experts, "adamerging", batches=batches(2), steps=3, lr=0.1)["up.weight"],
    )


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tise", {}, "did you mean 'ties'"),
        ("ties", {"densty": 0.2}, "did you mean 'density'"),
        ("ties", {"density": 0.0}, "density is 0.0 but must be above 0 and at most 1"),
        ("ties", {"density": 1.5}, "density is 1.5"),
        ("ties", {"density": "0.2"}, "must be a finite number"),
        ("ties", {"elect": "value"}, "option elect of ties is 'value' but must be 'values' or 'weighted'"),
        ("ties", {"weights": [1.0]}, "weights has 1 numbers but must have one for each of 3"),
        ("ties", {"weights": [1.0, float("nan"), 1.0]}, "weights"),
        ("average", {"weights": [1.0, -1.0, 0.0]}, "the sum 0"),
        ("dare", {"density": 0.0}, "density is 0.0"),
        ("fisher", {}, "either fishers or batches"),
        ("fisher", {"fishers": [{}] * 3}, r"fishers\[0\] has no up.weight, .* 6 names in all"),
        ("fisher", {"fishers": [{}] * 2}, "fishers has 2 entries"),
        ("fisher", {"floor": 0.0}, "floor is 0.0"),
        ("regmean", {"grams": [{}] * 3}, "no layer"),
        ("regmean", {"grams": [{"up": torch.eye(6)}, {}, {}]}, r"grams\[1\] has no 'up' of shape \(6, 6\)"),
        ("regmean", {"off_diagonal": 2.0}, "off_diagonal is 2.0"),
        ("adamerging", {}, "adamerging needs batches"),
        ("adamerging", {"batches": [[], [], []]}, r"batches\[0\] is empty"),
        ("knots", {"tolerance": 1.0}, "tolerance is 1.0"),
        ("average", {"weights": [0.1, 0.2, -0.3]}, "the sum 0, or next to it"),
        ("fisher", {"batches": [1, 2, 3]}, r"batches\[0\] is a int but must be a list of batches"),
        ("fisher", {"batches": [torch.randn(8, 6)] * 3}, r"batches\[0\] is a Tensor but must be a list of batches"),
        ("fisher", {"batches": [[torch.zeros(0, 6)]] * 3}, "at least one sample"),
        ("fisher", {"batches": [[torch.full((2, 6), float("nan"))]] * 3}, "no finite answer"),
        (
            "fisher",
            {"batches": [[torch.ones(2, 6)]] * 3, "seed": 2**64},
            "option seed of fisher is 18446744073709551616",
        ),
        ("regmean", {"batches": ["abc"] * 3}, r"batches\[0\] is a str"),
        ("regmean", {"grams": [1, 2, 3]}, r"grams\[0\] must hold tensors by the names of layers"),
        ("regmean", {"grams": [{"up": 1}] * 3}, r"grams\[0\] must hold tensors"),
        ("regmean", {"grams": [{"up": -torch.eye(6)}] * 3}, "no sum of squares"),
        ("adamerging", {"batches": [{"x": torch.ones(2, 6)}] * 3}, r"batches\[0\] is a dict"),
        ("adamerging", {"batches": [[torch.zeros(0, 6)]] * 3}, r"batches\[0\] .* at least one with a row"),
        ("adamerging", {"batches": [[]] * 3, "heads": [1, 2, 3]}, "heads .* must be a list, each a function or None"),
        ("concrete", {"batches": [[]] * 3, "mask_lr": -1.0}, "mask_lr is -1.0 but must be above 0 and at most 1"),
        ("concrete", {"batches": [[]] * 3, "inner_lr": -1.0}, "inner_lr is -1.0 but must be at least 0"),
        ("concrete", {"batches": [[]] * 3, "temperature": 0.0}, "temperature is 0.0"),
        ("rmm", {"task": 3, "include": "up.bias"}, "task is 3 but must be from 0 to 2"),
        ("rmm", {"task": 0, "p": 3, "include": "up.bias"}, "p is 3 but must be from 0 to experts - 1, 2"),
        ("lora-lego", {"seed": 2**40}, "seed is 1099511627776 but must be"),
    ],
)
def test_wrong_options_are_refused_by_name(method: str, options: dict, message: str):
    base, experts = nets()
    with pytest.raises(InputError, match=message):
        workbench.merge(base, experts, method, **options)


def test_an_unknown_method_is_told_all_of_them():
    with pytest.raises(InputError) as error:
        workbench.merge({}, [], "none")
    assert all(name in str(error.value) for name in mergers())


@pytest.mark.parametrize("method", ["fisher", "regmean", "adamerging", "concrete"])
def test_a_weight_that_is_not_finite_is_the_expert_s_before_data_is_run_through_it(method: str):
    base, experts = nets()
    experts[1].up.weight.data[0, 1] = float("nan")
    with pytest.raises(InputError, match=r"up\.weight of experts\[1\] has 1 weights that are not finite"):
        workbench.merge(base, experts, method, batches=batches())


def test_only_the_ratios_of_fisher_s_weights_matter_however_small():
    base, experts = nets()
    fishers = [{name: torch.rand_like(p) for name, p in base.named_parameters()} for _ in experts]
    expected = workbench.merge(base, experts, "fisher", fishers=fishers, weights=[1.0, 2.0, 0.5])
    for power in (-1000, -300, 300, 900):
        weights = [w * 2.0**power for w in (1.0, 2.0, 0.5)]
        merged = workbench.merge(base, experts, "fisher", fishers=fishers, weights=weights)
        assert all(torch.equal(merged[name], expected[name]) for name in merged)


def test_fisher_finds_tied_weights_by_any_of_their_names(tmp_path: Path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, i: Tensor) -> Tensor:
            return self.head(self.embed(i).tanh()).mean(1)

    torch.manual_seed(0)
    base, experts = Tied(), [Tied() for _ in range(2)]
    data = [[torch.randint(6, (5, 3))] for _ in experts]
    expected = workbench.merge(base, experts, "fisher", batches=data)
    for name in ("embed.weight", "head.weight"):
        save_file({name: base.head.weight.detach()}, tmp_path / "base.safetensors")
        merged = workbench.merge(tmp_path / "base.safetensors", experts, "fisher", batches=data)
        assert list(merged) == [name] and torch.equal(merged[name], expected["embed.weight"])
    plain = workbench.merge(base, experts, "average")["embed.weight"]
    assert not torch.allclose(expected["embed.weight"], plain, atol=1e-3)


@pytest.mark.parametrize("method", [name for name in mergers() if name not in LEARNED])
@pytest.mark.parametrize("shape", [(0, 3), (5,), ()])
def test_models_without_a_matrix_or_without_a_weight_are_merged(method: str, shape: tuple):
    states = [{"w": torch.arange(math.prod(shape), dtype=torch.float32).view(shape) * i} for i in range(3)]
    options = {"fisher": {"fishers": states[1:]}, "rmm": {"task": 0}}.get(method, {})
    merged = workbench.merge(states[0], states[1:], method, **options)["w"]
    assert merged.shape == shape and merged.isfinite().all()


def test_regmean_averages_a_layer_that_no_input_has_reached():
    base, experts = {"0.weight": torch.zeros(2, 3)}, [{"0.weight": torch.full((2, 3), float(i))} for i in (1, 3)]
    merged = workbench.merge(base, experts, "regmean", grams=[{"0": torch.zeros(3, 3)}] * 2)
    assert torch.equal(merged["0.weight"], torch.full((2, 3), 2.0))


def test_what_needs_a_module_says_so():
    base, experts = nets()
    states = [expert.state_dict() for expert in experts]
    with pytest.raises(InputError, match=r"experts\[0\] is no module.*give fishers"):
        workbench.merge(base, states, "fisher", batches=batches())
    with pytest.raises(InputError, match="base is no module"):
        workbench.merge(base.state_dict(), states, "adamerging", batches=batches())


def test_a_system_of_the_catalogue_is_found_by_its_slug_or_by_a_word_of_it(monkeypatch: pytest.MonkeyPatch):
    class Doubled(Flat):
        """Twice the sum."""

        def vector(self, tau, facts):
            return 2 * tau.sum(0)

    rows = [SimpleNamespace(slug=slug, merges=True, module=f"made.{slug}") for slug in ("pcb-merging", "other-merging")]
    made = SimpleNamespace(methods=lambda: rows, method=lambda slug: next(row for row in rows if row.slug == slug))
    monkeypatch.setattr(merger, "catalogue", made)
    monkeypatch.setitem(sys.modules, "made.pcb-merging", SimpleNamespace(MERGER=Doubled))
    assert mergers() == [*BUILT_IN, "pcb-merging", "other-merging"]
    base, experts = pair([1.0, 2.0], [3.0, -1.0])
    for name in ("pcb", "pcb-merging"):
        assert workbench.merge(base, experts, name)["w"].tolist() == [8, 2]
    with pytest.raises(InputError, match=r"method 'merging' is unknown.*Allowed: .*pcb-merging"):
        workbench.merge(base, experts, "merging")


def test_a_file_that_assigns_a_merger_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catalogue, "PACKAGE", tmp_path)
    row = catalogue.Method("a-b", "t", "merging", 2024, "p", "c")
    row.path.parent.mkdir(parents=True)
    row.path.write_text("class Merge: ...\n")
    assert not row.merges
    row.path.write_text("class Merge: ...\n\nMERGER = Merge\n")
    assert row.merges


def test_every_method_is_found_by_its_name():
    assert set(BUILT_IN) <= set(mergers())
    assert all(merger_class(name).__doc__ for name in mergers())
    assert make_merger("ties", {"density": 0.5}).density == 0.5
    with pytest.raises(InputError, match="method 'arithmetic' is unknown"):
        merger_class("arithmetic")
