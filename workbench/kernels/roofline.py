"""A roofline model of the kernels: operations, bytes each must move, and the bound of a device. Nothing is timed here.

Bytes are what a kernel moves between the chip and its memory if every operand is read once and every result written
once: rows gathered by several experts count each time, weights of an expert once. Caches may do better or worse.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Published figures of a GPU: FLOP/s of dense 16-bit products, bytes/s of its memory."""

    name: str
    peak: float
    bandwidth: float


H100 = Device("H100 SXM, bf16", 989e12, 3.35e12)


@dataclass(frozen=True)
class Cost:
    """What one kernel does: floating-point operations, and bytes moved."""

    name: str
    flops: float
    bytes: float

    def bound(self, device: Device) -> float:
        """FLOP/s that the model allows."""
        return min(device.peak, device.bandwidth * self.flops / self.bytes)


def moe_costs(n_tokens: int, dim: int, hidden: int, n_experts: int, top_k: int, size: int = 2) -> list[Cost]:
    """The kernels of the expert layer with SwiGLU: T tokens of width D, E experts of width I, K per token.

    Args:
        size: bytes of a number.
    """
    pairs, weights = n_tokens * top_k, n_experts * dim * hidden
    rows, wide, narrow = pairs * dim, 2 * pairs * hidden, pairs * hidden
    return [
        Cost("up (gather, SwiGLU)", 4 * pairs * dim * hidden, size * (rows + 2 * weights + wide + narrow)),
        Cost("down", 2 * pairs * dim * hidden, size * (narrow + weights + rows)),
        Cost("gather-sum", 2 * rows, size * (rows + n_tokens * dim) + 4 * pairs),
        Cost("down dgrad (SwiGLU')", 2 * pairs * dim * hidden, size * (rows + weights + 2 * wide + narrow)),
        Cost("down wgrad", 2 * pairs * dim * hidden, size * (rows + narrow + weights)),
        Cost("up dgrad", 4 * pairs * dim * hidden, size * (wide + 2 * weights + rows)),
        Cost("up wgrad", 4 * pairs * dim * hidden, size * (wide + rows + 2 * weights)),
    ]
