"""A bank of low-rank updates in Triton: rows are gathered inside the products, and never kept.

Forward: `_codes` makes U = X[tok] A_e^T, `_spread` the rows (score * U) B_e^T, and `gather_sum` adds those of a token.
Backward: `_codes` makes U and dV = dO[tok] B_e, `_weight_grad` both weight gradients, `_spread` the rows of dX. What is
done between them to (P, r) codes is torch's. The formulas are those of `reference`.

Grouped rows are cut into tiles of one expert (`RoutePlan.tiles`). Every output is written by one program, with sums in
a fixed order, so two runs agree bit for bit. Accumulators are float32. Widths and strides are run-time arguments,
offsets of rows and experts are int64, and whatever a mask leaves out is read as 0. Ranks are filled up to a power of
two of at least 16, the least that a product of tensor cores contracts.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.gather_sum.triton import gather_sum
from workbench.kernels.low_rank.order import pack, unpack
from workbench.kernels.low_rank.reference import inner, weighted
from workbench.kernels.plan import RoutePlan

if TYPE_CHECKING:
    from workbench.kernels.static import Launch

RANKS = (16, 128)  # the least and the greatest width of codes that there is a tile for


class Tile(NamedTuple):
    """Grouped rows, columns, and how much is contracted at a time; the launch's warps and stages."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


ROWS = {2: 64, 4: 32}
"""Grouped rows of a tile, by bytes a number: the same for every kernel that goes by tiles."""
#: (kernel, bytes a number) -> tile. `codes` contracts a row by steps, `weight_grad` rows by steps. No spills.
TILES = {
    ("codes", 2): Tile(ROWS[2], 0, 64, 4, 4),
    ("spread", 2): Tile(ROWS[2], 128, 0, 4, 2),
    ("weight_grad", 2): Tile(0, 128, 64, 4, 3),
    ("codes", 4): Tile(ROWS[4], 0, 32, 4, 2),
    ("spread", 4): Tile(ROWS[4], 64, 0, 4, 2),
    ("weight_grad", 4): Tile(0, 64, 32, 4, 2),
}


@triton.jit
def _codes(
    x, w, tok, offs, tile_expert, tile_row, codes, width, rank, stride_expert, stride_rank, stride_width,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """codes (P, r) = x[tok] (P, width) times w_e (width, r), which lies by the strides."""
    expert = tl.load(tile_expert + tl.program_id(0))
    if expert < 0:
        return
    first, row = tl.load(tile_row + tl.program_id(0)), tl.arange(0, BLOCK_M)
    there = row < tl.load(offs + expert + 1) - first
    token = tl.load(tok + first + row, mask=there, other=0).to(tl.int64)
    r, k = tl.arange(0, RANK), tl.arange(0, BLOCK_K)
    x_p = x + token[:, None] * width + k[None, :]
    w_p = w + expert.to(tl.int64) * stride_expert + r[None, :].to(tl.int64) * stride_rank
    w_p += k[:, None].to(tl.int64) * stride_width
    acc = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
    for step in range(tl.cdiv(width, BLOCK_K)):
        more = k < width - step * BLOCK_K
        x_t = tl.load(x_p, mask=there[:, None] & more[None, :], other=0.0)
        w_t = tl.load(w_p, mask=more[:, None] & (r < rank)[None, :], other=0.0)
        acc = tl.dot(x_t, w_t, acc, input_precision="ieee")
        x_p += BLOCK_K
        w_p += BLOCK_K * stride_width
    codes += first.to(tl.int64) * rank
    inside = there[:, None] & (r < rank)[None, :]
    tl.store(codes + row[:, None] * rank + r[None, :], acc.to(codes.dtype.element_ty), mask=inside)


@triton.jit
def _spread(
    codes, w, offs, tile_expert, tile_row, out, rank, width, stride_expert, stride_rank, stride_width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """out (P, width) = codes (P, r) times w_e (r, width), which lies by the strides."""
    columns = tl.cdiv(width, BLOCK_N)
    tile = tl.program_id(0) // columns
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    first, row = tl.load(tile_row + tile), tl.arange(0, BLOCK_M)
    there = row < tl.load(offs + expert + 1) - first
    r = tl.arange(0, RANK)
    col = (tl.program_id(0) - tile * columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    codes += first.to(tl.int64) * rank
    codes_t = tl.load(codes + row[:, None] * rank + r[None, :], mask=there[:, None] & (r < rank)[None, :], other=0.0)
    w_p = w + expert.to(tl.int64) * stride_expert + r[:, None].to(tl.int64) * stride_rank
    w_p += col[None, :].to(tl.int64) * stride_width
    w_t = tl.load(w_p, mask=(r < rank)[:, None] & (col < width)[None, :], other=0.0)
    acc = tl.dot(codes_t, w_t, input_precision="ieee")
    out += first.to(tl.int64) * width
    inside = there[:, None] & (col < width)[None, :]
    tl.store(out + row[:, None] * width + col[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weight_grad(
    x, codes, tok, offs, out, width, rank, stride_expert, stride_rank, stride_width,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """out_e (width, r), which lies by the strides, = x[tok]^T codes over the rows of expert e; zeros without rows."""
    columns = tl.cdiv(width, BLOCK_N)
    expert = tl.program_id(0) // columns
    col = (tl.program_id(0) - expert * columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, RANK)
    end = tl.load(offs + expert + 1)
    acc = tl.zeros((BLOCK_N, RANK), dtype=tl.float32)
    for begin in range(tl.load(offs + expert), end, BLOCK_K):
        row = begin + tl.arange(0, BLOCK_K)
        there = row < end
        token = tl.load(tok + row, mask=there, other=0).to(tl.int64)
        x_t = tl.load(
            x + token[None, :] * width + col[:, None], mask=there[None, :] & (col < width)[:, None], other=0.0
        )
        codes_p = codes + row.to(tl.int64)[:, None] * rank + r[None, :]
        codes_t = tl.load(codes_p, mask=there[:, None] & (r < rank)[None, :], other=0.0)
        acc = tl.dot(x_t, codes_t, acc, input_precision="ieee")
    out_p = out + expert.to(tl.int64) * stride_expert + r[None, :].to(tl.int64) * stride_rank
    out_p += col[:, None].to(tl.int64) * stride_width
    tl.store(out_p, acc.to(out.dtype.element_ty), mask=(col < width)[:, None] & (r < rank)[None, :])


def refusal(x: Tensor, a: Tensor) -> str | None:
    """Why these kernels cannot do this, if so."""
    if x.dtype == torch.float64:
        return "x is torch.float64; it must be float32, bfloat16 or float16"
    if a.shape[1] > RANKS[1]:
        return f"rank is {a.shape[1]}; it must be at most {RANKS[1]}"
    return None


def forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    score: Tensor,
    expert: Tensor,
    tok_offs: Tensor | None,
    top_k: int | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`."""
    plan = RoutePlan.build(expert, a.shape[0], top_k=top_k, tok_offs=tok_offs)
    tiles = plan.tiles(ROWS[x.element_size()])
    u = _make_codes(x, a.transpose(1, 2), plan, tiles)
    y = _make_rows(weighted(u, score[plan.order]), b.transpose(1, 2), plan, tiles)
    return gather_sum(y, plan, None), x.new_empty(0), pack(plan) if save else plan.order.new_empty(0)


def backward(
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    a: Tensor,
    b: Tensor,
    score: Tensor,
    expert: Tensor,
    index: Tensor,
    tok_offs: Tensor | None,
    top_k: int | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.backward`."""
    plan = unpack(index, x.shape[0], expert.shape[0], a.shape[0], tok_offs, top_k)
    tiles = plan.tiles(ROWS[x.element_size()])
    u, dv = _make_codes(x, a.transpose(1, 2), plan, tiles), _make_codes(grad, b, plan, tiles)
    s = score[plan.order]
    du, da, db = weighted(dv, s), torch.empty_like(a), torch.empty_like(b)
    _add_up(x, du, da.transpose(1, 2), plan)
    _add_up(grad, weighted(u, s), db, plan)
    dx = gather_sum(_make_rows(du, a, plan, tiles), plan, None)
    return dx, da, db, inner(u, dv)[plan.inv].to(score.dtype)


def _make_codes(x: Tensor, w: Tensor, plan: RoutePlan, tiles: tuple[Tensor, Tensor]) -> Tensor:
    """(P, r) from x (N, width) and w (E, width, r)."""
    codes = x.new_empty(plan.n_pairs, w.shape[2])
    tile = TILES["codes", x.element_size()]
    _codes[(tiles[0].shape[0],)](
        x, w, plan.tok, plan.offs, *tiles, codes, x.shape[1], w.shape[2], w.stride(0), w.stride(2), w.stride(1),
        BLOCK_M=tile.rows, BLOCK_K=tile.step, **_launch(tile, w.shape[2]),
    )  # fmt: skip
    return codes


def _make_rows(codes: Tensor, w: Tensor, plan: RoutePlan, tiles: tuple[Tensor, Tensor]) -> Tensor:
    """(P, width) from codes (P, r) and w (E, r, width)."""
    rank, width = w.shape[1:]
    out = codes.new_empty(plan.n_pairs, width)
    tile = TILES["spread", codes.element_size()]
    _spread[(tiles[0].shape[0] * triton.cdiv(width, tile.columns),)](
        codes, w, plan.offs, *tiles, out, rank, width, *w.stride(),
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, **_launch(tile, rank),
    )  # fmt: skip
    return out


def _add_up(x: Tensor, codes: Tensor, out: Tensor, plan: RoutePlan) -> None:
    """Into out (E, width, r), a view, from x (N, width) and codes (P, r)."""
    _, width, rank = out.shape
    tile = TILES["weight_grad", x.element_size()]
    _weight_grad[(plan.n_experts * triton.cdiv(width, tile.columns),)](
        x, codes, plan.tok, plan.offs, out, width, rank, out.stride(0), out.stride(2), out.stride(1),
        BLOCK_N=tile.columns, BLOCK_K=tile.step, **_launch(tile, rank),
    )  # fmt: skip


def _launch(tile: Tile, rank: int) -> dict[str, int]:
    stages = tile.stages if torch.version.hip is None else min(tile.stages, 2)  # 64 KiB of shared memory there
    return {"RANK": padded(rank), "num_warps": tile.warps, "num_stages": stages}


def padded(rank: int) -> int:
    """The width of codes inside a program."""
    return max(RANKS[0], triton.next_power_of_2(rank))


def launches() -> "list[Launch]":
    """What is compiled ahead of time: every kernel in both layouts of its weights, for ranks 16 and 64.

    In bfloat16 and float16. Each serves every width that is a multiple of 16. A matrix of A lies along its width, one
    of B along its rank; the stride of 1 is known when the kernel is compiled, as it is in a launch.
    """
    return [
        launch
        for dtype in ("bf16", "fp16")
        for rank in (16, 64)
        for lies in ("stride_width", "stride_rank")
        for launch in _launches(dtype, rank, lies)
    ]


def _launches(dtype: str, rank: int, lies: str) -> "list[Launch]":
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    types = dict.fromkeys(("tok", "offs", "tile_expert", "tile_row"), "*i32")
    types |= dict.fromkeys(("width", "rank", "stride_expert", "stride_rank", "stride_width"), "i32")

    def launch(kernel, function):
        tile = TILES[kernel, 2]
        blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.step, "RANK": rank, lies: 1}
        constants = {name: value for name, value in blocks.items() if name in function.arg_names}
        names = [name for name in function.arg_names if name not in constants]
        return Launch(
            kernel=f"low_rank/{kernel}",
            function=function,
            signature={name: types.get(name, f"*{dtype}") for name in names},
            constants=constants,
            divisible=tuple(names),
            num_warps=tile.warps,
            num_stages=tile.stages,
            dtype=dtype,
            shape=f"rank {rank}, {'A' if lies == 'stride_width' else 'B'}",
            gemm=True,
        )

    return [launch("codes", _codes), launch("spread", _spread), launch("weight_grad", _weight_grad)]
