"""The expert layer in Triton: what is gathered, activated or summed happens inside the products.

Forward: `_up` gathers rows of X, multiplies by W1 and activates; `_rows` multiplies by W2; `gather_sum` combines.
Backward, with the formulas of `reference`: `_down_dgrad` makes dZ, score * A and the parts of dscore in one pass from Z
and dO[tok] W2; `_score_grad` adds the parts; `_wgrad` makes both weight gradients, `_bias_grad` those of the biases;
`_rows` makes the rows of dX, which `gather_sum` adds. A, Y and gathered rows of X are never kept.

Grouped rows are cut into tiles of one expert (`RoutePlan.tiles`). Every output is written by one program, with sums in
a fixed order, so two runs agree bit for bit. Accumulators are float32. Widths and strides are run-time arguments,
offsets of rows and experts are int64, and whatever a mask leaves out is read as 0.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels.gather_sum.triton import gather_sum
from workbench.kernels.plan import RoutePlan

if TYPE_CHECKING:
    from workbench.kernels.static import Launch


class Tile(NamedTuple):
    """Rows and columns of a program's output, how much it contracts at a time, and the launch's warps and stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def sizes(self) -> dict[str, int]:
        """The compile-time arguments; a length of 0 is one that the kernel does not have."""
        return {f"BLOCK_{name}": size for name, size in zip("MNK", self[:3], strict=True) if size}


#: grouped rows of a tile, by bytes a number: the same for every kernel that goes by tiles
ROWS = {2: 128, 4: 64}
#: (kernel, bytes a number) -> tile. `up` has two accumulators of m x n. No spills on the targets.
TILES = {
    ("up", 2): Tile(ROWS[2], 64, 64, 8, 4),
    ("down", 2): Tile(ROWS[2], 128, 64, 8, 4),
    ("down_dgrad", 2): Tile(ROWS[2], 64, 64, 8, 4),
    ("up_dgrad", 2): Tile(ROWS[2], 128, 64, 8, 4),
    ("wgrad", 2): Tile(128, 128, 64, 8, 3),
    ("score_grad", 2): Tile(ROWS[2], 0, 64, 8, 1),
    ("bias_grad", 2): Tile(0, 64, 64, 4, 1),
    ("up", 4): Tile(ROWS[4], 32, 32, 8, 2),
    ("down", 4): Tile(ROWS[4], 32, 32, 8, 2),
    ("down_dgrad", 4): Tile(ROWS[4], 64, 32, 8, 2),
    ("up_dgrad", 4): Tile(ROWS[4], 64, 32, 8, 2),
    ("wgrad", 4): Tile(64, 64, 32, 8, 2),
    ("score_grad", 4): Tile(ROWS[4], 0, 64, 8, 1),
    ("bias_grad", 4): Tile(0, 64, 64, 4, 1),
}


@triton.jit
def _place(tiles, columns):
    """Tile of rows and tile of columns of this program: eight tiles of rows share the columns they read."""
    group = tl.program_id(0) // (8 * columns)
    inside = tl.program_id(0) - group * 8 * columns
    height = tl.minimum(tiles - group * 8, 8)
    return group * 8 + inside % height, inside // height


@triton.jit
def _up(
    x, w1, b1, tok, offs, tile_expert, tile_row, z, a, dim, hidden, tiles, stride_x,
    GLU: tl.constexpr, BIASED: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, column = _place(tiles, tl.cdiv(hidden, BLOCK_N))
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    row = tl.load(tile_row + tile) + tl.arange(0, BLOCK_M)
    there = row < tl.load(offs + expert + 1)
    token = tl.load(tok + row, mask=there, other=0).to(tl.int64)
    col = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    up = (2 if GLU else 1) * hidden
    x_p = x + token[:, None] * stride_x + k[None, :]
    gate_p = w1 + (expert.to(tl.int64) * up + col)[None, :] * dim + k[:, None]
    up_p = w1 + (expert.to(tl.int64) * up + hidden + col)[None, :] * dim + k[:, None]
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    linear = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(tl.cdiv(dim, BLOCK_K)):
        left = k < dim - step * BLOCK_K
        x_t = tl.load(x_p, mask=there[:, None] & left[None, :], other=0.0)
        inside = left[:, None] & (col < hidden)[None, :]
        gate = tl.dot(x_t, tl.load(gate_p, mask=inside, other=0.0), gate, input_precision="ieee")
        if GLU:
            linear = tl.dot(x_t, tl.load(up_p, mask=inside, other=0.0), linear, input_precision="ieee")
            up_p += BLOCK_K
        x_p += BLOCK_K
        gate_p += BLOCK_K
    if BIASED:
        b1 += expert.to(tl.int64) * up
        gate += tl.load(b1 + col, mask=col < hidden, other=0.0).to(tl.float32)[None, :]
        if GLU:
            linear += tl.load(b1 + hidden + col, mask=col < hidden, other=0.0).to(tl.float32)[None, :]
    # The backward reads Z as it is stored, so the activation takes it as it is stored.
    data = a.dtype.element_ty
    gate = gate.to(data)
    wide = gate.to(tl.float32)
    inside = there[:, None] & (col < hidden)[None, :]
    at = row.to(tl.int64)[:, None]
    if SAVE:
        tl.store(z + at * up + col[None, :], gate, mask=inside)
    if GLU:
        linear_t = linear.to(data)
        if SAVE:
            tl.store(z + at * up + (hidden + col)[None, :], linear_t, mask=inside)
        active = wide * tl.sigmoid(wide) * linear_t.to(tl.float32)
    else:
        active = tl.maximum(wide, 0.0)
    tl.store(a + at * hidden + col[None, :], active.to(data), mask=inside)


@triton.jit
def _rows(
    left, w, bias, offs, tile_expert, tile_row, out, inner, width, tiles,
    TRANSPOSED: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (P, width) = left (P, inner) times w_e (inner, width), or w_e (width, inner) transposed, plus bias_e."""
    tile, column = _place(tiles, tl.cdiv(width, BLOCK_N))
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    first, row = tl.load(tile_row + tile), tl.arange(0, BLOCK_M)
    there = row < tl.load(offs + expert + 1) - first
    left += first.to(tl.int64) * inner
    out += first.to(tl.int64) * width
    col = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    left_p = left + row[:, None] * inner + k[None, :]
    w += expert.to(tl.int64) * width * inner
    if TRANSPOSED:
        w_p = w + col.to(tl.int64)[None, :] * inner + k[:, None]
    else:
        w_p = w + k.to(tl.int64)[:, None] * width + col[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(tl.cdiv(inner, BLOCK_K)):
        more = k < inner - step * BLOCK_K
        left_t = tl.load(left_p, mask=there[:, None] & more[None, :], other=0.0)
        w_t = tl.load(w_p, mask=more[:, None] & (col < width)[None, :], other=0.0)
        acc = tl.dot(left_t, w_t, acc, input_precision="ieee")
        left_p += BLOCK_K
        if TRANSPOSED:
            w_p += BLOCK_K
        else:
            w_p += BLOCK_K * width
    if BIASED:
        bias_t = tl.load(bias + expert.to(tl.int64) * width + col, mask=col < width, other=0.0)
        acc += bias_t.to(tl.float32)[None, :]
    inside = there[:, None] & (col < width)[None, :]
    tl.store(out + row[:, None] * width + col[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _down_dgrad(
    grad, w2, z, score, order, tok, offs, tile_expert, tile_row, dz, scaled, parts, dim, hidden, tiles,
    GLU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From U = dO[tok] W2_e: dZ, score * A, and the part of <U, A> that these columns hold."""
    columns = tl.cdiv(hidden, BLOCK_N)
    tile, column = _place(tiles, columns)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    first, inner = tl.load(tile_row + tile), tl.arange(0, BLOCK_M)
    row = first + inner
    there = row < tl.load(offs + expert + 1)
    token = tl.load(tok + row, mask=there, other=0).to(tl.int64)
    col = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    grad_p = grad + token[:, None] * dim + k[None, :]
    w2_p = w2 + (expert.to(tl.int64) * dim + k)[:, None] * hidden + col[None, :]
    u = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(tl.cdiv(dim, BLOCK_K)):
        more = k < dim - step * BLOCK_K
        grad_t = tl.load(grad_p, mask=there[:, None] & more[None, :], other=0.0)
        w2_t = tl.load(w2_p, mask=more[:, None] & (col < hidden)[None, :], other=0.0)
        u = tl.dot(grad_t, w2_t, u, input_precision="ieee")
        grad_p += BLOCK_K
        w2_p += BLOCK_K * hidden
    inside = there[:, None] & (col < hidden)[None, :]
    data = scaled.dtype.element_ty
    pair = tl.load(order + row, mask=there, other=0)
    s = tl.load(score + pair, mask=there, other=0.0).to(tl.float32)
    up = (2 if GLU else 1) * hidden
    z += first.to(tl.int64) * up
    dz += first.to(tl.int64) * up
    scaled += first.to(tl.int64) * hidden
    at = inner[:, None] * up + col[None, :]  # inside the tile
    gate = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    # First what depends on Z alone, then its products with U, which lies otherwise in registers.
    if GLU:
        linear = tl.load(z + at + hidden, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        active = silu * linear
        slope = linear * (sigmoid + silu * (1 - sigmoid))
        tl.store(dz + at + hidden, (u * (silu * s[:, None])).to(data), mask=inside)
    else:
        active = tl.maximum(gate, 0.0)
        slope = tl.where(gate > 0, 1.0, 0.0)
    tl.store(scaled + inner[:, None] * hidden + col[None, :], (active * s[:, None]).to(data), mask=inside)
    tl.store(dz + at, (u * (slope * s[:, None])).to(data), mask=inside)
    tl.store(parts + row.to(tl.int64) * columns + column, tl.sum(u * active, 1), mask=there)


@triton.jit
def _score_grad(
    parts, grad, b2, order, tok, offs, tile_expert, tile_row, dscore, columns, dim,
    BIASED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds the parts of each row, and <dO[tok], b2_e>, and stores the sum at the row's pair."""
    expert = tl.load(tile_expert + tl.program_id(0))
    if expert < 0:
        return
    row = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    there = row < tl.load(offs + expert + 1)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for column in range(columns):
        total += tl.load(parts + row.to(tl.int64) * columns + column, mask=there, other=0.0)
    if BIASED:
        token = tl.load(tok + row, mask=there, other=0).to(tl.int64)
        for begin in range(0, dim, BLOCK_K):
            col = begin + tl.arange(0, BLOCK_K)
            inside = there[:, None] & (col < dim)[None, :]
            grad_t = tl.load(grad + token[:, None] * dim + col[None, :], mask=inside, other=0.0)
            b2_t = tl.load(b2 + expert.to(tl.int64) * dim + col, mask=col < dim, other=0.0)
            total += tl.sum(grad_t.to(tl.float32) * b2_t.to(tl.float32)[None, :], 1)
    pair = tl.load(order + row, mask=there, other=0)
    tl.store(dscore + pair, total.to(dscore.dtype.element_ty), mask=there)


@triton.jit
def _wgrad(
    left, right, tok, offs, out, height, width, stride_left, stride_right,
    GATHER_LEFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out_e (height, width) = left^T right over the rows of expert e; one side is gathered by token, the other grouped.

    An expert without rows gets zeros."""
    columns = tl.cdiv(width, BLOCK_N)
    each = tl.cdiv(height, BLOCK_M) * columns
    expert = tl.program_id(0) // each
    inside = tl.program_id(0) - expert * each
    m = inside // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = inside % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(offs + expert + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for begin in range(tl.load(offs + expert), end, BLOCK_K):
        row = begin + tl.arange(0, BLOCK_K)
        there = row < end
        token = tl.load(tok + row, mask=there, other=0).to(tl.int64)
        grouped = row.to(tl.int64)
        left_row = token if GATHER_LEFT else grouped
        right_row = grouped if GATHER_LEFT else token
        left_p = left + left_row[None, :] * stride_left + m[:, None]
        right_p = right + right_row[:, None] * stride_right + n[None, :]
        left_t = tl.load(left_p, mask=there[None, :] & (m < height)[:, None], other=0.0)
        right_t = tl.load(right_p, mask=there[:, None] & (n < width)[None, :], other=0.0)
        acc = tl.dot(left_t, right_t, acc, input_precision="ieee")
    out += expert.to(tl.int64) * height * width
    out_p = out + m.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(out_p, acc.to(out.dtype.element_ty), mask=(m < height)[:, None] & (n < width)[None, :])


@triton.jit
def _bias_grad(
    rows, score, order, tok, offs, out, width,
    GATHERED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out_e (width) = sum of the rows of expert e; gathered by token and times the score, or grouped as they are."""
    columns = tl.cdiv(width, BLOCK_N)
    expert = tl.program_id(0) // columns
    col = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(offs + expert + 1)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for begin in range(tl.load(offs + expert), end, BLOCK_K):
        row = begin + tl.arange(0, BLOCK_K)
        there = row < end
        source = tl.load(tok + row, mask=there, other=0) if GATHERED else row
        inside = there[:, None] & (col < width)[None, :]
        t = tl.load(rows + source.to(tl.int64)[:, None] * width + col[None, :], mask=inside, other=0.0).to(tl.float32)
        if GATHERED:
            pair = tl.load(order + row, mask=there, other=0)
            t *= tl.load(score + pair, mask=there, other=0.0).to(tl.float32)[:, None]
        acc += tl.sum(t, 0)
    tl.store(out + expert.to(tl.int64) * width + col, acc.to(out.dtype.element_ty), mask=col < width)


def forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    plan: RoutePlan,
    score: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `reference.forward`.

    Raises:
        InputError: x is float64.
    """
    if x.dtype == torch.float64:
        raise InputError("backend is 'triton' but x is torch.float64; it must be float32, bfloat16 or float16")
    tiles = plan.tiles(ROWS[x.element_size()])
    z = x.new_empty(plan.n_pairs, w1.shape[1]) if save else None
    a = x.new_empty(plan.n_pairs, w2.shape[2])
    count, (dim, hidden) = tiles[0].shape[0], w2.shape[1:]
    blocks, grid = _blocks("up", x, count, hidden)
    _up[grid](
        x, w1, w1 if b1 is None else b1, plan.tok, plan.offs, *tiles, a if z is None else z, a,
        dim, hidden, count, x.stride(0),
        GLU=activation == "swiglu", BIASED=b1 is not None, SAVE=save, **blocks,
    )  # fmt: skip
    return gather_sum(_product("down", a, w2, b2, plan, tiles), plan, score), z


def backward(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    w1: Tensor,
    w2: Tensor,
    plan: RoutePlan,
    score: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `reference.backward`. `grad` is contiguous."""
    tiles = plan.tiles(ROWS[x.element_size()])
    count, (dim, hidden) = tiles[0].shape[0], w2.shape[1:]
    dz, scaled = torch.empty_like(z), x.new_empty(plan.n_pairs, hidden)
    blocks, grid = _blocks("down_dgrad", x, count, hidden)
    columns = triton.cdiv(hidden, blocks["BLOCK_N"])
    parts = x.new_empty(plan.n_pairs, columns, dtype=torch.float32)
    _down_dgrad[grid](
        grad, w2, z, score, plan.order, plan.tok, plan.offs, *tiles, dz, scaled, parts, dim, hidden, count,
        GLU=activation == "swiglu", **blocks,
    )  # fmt: skip
    dscore = torch.empty_like(score)
    blocks, _ = _blocks("score_grad", x)
    _score_grad[(count,)](
        parts, grad, grad if b2 is None else b2, plan.order, plan.tok, plan.offs, *tiles, dscore, columns, dim,
        BIASED=b2 is not None, **blocks,
    )  # fmt: skip
    dw2 = _weight_grad(grad, scaled, w2, plan, gather_left=True)
    del scaled
    dw1 = _weight_grad(dz, x, w1, plan, gather_left=False)
    db1 = None if b1 is None else _column_sums(dz, None, b1, plan)
    db2 = None if b2 is None else _column_sums(grad, score, b2, plan)
    dx = gather_sum(_product("up_dgrad", dz, w1, None, plan, tiles), plan, None)
    return dx, dw1, dw2, dscore, db1, db2


def _product(
    kernel: str, left: Tensor, w: Tensor, bias: Tensor | None, plan: RoutePlan, tiles: tuple[Tensor, Tensor]
) -> Tensor:
    """`left` (P, I) times W2 (E, H, I) transposed for "down", (P, 2I or I) times W1 (E, 2I or I, H) for "up_dgrad"."""
    transposed = kernel == "down"
    inner, width = left.shape[1], w.shape[1 if transposed else 2]
    out = left.new_empty(plan.n_pairs, width)
    count = tiles[0].shape[0]
    blocks, grid = _blocks(kernel, left, count, width)
    _rows[grid](
        left, w, w if bias is None else bias, plan.offs, *tiles, out, inner, width, count,
        TRANSPOSED=transposed, BIASED=bias is not None, **blocks,
    )  # fmt: skip
    return out


def _weight_grad(left: Tensor, right: Tensor, w: Tensor, plan: RoutePlan, gather_left: bool) -> Tensor:
    out = torch.empty_like(w)
    height, width = w.shape[1:]
    tile = TILES["wgrad", w.element_size()]
    blocks, grid = _blocks("wgrad", w, plan.n_experts * triton.cdiv(height, tile.m), width)
    _wgrad[grid](
        left, right, plan.tok, plan.offs, out, height, width, left.stride(0), right.stride(0),
        GATHER_LEFT=gather_left, **blocks,
    )  # fmt: skip
    return out


def _column_sums(rows: Tensor, score: Tensor | None, bias: Tensor, plan: RoutePlan) -> Tensor:
    out = torch.empty_like(bias)
    blocks, grid = _blocks("bias_grad", bias, plan.n_experts, bias.shape[1])
    _bias_grad[grid](
        rows, rows if score is None else score, plan.order, plan.tok, plan.offs, out, bias.shape[1],
        GATHERED=score is not None, **blocks,
    )  # fmt: skip
    return out


def _blocks(kernel: str, like: Tensor, tiles: int = 1, width: int = 1) -> tuple[dict[str, int], tuple[int]]:
    """Block sizes and launch options of a kernel, and its grid: `tiles` times the tiles of `width` columns."""
    tile = TILES[kernel, like.element_size()]
    stages = tile.stages if torch.version.hip is None else min(tile.stages, 2)  # 64 KiB of shared memory there
    columns = triton.cdiv(width, tile.n) if tile.n else 1
    return tile.sizes() | {"num_warps": tile.warps, "num_stages": stages}, (tiles * columns,)


def launches() -> "list[Launch]":
    """What is compiled ahead of time: every kernel for SwiGLU, and for a perceptron with biases where it differs.

    In bfloat16 and float16. Each serves every model whose widths are multiples of 16, such as (H, I) = (768, 256),
    (1536, 256), (4096, 512) and (4096, 1536), so its "shape" is the variant. Strides are 32-bit, as Triton passes them
    while they fit; offsets are 64-bit all the same.
    """
    return [launch for dtype in ("bf16", "fp16") for launch in _launches(dtype)]


def _launches(dtype: str) -> "list[Launch]":
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    types = dict.fromkeys(("order", "tok", "offs", "tile_expert", "tile_row"), "*i32")
    types |= dict.fromkeys(("dim", "hidden", "inner", "width", "height", "tiles", "columns"), "i32")
    types |= dict.fromkeys(("stride_x", "stride_left", "stride_right"), "i32")
    types |= dict.fromkeys(("score", "parts", "dscore"), "*fp32")

    def launch(kernel, function, note, **constants):
        tile = TILES[kernel, 2]
        constants |= tile.sizes()
        names = [name for name in function.arg_names if name not in constants]
        return Launch(
            kernel=f"moe_mlp/{kernel}",
            function=function,
            signature={name: types.get(name, f"*{dtype}") for name in names},
            constants=constants,
            divisible=tuple(name for name in names if name not in ("tiles", "columns")),
            num_warps=tile.warps,
            num_stages=tile.stages,
            dtype=dtype,
            shape=note,
            gemm=kernel not in ("score_grad", "bias_grad"),
        )

    return [
        launch("up", _up, "SwiGLU, training", GLU=True, BIASED=False, SAVE=True),
        launch("up", _up, "SwiGLU, inference", GLU=True, BIASED=False, SAVE=False),
        launch("up", _up, "SwiGLU, biases, training", GLU=True, BIASED=True, SAVE=True),
        launch("up", _up, "ReLU, biases, training", GLU=False, BIASED=True, SAVE=True),
        launch("down", _rows, "no bias", TRANSPOSED=True, BIASED=False),
        launch("down", _rows, "bias", TRANSPOSED=True, BIASED=True),
        launch("down_dgrad", _down_dgrad, "SwiGLU", GLU=True),
        launch("down_dgrad", _down_dgrad, "ReLU", GLU=False),
        launch("score_grad", _score_grad, "no bias", BIASED=False),
        launch("score_grad", _score_grad, "bias", BIASED=True),
        launch("wgrad", _wgrad, "W2", GATHER_LEFT=True),
        launch("wgrad", _wgrad, "W1", GATHER_LEFT=False),
        launch("bias_grad", _bias_grad, "b1", GATHERED=False),
        launch("bias_grad", _bias_grad, "b2", GATHERED=True),
        launch("up_dgrad", _rows, "rows of dX", TRANSPOSED=False, BIASED=False),
    ]
