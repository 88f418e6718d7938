"""Span attention and span decoding in Triton: forward only.

`_prefill`: a program takes a tile of queries of one head and visits the sink and the head's band, with the running
softmax of flash attention. Heads are ordered by their span, the longest first, so that no long program starts last.
`_decode`: a program takes one query and a piece of its head's cache; `_merge` joins the pieces by their logarithms of
sums. Every head has its own length, so a cache that keeps few tokens costs few reads.

Widths are compiled in, since a tile is as wide as a head; lengths and strides are not. Offsets of rows are int64.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from workbench.kernels.static import Launch

WIDTHS = (16, 32, 64, 128)
LOG2_E = 1.4426950408889634

#: (bytes a number, wide) -> queries, keys, warps and stages of a prefill tile; wide: d = 128. No spills on the targets.
TILES = {
    (2, False): (128, 64, 4, 2),
    (2, True): (128, 32, 8, 2),
    (4, False): (64, 32, 4, 2),
    (4, True): (64, 32, 8, 2),
}
KEYS = 64  # keys a step of decoding
PIECE = 512  # keys a program of decoding
PIECES = 16  # pieces a step of joining them


@triton.jit
def _prefill(
    q, k, v, out, spans, heads, tokens, sink, group, scale,
    sq_b, sq_h, sq_n, sk_b, sk_h, sk_n, sv_b, sv_h, sv_n, so_b, so_h, so_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.load(heads + tl.program_id(1))
    batch = tl.program_id(2).to(tl.int64)
    span = tl.load(spans + head)
    row, d = begin + tl.arange(0, BLOCK_M), tl.arange(0, D)
    there = row < tokens
    q += batch * sq_b + head.to(tl.int64) * sq_h
    k += batch * sk_b + (head // group).to(tl.int64) * sk_h
    v += batch * sv_b + (head // group).to(tl.int64) * sv_h
    q_t = tl.load(q + row.to(tl.int64)[:, None] * sq_n + d[None, :], mask=there[:, None], other=0.0)
    acc = tl.zeros((BLOCK_M, D), dtype=tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    # The blocks of the sink that lie before the band, then the band from the block of the first row's oldest key.
    band = tl.maximum(begin - span + 1, 0) // BLOCK_N
    sinks = tl.minimum(tl.cdiv(sink, BLOCK_N), band)
    for block in range(sinks + tl.cdiv(tl.minimum(begin + BLOCK_M, tokens), BLOCK_N) - band):
        key = tl.where(block < sinks, block, block - sinks + band) * BLOCK_N + tl.arange(0, BLOCK_N)
        k_t = tl.load(k + key.to(tl.int64)[None, :] * sk_n + d[:, None], mask=(key < tokens)[None, :], other=0.0)
        v_t = tl.load(v + key.to(tl.int64)[:, None] * sv_n + d[None, :], mask=(key < tokens)[:, None], other=0.0)
        s = tl.dot(q_t, k_t, input_precision=PRECISION)
        near = (key[None, :] < sink) | (row[:, None] - key[None, :] < span)
        s = tl.where((key[None, :] <= row[:, None]) & near, s * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key yet
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v_t.dtype), v_t, input_precision=PRECISION)
        top = new_top
    out += batch * so_b + head.to(tl.int64) * so_h
    total = tl.where(there, total, 1.0)  # of rows past the end, which are not stored
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64)[:, None] * so_n + d[None, :], result, mask=there[:, None])


@triton.jit
def _decode(
    q, k, v, part, log_sum, start, length, group, pieces, scale,
    sq_b, sq_h, sk_b, sk_s, sv_b, sv_s,
    BLOCK_N: tl.constexpr, STEPS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    piece, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, held = tl.load(start + head // group), tl.load(length + head // group)
    d, lane = tl.arange(0, D), tl.arange(0, BLOCK_N)
    q_t = tl.load(q + batch * sq_b + head.to(tl.int64) * sq_h + d).to(tl.float32) * scale
    acc = tl.zeros((D,), dtype=tl.float32)
    top, total = float("-inf"), 0.0
    for step in range(STEPS):
        token = piece * (BLOCK_N * STEPS) + step * BLOCK_N + lane
        there = token < held
        slot = (first + token).to(tl.int64)
        k_t = tl.load(k + batch * sk_b + slot[:, None] * sk_s + d[None, :], mask=there[:, None], other=0.0)
        v_t = tl.load(v + batch * sv_b + slot[:, None] * sv_s + d[None, :], mask=there[:, None], other=0.0)
        s = tl.where(there, tl.sum(q_t[None, :] * k_t.to(tl.float32), 1), float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # this piece lies behind the last token
        p = tl.exp2(s - base)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 0)
        acc = acc * shrink + tl.sum(p[:, None] * v_t.to(tl.float32), 0)
        top = new_top
    at = (batch * tl.num_programs(1) + head) * pieces + piece
    some = tl.where(total > 0, total, 1.0)  # a piece without a token has the weight 2 ** -inf
    tl.store(part + at * D + d, acc / some)
    tl.store(log_sum + at, top + tl.log2(some))


@triton.jit
def _merge(part, log_sum, out, pieces, BLOCK_P: tl.constexpr, D: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    acc = tl.zeros((D,), dtype=tl.float32)
    top, total = float("-inf"), 0.0
    for first in range(0, pieces, BLOCK_P):  # the first piece is never empty
        p = first + tl.arange(0, BLOCK_P)
        logs = tl.load(log_sum + at * pieces + p, mask=p < pieces, other=float("-inf"))
        parts = tl.load(part + (at * pieces + p)[:, None] * D + d[None, :], mask=(p < pieces)[:, None], other=0.0)
        new_top = tl.maximum(top, tl.max(logs, 0))
        weight, shrink = tl.exp2(logs - new_top), tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(parts * weight[:, None], 0)
        top = new_top
    tl.store(out + at * D + d, (acc / total).to(out.dtype.element_ty))


def span_attention(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[int], sink: int) -> Tensor:
    batch, heads, tokens, d = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    block_m, block_n, warps, stages = TILES[q.element_size(), d > 64]
    longest_first = sorted(range(heads), key=lambda head: -spans[head])
    _prefill[triton.cdiv(tokens, block_m), heads, batch](
        q,
        k,
        v,
        output,
        torch.tensor([min(span, tokens) for span in spans], dtype=torch.int32).to(q.device),
        torch.tensor(longest_first, dtype=torch.int32).to(q.device),
        tokens,
        min(sink, tokens),
        heads // k.shape[1],
        d**-0.5 * LOG2_E,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *output.stride()[:3],
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        D=d,
        PRECISION="ieee",
        num_warps=warps,
        num_stages=stages,
    )
    return output


def span_decode(q: Tensor, k: Tensor, v: Tensor, start: Sequence[int], length: Sequence[int]) -> Tensor:
    batch, heads, d = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    pieces = triton.cdiv(max(length), PIECE)
    part = torch.empty(batch, heads, pieces, d, dtype=torch.float32, device=q.device)
    log_sum = torch.empty(batch, heads, pieces, dtype=torch.float32, device=q.device)
    _decode[pieces, heads, batch](
        q,
        k,
        v,
        part,
        log_sum,
        torch.tensor(start, dtype=torch.int32).to(q.device),
        torch.tensor(length, dtype=torch.int32).to(q.device),
        heads // len(start),
        pieces,
        d**-0.5 * LOG2_E,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        BLOCK_N=KEYS,
        STEPS=PIECE // KEYS,
        D=d,
        num_warps=4,
        num_stages=2,
    )
    _merge[(batch * heads,)](part, log_sum, output, pieces, BLOCK_P=PIECES, D=d, num_warps=4, num_stages=1)
    return output


def launches() -> "list[Launch]":
    """What is compiled ahead of time: every kernel at head widths 64 and 128, in bfloat16 and float16.

    Strides are 32-bit, as Triton passes them while they fit; offsets are 64-bit all the same.
    """
    return [launch for dtype in ("bf16", "fp16") for d in (64, 128) for launch in _launches(dtype, d)]


def _launches(dtype: str, d: int) -> "list[Launch]":
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    block_m, block_n, warps, stages = TILES[2, d > 64]
    data, ints, floats = f"*{dtype}", "*i32", "*fp32"

    def launch(kernel, function, pointers, numbers, strides, constants, num_warps, num_stages, gemm=False):
        signature = pointers | numbers | dict.fromkeys(strides, "i32")
        divisible = (*pointers, *strides)
        return Launch(
            kernel=f"span_attention/{kernel}",
            function=function,
            signature=signature,
            constants=constants | {"D": d},
            divisible=divisible,
            num_warps=num_warps,
            num_stages=num_stages,
            dtype=dtype,
            shape=f"d={d}",
            gemm=gemm,
        )

    return [
        launch(
            "prefill",
            _prefill,
            {"q": data, "k": data, "v": data, "out": data, "spans": ints, "heads": ints},
            {"tokens": "i32", "sink": "i32", "group": "i32", "scale": "fp32"},
            [f"s{tensor}_{axis}" for tensor in "qkvo" for axis in "bhn"],
            {"BLOCK_M": block_m, "BLOCK_N": block_n, "PRECISION": "ieee"},
            warps,
            stages,
            gemm=True,
        ),
        launch(
            "decode",
            _decode,
            {"q": data, "k": data, "v": data, "part": floats, "log_sum": floats, "start": ints, "length": ints},
            {"group": "i32", "pieces": "i32", "scale": "fp32"},
            ["sq_b", "sq_h", "sk_b", "sk_s", "sv_b", "sv_s"],
            {"BLOCK_N": KEYS, "STEPS": PIECE // KEYS},
            4,
            2,
        ),
        launch(
            "merge",
            _merge,
            {"part": floats, "log_sum": floats, "out": data},
            {"pieces": "i32"},
            [],
            {"BLOCK_P": PIECES},
            4,
            1,
        ),
    ]
