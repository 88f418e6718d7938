"""Sums over a seeded random basis and their gradients, as NOLA needs them, beside what torch can do for them.

"torch/philox" is the same generator in torch's whole numbers, of the same results. "torch/generator" draws from torch's
own, seeded anew each time: other numbers, on a GPU not those of a processor, and none can be had without those before
it. "torch/stored" has the basis in memory, k times as large as the result, and only reads it.

k basis tensors of a shape; the gradient is that in their coefficients.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from workbench.bench.core import BOTH, OURS, Case, Contestants
from workbench.kernels.random_basis import random_basis, random_basis_adjoint, uniform

REPEATS = 5
PHILOX, GENERATOR, STORED = "torch/philox", "torch/generator", "torch/stored"
CHUNK = 64  # basis tensors at a time, NOLA's own number
QUICK = ((5, (3, 8)),)
SHAPES = ((512, (8, 1024)), (512, (16, 4096)), (16, (1_000_000,)))  # GPT-2 M's and LLaMA-2-7B's, and a long vector


def cases(quick: bool = False) -> list[Case]:
    return [
        Case(f"k={k} {'x'.join(map(str, shape))}", partial(_contestants, k, shape))
        for k, shape in (QUICK if quick else SHAPES)
    ]


class Problem:
    """Coefficients, a seed and a gradient; each implementation is a pair of calls: the sum, and the gradient."""

    def __init__(self, k: int, shape: tuple[int, ...]):
        generator = torch.Generator().manual_seed(0)
        self.k, self.shape, self.seed = k, shape, torch.tensor(0x0123456789ABCDEF)
        self.c = torch.randn(k, generator=generator)
        self.grad = torch.randn(shape, generator=generator)

    def operator(self, backend: str | None = None) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        return (
            lambda: random_basis(self.c, self.seed, self.shape, backend=backend),
            lambda: random_basis_adjoint(self.grad, self.seed, self.k, backend=backend),
        )

    def generator(self) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        def parts():
            source = torch.Generator().manual_seed(int(self.seed) % 2**32)
            for c in self.c.split(CHUNK):
                yield c, torch.empty(len(c), self.grad.numel()).uniform_(-1, 1, generator=source)

        return (
            lambda: sum(c @ part for c, part in parts()).view(self.shape),
            lambda: torch.cat([part @ self.grad.flatten() for _, part in parts()]),
        )

    def stored(self) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        basis = uniform(self.seed, 0, self.k * self.grad.numel()).view(self.k, -1)
        return lambda: (self.c @ basis).view(self.shape), lambda: basis @ self.grad.flatten()


def _contestants(k: int, shape: tuple[int, ...], direction: str) -> Contestants:
    problem = Problem(k, shape)
    pairs = {
        OURS: problem.operator(),
        PHILOX: problem.operator("reference"),
        GENERATOR: problem.generator(),
        STORED: problem.stored(),
    }
    return {
        name: (lambda total=total, gradient=gradient: (total(), gradient())) if direction == BOTH else total
        for name, (total, gradient) in pairs.items()
    }
