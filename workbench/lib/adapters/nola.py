"""NOLA: the two factors of a LoRA, each a mixture of random matrices that a seed makes; only the coefficients train.

Koohpayegani et al. 2023, "NOLA: Compressing LoRA using Linear Combination of Random Basis" (arXiv:2310.02556); public
code: UCDvision/NOLA. Beside a frozen layer W (O, I):

    A = A0 + k^-1/2 sum_j a_j GA_j     A (r, I), a (k,)      GA_j, GB_j fixed, from U[-1, 1)
    B =      k^-1/2 sum_j b_j GB_j     B (O, r), b (k,)      A0 fixed, from U(+-I^-1/2), as LoRA's A starts
    y = W x + (alpha / r) B A u,       u = dropout(x)

a = b = 0 at first, so the function stays and, A0 not being 0, b has a gradient. (The paper's formula has no A0; as in
its code for language models there is one here.) What is trained is 2 k numbers a layer whatever r, O and I are, and
what is saved is these and two seeds: a basis is made where it is needed, `kernels.random_basis`, and again in the
backward pass. Each layer has seeds of its own.

Tensor letters: O output width, I input width, r rank, k coefficients; B may have another number of them, `k_b`.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.kernels.random_basis import random_basis, uniform
from workbench.lib.core.adapt import Adapter, MadeLinear
from workbench.lib.core.low_rank import MadeFactors, fitting_rank

METHOD = Method(
    slug="nola",
    title="NOLA: Compressing LoRA using Linear Combination of Random Basis",
    family="adapters",
    year=2023,
    paper="arXiv:2310.02556",
    claim="LoRA factors written as mixtures of fixed random matrices equal LoRA with fewer trained numbers than rank "
    "one needs.",
    objects=("NOLA", "NOLALinear", "NOLAFactors", "RandomMixture"),
)


def example() -> nn.Module:
    """A linear layer with an update of rank 8 that 16 + 16 numbers make."""
    return NOLALinear(nn.Linear(32, 32), rank=8, k=16)


class RandomMixture(nn.Module):
    """k^-1/2 sum_j c_j G_j for coefficients c (k,), 0 at first, and a basis that the seed makes.

    Args:
        shape: of the result.
        k: how many matrices there are.
        cache: keep the basis, k times as large as the result, from the first use on. Faster, and the same numbers.
    """

    def __init__(self, shape: tuple[int, ...], k: int, cache: bool = False):
        super().__init__()
        if k < 1:
            raise InputError(f"k is {k} but must be at least 1")
        self.shape, self.k, self.cache = tuple(shape), k, cache
        self.coefficients = nn.Parameter(torch.zeros(k))
        self.register_buffer("seed", torch.randint(2**63 - 1, ()))
        self._kept: tuple[Tensor, int, Tensor] | None = None

    def forward(self) -> Tensor:
        c = self.coefficients * self.k**-0.5
        if not self.cache:
            return random_basis(c, self.seed, self.shape)
        return (c @ self.basis().flatten(1)).view(self.shape)

    def extra(self) -> Tensor:
        """One more matrix of the shape, from U[-1, 1), beside those that are mixed."""
        numel = torch.Size(self.shape).numel()
        return uniform(self.seed, self.k * numel, numel, self.coefficients.dtype).view(self.shape)

    def basis(self) -> Tensor:
        """(k, *shape) all G_j; with `cache` the same tensor until the seed, the type or the device is another."""
        c, kept = self.coefficients, self._kept
        if kept is not None and kept[0] is self.seed and kept[1] == self.seed._version and kept[2].dtype == c.dtype:
            return kept[2]
        with torch.inference_mode(False):  # else it could not be used in a backward pass
            whole = uniform(self.seed, 0, self.k * torch.Size(self.shape).numel(), c.dtype).view(self.k, *self.shape)
        if self.cache:
            self._kept = self.seed, self.seed._version, whole
        return whole

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": None}


class NOLAFactors(MadeFactors):
    """A and B as mixtures of random matrices.

    Args:
        k, k_b: coefficients of A and of B; k_b None: as many.
        cache: see `RandomMixture`.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        k: int,
        k_b: int | None = None,
        alpha: float | None = None,
        cache: bool = False,
    ):
        super().__init__(d_in, d_out, rank, alpha)
        if k_b is not None and k_b < 1:
            raise InputError(f"k_b is {k_b} but must be at least 1")
        self.a = RandomMixture((rank, d_in), k, cache)
        self.b = RandomMixture((d_out, rank), k if k_b is None else k_b, cache)

    def forward(self) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
        return self.a.extra() * self.shape[1] ** -0.5 + self.a(), self.b()


class NOLALinear(MadeLinear):
    """y = W x + (alpha / r) B A dropout(x).

    Args:
        options: of `NOLAFactors`.
    """

    def __init__(self, base: nn.Linear, rank: int, k: int, dropout: float = 0.0, **options: Any):
        super().__init__(base, NOLAFactors(base.in_features, base.out_features, rank, k, **options), dropout)


class NOLA(Adapter):
    """An update of random matrices on every wanted layer. Its best learning rate is several times LoRA's.

    Args:
        rank: r; default 8, or a layer's smaller width where that is less. It costs no trained numbers.
        k: coefficients of A, and of B unless `k_b` says otherwise.
        k_b: coefficients of B.
        alpha: numerator of the scale; default r, so that the scale is 1.
        dropout: of the update's input.
        cache: keep the random matrices, which is faster and takes k r (I + O) numbers a layer.
    """

    slug = "nola"

    def __init__(
        self,
        rank: int | None = None,
        k: int = 64,
        k_b: int | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
        cache: bool = False,
    ):
        self.rank, self.k, self.dropout = rank, k, dropout
        self.options = {"k_b": k_b, "alpha": alpha, "cache": cache}

    def linear(self, layer: nn.Linear, name: str) -> NOLALinear:
        return NOLALinear(layer, fitting_rank(self.rank, layer), self.k, self.dropout, **self.options)


ADAPTER = NOLA
