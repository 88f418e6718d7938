"""MoS: pools as large as LoRA, lists that repeat nothing, gradients that add up; plain LoRA where all is private."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from workbench.errors import InputError
from workbench.lib.adapters.mos_shards import MoSFactors, ShardPool, draw, sharing_stats
from workbench.lib.core.adapt import Adapted, adapt, load_adapter

L, WIDTHS = 3, (8, 12)
X = torch.randn(9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Blocks(nn.Module):
    """Three blocks of an up and a down layer: two types."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in range(L))

    def forward(self, x):
        for block in self.blocks:
            x = x + block["down"](block["up"](x).tanh())
        return x


def put(shake: bool = True, **options) -> Adapted:
    adapted = adapt(Blocks().double(), "mos-shards", **options)
    for p in adapted.parameters() if shake else ():
        nn.init.normal_(p, std=0.4)
    return adapted


def of_type(adapted: Adapted, name: str) -> list[MoSFactors]:
    return [layer.experts for place, layer in adapted.layers.items() if place.endswith(name)]


def named(factors: list[MoSFactors]) -> dict[str, MoSFactors]:
    return {str(n): one for n, one in enumerate(factors)}


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2, "e": 1},
        {"rank": 4, "e": 2, "private": 0, "shards": 1},
        {"rank": 4, "e": 2, "private": 1, "shards": 4},
        {"e": 2, "sharing": "pure"},
    ],
)
def test_it_trains_as_much_as_lora_of_rank_e(options):
    lora = adapt(Blocks(), "lora", rank=options["e"])
    adapted = put(**options)
    assert len(adapted.parameters()) == 4
    assert adapted.report()["trained"] == lora.report()["trained"] == 2 * options["e"] * L * sum(WIDTHS)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_all_private_it_is_plain_lora(shards):
    ours, lora = (
        put(rank=2, e=2, private=2, shards=shards, alpha=6.0),
        adapt(Blocks().double(), "lora", rank=2, alpha=6.0),
    )
    rows = {}
    with torch.no_grad():
        for name, layer in ours.layers.items():
            factors, bank = layer.experts, lora.layers[name].experts
            n = int(name.split(".")[1])
            rows[name] = slice(n * 2 * shards, (n + 1) * 2 * shards)  # the layer's own, in order
            bank.a.copy_(factors.pool_a.weight[rows[name]].reshape(1, 2, -1))
            bank.b.copy_(factors.pool_b.weight[rows[name]].reshape(2, -1).T[None])
    for adapted in (ours, lora):
        adapted.model(X).sin().sum().backward()
    torch.testing.assert_close(ours.model(X), lora.model(X), atol=1e-10, rtol=1e-10)
    for name, layer in ours.layers.items():
        factors, bank = layer.experts, lora.layers[name].experts
        grads = factors.pool_a.weight.grad[rows[name]], factors.pool_b.weight.grad[rows[name]]
        torch.testing.assert_close(grads[0].reshape(2, -1), bank.a.grad[0], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(grads[1].reshape(2, -1).T, bank.b.grad[0], atol=1e-10, rtol=1e-10)


def test_it_starts_as_the_layer_with_a_gradient_of_b_alone():
    adapted = put(shake=False, rank=4, e=2)
    assert torch.equal(adapted.model(X), Blocks().double()(X))
    adapted.model(X).sin().sum().backward()
    for factors in of_type(adapted, "up")[:1] + of_type(adapted, "down")[:1]:
        assert factors.pool_b.weight.grad.any() and not factors.pool_a.weight.grad.any()
        width = factors.pool_a.weight.shape[1] * factors.shards  # the bound is that of the whole vector
        largest = factors.pool_a.weight.abs().max()
        assert 0.8 * width**-0.5 < largest <= width**-0.5


def test_a_shards_gradient_is_the_sum_over_its_uses():
    """Against factors that are gathered by one-hot matrices, each with a gradient of its own."""
    torch.manual_seed(3)
    adapted = put(rank=4, e=2, private=1, shards=2)
    g = torch.randn(12, 8, dtype=torch.float64)
    factors = of_type(adapted, "up")
    sum((one.delta() * g).sum() for one in factors).backward()
    pool_a, pool_b = factors[0].pool_a, factors[0].pool_b
    sums = torch.zeros_like(pool_a.weight), torch.zeros_like(pool_b.weight)
    for one in factors:
        hot = [nn.functional.one_hot(i, len(pool_a.weight)).double() for i in (one.index_a, one.index_b)]
        a, b = (h @ pool.weight.detach() for h, pool in zip(hot, (pool_a, pool_b), strict=True))
        a, b = a.reshape(4, 8), b.reshape(4, 12).T
        sums[0].add_(hot[0].T @ (b.T @ g).reshape(-1, 4)), sums[1].add_(hot[1].T @ (g @ a.T).T.reshape(-1, 6))
    torch.testing.assert_close(pool_a.weight.grad, sums[0])
    torch.testing.assert_close(pool_b.weight.grad, sums[1])
    assert sharing_stats(named(factors))[0].max() > 1  # some are used by several


@pytest.mark.parametrize(("rank", "e", "private", "shards"), [(4, 2, 0, 1), (6, 2, 1, 4), (4, 1, 0, 2), (3, 3, 2, 4)])
def test_lists_repeat_nothing_and_private_rows_are_nobody_elses(rank, e, private, shards):
    torch.manual_seed(0)
    layers = 6
    lists, public = draw(layers, rank, e, private, shards), (e - private) * layers * shards
    for side in (0, 1):
        own = [set(one[side].tolist()) for one in lists]
        assert all(len(index) == rank * shards for index in own)
        assert all(0 <= i < e * layers * shards for index in own for i in index)
        for n, index in enumerate(own):
            mine = {i for i in index if i >= public}
            assert mine == set(range(public + n * private * shards, public + (n + 1) * private * shards))
    if rank > private:
        assert any(not torch.equal(a, b) for a, b in lists)
        assert any(not torch.equal(lists[0][0], a) for a, _ in lists[1:])
    assert all(torch.equal(a, b) for a, b in draw(layers, rank, e, private, shards, dissociate=False))


def test_vectors_are_shards_one_behind_the_other():
    pool = ShardPool(8, 3)
    pool.weight.data = torch.arange(24.0).view(8, 3)
    index = torch.tensor([5, 0, 2, 7])
    made = pool(index, 2)
    assert made.tolist() == [[15.0, 16.0, 17.0, 0.0, 1.0, 2.0], [6.0, 7.0, 8.0, 21.0, 22.0, 23.0]]
    assert torch.equal(made.reshape(4, 3), pool.weight[index])
    assert torch.equal(pool(index, 1), pool.weight[index])
    for wrong in (8, -1):
        with pytest.raises(IndexError):
            pool(torch.tensor([wrong]), 1)


def test_pure_sharing_gives_all_layers_of_a_type_the_same_factors():
    adapted = put(e=2, sharing="pure")
    for name in ("up", "down"):
        first, *others = [one.delta() for one in of_type(adapted, name)]
        assert all(torch.equal(first, other) for other in others)
        assert torch.linalg.matrix_rank(first) == 2 * L
    uses, common = sharing_stats(named(of_type(adapted, "up")))
    assert (uses == L).all() and (common == 2 * L).all()


def test_the_rank_is_all_of_r_and_merged_back_it_is_the_same_function():
    adapted = put(rank=4, e=2, private=1, shards=4)
    for layer in adapted.layers.values():
        assert torch.linalg.matrix_rank(layer.fixed_update()) == 4
    y = adapted.model(X)
    torch.testing.assert_close(adapted.merge_back()(X), y, atol=1e-10, rtol=1e-10)


def test_a_saved_adapter_is_the_pools_once_and_the_lists(tmp_path):
    torch.manual_seed(2)
    adapted = put(rank=4, e=2, private=1, shards=4)
    tensors = load_file(adapted.save(tmp_path / "mos") / "adapter.safetensors")
    floats = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    assert floats == adapted.report()["trained"] and len(tensors) == 4 + 2 * len(adapted.layers)
    torch.manual_seed(77)  # the lists are not drawn again
    again = load_adapter(Blocks().double(), tmp_path / "mos")
    assert torch.equal(again.model(X), adapted.model(X))
    factors = of_type(again, "up")
    assert all(one.pool_a is factors[0].pool_a for one in factors)


def test_stats_count_what_is_shared():
    torch.manual_seed(0)
    factors = named(of_type(put(rank=4, e=2, private=1, shards=2), "up"))
    for side in ("a", "b"):
        uses, common = sharing_stats(factors, side)
        assert uses.sum() == L * 4 * 2 and (uses[-L * 2 :] == 1).all()  # private rows once
        assert (common.diagonal() == 4 * 2).all() and torch.equal(common, common.T)
        lists = [set(getattr(one, f"index_{side}").tolist()) for one in factors.values()]
        assert common[0, 1] == len(lists[0] & lists[1])
    with pytest.raises(InputError, match="factors have 2 pools but must have one"):
        sharing_stats({"0": factors["0"], "1": of_type(put(), "down")[0]})
    with pytest.raises(InputError, match="side 'c' is unknown"):
        sharing_stats(factors, "c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 6, "e": 1}, "rank is 6 but must be at most 3: 3 layers of a type with e=1 and private=0 share 3 vec"),
        ({"rank": 6, "e": 2, "private": 1}, "rank is 6 but must be at most 4: 3 layers .* share 3 vectors"),
        ({"rank": 2, "e": 2, "private": 3}, "private is 3 but must be between 0 and 2, the smaller of e and rank"),
        ({"rank": 1, "e": 2, "private": 2}, "private is 2 but must be between 0 and 1"),
        ({"shards": 3}, "shards is 3 but must divide the widths of 'up', 8 and 12"),
        ({"e": 3, "sharing": "pure"}, "e is 3 but pure sharing of 3 layers 'up' allows 2"),
        ({"rank": 2, "sharing": "pure"}, "sharing is 'pure' but rank, private and shards are set"),
        ({"sharing": "none"}, "sharing 'none' is unknown. Allowed: drawn, pure"),
        ({"e": 0}, "e, shards are 0, None but must both be at least 1"),
    ],
)
def test_wrong_settings_are_named(options, message):
    model = Blocks()
    with pytest.raises(InputError, match=message):
        adapt(model, "mos-shards", **options)
    assert all(type(layer) is nn.Linear for block in model.blocks for layer in block.values())
