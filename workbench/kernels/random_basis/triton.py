"""`random_basis` in Triton: a program makes a stretch of one basis tensor after the other and adds it to its sum.

Nothing of the basis is written. So that few elements fill a GPU too, their sum is split over the k basis tensors, and a
product with few tensors over the elements; torch adds the parts, nothing is added atomically, and two runs agree bit
for bit.

Where every tensor begins at a whole counter, a counter is worked out once for its four numbers, else once for each.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from workbench.kernels.static import Launch

BLOCK, WARPS = 1024, 4  # elements and warps of a program: two counters a thread
PROGRAMS = 1024  # wanted, several for each multiprocessor
FEWEST = 8  # tensors, or blocks of elements, that a part has at least


@triton.jit
def _uniform(seed, first, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK,) numbers of a seed from `first` on, which is a multiple of four if WHOLE."""
    if WHOLE:
        counter = (first >> 2) + tl.arange(0, BLOCK // 4)
    else:
        at = first + tl.arange(0, BLOCK)
        counter = at >> 2
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    a, b, c, d = tl.philox(seed, low, high, zero, zero)
    if WHOLE:
        word = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    else:
        word = tl.where((at & 2) == 0, tl.where((at & 1) == 0, a, b), tl.where((at & 1) == 0, c, d))
    return (word >> 8).to(tl.int32).to(tl.float32) * 1.1920928955078125e-07 - 1.0  # 2^-23


@triton.jit
def _mix(
    coefficients, seed, out, start, numel, k, per,
    WHOLE: tl.constexpr, DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wide = tl.float64 if DOUBLE else tl.float32
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    part = tl.program_id(1).to(tl.int64)
    key = tl.load(seed)
    acc = tl.zeros((BLOCK,), dtype=wide)
    for j in range(part * per, tl.minimum(part * per + per, k)):
        acc += tl.load(coefficients + j) * _uniform(key, start + j * numel + begin, WHOLE, BLOCK).to(wide)
    col = begin + tl.arange(0, BLOCK)
    tl.store(out + part * numel + col, acc, mask=col < numel)


@triton.jit
def _products(
    x, seed, out, start, numel, k, per,
    WHOLE: tl.constexpr, DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wide = tl.float64 if DOUBLE else tl.float32
    j = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    key = tl.load(seed)
    acc = tl.zeros((BLOCK,), dtype=wide)
    for begin in range(part * per, tl.minimum(part * per + per, numel), BLOCK):
        col = begin + tl.arange(0, BLOCK)
        given = tl.load(x + col, mask=col < numel, other=0.0)
        acc += given * _uniform(key, start + j * numel + begin, WHOLE, BLOCK).to(wide)
    tl.store(out + part * k + j, tl.sum(acc, 0))


def mix(coefficients: Tensor, seed: Tensor, numel: int, start: int) -> Tensor:
    """As `reference.mix`."""
    k = len(coefficients)
    if not numel or not k:
        return coefficients.new_zeros(numel)
    blocks = triton.cdiv(numel, BLOCK)
    per = _per(k, blocks)
    parts = triton.cdiv(k, per)
    out = coefficients.new_empty(parts, numel)
    _mix[blocks, parts](coefficients, seed, out, start, numel, k, per, **_form(coefficients, numel, start))
    return out[0] if parts == 1 else out.sum(0)


def products(x: Tensor, seed: Tensor, k: int, start: int) -> Tensor:
    """As `reference.products`."""
    numel = len(x)
    if not numel or not k:
        return x.new_zeros(k)
    per = BLOCK * _per(triton.cdiv(numel, BLOCK), k)
    parts = triton.cdiv(numel, per)
    out = x.new_empty(parts, k)
    _products[k, parts](x, seed, out, start, numel, k, per, **_form(x, numel, start))
    return out[0] if parts == 1 else out.sum(0)


def _per(steps: int, programs: int) -> int:
    """How many of its steps each program takes, where there are so many programs that could take all."""
    return max(FEWEST, triton.cdiv(steps * programs, PROGRAMS))


def _form(given: Tensor, numel: int, start: int) -> dict:
    return {
        "WHOLE": numel % 4 == 0 and start % 4 == 0,
        "DOUBLE": given.dtype == torch.float64,
        "BLOCK": BLOCK,
        "num_warps": WARPS,
        "num_stages": 1,
    }


def launches() -> "list[Launch]":
    """What is compiled ahead of time: tensors that begin at whole counters, and any; sizes are 64-bit."""
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    def launch(function, name: str, first: str, whole: bool) -> "Launch":
        return Launch(
            kernel=f"random_basis/{name}",
            function=function,
            signature={first: "*fp32", "seed": "*i64", "out": "*fp32"}
            | dict.fromkeys(("start", "numel", "k", "per"), "i64"),
            constants={"WHOLE": whole, "DOUBLE": False, "BLOCK": BLOCK},
            divisible=(first, "seed", "out", *(("start", "numel", "per") if whole else ())),
            num_warps=WARPS,
            num_stages=1,
            dtype="fp32",
            shape=f"any size; numel and start {'multiples of 16' if whole else 'any'}",
            gemm=False,
        )

    kinds = ((_mix, "mix", "coefficients"), (_products, "products", "x"))
    return [launch(*kind, whole) for kind in kinds for whole in (True, False)]
