"""`trim_elect_merge` in Triton: a program has a stretch of entries of every model, and reads each once, twice to elect.

The models lie where they are, and a kernel is told their addresses, so that one serves any number of them. Products are
not joined with sums and quotients are rounded once: results are those of the reference bit for bit.

The magnitude at a rank is found as in `native`, by counts of its first 15 bits and then of the other 16. They are added
atomically: whole numbers, whose order does not matter.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels.trim_elect_merge.native import DIGITS, by_counts

if TYPE_CHECKING:
    from workbench.kernels.static import Launch

BLOCK, WARPS = 1024, 4  # entries and warps of a program


@triton.jit
def row_at(places, i, kind, ALIGNED: tl.constexpr):
    """Where model i begins, as `kind` points; if ALIGNED at a multiple of 16 bytes."""
    row = tl.load(places + i).to(kind.dtype)
    return tl.multiple_of(row, 16) if ALIGNED else row


@triton.jit
def _trimmed(places, i, col, inside, origin, numbers, n, out, wide: tl.constexpr, ALIGNED: tl.constexpr):
    """Differences of model i, and which are kept: NaN is, to be seen."""
    x = tl.load(row_at(places, i, out, ALIGNED) + col, mask=inside, other=0.0).to(wide)
    tau = x - origin
    return tau, (tl.abs(tau) < tl.load(numbers + n + i)) == 0


@triton.jit
def _merge(
    places, base, numbers, out, n, size,
    BASED: tl.constexpr, ELECTS: tl.constexpr, DIVIDES: tl.constexpr, ALIGNED: tl.constexpr, DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = col < size
    origin = tl.zeros((BLOCK,), dtype=wide)
    if BASED:
        origin = tl.load(base + col, mask=inside, other=0.0).to(wide)
    vote = tl.zeros((BLOCK,), dtype=wide)
    if ELECTS:
        for i in range(n):
            tau, kept = _trimmed(places, i, col, inside, origin, numbers, n, out, wide, ALIGNED)
            vote += tl.where(kept, tl.load(numbers + 2 * n + i) * tau, 0.0)
    negative = vote < 0
    total = tl.zeros((BLOCK,), dtype=wide)
    divisor = tl.zeros((BLOCK,), dtype=wide)
    for i in range(n):
        tau, kept = _trimmed(places, i, col, inside, origin, numbers, n, out, wide, ALIGNED)
        if ELECTS:
            kept = kept & (tau != 0) & (tl.where(negative, tau > 0, tau < 0) == 0)
        total += tl.where(kept, tl.load(numbers + i) * tau, 0.0)
        if DIVIDES:
            divisor += tl.where(kept, tl.load(numbers + 3 * n + i), 0.0)
    if DIVIDES:
        by = tl.where(divisor == 0, 1.0, divisor)
        total = total / by if DOUBLE else tl.div_rn(total, by)
    merged = tl.load(numbers + 4 * n) * total
    if BASED:
        merged = origin + merged
    tl.store(out + col, merged.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _count(x, base, table, most, size, digit, BASED: tl.constexpr, FINE: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = col < size
    tau = tl.load(x + col, mask=inside, other=0.0).to(tl.float32)
    if BASED:
        tau -= tl.load(base + col, mask=inside, other=0.0).to(tl.float32)
    key = tau.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    one = tl.full((BLOCK,), 1, tl.int64)
    if FINE:
        tl.atomic_add(table + (key & 0xFFFF), one, mask=inside & ((key >> 16) == digit), sem="relaxed")
    else:
        tl.atomic_add(table + (key >> 16), one, mask=inside, sem="relaxed")
        tl.atomic_max(most, tl.max(tl.where(inside, key, 0), 0), sem="relaxed")


def trim_elect_merge(
    experts: Sequence[Tensor],
    base: Tensor | None,
    weights: Sequence[float],
    thresholds: Sequence[float],
    elect: str | None,
    divide: str | None,
    scale: float,
    out: Tensor,
) -> None:
    """As `reference.trim_elect_merge`."""
    n, (size,), double = len(experts), experts[0].shape, out.dtype == torch.float64
    if not size:
        return
    votes, shares = ([1.0] * n if how in ("values", "count") else weights for how in (elect, divide))
    numbers = torch.tensor(
        [*weights, *thresholds, *votes, *shares, scale],
        dtype=torch.float64 if double else torch.float32,
        device=out.device,
    )
    places, aligned = places_of(experts)
    _merge[(triton.cdiv(size, BLOCK),)](
        places,
        out if base is None else base,  # not read without a base
        numbers,
        out,
        n,
        size,
        BASED=base is not None,
        ELECTS=elect is not None,
        DIVIDES=divide is not None,
        ALIGNED=aligned,
        DOUBLE=double,
        BLOCK=BLOCK,
        num_warps=WARPS,
        num_stages=1,
        enable_fp_fusion=False,
    )


def places_of(experts: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """(n,) where the models begin, on their device, and whether all do at a multiple of 16 bytes."""
    places = [x.data_ptr() for x in experts]
    return torch.tensor(places, device=experts[0].device), all(place % 16 == 0 for place in places)


def magnitudes(pieces: Iterable[tuple[Tensor, Tensor | None]], ranks: Callable[[int], Sequence[int]]) -> list[float]:
    """As `reference.magnitudes`, of float32 or narrower."""

    def counted(digit: int) -> tuple[np.ndarray, int]:
        table = most = None
        for x, base in pieces:
            if x.dtype == torch.float64:
                raise InputError("backend is 'triton' but magnitude_threshold got tensors of torch.float64")
            if table is None:
                table = torch.zeros(DIGITS, dtype=torch.int64, device=x.device)
                most = torch.zeros(1, dtype=torch.int32, device=x.device)
            if len(x):
                _count[(triton.cdiv(len(x), BLOCK),)](
                    x,
                    x if base is None else base,  # not read without a base
                    table,
                    most,
                    len(x),
                    digit,
                    BASED=base is not None,
                    FINE=digit >= 0,
                    BLOCK=BLOCK,
                    num_warps=WARPS,
                    num_stages=1,
                )
        return table.cpu().numpy(), int(most)

    return by_counts(counted, ranks)


def launches() -> "list[Launch]":
    """What is compiled ahead of time: TIES and the average, and both counts; sizes are 64-bit and multiples of 16."""
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    def launch(name: str, dtype: str, shape: str, function, signature: dict, constants: dict) -> "Launch":
        return Launch(
            kernel=f"trim_elect_merge/{name}",
            function=function,
            signature=signature | {"size": "i64"},
            constants=constants | {"BLOCK": BLOCK},
            divisible=("size", *(key for key, kind in signature.items() if kind.startswith("*"))),
            num_warps=WARPS,
            num_stages=1,
            dtype=dtype,
            shape=shape,
            gemm=False,
            fused=name != "merge",
        )

    def merge(dtype: str, shape: str, based: bool, elects: bool) -> "Launch":
        data = f"*{dtype}"
        signature = {"places": "*i64", "base": data, "numbers": "*fp32", "out": data, "n": "i32"}
        constants = {"BASED": based, "ELECTS": elects, "DIVIDES": True, "ALIGNED": True, "DOUBLE": False}
        return launch("merge", dtype, shape, _merge, signature, constants)

    def count(dtype: str, based: bool, fine: bool) -> "Launch":
        data = f"*{dtype}"
        signature = {"x": data, "base": data, "table": "*i64", "most": "*i32", "digit": "i32"}
        shape = f"{'last 16' if fine else 'first 15'} bits{', base' if based else ''}"
        return launch("count", dtype, shape, _count, signature, {"BASED": based, "FINE": fine})

    return [
        merge("bf16", "TIES, base", True, True),
        merge("fp32", "TIES, base", True, True),
        merge("bf16", "average of differences", False, False),
        count("bf16", True, False),
        count("fp32", False, True),
    ]
