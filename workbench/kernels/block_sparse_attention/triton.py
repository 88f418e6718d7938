"""Block gating and block-sparse attention in Triton.

Gate: `_mean_pool` gives the mean key of each block; `_gate` scores a tile of queries against tiles of mean keys and
keeps each query's best in registers, so that the (N, M) scores are never stored. The inversion to columns is torch's.

Attention, in two stages: `_pair_forward` takes a piece of one column (one head, one key block), gathers its queries and
attends to the block, which gives an output part and the logarithm of its sum for every (query, block); `_merge` joins
the parts of each query. Backward, with the joined L: `_pair_backward_kv` owns the keys of a column and loops over its
queries, `_pair_backward_q` owns a piece of a column's queries and loops over its keys, and `_merge` adds the parts of
each query's gradient. Nothing is atomic, so results repeat bit by bit. The parts take K N H d numbers.

Widths are compiled in, block sizes and strides are not. Offsets of rows are int64.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.block_sparse_attention.index import BlockIndex, ascending, token_blocks

if TYPE_CHECKING:
    from workbench.kernels.static import Launch

LOG2_E = 1.4426950408889634

#: (bytes a number, wide) -> queries, keys, warps and stages of a tile; wide: d = 128.
FORWARD = {
    (2, False): (128, 64, 4, 2),
    (2, True): (128, 32, 8, 2),
    (4, False): (64, 32, 4, 2),
    (4, True): (64, 32, 8, 2),
}
BACKWARD_Q = {
    (2, False): (64, 64, 4, 2),
    (2, True): (64, 32, 8, 2),
    (4, False): (64, 32, 4, 2),
    (4, True): (64, 32, 8, 2),
}
BACKWARD_KV = {
    (2, False): (32, 64, 4, 2),
    (2, True): (32, 64, 4, 1),
    (4, False): (32, 32, 4, 2),
    (4, True): (32, 32, 8, 1),
}
GATE = (32, 32, 4, 1)  # queries, blocks, warps, stages
MERGE = 16  # queries a program
POOL = 64  # tokens a step


@triton.jit
def _mean_pool(k, out, starts, lengths, heads, sk_n, sk_h, BLOCK_T: tl.constexpr, D: tl.constexpr):
    block, head = tl.program_id(0), tl.program_id(1)
    start, length = tl.load(starts + block), tl.load(lengths + block)
    t, d = tl.arange(0, BLOCK_T), tl.arange(0, D)
    total = tl.zeros((D,), dtype=tl.float32)
    for first in range(0, length, BLOCK_T):
        row = (start + first + t).to(tl.int64)
        there = (first + t < length)[:, None]
        keys = tl.load(k + head.to(tl.int64) * sk_h + row[:, None] * sk_n + d[None, :], mask=there, other=0.0)
        total += tl.sum(keys.to(tl.float32), 0)
    mean = total / tl.maximum(length, 1).to(tl.float32)
    tl.store(out + (block.to(tl.int64) * heads + head) * D + d, mean)


@triton.jit
def _gate(
    q, means, own, first, blocks, tokens, kv_heads, group, k_top, sq_n, sq_h,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d, slot = tl.arange(0, D), tl.arange(0, KEEP)
    there = row < tokens
    mine = tl.load(own + row, mask=there, other=0)
    low = tl.load(first + row, mask=there, other=2147483647)
    q_at = q + head.to(tl.int64) * sq_h + row.to(tl.int64)[:, None] * sq_n + d[None, :]
    q_t = tl.load(q_at, mask=there[:, None], other=0.0).to(tl.float32)
    # Every score is one int64: the bits of the number in an order that integers keep, then the block, the first one
    # highest, so that no two are equal. Slots that are not in use hold the highest value and are never replaced.
    nothing = tl.full((BLOCK_M, KEEP), -9223372036854775808, dtype=tl.int64) + slot[None, :]
    best = tl.where((slot < k_top - 1)[None, :], nothing, 9223372036854775807)
    for begin in range(tl.min(low, 0) // BLOCK_N * BLOCK_N, tl.max(mine, 0), BLOCK_N):
        block = begin + tl.arange(0, BLOCK_N)
        m_at = means + (block.to(tl.int64)[None, :] * kv_heads + head // group) * D + d[:, None]
        earlier = (block[None, :] < mine[:, None]) & (block[None, :] >= low[:, None])
        m_t = tl.load(m_at, mask=(block < tl.max(mine, 0))[None, :], other=0.0)
        score = tl.dot(q_t, m_t, input_precision="ieee") + 0.0  # -0 becomes 0
        bits = score.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        packed = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - block).to(tl.int64)[None, :]
        packed = tl.where(earlier, packed, -9223372036854775808)
        for _ in range(k_top - 1):
            high, least = tl.max(packed, 1), tl.min(best, 1)
            enter = (high > least)[:, None] & (best == least[:, None])
            best = tl.where(enter, high[:, None], best)
            packed = tl.where(packed == high[:, None], -9223372036854775808, packed)
    block = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
    # What is left of `nothing` has the lowest 32 bits of no score: a NaN of all ones, which has its own place.
    block = tl.where((best >> 32) == -2147483648, -1, block)
    block = tl.where((slot == k_top - 1)[None, :], mine[:, None], block)
    at = (row.to(tl.int64)[:, None] * tl.num_programs(1) + head) * k_top + slot[None, :]
    tl.store(blocks + at, block, mask=there[:, None] & (slot < k_top)[None, :])


@triton.jit
def _pair_forward(
    q, k, v, part, log_sum, rows, col_offs, starts, lengths, tile_col, tile_row, blocks, group, scale,
    sq_n, sq_h, sk_n, sk_h, sv_n, sv_h,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    column = tl.load(tile_col + tl.program_id(0))
    if column < 0:
        return
    head, block = (column // blocks).to(tl.int64), column % blocks
    start, length = tl.load(starts + block), tl.load(lengths + block)
    place = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    there = place < tl.load(col_offs + column + 1)
    row = tl.load(rows + place, mask=there, other=0x7FFFFFFF)  # a row that is none sees every key
    d = tl.arange(0, D)
    q_at = q + head * sq_h + row.to(tl.int64)[:, None] * sq_n + d[None, :]
    q_t = tl.load(q_at, mask=there[:, None], other=0.0)
    k += head // group * sk_h
    v += head // group * sv_h
    acc = tl.zeros((BLOCK_M, D), dtype=tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for begin in range(0, length, BLOCK_N):
        key = start + begin + tl.arange(0, BLOCK_N)
        inside = key < start + length
        k_t = tl.load(k + key.to(tl.int64)[None, :] * sk_n + d[:, None], mask=inside[None, :], other=0.0)
        v_t = tl.load(v + key.to(tl.int64)[:, None] * sv_n + d[None, :], mask=inside[:, None], other=0.0)
        s = tl.dot(q_t, k_t, input_precision="ieee") * scale
        # Only within its own block can a key be later than the query. The first key of a block never is.
        s = tl.where(inside[None, :] & (key[None, :] <= row[:, None]), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v_t.dtype), v_t, input_precision="ieee")
        top = new_top
    result = (acc / total[:, None]).to(part.dtype.element_ty)
    tl.store(part + place.to(tl.int64)[:, None] * D + d[None, :], result, mask=there[:, None])
    tl.store(log_sum + place, top + tl.log2(total), mask=there)


@triton.jit
def _merge(
    part, log_sum, pair, out, lse, tokens, k_top, so_n, so_h, factor,
    BLOCK_M: tl.constexpr, D: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    there, d = row < tokens, tl.arange(0, D)
    at = (row * tl.num_programs(1) + head) * k_top
    acc = tl.zeros((BLOCK_M, D), dtype=tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for choice in range(k_top):
        place = tl.load(pair + at + choice, mask=there, other=-1).to(tl.int64)
        chosen = place >= 0
        piece = tl.load(part + place[:, None] * D + d[None, :], mask=chosen[:, None], other=0.0).to(tl.float32)
        if WEIGHTED:
            logs = tl.load(log_sum + place, mask=chosen, other=float("-inf"))
            new_top = tl.maximum(top, logs)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            weight, shrink = tl.exp2(logs - base), tl.exp2(top - base)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + piece * weight[:, None]
            top = new_top
        else:
            acc += piece
    if WEIGHTED:
        total = tl.where(there, total, 1.0)
        acc = acc / total[:, None]
        tl.store(lse + row * tl.num_programs(1) + head, (top + tl.log2(total)) * factor, mask=there)
    else:
        acc = acc * factor
    o_at = out + row[:, None] * so_n + head.to(tl.int64) * so_h + d[None, :]
    tl.store(o_at, acc.to(out.dtype.element_ty), mask=there[:, None])


@triton.jit
def _pair_backward_kv(
    q, k, v, grad, lse, delta, dk, dv, rows, col_offs, starts, lengths, blocks, heads, group, scale, factor,
    sq_n, sq_h, sk_n, sk_h, sv_n, sv_h, sg_n, sg_h,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    column, begin = tl.program_id(0), tl.program_id(1) * BLOCK_N
    head, block = (column // blocks).to(tl.int64), column % blocks
    start, length = tl.load(starts + block), tl.load(lengths + block)
    if begin >= length:
        return
    key = start + begin + tl.arange(0, BLOCK_N)
    inside, d = key < start + length, tl.arange(0, D)
    k_at = k + head // group * sk_h + key.to(tl.int64)[:, None] * sk_n + d[None, :]
    v_at = v + head // group * sv_h + key.to(tl.int64)[:, None] * sv_n + d[None, :]
    k_t = tl.load(k_at, mask=inside[:, None], other=0.0)
    v_t = tl.load(v_at, mask=inside[:, None], other=0.0)
    dk_t = tl.zeros((BLOCK_N, D), dtype=tl.float32)
    dv_t = tl.zeros((BLOCK_N, D), dtype=tl.float32)
    end = tl.load(col_offs + column + 1)
    for first in range(tl.load(col_offs + column), end, BLOCK_M):
        place = first + tl.arange(0, BLOCK_M)
        there = place < end
        row = tl.load(rows + place, mask=there, other=0).to(tl.int64)
        q_at = q + head * sq_h + row[:, None] * sq_n + d[None, :]
        g_at = grad + head * sg_h + row[:, None] * sg_n + d[None, :]
        q_t = tl.load(q_at, mask=there[:, None], other=0.0)
        g_t = tl.load(g_at, mask=there[:, None], other=0.0)
        log = tl.load(lse + row * heads + head, mask=there, other=0.0) * factor
        inner = tl.load(delta + row * heads + head, mask=there, other=0.0)
        s = tl.dot(k_t, tl.trans(q_t), input_precision="ieee") * (scale * factor)
        seen = inside[:, None] & there[None, :] & (key[:, None] <= row[None, :])
        p = tl.exp2(tl.where(seen, s - log[None, :], float("-inf")))
        dv_t += tl.dot(p.to(g_t.dtype), g_t, input_precision="ieee")
        ds = p * (tl.dot(v_t, tl.trans(g_t), input_precision="ieee") - inner[None, :])
        dk_t += tl.dot(ds.to(q_t.dtype), q_t, input_precision="ieee")
    at = (key.to(tl.int64)[:, None] * heads + head) * D + d[None, :]
    tl.store(dk + at, dk_t * scale, mask=inside[:, None])
    tl.store(dv + at, dv_t, mask=inside[:, None])


@triton.jit
def _pair_backward_q(
    q, k, v, grad, lse, delta, part, rows, col_offs, starts, lengths, tile_col, tile_row, blocks, heads, group, scale,
    factor, sq_n, sq_h, sk_n, sk_h, sv_n, sv_h, sg_n, sg_h,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    column = tl.load(tile_col + tl.program_id(0))
    if column < 0:
        return
    head, block = (column // blocks).to(tl.int64), column % blocks
    start, length = tl.load(starts + block), tl.load(lengths + block)
    place = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    there, d = place < tl.load(col_offs + column + 1), tl.arange(0, D)
    row = tl.load(rows + place, mask=there, other=0).to(tl.int64)
    q_t = tl.load(q + head * sq_h + row[:, None] * sq_n + d[None, :], mask=there[:, None], other=0.0)
    g_t = tl.load(grad + head * sg_h + row[:, None] * sg_n + d[None, :], mask=there[:, None], other=0.0)
    log = tl.load(lse + row * heads + head, mask=there, other=0.0) * factor
    inner = tl.load(delta + row * heads + head, mask=there, other=0.0)
    k += head // group * sk_h
    v += head // group * sv_h
    acc = tl.zeros((BLOCK_M, D), dtype=tl.float32)
    for begin in range(0, length, BLOCK_N):
        key = start + begin + tl.arange(0, BLOCK_N)
        inside = key < start + length
        k_t = tl.load(k + key.to(tl.int64)[:, None] * sk_n + d[None, :], mask=inside[:, None], other=0.0)
        v_t = tl.load(v + key.to(tl.int64)[:, None] * sv_n + d[None, :], mask=inside[:, None], other=0.0)
        s = tl.dot(q_t, tl.trans(k_t), input_precision="ieee") * (scale * factor)
        seen = inside[None, :] & there[:, None] & (key[None, :] <= row[:, None])
        p = tl.exp2(tl.where(seen, s - log[:, None], float("-inf")))
        ds = p * (tl.dot(g_t, tl.trans(v_t), input_precision="ieee") - inner[:, None])
        acc += tl.dot(ds.to(k_t.dtype), k_t, input_precision="ieee")
    tl.store(part + place.to(tl.int64)[:, None] * D + d[None, :], acc.to(part.dtype.element_ty), mask=there[:, None])


def gate(
    q: Tensor, k: Tensor, block_size: int, top_k: int, cu_seqlens: Tensor | None, starts: Tensor, lengths: Tensor
) -> Tensor:
    """`BlockIndex.blocks`."""
    n_tokens, heads, d = q.shape
    q, k = neighbours(q), neighbours(k)
    means = torch.empty(starts.numel(), k.shape[1], d, dtype=torch.float32, device=q.device)
    _mean_pool[means.shape[0], k.shape[1]](
        k, means, starts, lengths, k.shape[1], k.stride(0), k.stride(1), BLOCK_T=POOL, D=d, num_warps=4
    )
    own, first = token_blocks(n_tokens, starts, lengths, cu_seqlens)
    blocks = torch.empty(n_tokens, heads, top_k, dtype=torch.int32, device=q.device)
    block_m, block_n, warps, stages = GATE
    keep = max(2, triton.next_power_of_2(top_k))
    _gate[triton.cdiv(n_tokens, block_m), heads](
        q, means, own, first, blocks, n_tokens, k.shape[1], heads // k.shape[1], top_k, q.stride(0), q.stride(1),
        BLOCK_M=block_m, BLOCK_N=block_n, D=d, KEEP=keep, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return ascending(blocks)


def forward(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float) -> tuple[Tensor, Tensor]:
    """Output (N, H, d), in the memory layout of q, and L (N, H)."""
    out = torch.empty_like(q)
    q, k, v = neighbours(q), neighbours(k), neighbours(v)
    n_tokens, heads, d = q.shape
    block_m, block_n, warps, stages = FORWARD[q.element_size(), d > 64]
    column, row = column_tiles(index, block_m)
    part = torch.empty(index.rows.numel(), d, dtype=q.dtype, device=q.device)
    log_sum = torch.empty(index.rows.numel(), dtype=torch.float32, device=q.device)
    _pair_forward[(column.numel(),)](
        q, k, v, part, log_sum, index.rows, index.col_offs, index.starts, index.lengths, column, row, index.n_blocks,
        heads // k.shape[1], scale * LOG2_E, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        BLOCK_M=block_m, BLOCK_N=block_n, D=d, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    lse = torch.empty(n_tokens, heads, dtype=torch.float32, device=q.device)
    return merge(part, log_sum, index, out, lse, 1 / LOG2_E), lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, index: BlockIndex, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each in the memory layout of what it is the gradient of."""
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    delta = (grad.float() * out.float()).sum(-1)
    grad, q, k, v = (neighbours(x) for x in (grad, q, k, v))
    n_tokens, heads, d = q.shape
    shared = (index.rows, index.col_offs, index.starts, index.lengths)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad.stride()[:2])
    group = heads // k.shape[1]
    by_head = torch.empty(2, n_tokens, heads, d, dtype=torch.float32, device=q.device)
    block_m, block_n, warps, stages = BACKWARD_KV[q.element_size(), d > 64]
    _pair_backward_kv[heads * index.n_blocks, triton.cdiv(index.block_size, block_n)](
        q, k, v, grad, lse, delta, *by_head, *shared, index.n_blocks, heads, group, scale, LOG2_E, *strides,
        BLOCK_M=block_m, BLOCK_N=block_n, D=d, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    for summed, gradient in zip(by_head, (dk, dv), strict=True):
        gradient.copy_(summed.unflatten(1, (-1, group)).sum(2))
    block_m, block_n, warps, stages = BACKWARD_Q[q.element_size(), d > 64]
    column, row = column_tiles(index, block_m)
    part = torch.empty(index.rows.numel(), d, dtype=q.dtype, device=q.device)
    _pair_backward_q[(column.numel(),)](
        q, k, v, grad, lse, delta, part, *shared, column, row, index.n_blocks, heads, group, scale, LOG2_E, *strides,
        BLOCK_M=block_m, BLOCK_N=block_n, D=d, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return merge(part, None, index, dq, None, scale), dk, dv


def merge(
    part: Tensor, log_sum: Tensor | None, index: BlockIndex, out: Tensor, lse: Tensor | None, factor: float
) -> Tensor:
    """Writes to `out` the parts of each query, joined by their logarithms of sums, or without these their sum."""
    n_tokens, heads, k_top = index.pair.shape
    result = out if out.stride(-1) == 1 else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    _merge[triton.cdiv(n_tokens, MERGE), heads](
        part, log_sum, index.pair, result, lse, n_tokens, k_top, result.stride(0), result.stride(1), factor,
        BLOCK_M=MERGE, D=part.shape[1], WEIGHTED=log_sum is not None, num_warps=4,
    )  # fmt: skip
    return result if result is out else out.copy_(result)


def column_tiles(index: BlockIndex, block_m: int) -> tuple[Tensor, Tensor]:
    """The columns cut into pieces of at most `block_m` rows: column and first row of each, -1 for pieces not in use.

    Their number P // block_m + columns is a bound that needs no look at the columns.
    """
    counts = index.col_nnz
    ends = ((counts + block_m - 1) // block_m).cumsum(0)
    tile = torch.arange(index.rows.numel() // block_m + counts.numel(), device=ends.device)
    column = torch.searchsorted(ends, tile, right=True)
    used = column < counts.numel()
    column = column.clamp(max=counts.numel() - 1)
    row = index.col_offs[column] + (tile - ends[column] + (counts[column] + block_m - 1) // block_m) * block_m
    return torch.where(used, column, -1).int(), torch.where(used, row, -1).int()


def neighbours(x: Tensor) -> Tensor:
    """x with the elements of a row next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def launches() -> "list[Launch]":
    """The configurations that are compiled ahead of time and held to the limits of the hardware."""
    from workbench.kernels.static import Launch

    result = []
    for name in ("bf16", "fp16"):
        x, i32, i64, f32 = f"*{name}", "*i32", "*i64", "*fp32"
        for d in (64, 128):
            shape = f"d={d}"

            def add(kernel, function, signature, constants, tile, gemm, dtype=name, shape=shape):
                names = [argument for argument in signature if signature[argument].startswith("*")]
                steps = [argument for argument in signature if argument.startswith("s") and argument[2:3] == "_"]
                result.append(
                    Launch(
                        kernel=f"block_sparse_attention/{kernel}",
                        function=function,
                        signature=signature,
                        constants=constants,
                        divisible=(*names, *steps),
                        num_warps=tile[0],
                        num_stages=tile[1],
                        dtype=dtype,
                        shape=shape,
                        gemm=gemm,
                    )
                )

            strides = dict.fromkeys(("sq_n", "sq_h", "sk_n", "sk_h", "sv_n", "sv_h"), "i32")
            more = strides | dict.fromkeys(("sg_n", "sg_h"), "i32")
            columns = {"rows": i32, "col_offs": i64, "starts": i32, "lengths": i32}
            tiles = {"tile_col": i32, "tile_row": i32}
            sums = {"lse": f32, "delta": f32}
            wide = d > 64
            pool = {"k": x, "out": f32, "starts": i32, "lengths": i32} | dict.fromkeys(("heads", "sk_n", "sk_h"), "i32")
            add("mean_pool", _mean_pool, pool, {"BLOCK_T": POOL, "D": d}, (4, 3), False)
            gated = {"q": x, "means": f32, "own": i32, "first": i32, "blocks": i32}
            gated |= dict.fromkeys(("tokens", "kv_heads", "group", "k_top", "sq_n", "sq_h"), "i32")
            m, n, *rest = GATE
            add("gate", _gate, gated, {"BLOCK_M": m, "BLOCK_N": n, "D": d, "KEEP": 8}, rest, False)
            m, n, *rest = FORWARD[2, wide]
            constants = {"BLOCK_M": m, "BLOCK_N": n, "D": d}
            pairs = {"q": x, "k": x, "v": x, "part": x, "log_sum": f32} | columns | tiles
            pairs |= {"blocks": "i32", "group": "i32", "scale": "fp32"} | strides
            add("pair_forward", _pair_forward, pairs, constants, rest, True)
            merged = {"part": x, "log_sum": f32, "pair": i32, "out": x, "lse": f32}
            merged |= {"tokens": "i32", "k_top": "i32", "so_n": "i32", "so_h": "i32", "factor": "fp32"}
            add("merge", _merge, merged, {"BLOCK_M": MERGE, "D": d, "WEIGHTED": True}, (4, 3), False)
            m, n, *rest = BACKWARD_KV[2, wide]
            constants = {"BLOCK_M": m, "BLOCK_N": n, "D": d}
            scalars = {"blocks": "i32", "heads": "i32", "group": "i32", "scale": "fp32", "factor": "fp32"}
            keys = {"q": x, "k": x, "v": x, "grad": x} | sums | {"dk": f32, "dv": f32} | columns | scalars | more
            add("pair_backward_kv", _pair_backward_kv, keys, constants, rest, True)
            m, n, *rest = BACKWARD_Q[2, wide]
            constants = {"BLOCK_M": m, "BLOCK_N": n, "D": d}
            queries = {"q": x, "k": x, "v": x, "grad": x} | sums | {"part": x} | columns | tiles | scalars | more
            add("pair_backward_q", _pair_backward_q, queries, constants, rest, True)
    return result
