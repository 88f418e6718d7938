"""`shared_weight` and `shared_linear` in Triton: a tile of the matrix is formed in registers where it is multiplied.

32 weights in a row have the signs of five words and lie in two partitions at most, where m is 32 or more; so the
generator runs a few times a row of a tile and not for each weight. Gradients are multiplied as panels of the matrix, by
torch; then each program takes a stretch of the array and walks through the partitions for what each number made.
Nothing is added atomically, and two runs agree bit for bit.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from workbench.kernels.static import Launch

RUN = 32  # weights in a row that a tile has
LINES = 64  # rows of such
ROWS = 64  # of x, in a product
BLOCK, WARPS = 256, 4  # numbers of the array and warps of a program
MANY = 8  # warps of a program that multiplies: fewer spill on sm_80
PANEL = 2**24  # weights whose gradient is there at a time


@triton.jit
def _words(key, counter):
    """The four words of each block of the generator."""
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(key, low, high, zero, zero)


@triton.jit
def _shift(key, part, m):
    """By how much partitions are turned."""
    a, b, _c, _d = _words(key, part + (1 << 62))
    return (((a >> 1).to(tl.int64) << 32) | b.to(tl.int64)) % m


@triton.jit
def _tile(memory, key, scale, m, first, there, SMALL: tl.constexpr, RUN: tl.constexpr):
    """(lines, RUN) weights from `first` (lines,) on, 0 where they are not `there`."""
    k = tl.arange(0, RUN)
    part = first // m
    if SMALL:
        i = first[:, None] + k[None, :]
        of = i // m
        place = (_shift(key, of, m) + i - of * m) % m
    else:
        within = (first - part * m)[:, None] + k[None, :]
        here, following = _shift(key, part, m)[:, None], _shift(key, part + 1, m)[:, None]
        place = within + tl.where(within < m, here, following - m)
        place = tl.where(place < m, place, place - m)
    a, b, c, d = _words(key, first >> 7)
    e, _f, _g, _h = _words(key, (first >> 7) + 1)
    bit = ((first & 127)[:, None] + k[None, :]).to(tl.uint32)
    word = bit >> 5
    word = tl.where(
        word < 2,
        tl.where(word == 0, a[:, None], b[:, None]),
        tl.where(word == 2, c[:, None], tl.where(word == 3, d[:, None], e[:, None])),
    )
    value = tl.load(memory + place, mask=there, other=0.0) * scale
    return tl.where(((word >> (bit & 31)) & 1) != 0, -value, value)


@triton.jit
def _expand(
    memory, seed, scale, out, offset, numel, m,
    SMALL: tl.constexpr, LINES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    line = (tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)) * RUN
    at = line[:, None] + tl.arange(0, RUN)[None, :]
    made = _tile(memory, tl.load(seed), tl.load(scale), m, offset + line, at < numel, SMALL, RUN)
    tl.store(out + at, made, mask=at < numel)


@triton.jit
def _product(
    x, memory, seed, scale, out, offset, rows, depth, width, m,
    SMALL: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """out (rows, width) = x (rows, depth) times W^T of W (width, depth), or W (depth, width) where TRANSPOSED."""
    key, factor = tl.load(seed), tl.load(scale)
    COLUMNS: tl.constexpr = RUN if TRANSPOSED else LINES
    STEP: tl.constexpr = LINES if TRANSPOSED else RUN
    columns = tl.cdiv(width, COLUMNS)
    panel = tl.program_id(0) // columns
    row = panel.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    begin = (tl.program_id(0) - panel * columns).to(tl.int64) * COLUMNS
    col = begin + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, depth, STEP):
        k = start + tl.arange(0, STEP)
        inside = (row < rows)[:, None] & (k < depth)[None, :]
        x_t = tl.load(x + row[:, None] * depth + k[None, :], mask=inside, other=0.0)
        if TRANSPOSED:
            there = (k < depth)[:, None] & (col < width)[None, :]
            w_t = _tile(memory, key, factor, m, offset + k * width + begin, there, SMALL, RUN)
        else:
            there = (col < width)[:, None] & (k < depth)[None, :]
            w_t = tl.trans(_tile(memory, key, factor, m, offset + col * depth + start, there, SMALL, RUN))
        acc = tl.dot(x_t, w_t, acc, input_precision="ieee")
    tl.store(out + row[:, None] * width + col[None, :], acc, mask=(row < rows)[:, None] & (col < width)[None, :])


@triton.jit
def _fold(values, seed, scale, out, offset, numel, m, BLOCK: tl.constexpr):
    """Adds to each number of the array the values of the weights that it made, in their order."""
    key, factor = tl.load(seed), tl.load(scale)
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.load(out + j, mask=j < m, other=0.0)
    for part in range(offset // m, (offset + numel - 1) // m + 1):
        back = j - _shift(key, tl.zeros_like(j) + part, m)
        i = part * m + tl.where(back < 0, back + m, back)
        there = (j < m) & (i >= offset) & (i < offset + numel)
        a, b, c, d = _words(key, i >> 7)
        word = (i >> 5) & 3
        word = tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))
        value = tl.load(values + i - offset, mask=there, other=0.0) * factor
        acc += tl.where(((word >> (i & 31).to(tl.uint32)) & 1) != 0, -value, value)
    tl.store(out + j, acc, mask=j < m)


def expand(memory: Tensor, seed: Tensor, scale: Tensor, offset: int, numel: int) -> Tensor:
    out = memory.new_empty(numel)
    if numel:
        m, programs = len(memory), triton.cdiv(numel, LINES * RUN)
        form = {"SMALL": m < RUN, "LINES": LINES, "RUN": RUN, "num_warps": WARPS, "num_stages": 1}
        _expand[programs,](memory, seed, scale, out, offset, numel, m, **form)
    return out


def fold(values: Tensor, seed: Tensor, scale: Tensor, offset: int, m: int) -> Tensor:
    out = values.new_zeros(m)
    _add(out, values, seed, scale, offset)
    return out


def product(
    x: Tensor, memory: Tensor, seed: Tensor, scale: Tensor, offset: int, width: int, transposed: bool
) -> Tensor:
    (rows, depth), m = x.shape, len(memory)
    out = x.new_empty(rows, width)
    if not out.numel():
        return out
    columns = RUN if transposed else LINES
    form = {"SMALL": m < RUN, "TRANSPOSED": transposed, "ROWS": ROWS, "LINES": LINES, "RUN": RUN}
    programs = triton.cdiv(rows, ROWS) * triton.cdiv(width, columns)
    given = (x, memory, seed, scale, out, offset, rows, depth, width, m)
    _product[programs,](*given, **form, num_warps=MANY, num_stages=1)
    return out


def outer(grad: Tensor, x: Tensor, seed: Tensor, scale: Tensor, offset: int, m: int) -> Tensor:
    out, (depth, rows) = x.new_zeros(m), (x.shape[1], grad.shape[1])
    step = max(1, PANEL // max(1, depth))
    for first in range(0, rows, step):
        _add(out, grad[:, first : first + step].T @ x, seed, scale, offset + first * depth)
    return out


def _add(out: Tensor, values: Tensor, seed: Tensor, scale: Tensor, offset: int) -> None:
    if values.numel():
        given = (values, seed, scale, out, offset, values.numel(), len(out))
        _fold[triton.cdiv(len(out), BLOCK),](*given, BLOCK=BLOCK, num_warps=WARPS, num_stages=1)


def launches() -> "list[Launch]":
    """What is compiled ahead of time: arrays of 32 numbers or more, and smaller ones; sizes are 64-bit."""
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    def launch(function, name: str, pointers: tuple[str, ...], sizes: tuple[str, ...], shape: str, **constants):
        kinds = {"seed": "*i64"}
        return Launch(
            kernel=f"shared_store/{name}",
            function=function,
            signature={p: kinds.get(p, "*fp32") for p in pointers} | dict.fromkeys(sizes, "i64"),
            constants=constants,
            divisible=(*pointers, *(size for size in sizes if size in ("depth", "width", "numel"))),
            num_warps=MANY if function is _product else WARPS,
            num_stages=1,
            dtype="fp32",
            shape=shape,
            gemm=False,
        )

    tile, given = {"LINES": LINES, "RUN": RUN}, ("memory", "seed", "scale", "out")
    found = [launch(_fold, "fold", ("values", "seed", "scale", "out"), ("offset", "numel", "m"), "any", BLOCK=BLOCK)]
    for small in (False, True):
        size = "m < 32" if small else "m >= 32"
        found.append(launch(_expand, "expand", given, ("offset", "numel", "m"), size, SMALL=small, **tile))
        for transposed in (False, True):
            name, more = f"{size}{', transposed' * transposed}", {"SMALL": small, "TRANSPOSED": transposed}
            sizes = ("offset", "rows", "depth", "width", "m")
            found.append(launch(_product, "product", ("x", *given), sizes, name, **more, ROWS=ROWS, **tile))
    return found
