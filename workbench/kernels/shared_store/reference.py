"""The meaning of `shared_weight` and `shared_linear`: the places and the signs of the weights as tensors."""

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from workbench.kernels.random_basis.reference import philox

SHIFTS = 2**62
"""The block of the generator that the first partition's shift is made of; signs are made of the first blocks."""
BITS = 128  # of a block


def places(seed: Tensor, m: int, offset: int, numel: int) -> Int64[Tensor, " numel"]:
    """Where in an array of m numbers the weights `offset` and following are."""
    i = torch.arange(offset, offset + numel, device=seed.device)
    part, first = i // m, offset // m
    turned = shifts(seed, m, first, (offset + max(numel, 1) - 1) // m - first + 1)
    return (turned[part - first] + i - part * m) % m


def shifts(seed: Tensor, m: int, first: int, count: int) -> Int64[Tensor, " count"]:
    """By how much the partitions `first` and following are turned, below m."""
    words = philox(SHIFTS + torch.arange(first, first + count, device=seed.device), seed)
    return (words[:, 0] >> 1 << 32 | words[:, 1]) % m


def negative(seed: Tensor, offset: int, numel: int) -> Bool[Tensor, " numel"]:
    """Whether the weights `offset` and following have the sign -1."""
    first, last = offset // BITS, (offset + numel + BITS - 1) // BITS
    words = philox(torch.arange(first, last, device=seed.device), seed)
    bits = words[..., None] >> torch.arange(32, device=seed.device) & 1
    return bits.view(-1)[offset - BITS * first :][:numel] == 1


def expand(memory: Tensor, seed: Tensor, scale: Tensor, offset: int, numel: int) -> Tensor:
    values = memory[places(seed, len(memory), offset, numel)] * scale
    return torch.where(negative(seed, offset, numel), -values, values)


def fold(values: Tensor, seed: Tensor, scale: Tensor, offset: int, m: int) -> Tensor:
    values = values.view(-1) * scale
    signed = torch.where(negative(seed, offset, len(values)), -values, values)
    return values.new_zeros(m).index_add_(0, places(seed, m, offset, len(values)), signed)


def product(
    x: Tensor, memory: Tensor, seed: Tensor, scale: Tensor, offset: int, width: int, transposed: bool
) -> Tensor:
    depth = x.shape[1]
    matrix = expand(memory, seed, scale, offset, width * depth)
    return x @ (matrix.view(depth, width) if transposed else matrix.view(width, depth).T)


def outer(grad: Tensor, x: Tensor, seed: Tensor, scale: Tensor, offset: int, m: int) -> Tensor:
    return fold(grad.T @ x, seed, scale, offset, m)
