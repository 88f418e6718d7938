"""MoS: LoRAs that every layer puts together from two pools of pieces of vectors, by a list that is drawn once.

Wang et al. 2024, "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards"
(arXiv:2410.00938); public code: Forence1999/MoS. L layers of one type have the same widths and share

    PA (N, I / l), PB (N, O / l),     N = e L l shards: as many numbers as L LoRAs of rank e.

A vector of A (r, I) is l shards of PA one behind the other, a column of B (O, r) l shards of PB. Which, a layer draws
once, without repetition; it is part of the adapter and never learned, so the update is one matrix. Four things set the
layers apart, each with a switch:

    subset selection    r < e L: a layer has some of the shards (r = e L: all have all of them)
    pair dissociation   A and B draw lists of their own (`dissociate=False`: the same list)
    vector sharding     l > 1 (`shards=1`: whole vectors)
    privatisation       the last p l rows of each layer's list are its own, and nobody draws them (`private=0`: none)

A pool of vectors that every layer uses whole is pure sharing, `sharing="pure"`: r = e L, the same order everywhere.
p = e = r is plain LoRA. PB = 0 at first; PA starts as LoRA's A does, by the width I of the whole vector.

Tensor letters: O output width, I input width, r rank.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.adapt import Adapted, Adapter, MadeLinear, adapt
from workbench.lib.core.low_rank import MadeFactors, fitting_rank

METHOD = Method(
    slug="mos-shards",
    title="MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards",
    family="adapters",
    year=2024,
    paper="arXiv:2410.00938",
    claim="Adapters assembled from global pools of vector pieces save about eight times the parameters; pure sharing "
    "without differentiation hurts.",
    objects=("MoS", "MoSLinear", "MoSFactors", "ShardPool", "draw", "sharing_stats"),
)

SHARDS = 4


def example() -> nn.Module:
    """Two linear layers whose LoRAs of rank 3 come out of pools with the size of rank 2."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32)) for _ in range(2)))
    return adapt(model, "mos-shards", rank=3, e=2).model


class ShardPool(nn.Module):
    """N pieces of vectors, from which vectors are put together.

    Args:
        width: of the whole vectors, by which the pieces start as `nn.Linear` does; None: they start as 0.
    """

    def __init__(self, n_shards: int, shard_width: int, width: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_shards, shard_width))
        if width is not None:
            nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def forward(self, index: Int64[Tensor, " n"], shards: int) -> Float[Tensor, "rank width"]:
        """Vector j is the rows index[j l], ..., index[j l + l - 1], one behind the other, l = `shards`."""
        return F.embedding(index, self.weight).view(len(index) // shards, -1)


class MoSFactors(MadeFactors):
    """A and B of one layer out of pools that other layers have too."""

    def share(self, a: ShardPool, b: ShardPool, index_a: Tensor, index_b: Tensor, shards: int) -> None:
        """Take these pools, and the rows of them that are this layer's: (r l,) each."""
        self.pool_a, self.pool_b, self.shards = a, b, shards
        self.register_buffer("index_a", index_a.to(a.weight.device))
        self.register_buffer("index_b", index_b.to(b.weight.device))

    def forward(self) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
        return self.pool_a(self.index_a, self.shards), self.pool_b(self.index_b, self.shards).T


class MoSLinear(MadeLinear):
    """y = W x + (alpha / r) B A dropout(x). It has its pools from `MoSFactors.share`."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float | None = None, dropout: float = 0.0):
        super().__init__(base, MoSFactors(base.in_features, base.out_features, rank, alpha), dropout)


def draw(
    layers: int, rank: int, e: int, private: int, shards: int, dissociate: bool = True
) -> list[tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]]:
    """For each layer the rows of the pools that are its own, for A and for B: (r l,) each.

    Raises:
        InputError: `private` is above e or r, or r - p vectors are more than the (e - p) L that are public.
    """
    if not 0 <= private <= min(e, rank):
        raise InputError(f"private is {private} but must be between 0 and {min(e, rank)}, the smaller of e and rank")
    public = (e - private) * layers
    if rank - private > public:
        raise InputError(
            f"rank is {rank} but must be at most {public + private}: {layers} layers of a type with e={e} and "
            f"private={private} share {public} vectors"
        )
    lists = []
    for n in range(layers):
        own = torch.arange(private * shards) + (public + n * private) * shards
        a = torch.cat([torch.randperm(public * shards)[: (rank - private) * shards], own])
        b = torch.cat([torch.randperm(public * shards)[: (rank - private) * shards], own]) if dissociate else a.clone()
        lists.append((a, b))
    return lists


class MoS(Adapter):
    """Low-rank updates that all layers of a type put together from the same two pools.

    Layers are of one type if their widths and the last part of their names are the same: `layers.0.mlp.up_proj` and
    `layers.1.mlp.up_proj`, say.

    Args:
        rank: r; default as far as the shards of a type and the layer's smaller width allow, at most 8.
        e: a type trains as much as LoRAs of this rank on all of its layers.
        private: p, vectors of each layer that no other has; default 1, and 0 where e is 1.
        shards: l, pieces of a vector, by which both widths can be divided; default the most up to 4.
        alpha: numerator of the scale; default r, so that the scale is 1.
        dropout: of the update's input.
        dissociate: A and B draw lists of their own.
        sharing: "drawn", or "pure": every layer has all vectors in the same order, for comparison.
    """

    slug = "mos-shards"

    def __init__(
        self,
        rank: int | None = None,
        e: int = 2,
        private: int | None = None,
        shards: int | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
        dissociate: bool = True,
        sharing: str = "drawn",
    ):
        if sharing not in ("drawn", "pure"):
            raise unknown("sharing", sharing, ("drawn", "pure"))
        if sharing == "pure" and (rank is not None or private or (shards or 1) > 1):
            raise InputError("sharing is 'pure' but rank, private and shards are set: all vectors are whole and shared")
        if e < 1 or (shards is not None and shards < 1):
            raise InputError(f"e, shards are {e}, {shards} but must both be at least 1")
        self.rank, self.e, self.shards, self.pure = rank, e, shards, sharing == "pure"
        self.private = private if private is not None else 0 if self.pure else min(1, e - 1)
        self.alpha, self.dropout, self.dissociate = alpha, dropout, dissociate

    def linear(self, layer: nn.Linear, name: str) -> MoSLinear:
        return MoSLinear(layer, fitting_rank(self.rank, layer), self.alpha, self.dropout)

    def finish(self, adapted: Adapted) -> None:
        types: dict[tuple[str, int, int], list[MoSLinear]] = {}
        for name, layer in adapted.layers.items():
            widths = layer.base.in_features, layer.base.out_features
            types.setdefault((name.rpartition(".")[2], *widths), []).append(layer)
        for (name, d_in, d_out), layers in types.items():
            self._share(name, d_in, d_out, layers)

    def _share(self, name: str, d_in: int, d_out: int, layers: list[MoSLinear]) -> None:
        e, p, most, smaller = self.e, self.private, self.e * len(layers), min(d_in, d_out)
        if self.pure and most > smaller:
            raise InputError(
                f"e is {e} but pure sharing of {len(layers)} layers {name!r} allows {smaller // len(layers)}"
            )
        rank = most if self.pure else self.rank
        if rank is None:
            rank = min(8, smaller, p + (e - p) * len(layers))
        shards = 1 if self.pure else self.shards
        if shards is None:
            shards = next(n for n in range(SHARDS, 0, -1) if d_in % n == d_out % n == 0)
        if d_in % shards or d_out % shards:
            raise InputError(f"shards is {shards} but must divide the widths of {name!r}, {d_in} and {d_out}")
        lists = draw(len(layers), rank, e, p, shards, self.dissociate)
        if self.pure:
            lists = [(torch.arange(rank), torch.arange(rank)) for _ in layers]
        weight = layers[0].base.weight
        dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
        pools = ShardPool(most * shards, d_in // shards, d_in), ShardPool(most * shards, d_out // shards)
        for pool in pools:
            pool.to(weight.device, dtype)
        for layer, (a, b) in zip(layers, lists, strict=True):
            layer.experts.rank, layer.experts.scale = rank, (rank if self.alpha is None else self.alpha) / rank
            layer.experts.share(*pools, a, b, shards)


def sharing_stats(factors: Mapping[str, MoSFactors], side: str = "a") -> tuple[Int64[Tensor, " n"], Tensor]:
    """Of layers with the same pool: how many use each shard (N,), and how many shards each two have in common (L, L).

    Raises:
        InputError: `side` is neither "a" nor "b", or the layers have different pools.
    """
    if side not in ("a", "b"):
        raise unknown("side", side, ("a", "b"))
    pools = {getattr(one, f"pool_{side}") for one in factors.values()}
    if len(pools) != 1:
        raise InputError(f"factors have {len(pools)} pools but must have one: those of layers of one type")
    uses = torch.zeros(len(factors), len(pools.pop().weight), dtype=torch.int64)
    for row, one in zip(uses, factors.values(), strict=True):
        row[getattr(one, f"index_{side}").cpu()] = 1
    return uses.sum(0), uses @ uses.T


ADAPTER = MoS
