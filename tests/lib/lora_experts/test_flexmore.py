"""FlexMoRE: experts trained apart on one public model, cut to ranks of their own, and merged."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.freeze import moved
from workbench.errors import InputError
from workbench.lib.core.adapt import adapt, load_adapter
from workbench.lib.core.adapt.expert_ffn import RoutedFeedForward
from workbench.lib.core.experts import GLU
from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.routing import Context, Routing
from workbench.lib.lora_experts.flexmore import (
    FullExperts,
    break_even_rank,
    count_parameters,
    domain_rows,
    merge_experts,
    rank_for_energy,
    set_rows,
    take_expert,
)
from workbench.live.probes import find

X = torch.randn(31, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def public(double: bool = True) -> nn.Module:
    """A block, a linear layer by itself, and another block."""
    torch.manual_seed(0)
    model = nn.Sequential(Llama(), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 8)))
    return model.double() if double else model


def owned(seed: int, **options):
    """An adaptation of the public model with a trained expert: random numbers take the place of training."""
    adapted = adapt(public(), "flexmore", **options)
    adapted.model.double()
    generator = torch.Generator().manual_seed(99)
    for layer in adapted.layers.values():  # the public rows are the same for all owners
        layer.router.public.normal_(generator=generator)
    generator.manual_seed(seed)
    with torch.no_grad():
        for name, p in adapted.named_parameters().items():
            p.normal_(std=0.5 if "router" in name else 0.3, generator=generator)
    return adapted


def experts(*seeds: int):
    return [take_expert(owned(seed)) for seed in seeds]


def merged(states, **options):
    adapted = merge_experts(public(), states, **options)
    adapted.model.double()
    return adapted


def naive(layer, x: Tensor, routing: Routing, deltas) -> Tensor:
    """Each expert as a block of its own with dense weights; all of them on every token, those not chosen at weight 0.

    deltas: expert -> matrix -> (O, I), the public one not among them.
    """
    gates, total = routing.dense(), 0.0
    linears = layer.block.linears if isinstance(layer, RoutedFeedForward) else {"": layer.base}

    def call(key: str, e: int, h: Tensor) -> Tensor:
        update = 0.0 if e == 0 else deltas[e - 1][key]
        return F.linear(h, linears[key].weight + update, linears[key].bias)

    for e in range(len(deltas) + 1):
        if not isinstance(layer, RoutedFeedForward):
            y = call("", e, x)
        else:
            block = layer.block
            gate = call(block.gate, e, x) if block.gate else None
            y = call(block.down, e, block.activate(gate, call(block.up, e, x)))
        total = total + gates[:, e : e + 1] * y
    return total


def test_flexmore_new_expert_is_the_public_model_and_trains_the_matrices_themselves():
    adapted = adapt(public(double=False), "flexmore")
    x = X.float()
    torch.testing.assert_close(adapted.model(x), public(double=False)(x), atol=1e-6, rtol=1e-6)
    bank = adapted.layers["0"].experts["gate_proj"]
    assert isinstance(bank, FullExperts) and bank.n_experts == 2 and (bank.d_in, bank.d_out) == (8, 12)
    blocks = [3 * 8 * 12, 8 * 8, 2 * 8 * 10]
    assert adapted.report()["trained"] == sum(blocks) + 3 * (8 + 1)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("renormalize", [False, True])
def test_flexmore_mixture_equals_dense_experts_in_outputs_and_gradients(top_k, renormalize):
    adapted = merged(experts(1, 2), rank=[0, 0], top_k=top_k, renormalize=renormalize)
    for name in ("0", "1", "2"):
        layer, x = adapted.layers[name], X.clone().requires_grad_()
        routing = layer.router(x, Context())
        banks = dict(layer.experts.items()) if name != "1" else {"": layer.experts}
        deltas = [{key: bank.updates[e].weight for key, bank in banks.items()} for e in range(2)]
        y, expected = layer(x), naive(layer, x, routing, deltas)
        torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
        seed = torch.randn_like(y)
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        pairs = zip(
            torch.autograd.grad((y * seed).sum(), wanted, allow_unused=True),
            torch.autograd.grad((expected * seed).sum(), wanted, allow_unused=True),
            strict=True,
        )
        for ours, theirs in pairs:
            zero = torch.zeros(1, dtype=torch.float64)
            a, b = (zero if g is None else g for g in (ours, theirs))
            torch.testing.assert_close(*torch.broadcast_tensors(a, b), atol=1e-10, rtol=1e-10)


def test_flexmore_full_experts_are_a_bank_as_any_other():
    torch.manual_seed(0)
    for d_in, d_out in ((5, 9), (9, 5), (6, 6)):
        full = FullExperts(4, d_in, d_out).double()
        with torch.no_grad():
            for layer in full.updates:
                layer.weight.normal_()
        assert not full.delta(0).any()
        x = torch.randn(20, d_in, dtype=torch.float64)
        chosen = torch.stack([torch.randperm(4)[:2] for _ in range(20)])
        routing = Routing.fixed(chosen, torch.rand(20, 2, dtype=torch.float64), 4)
        expected = torch.einsum("ne,eoi,ni->no", routing.dense(), torch.stack([full.delta(e) for e in range(4)]), x)
        torch.testing.assert_close(full(x, routing), expected)
        torch.testing.assert_close(full.gated(x, routing.dense()), expected)
        nobody = Routing.fixed(torch.zeros(20, 1, dtype=torch.int64), torch.ones(20, 1, dtype=torch.float64), 4)
        assert not full(x, nobody).any()


def test_flexmore_cut_is_the_best_of_its_rank_and_its_error_is_what_was_dropped():
    (expert,) = experts(1)
    update = expert.updates["0"]["gate_proj"]
    singular = torch.linalg.svdvals(update)
    for rank in (1, 3, 8):
        a, b = expert.cut("0", "gate_proj", rank)
        error = (update - b @ a).square().sum()
        torch.testing.assert_close(error, singular[rank:].square().sum(), atol=1e-12, rtol=1e-9)
        for seed in range(50):  # the best of this rank with a random row space
            other = torch.randn(rank, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            fitted = update @ torch.linalg.pinv(other) @ other
            assert error <= (update - fitted).square().sum() + 1e-12
        torch.testing.assert_close(a @ a.T, torch.diag(singular[:rank]), atol=1e-12, rtol=1e-9)  # balanced
        torch.testing.assert_close(b.T @ b, torch.diag(singular[:rank]), atol=1e-12, rtol=1e-9)
    smaller, larger = expert.cut("0", "gate_proj", 2), expert.cut("0", "gate_proj", 5)  # nested
    assert torch.equal(smaller[0], larger[0][:2]) and torch.equal(smaller[1], larger[1][:, :2])
    core = LowRankExperts.from_deltas(update[None], [3])
    torch.testing.assert_close(core.delta(0), torch.mm(*expert.cut("0", "gate_proj", 3)[::-1]).float())


def test_flexmore_it_is_the_difference_that_is_cut_not_the_matrix():
    (expert,) = experts(1)
    tiny = {name: {key: 1e-3 * update for key, update in parts.items()} for name, parts in expert.updates.items()}
    expert.updates.clear(), expert.updates.update(tiny)
    ours = merged([expert], rank=1).model(X)
    torch.testing.assert_close(ours, public()(X), atol=0.02, rtol=0.02)  # a cut of W + D to rank 1 would be far off


def test_flexmore_full_rank_is_the_full_mixture():
    states = experts(1, 2)
    full, cut, mixed = merged(states, rank=0), merged(states, rank=8), merged(states, rank=[0, 8])
    assert isinstance(cut.layers["1"].experts, LowRankExperts)
    expected = full.model(X)
    torch.testing.assert_close(cut.model(X), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed.model(X), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top_k", [2, 4])
def test_flexmore_padded_bank_equals_experts_one_by_one_at_their_own_ranks(top_k):
    states, ranks = experts(1, 2, 3), [1, 5, 0]
    adapted = merged(states, rank=ranks, top_k=top_k)
    for name in ("0", "1", "2"):
        layer = adapted.layers[name]
        deltas = [
            {key: torch.mm(*state.cut(name, key, rank)[::-1]) for key in state.updates[name]}
            for state, rank in zip(states, ranks, strict=True)
        ]
        torch.testing.assert_close(layer(X), naive(layer, X, layer.router(X, Context()), deltas), atol=1e-6, rtol=1e-6)
    bank = adapted.layers["0"].experts["gate_proj"]
    assert bank.rank == 8 and not bank.a[0].any() and not bank.a[1, 1:].any() and bank.a[3].any()


def test_flexmore_padding_stays_zero_in_training():
    adapted = adapt(public(), "flexmore", experts=4, rank=[1, 3, 0], top_k=4)
    adapted.model.double()
    optimizer = adapted.optimizer(0.05)
    for _ in range(4):
        optimizer.zero_grad()
        (adapted.model(X) - X.roll(1, 0)).square().mean().backward()
        optimizer.step()
    for layer in adapted.layers.values():
        for bank in layer.experts.values() if isinstance(layer, RoutedFeedForward) else [layer.experts]:
            for e, width in enumerate((0, 1, 3, bank.rank)):
                assert not bank.a[e, width:].any() and not bank.b[e, :, width:].any()
                assert width == 0 or bank.b[e, :, :width].any()


def test_flexmore_without_updates_the_output_is_the_public_block_times_the_sum_of_the_weights():
    """Only weights that sum to 1 give the public model back: the trap of leaving them as they are."""
    for top_k, renormalize, whole in ((2, False, False), (2, True, True), (4, False, True)):
        adapted = adapt(public(), "flexmore", experts=4, top_k=top_k, renormalize=renormalize)
        adapted.model.double()
        for name in ("0", "1", "2"):
            layer = adapted.layers[name]
            routing = layer.router(X, Context())
            share = routing.weights.sum(1, keepdim=True)
            assert bool((share < 0.9).all()) is not whole and bool((share <= 1 + 1e-9).all())
            linears = layer.block.linears if isinstance(layer, RoutedFeedForward) else None
            expected = share * layer.base(X)
            assert linears is None or set(linears) == set(layer.experts)
            torch.testing.assert_close(layer(X), expected, atol=1e-6, rtol=1e-6)


def test_flexmore_training_apart_leaves_everything_public_as_it_was():
    adapted = adapt(public(), "flexmore")
    adapted.model.double()
    optimizer = adapted.optimizer(0.05)

    def train_apart(model: nn.Module) -> None:
        for _ in range(5):
            optimizer.zero_grad()
            ((model(X) - X.roll(1, 0)).square().mean() + sum(adapted.losses().values())).backward()
            optimizer.step()

    changed = moved(adapted.model, train_apart)
    assert all("updates" in name or "router.rows" in name or "router.handicap" in name for name in changed)
    assert any("updates" in name for name in changed) and any("rows" in name for name in changed)
    expected = public()
    assert all(torch.equal(p, expected.state_dict()[name]) for name, p in adapted.remove().state_dict().items())


def test_flexmore_handicap_is_never_an_advantage_and_is_dropped_in_the_merge():
    adapted = owned(1)
    router = adapted.layers["0"].router
    with torch.no_grad():
        router.handicap.fill_(5.0)
    plain = X @ torch.cat([router.public[None], router.rows]).T
    torch.testing.assert_close(router(X, Context()).logits, plain)
    with torch.no_grad():
        router.handicap.fill_(-2.0)
    torch.testing.assert_close(router(X, Context()).logits, plain - torch.tensor([0.0, 2.0], dtype=torch.float64))
    assert "z" in router(X, Context()).losses and router.coefficients == {"z": 0.001}
    assert merged([take_expert(adapted)]).layers["0"].router.handicap is None


def test_flexmore_merging_one_domain_gives_its_two_expert_model_back():
    adapted = owned(1, handicap=False)
    torch.testing.assert_close(merged([take_expert(adapted)]).model(X), adapted.model(X), atol=1e-6, rtol=1e-6)


def test_flexmore_order_of_the_merge_does_not_matter():
    a, b, c = experts(1, 2, 3)
    one, other = merged([a, b, c], rank=[0, 2, 3], top_k=3), merged([c, a, b], rank=[3, 0, 2], top_k=3)
    torch.testing.assert_close(one.model(X), other.model(X), atol=1e-6, rtol=1e-6)


def test_flexmore_opting_out_is_routing_over_the_experts_that_are_left():
    a, b, c = experts(1, 2, 3)
    everyone, left = merged([a, b, c]), merged([a, c])
    for name in ("0", "1", "2"):
        logits = everyone.layers[name].router(X, Context()).logits
        probs = logits[:, [0, 1, 3]].softmax(1)
        torch.testing.assert_close(left.layers[name].router(X, Context()).probs, probs, atol=1e-6, rtol=1e-6)
    layer, deltas = left.layers["0"], [state.updates["0"] for state in (a, c)]
    expected = naive(layer, X, layer.router(X, Context()), deltas)
    torch.testing.assert_close(layer(X), expected, atol=1e-6, rtol=1e-6)


def test_flexmore_router_alone_can_be_trained_after_the_merge():
    adapted = merged(experts(1, 2), rank=2, tune="router")
    assert {name.split(".", 1)[1] for name in adapted.named_parameters()} == {"router.rows"}
    assert adapted.report()["trained"] == 3 * 2 * 8


def test_flexmore_rows_begin_as_the_mean_of_what_a_layer_is_given():
    adapted = adapt(public(), "flexmore")
    adapted.model.double()
    rows = domain_rows(adapted, lambda model: [model(part) for part in X.split(10)])
    for name, x in (("0", X), ("1", public()[0](X))):
        mean = x.mean(0) - x.mean()
        torch.testing.assert_close(rows[name], (mean / mean.norm()).float())
    other = {name: row.flip(0) for name, row in rows.items()}
    set_rows(adapted, rows, other)
    router = adapted.layers["1"].router
    torch.testing.assert_close(router.public.float(), rows["1"])
    torch.testing.assert_close(router.rows[0].float(), other["1"])
    with torch.no_grad():
        adapted.layers["1"].experts.updates[0].weight.fill_(1.0)
    with pytest.raises(InputError, match="must still be the public model"):
        domain_rows(adapted, lambda model: model(X))
    with pytest.raises(InputError, match="rows has 2 entries"):
        set_rows(adapted, rows, other, other)


def test_flexmore_sizes_are_those_of_the_paper():
    d, f, layers = 4096, 11008, 32
    block = [(f, d), (f, d), (d, f)]
    assert layers * count_parameters(block, [0]) == 4_328_521_728
    assert layers * count_parameters(block, [1]) == 1_449_984
    assert int(break_even_rank(d, f)) == 2985
    assert count_parameters(block, [2985]) < count_parameters(block, [0]) < count_parameters(block, [2986])
    assert count_parameters(block, [0, 1, 7]) == count_parameters(block, [0]) + 8 * count_parameters(block, [1])


def test_flexmore_counted_parameters_are_those_of_trained_experts():
    shapes = [(12, 8), (12, 8), (8, 12), (8, 8), (10, 8), (8, 10)]
    trained = adapt(public(), "flexmore", experts=3, rank=2, handicap=False).report()["trained"]
    stored = 3 * count_parameters(shapes, [2])  # the zeros of the public expert are stored as well
    assert trained == stored + 3 * 2 * 8 and count_parameters(shapes, [2, 2]) == stored * 2 // 3
    trained = adapt(public(), "flexmore", experts=3, handicap=False).report()["trained"]
    assert trained == count_parameters(shapes, [0, 0]) + 3 * 2 * 8


def test_flexmore_energy_says_which_rank_keeps_it():
    singular = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert [rank_for_energy(singular, share) for share in (0.1, 9 / 14, 0.65, 13 / 14, 1.0)] == [1, 1, 2, 2, 3]
    (expert,) = experts(1)
    energies = [expert.energy(rank) for rank in range(9)]
    assert energies[0] == 0 and energies == sorted(energies) and energies[8] == pytest.approx(1)
    with pytest.raises(InputError, match="share is 0"):
        rank_for_energy(singular, 0)


@pytest.mark.parametrize("rank", [0, [1, 0], [2, 3]])
def test_flexmore_kept_and_loaded_computes_the_same(rank, tmp_path):
    states = experts(1, 2)
    adapted = merged(states, rank=rank, top_k=2)
    adapted.save(tmp_path / "adapter")
    loaded = load_adapter(public(), tmp_path / "adapter")
    loaded.model.double()
    torch.testing.assert_close(loaded.model(X), adapted.model(X), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="cannot be merged back"):
        loaded.merge_back()


def test_flexmore_live_views_see_its_blocks_and_the_spectra_of_its_experts():
    torch.manual_seed(0)
    model = DecoderLM(20, 16, 2, 2, lambda layer: GLU(16, 24), 8)
    adapted = adapt(model, "flexmore", "*.ffn.*")
    found = find.blocks(model)
    assert [(block.n_experts, block.top_k) for block in found] == [(2, 2)] * 2
    seen = []
    adapted.layers["blocks.0.ffn"].observe(lambda layer, routing, context: seen.append(routing))
    context = Context()
    model(torch.randint(20, (2, 8)), context)
    torch.testing.assert_close(seen[0].probs.sum(1), torch.ones(16))
    assert context.aux.item() > 0  # the z-loss
    assert any("updates.0" in matrix.name for matrix in find.matrices(model, found))
    adapted.remove()
    adapt(model, "flexmore", "*.ffn.*", experts=3, rank=2)
    low_rank = [m for m in find.matrices(model, find.blocks(model)) if isinstance(m, find.LowRank)]
    assert {matrix.expert for matrix in low_rank} == {0, 1, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, "experts is 1 but must be at least 2"),
        ({"top_k": 3}, "top_k is 3"),
        ({"rank": 9}, "rank is 9 but must be 0, for a full expert, or between 1"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": [1, 2]}, "rank has 2 entries"),
        ({"tune": "rows"}, "tune"),
        ({"ranks": 1}, "rank"),
    ],
)
def test_flexmore_refuses_what_it_cannot_do(options, message):
    with pytest.raises(InputError, match=message):
        adapt(public(), "flexmore", **options)


def test_flexmore_refuses_experts_that_do_not_belong_together():
    a, b = experts(1, 2)
    other = copy.deepcopy(b)
    other.public["0"][0] += 1
    with pytest.raises(InputError, match=r"experts\[1\] has other layers, public weights or public rows"):
        merge_experts(public(), [a, other])
    model = public()
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    with pytest.raises(InputError, match="other public weights than this model's"):
        merge_experts(model, [a, b])
    assert type(model[1]) is nn.Linear
    with pytest.raises(InputError, match="experts is empty"):
        merge_experts(public(), [])
    with pytest.raises(InputError, match="rank is 9"):
        merge_experts(public(), [a, b], rank=[2, 9])
    with pytest.raises(InputError, match="expert is 0"):
        take_expert(owned(1), 0)
    with pytest.raises(InputError, match="must be one with 'flexmore'"):
        take_expert(adapt(public(), "lora"))
