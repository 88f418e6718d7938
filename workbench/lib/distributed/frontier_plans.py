"""A dense decoder, and how it may lie over ranks: split by tensors, by layers and by rows of a batch (`frontier`)."""

from dataclasses import dataclass, fields

from workbench.errors import InputError, unknown
from workbench.lib.core.distributed.grids import divisors

SCHEDULES = ("1f1b", "gpipe")


@dataclass(frozen=True)
class DenseConfig:
    """A pre-norm decoder with a tied embedding, learned positions and feed-forward parts of 4 D, without biases.

    Attributes:
        time: T, tokens of a sequence.
        width: bytes of a weight, a gradient and an activation. With 2 the optimiser keeps a weight of 4 bytes and two
            moments of 4; with 4 and 8 two moments as wide as the weight.
    """

    name: str
    layers: int
    dim: int
    heads: int
    vocab: int = 51_200
    time: int = 2048
    width: int = 2

    def __post_init__(self):
        for name in ("layers", "dim", "heads", "vocab", "time"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)} but must be at least 1")
        if self.dim % self.heads:
            raise InputError(f"heads is {self.heads} but must divide dim = {self.dim}")
        if self.width not in (2, 4, 8):
            raise InputError(f"width is {self.width} but must be 2, 4 or 8 bytes")

    @property
    def layer_params(self) -> int:
        """Of one layer: 12 D^2 in products, and two norms."""
        return 12 * self.dim**2 + 2 * self.dim

    @property
    def params(self) -> int:
        return self.layers * self.layer_params + (self.vocab + self.time + 1) * self.dim

    @property
    def state_bytes(self) -> int:
        """Of the optimiser, for one parameter."""
        return 12 if self.width == 2 else 2 * self.width

    def flops(self, batch: int) -> float:
        """Of a step's products, forward and backward, on so many sequences: what the shares of the peak count.

        72 B T L D^2 (1 + T / (6 D) + V / (12 L D)): scores count whole, and nothing that is computed twice counts.
        """
        rest = self.time / (6 * self.dim) + self.vocab / (12 * self.layers * self.dim)
        return 72.0 * batch * self.time * self.layers * self.dim**2 * (1 + rest)


#: The published sizes: layers, width and heads; vocabulary and sequence are taken.
GPT = {
    "22B": DenseConfig("22B", 48, 6144, 48),
    "175B": DenseConfig("175B", 96, 12_288, 96),
    "1T": DenseConfig("1T", 128, 25_600, 128),
}


@dataclass(frozen=True)
class ParallelPlan:
    """How a step is taken: ranks are tp x dp x pp, the first fastest.

    Attributes:
        tp: ranks that split every product of a layer.
        pp: stages, of layers / pp layers each.
        dp: copies, each with rows of its own.
        micro_batch: b, sequences of a micro-batch.
        accum: m, micro-batches of a step on each copy.
        interleave: v, chunks of layers on each stage: chunk c of stage p is the c pp + p -th of all.
        zero: 1: optimiser states are split over dp (ZeRO-1); 0: every copy has them.
        recompute: forward passes of layers are done again in the backward pass, from their inputs.
        flash: attention keeps no scores.
        schedule: "1f1b", one forward one backward (interleaved with chunks), or "gpipe", all forward first.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    micro_batch: int = 1
    accum: int = 1
    interleave: int = 1
    zero: int = 1
    recompute: bool = False
    flash: bool = True
    schedule: str = "1f1b"

    def __post_init__(self):
        for name in ("tp", "pp", "dp", "micro_batch", "accum", "interleave"):
            value = getattr(self, name)
            if isinstance(value, bool) or value < 1:
                raise InputError(f"{name} is {value!r} but must be a whole number, at least 1")
        if isinstance(self.zero, bool) or self.zero not in (0, 1):
            raise InputError(f"zero is {self.zero!r} but must be 0 or 1")
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)

    def __str__(self) -> str:
        more = [f"v{self.interleave}"] * (self.interleave > 1) + ["gpipe"] * (self.schedule == "gpipe")
        more += [f"zero{self.zero}"] + ["recompute"] * self.recompute + ["no flash"] * (not self.flash)
        sizes = f"tp{self.tp} pp{self.pp} dp{self.dp} b{self.micro_batch} m{self.accum}"
        return " ".join([sizes, *more])

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def batch(self) -> int:
        """Sequences of a step, of all ranks."""
        return self.micro_batch * self.accum * self.dp

    @property
    def chunks(self) -> int:
        """Of layers, on all stages."""
        return self.pp * self.interleave

    @property
    def axes(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Groups as (stride, size), as `folding_model.Cluster` takes them."""
        return {"tp": ((1, self.tp),), "dp": ((self.tp, self.dp),), "pp": ((self.tp * self.dp, self.pp),)}

    def problem(self, config: DenseConfig, world: int | None = None) -> str | None:
        """Why the plan does not fit a model and a number of ranks; None where it does. Memory is not looked at."""
        if world is not None and self.world != world:
            fit = ", ".join(map(str, divisors(world)))
            return f"tp * pp * dp is {self.world} but must be the world of {world} ranks: each of them one of {fit}"
        for name, whole in (("heads", config.heads), ("vocab", config.vocab)):
            if whole % self.tp:
                return f"tp is {self.tp} but must divide {name} = {whole}"
        if config.layers % self.chunks:
            return f"pp * interleave is {self.chunks} but must divide layers = {config.layers}"
        if self.interleave > 1:
            if self.pp == 1 or self.schedule != "1f1b":
                return f"interleave is {self.interleave} but must be 1 with one stage, and with schedule 'gpipe'"
            if self.accum % self.pp:
                return f"accum is {self.accum} but must be a multiple of pp = {self.pp} with interleave > 1"
        return None

    def valid(self, config: DenseConfig, world: int | None = None) -> bool:
        return self.problem(config, world) is None

    def check(self, config: DenseConfig, world: int | None = None) -> "ParallelPlan":
        """Itself; an `InputError` where it does not fit."""
        if problem := self.problem(config, world):
            raise InputError(problem)
        return self

    @classmethod
    def fitted(cls, world: int, **sizes: int | bool | str) -> "ParallelPlan":
        """The plan whose dp takes what tp and pp leave of a world.

        Raises:
            InputError: they do not divide it.
        """
        if strange := [name for name in sizes if name not in {field.name for field in fields(cls)} - {"dp"}]:
            raise unknown("size", strange[0], [field.name for field in fields(cls) if field.name != "dp"])
        taken = int(sizes.get("tp", 1)) * int(sizes.get("pp", 1))
        if world < 1 or taken < 1 or world % taken:
            fit = ", ".join(map(str, divisors(world))) or "none"
            raise InputError(f"tp * pp is {taken} but must divide the world of {world} ranks: be one of {fit}")
        return cls(dp=world // taken, **sizes)
