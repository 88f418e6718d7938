"""A model with experts in every layer, and how attention and experts of it may lie over the ranks (`folding_model`)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from workbench.errors import InputError
from workbench.lib.core.distributed.grids import divisors


@dataclass(frozen=True)
class MoEConfig:
    """A decoder whose every layer has experts, and what it is trained on.

    Attributes:
        hidden: of one SwiGLU expert.
        vocab, time, batch: tokens known; of a sequence; sequences a step, of all ranks.
        loads: (experts,) share of the pairs that each expert gets; None: all the same.
        width: bytes of a number in activations and weights.
        split_vocab: embedding and output matrix, two of them, split over tp; False: one matrix, whole on each rank, as
            `FoldedDecoder` has it.
    """

    name: str
    layers: int
    dim: int
    heads: int
    kv_heads: int
    hidden: int
    experts: int
    top_k: int
    vocab: int = 32_000
    time: int = 4096
    batch: int = 256
    loads: tuple[float, ...] | None = None
    width: int = 2
    split_vocab: bool = True

    def __post_init__(self):
        for name in ("layers", "dim", "heads", "kv_heads", "hidden", "experts", "top_k", "vocab", "time", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)} but must be at least 1")
        if self.top_k > self.experts:
            raise InputError(f"top_k is {self.top_k} but must be at most experts = {self.experts}")
        if self.dim % self.heads or self.heads % self.kv_heads:
            raise InputError(
                f"heads is {self.heads} but must divide dim = {self.dim} and be a multiple of kv_heads, {self.kv_heads}"
            )
        if self.loads is not None and (
            len(self.loads) != self.experts or min(self.loads) < 0 or not math.isclose(sum(self.loads), 1, rel_tol=1e-6)
        ):
            raise InputError(f"loads must be {self.experts} shares, none negative and of sum 1")

    @property
    def kv_dim(self) -> int:
        return self.dim * self.kv_heads // self.heads

    @property
    def attention_params(self) -> int:
        """Of a layer: queries, keys, values and output."""
        return 2 * self.dim * (self.dim + self.kv_dim)

    @property
    def expert_params(self) -> int:
        """Of one expert."""
        return 3 * self.dim * self.hidden

    @property
    def small_params(self) -> int:
        """Of a layer, on every rank of a stage: router and norms."""
        return self.dim * (self.experts + 2)

    @property
    def params(self) -> int:
        layer = self.attention_params + self.experts * self.expert_params + self.small_params
        return self.layers * layer + (1 + self.split_vocab) * self.vocab * self.dim

    @property
    def active_params(self) -> int:
        layer = self.attention_params + self.top_k * self.expert_params + self.small_params
        return self.layers * layer + (1 + self.split_vocab) * self.vocab * self.dim

    @property
    def flops(self) -> float:
        """Of a step's products, forward and backward, that the model needs: what MFU counts."""
        per_token = self.layers * (self.attention_params + self.top_k * self.expert_params + self.dim * self.experts)
        scores = self.layers * self.time * self.dim  # 2 products of 2 T D, half of them masked; times 3
        return 6.0 * self.time * self.batch * (per_token + self.vocab * self.dim + scores)


@dataclass(frozen=True)
class Layout:
    """Sizes of both grids. `folded`: ranks are etp x ep x edp x pp for experts, the first fastest; otherwise they are
    tp x cp x ep x dp / ep x pp, experts carved out of attention's grid (Megatron Core before folding)."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int
    folded: bool = True

    def __str__(self) -> str:
        sizes = f"tp{self.tp} cp{self.cp} dp{self.dp} | etp{self.etp} ep{self.ep} edp{self.edp} | pp{self.pp}"
        return sizes if self.folded else f"{sizes}, coupled"

    @property
    def world(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    @classmethod
    def fitted(cls, world: int, tp: int, cp: int, pp: int, etp: int, ep: int, n_experts: int | None = None) -> "Layout":
        """The layout in which dp and edp take what is left.

        Raises:
            InputError: sizes that do not fit the world, or experts that do not divide over ep; the message has all
                sizes that fit.
        """
        if world % pp:
            raise InputError(f"pp is {pp} but must divide the world of {world}: {_listed(divisors(world))}")
        stage = world // pp
        for names, sizes in ((("tp", "cp"), (tp, cp)), (("etp", "ep"), (etp, ep))):
            if stage % math.prod(sizes):
                (a, b), fit = names, [f"{i}x{j}" for i in divisors(stage) for j in divisors(stage // i)]
                raise InputError(
                    f"{a} x {b} = {sizes[0]}x{sizes[1]} does not fit the {stage} ranks of a stage; what fits is "
                    f"{', '.join(fit)}"
                )
        if n_experts is not None and n_experts % ep:
            fit = [size for size in divisors(n_experts) if stage % (size * etp) == 0]
            raise InputError(
                f"ep is {ep} but must divide the {n_experts} experts evenly: {_listed(fit)} with etp {etp}"
            )
        return cls(tp, cp, stage // (tp * cp), pp, etp, ep, stage // (etp * ep))

    def axes(self, name: str) -> list[tuple[int, int]]:
        """A group as (stride, size) along each of its axes."""
        attention = {"tp": (1, self.tp), "cp": (self.tp, self.cp), "dp": (self.tp * self.cp, self.dp)}
        pp = {"pp": (self.world // self.pp, self.pp)}
        if self.folded:
            experts = {"etp": (1, self.etp), "ep": (self.etp, self.ep), "edp": (self.etp * self.ep, self.edp)}
            return [(attention | experts | pp)[axis] for axis in name.split()]
        within = self.tp * self.cp  # ep is the inner part of dp, and copies are found along cp and the rest of dp
        experts = {"etp": [(1, self.tp)], "ep": [(within, self.ep)]}
        experts["edp"] = [attention["cp"], (within * self.ep, self.dp // self.ep)]
        found = {axis: [place] for axis, place in (attention | pp).items()} | experts
        return [place for axis in name.split() for place in found[axis]]


def layouts(config: MoEConfig, world: int, folded: bool = True) -> Iterator[Layout]:
    """All layouts of a model over so many ranks, whatever memory they need.

    Args:
        folded: False for those that were there before: etp = tp, and ep divides dp.
    """
    c = config
    for pp in divisors(math.gcd(world, c.layers)):
        stage = world // pp
        for tp in divisors(math.gcd(stage, c.kv_heads)):
            for cp in divisors(stage // tp):
                dp = stage // (tp * cp)
                if c.batch % dp or c.time % (tp * cp):
                    continue
                if not folded:
                    for ep in divisors(math.gcd(dp, c.experts)):
                        if c.hidden % tp == 0:
                            yield Layout(tp, cp, dp, pp, tp, ep, stage // (tp * ep), folded=False)
                    continue
                for etp in divisors(math.gcd(stage, c.hidden)):
                    for ep in divisors(math.gcd(stage // etp, c.experts)):
                        yield Layout(tp, cp, dp, pp, etp, ep, stage // (etp * ep))


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))
