"""Products with weights looked up in a shared array, as STABLE-RPS needs them, beside the product with a dense matrix.

"torch/linear" has the whole matrix in memory, ten times as many numbers; it is the bound too, so that the ratio to it
is what sharing costs. "torch/expanded" forms the matrix as a whole, then multiplies. "torch/index" has the places of
all weights in memory, 8 bytes each, and their signs, as a direct implementation does.

N rows, a matrix (out, in), and an array of a tenth of its numbers; gradients are those in the rows and in the array.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.bench.core import BOTH, LIMIT, OURS, Case, Contestants
from workbench.kernels import shared_linear, shared_weight
from workbench.kernels.shared_store.reference import negative, places

REPEATS = 9
LINEAR, EXPANDED, INDEX = "torch/linear", "torch/expanded", "torch/index"
COMPRESSION = 0.1
QUICK = ((3, 20, 40),)
SHAPES = ((64, 1024, 1024), (256, 1024, 1024), (256, 1024, 4096))


def cases(quick: bool = False) -> list[Case]:
    return [
        Case(f"N={n} {width}x{depth} at {COMPRESSION}", partial(_contestants, n, depth, width))
        for n, depth, width in (QUICK if quick else SHAPES)
    ]


class Problem:
    """Rows, an array and a gradient; an implementation is a function of the rows and of what it keeps of weights."""

    def __init__(self, n: int, depth: int, width: int):
        generator = torch.Generator().manual_seed(0)
        self.shape, m = (width, depth), int(COMPRESSION * width * depth)
        self.x, self.grad = torch.randn(n, depth, generator=generator), torch.randn(n, width, generator=generator)
        self.memory = torch.randn(m, generator=generator)
        self.seed, self.scale = torch.tensor(0x0123456789ABCDEF), torch.tensor(0.5)

    def ours(self) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
        return lambda x, memory: shared_linear(x, memory, self.seed, self.scale, self.shape[0]), self.memory

    def linear(self) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
        return F.linear, shared_weight(self.memory, self.seed, self.scale, self.shape)

    def expanded(self) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
        return lambda x, memory: F.linear(x, shared_weight(memory, self.seed, self.scale, self.shape)), self.memory

    def index(self) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
        numel = self.shape[0] * self.shape[1]
        index = places(self.seed, len(self.memory), 0, numel).view(self.shape)
        sign = torch.where(negative(self.seed, 0, numel), -self.scale, self.scale).view(self.shape)
        return lambda x, memory: F.linear(x, memory[index] * sign), self.memory

    def call(self, function: Callable[[Tensor, Tensor], Tensor], weights: Tensor, direction: str) -> list[Tensor]:
        """The product and, in both directions, its gradients."""
        given = [tensor.detach().requires_grad_(direction == BOTH) for tensor in (self.x, weights)]
        y = function(*given)
        return [y, *torch.autograd.grad(y, given, self.grad)] if direction == BOTH else [y]


def _contestants(n: int, depth: int, width: int, direction: str) -> Contestants:
    problem = Problem(n, depth, width)
    pairs = {
        OURS: problem.ours(),
        LINEAR: problem.linear(),
        EXPANDED: problem.expanded(),
        INDEX: problem.index(),
        LIMIT: problem.linear(),
    }
    return {name: partial(problem.call, *pair, direction) for name, pair in pairs.items()}
