"""GEPS experts: perceptrons whose every layer a context moves along a few directions (Kassai Koupai et al. 2024).

    W(xi) = W + A diag(xi) B        b(xi) = b + A xi        A (out, d), B (d, in), xi (d)

A context does not change along a trajectory, so the matrices of each pair of an expert and a context are made once and
all pairs are applied together, as batched products. At xi = 0 an expert is a plain perceptron.
"""

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError

Rates = Callable[[Float[Tensor, "pairs starts n"]], Float[Tensor, "pairs starts n"]]


class GEPSBank(nn.Module):
    """M experts of one shape that all start the same.

    Args:
        n_experts: M.
        state_dim: n, of states and their rates.
        width, depth: of the hidden layers, with swish after each.
        context_dim: d, of what an expert sees of a context.
    """

    def __init__(self, n_experts: int, state_dim: int = 2, width: int = 32, depth: int = 2, context_dim: int = 2):
        super().__init__()
        for name, value in (("n_experts", n_experts), ("state_dim", state_dim), ("width", width), ("depth", depth)):
            if value < 1:
                raise InputError(f"{name} is {value} but must be at least 1")
        if context_dim < 1:
            raise InputError(f"context_dim is {context_dim} but must be at least 1")
        self.n_experts, self.state_dim, self.context_dim = n_experts, state_dim, context_dim
        self.weight, self.bias, self.a, self.b = (nn.ParameterList() for _ in range(4))
        for size, out in itertools.pairwise([state_dim, *[width] * depth, state_dim]):
            layer = nn.Linear(size, out)
            bound = context_dim**-0.5
            drawn = {
                "weight": layer.weight.detach(),
                "bias": layer.bias.detach(),
                "a": torch.empty(out, context_dim).uniform_(-bound, bound),
                "b": torch.empty(context_dim, size).uniform_(-(size**-0.5), size**-0.5),
            }
            for name, value in drawn.items():
                getattr(self, name).append(nn.Parameter(value.expand(n_experts, *value.shape).clone()))

    def rates(self, expert: Int64[Tensor, " pairs"], xi: Float[Tensor, "pairs context"]) -> Rates:
        """What maps states of each pair to their rates: pair p is expert `expert[p]` at the context `xi[p]`."""
        layers = []
        for weight, bias, a, b in zip(self.weight, self.bias, self.a, self.b, strict=True):
            moved = a[expert]
            matrix = weight[expert] + (moved * xi[:, None]) @ b[expert]
            offset = bias[expert] + (moved @ xi[..., None]).squeeze(-1)
            layers.append((offset[:, None], matrix.mT))

        def rates(x: Tensor) -> Tensor:
            for offset, matrix in layers[:-1]:
                x = F.silu(torch.baddbmm(offset, x, matrix))
            return torch.baddbmm(layers[-1][0], x, layers[-1][1])

        return rates

    def extra_repr(self) -> str:
        return f"{self.n_experts} experts, context_dim={self.context_dim}"


def width_for(params: int, state_dim: int, depth: int, context_dim: int) -> int:
    """The width at which one expert has at least so many parameters."""
    width = 1
    while True:
        sizes = [state_dim, *[width] * depth, state_dim]
        pairs = list(itertools.pairwise(sizes))
        if sum((i + 1) * o + context_dim * (i + o) for i, o in pairs) >= params:
            return width
        width += 1
