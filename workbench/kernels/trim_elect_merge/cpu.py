"""The CPU path of `trim_elect_merge` without a compiler, and for float64: the reference, a piece at a time.

What lies between the operators of torch is then in the cache, and next to no memory is needed beside the result.
"""

from collections.abc import Sequence

from torch import Tensor

from workbench.kernels import threads
from workbench.kernels.trim_elect_merge import reference

PIECE = 2**14  # entries


def trim_elect_merge(experts: Sequence[Tensor], base: Tensor | None, *how) -> None:
    """As `reference.trim_elect_merge`."""
    *how, out = how

    def work(_: int, first: int) -> None:
        part = slice(first, first + PIECE)
        origin = None if base is None else base[part]
        reference.trim_elect_merge([x[part] for x in experts], origin, *how, out[part])

    threads.share(range(0, out.numel(), PIECE), work, threads.available())
