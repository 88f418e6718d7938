"""`pcb_merge` in Triton: three passes over all models, as in `native`, to count scores, to count them finely, to merge.

Each pass makes the scores anew, by one function and without joining products with sums, so that they are the same each
time. A program that makes the scores of one model goes through all of them, which are in the cache by then.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels.pcb_merge.native import Models, Unbased, by_counts, constants
from workbench.kernels.pcb_merge.reference import checked_ends
from workbench.kernels.trim_elect_merge import magnitudes
from workbench.kernels.trim_elect_merge.native import DIGITS
from workbench.kernels.trim_elect_merge.triton import places_of, row_at

if TYPE_CHECKING:
    from workbench.kernels.static import Launch

BLOCK, WARPS = 512, 4  # parameters and warps of a program


@triton.jit
def _tanh(x):
    """Of -1 to 1: the polynomial of native.c."""
    u = x * x
    p = u * -3.523280939e-04 + 2.278647663e-03
    p = p * u - 7.912485055e-03
    p = p * u + 2.146141015e-02
    p = p * u - 5.386970672e-02
    p = p * u + 1.333213931e-01
    p = p * u - 3.333327738e-01
    p = p * u + 9.999999956e-01
    return p * x


@triton.jit
def _placed(places, i, col, inside, origin, numbers, n, kind, ALIGNED: tl.constexpr):
    """Clipped differences of model i, and their places between its bounds, -1 to 1."""
    low, high = tl.load(numbers + i), tl.load(numbers + n + i)
    tau = tl.load(row_at(places, i, kind, ALIGNED) + col, mask=inside, other=0.0).to(tl.float32) - origin
    size = tl.minimum(tl.maximum(tl.abs(tau), low), high)
    sign = tl.where(tau > 0, 1.0, tl.where(tau < 0, -1.0, 0.0))
    return sign * size, sign * ((size - low) * tl.load(numbers + 2 * n + i))


@triton.jit
def _scored(places, i, col, inside, origin, numbers, n, kind, ALIGNED: tl.constexpr):
    """Clipped differences of model i, and their scores; 0 has no sign."""
    clipped, g = _placed(places, i, col, inside, origin, numbers, n, kind, ALIGNED)
    total = tl.zeros_like(g)
    for j in range(n):
        _, other = _placed(places, j, col, inside, origin, numbers, n, kind, ALIGNED)
        total += _tanh(g * other)
    score = total * tl.exp2((g * g - 1.0) * (1.44269504 * n))
    return clipped, tl.where(score == 0, 0.0, score)


@triton.jit
def _origin(base, col, inside, BASED: tl.constexpr):
    origin = tl.zeros(col.shape, dtype=tl.float32)
    if BASED:
        origin = tl.load(base + col, mask=inside, other=0.0).to(tl.float32)
    return origin


@triton.jit
def _count(
    places, base, numbers, digits, table, most, n, size,
    BASED: tl.constexpr, FINE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(1)
    col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = col < size
    origin = _origin(base, col, inside, BASED)
    _, score = _scored(places, i, col, inside, origin, numbers, n, base, ALIGNED)
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # rises with the score
    row = table + i.to(tl.int64) * 65536
    one = tl.full((BLOCK,), 1, tl.int64)
    if FINE:
        tl.atomic_add(row + (key & 0xFFFF), one, mask=inside & ((key >> 16) == tl.load(digits + i)), sem="relaxed")
    else:
        tl.atomic_add(row + 32768 + (key >> 16), one, mask=inside, sem="relaxed")
        tl.atomic_max(most + i, tl.max(tl.where(inside, key, -2147483648), 0), sem="relaxed")


@triton.jit
def _merge(places, base, numbers, out, n, size, BASED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = col < size
    origin = _origin(base, col, inside, BASED)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    shares = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(n):
        clipped, score = _scored(places, i, col, inside, origin, numbers, n, out, ALIGNED)
        least = tl.load(numbers + 3 * n + i)
        share = tl.where(score > least, (score - least) * tl.load(numbers + 4 * n + i), 0.0)
        total += share * tl.load(numbers + 5 * n + i) * clipped
        shares += share
    merged = tl.div_rn(total, tl.where(shares > 0, shares, 1.0))
    tl.store(out + col, (origin + merged).to(out.dtype.element_ty), mask=inside)


def pcb_merge(
    experts: Sequence[Tensor], base: Tensor | None, clip: tuple[int, int], drop: int, scale: Sequence[float]
) -> Tensor:
    """As `reference.pcb_merge`."""
    found = (magnitudes(x, lambda size: [0, *clip, size - 1], base, "triton") for x in experts)
    low, high = zip(*(checked_ends(i, four) for i, four in enumerate(found)), strict=True)
    least, most = _bounds([(experts, base)], low, high, drop)
    return _merged((experts, base), low, high, least, most, scale)


def bounds(
    pieces: Iterable[Float[Tensor, "models piece"]], low: Sequence[float], high: Sequence[float], drop: int
) -> tuple[list[float], list[float]]:
    """As `reference.bounds`, with nothing in memory but a piece at a time; they are gone through twice."""
    return _bounds(Unbased(pieces), low, high, drop)


def piece(tau: Float[Tensor, "models piece"], *numbers: Sequence[float]) -> Float[Tensor, " piece"]:
    """As `reference.piece`."""
    return _merged((list(tau.contiguous()), None), *numbers)


def _bounds(models: Iterable[Models], low, high, drop: int) -> tuple[list[float], list[float]]:
    n = len(low)

    def counted(digits: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        table = None
        for experts, base in models:
            device, size = experts[0].device, len(experts[0])
            if table is None:
                table = torch.zeros(n, DIGITS, dtype=torch.int64, device=device)
                most = torch.full((n,), -(2**31), dtype=torch.int32, device=device)
                wanted = torch.zeros(n) if digits is None else torch.from_numpy(digits - DIGITS // 2)
                wanted = wanted.to(device, torch.int32)
            if size:
                grid, counts = (triton.cdiv(size, BLOCK), n), (wanted, table, most)
                _run(_count, grid, experts, base, constants(low, high)[:3], *counts, FINE=digits is not None)
        largest = most.cpu().numpy()
        return table.cpu().numpy(), (largest ^ ((largest >> 31) & 0x7FFFFFFF)).view(np.float32)

    return by_counts(counted, drop)


def _merged(models: Models, low, high, least, most, scale) -> Tensor:
    experts, base = models
    out, size = torch.empty_like(experts[0]), len(experts[0])
    if size:
        _run(_merge, (triton.cdiv(size, BLOCK),), experts, base, constants(low, high, least, most, scale), out)
    return out


def _run(kernel, grid: tuple[int, ...], experts, base, numbers: Sequence[np.ndarray], *given, **form) -> None:
    """`kernel` over all parameters; a base that is not there is not read."""
    first = experts[0]
    if first.dtype == torch.float64:
        raise InputError("backend is 'triton' but pcb_merge got tensors of torch.float64")
    places, aligned = places_of(experts)
    kernel[grid](
        places,
        first if base is None else base,
        torch.from_numpy(np.concatenate(numbers)).to(first.device),
        *given,
        len(experts),
        len(first),
        BASED=base is not None,
        ALIGNED=aligned,
        BLOCK=BLOCK,
        num_warps=WARPS,
        num_stages=1,
        enable_fp_fusion=False,
        **form,
    )


def launches() -> "list[Launch]":
    """What is compiled ahead of time: the counts and the merge, with a base; sizes are 64-bit and multiples of 16."""
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    def launch(name: str, dtype: str, shape: str, function, signature: dict, constants: dict) -> "Launch":
        data = f"*{dtype}"
        signature = {"places": "*i64", "base": data, "numbers": "*fp32"} | signature | {"n": "i32", "size": "i64"}
        return Launch(
            kernel=f"pcb_merge/{name}",
            function=function,
            signature=signature,
            constants={"BASED": True, "ALIGNED": True, "BLOCK": BLOCK} | constants,
            divisible=("size", *(key for key, kind in signature.items() if kind.startswith("*"))),
            num_warps=WARPS,
            num_stages=1,
            dtype=dtype,
            shape=shape,
            gemm=False,
            fused=False,
        )

    def count(dtype: str, fine: bool) -> "Launch":
        signature = {"digits": "*i32", "table": "*i64", "most": "*i32"}
        return launch("count", dtype, f"{'lower' if fine else 'upper'} half", _count, signature, {"FINE": fine})

    return [
        count("bf16", False),
        count("fp32", True),
        *(launch("merge", dtype, "any models", _merge, {"out": f"*{dtype}"}, {}) for dtype in ("bf16", "fp32")),
    ]
