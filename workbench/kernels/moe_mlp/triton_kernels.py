"""The kernels of the expert layer; `triton` says how they follow one another and launches them.

Each takes tiles of grouped rows of one expert, or one expert after the other. Every output is written by one program,
with sums in a fixed order. Accumulators are float32. Widths and strides are run-time arguments, offsets of rows and
experts are int64, and whatever a mask leaves out is read as 0.
"""

import triton
import triton.language as tl


@triton.jit
def place(tiles, columns):
    """Tile of rows and tile of columns of this program: eight tiles of rows share the columns they read."""
    group = tl.program_id(0) // (8 * columns)
    inside = tl.program_id(0) - group * 8 * columns
    height = tl.minimum(tiles - group * 8, 8)
    return group * 8 + inside % height, inside // height


@triton.jit
def up_forward(
    x, w1, b1, tok, offs, tile_expert, tile_row, z, a, dim, hidden, tiles, stride_x,
    GLU: tl.constexpr, BIASED: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, column = place(tiles, tl.cdiv(hidden, BLOCK_N))
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
def grouped_rows(
    left, w, bias, offs, tile_expert, tile_row, out, inner, width, tiles,
    TRANSPOSED: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (P, width) = left (P, inner) times w_e (inner, width), or w_e (width, inner) transposed, plus bias_e."""
    tile, column = place(tiles, tl.cdiv(width, BLOCK_N))
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
def down_dgrad(
    grad, w2, z, score, order, tok, offs, tile_expert, tile_row, dz, scaled, parts, dim, hidden, tiles,
    GLU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From U = dO[tok] W2_e: dZ, score * A, and the part of <U, A> that these columns hold."""
    columns = tl.cdiv(hidden, BLOCK_N)
    tile, column = place(tiles, columns)
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
def score_grad(
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
def wgrad(
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
def bias_grad(
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
