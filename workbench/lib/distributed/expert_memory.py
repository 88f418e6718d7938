"""What a rank holds of a mixture of experts in training, by formula: Z-code M3's forms of parallelism, and offloading.

    memory(shared=10**9, experts=64 * 10**9, world=64, ep=64, zero=True).device      # bytes

Of each parameter there are a weight and a gradient in half precision, 2 bytes each, and 12 bytes of states: a weight
and two moments of AdamW in single precision. Tensor slices divide what is not of experts by tp, expert parallelism the
experts by ep. Of D = world / tp data ranks ZeRO divides the states of the first among D, those of the experts among the
D / ep that have the same. Offloading moves the states to the host, and the gradients too but for a bucket. Activations
and buffers of the runtime are not in it.
"""

from dataclasses import dataclass

from workbench.errors import InputError
from workbench.lib.core.distributed.grids import RankGrid


@dataclass(frozen=True)
class Bytes:
    """Of a parameter: its weight and gradient on the device, its states wherever they are, its gradient on the host."""

    weight: int = 2
    gradient: int = 2
    states: int = 12
    host_gradient: int = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank: weights, gradients and states on the device, and what is on the host."""

    weights: int
    gradients: int
    states: int
    host: int

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.states


MIXED = Bytes()


def memory(
    shared: int,
    experts: int,
    *,
    world: int,
    ep: int,
    tp: int = 1,
    zero: bool = False,
    offload: bool = False,
    bucket_bytes: int = 2**25,
    per: Bytes = MIXED,
) -> Memory:
    """What each of `world` ranks holds.

    Args:
        shared, experts: parameters in all: those of no expert, and those of all experts.
        ep: ranks that share out the experts.
        tp: ranks that share out everything else.
        zero: share out the states among the ranks that would have the same (stage 1). What does not divide evenly is
            filled up.
        offload: states and gradients to the host.
        bucket_bytes: of gradients that are on the device at once, of those that are offloaded.
        per: bytes of a parameter.

    Raises:
        InputError: a number of parameters is negative, or the ranks do not fit; those that do are named.
    """
    for name, count in (("shared", shared), ("experts", experts)):
        if count < 0:
            raise InputError(f"{name} is {count} but must not be negative")
    if bucket_bytes < 1:
        raise InputError(f"bucket_bytes is {bucket_bytes} but must be at least 1")
    data = RankGrid.filled(world, {"tp": tp, "data": None}).sizes["data"]
    same = RankGrid.filled(data, {"ep": ep, "edp": None}).sizes["edp"]
    mine = [-(-shared // tp), -(-experts // ep)]
    kept = [-(-count // ranks) for count, ranks in zip(mine, (data, same), strict=True)] if zero else mine
    weights, gradients, states = per.weight * sum(mine), per.gradient * sum(mine), per.states * sum(kept)
    if not offload:
        return Memory(weights, gradients, states, 0)
    return Memory(weights, min(bucket_bytes, gradients), 0, states + per.host_gradient * sum(kept))
