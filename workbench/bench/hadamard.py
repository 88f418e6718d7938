"""The Walsh-Hadamard transform of rows of 2^n numbers, beside two ways in torch: dense factors, and butterflies.

H of 2^n is the Kronecker product of smaller ones, so that a row, seen as a cube, is multiplied along each of its two or
three axes by a small dense H: more operations, in the processor's fastest form. The bound is a copy of the numbers,
which have to be read and written once. It is its own gradient, so only the forward is timed.
"""

from functools import partial

import torch
from scipy.linalg import hadamard
from torch import Tensor

from workbench.bench.core import FORWARD, LIMIT, OURS, Case, Contestants
from workbench.kernels import walsh_hadamard

REPEATS = 51
FACTORS, BUTTERFLIES = "torch/factors", "torch/butterflies"
QUICK = ((4, 64),)
SHAPES = ((1, 2**13), (1, 2**17), (1, 2**20), (256, 2**10), (64, 2**12))  # rows, 2^n


def cases(quick: bool = False) -> list[Case]:
    return [Case("N={} L={}".format(*s), partial(_contestants, s), (FORWARD,)) for s in (QUICK if quick else SHAPES)]


def _contestants(shape: tuple[int, int], direction: str) -> Contestants:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    copy = torch.empty_like(x)
    return {
        LIMIT: lambda: copy.copy_(x),
        OURS: lambda: walsh_hadamard(x),
        FACTORS: _factors(x),
        BUTTERFLIES: lambda: walsh_hadamard(x, backend="reference"),
    }


def _factors(x: Tensor):
    """H x as products with two factors, three of rows above 2^12."""
    rows, length = x.shape
    n = length.bit_length() - 1
    counts = [n - n // 2, n // 2] if n <= 12 else [n - 2 * (n // 3), n // 3, n // 3]
    *others, last = [torch.tensor(hadamard(2**count), dtype=x.dtype) for count in counts]

    def once() -> Tensor:
        y, near = x.view(-1, len(last)) @ last, len(last)
        for factor in reversed(others):
            y, near = factor @ y.view(-1, len(factor), near), near * len(factor)
        return y.view(rows, length)

    return once
