"""Attention in which every query attends to a few blocks of keys, and the gate that chooses them by the mean key.

Paths: "reference" (dense masks, any floating type), "cpu", "native" (float32) and "triton". The choice of blocks has no
gradient. Kept for the backward are q, k, v, the output, L and the index, nothing else; it is deterministic and cannot
be differentiated again.

The method is that of MoBA (Lu et al. 2025, arXiv:2502.13189); the layout by columns that of FlashMoBA (Xiao et al.
2025, arXiv:2511.11571).

Tensor letters: N tokens of all sequences, H query heads, G key-value heads (H is divisible by G, query head h reads
h // (H / G)), d head width, B tokens a block, K blocks per query.
"""

from importlib import import_module
from pathlib import Path

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from workbench.errors import InputError
from workbench.kernels import dispatch
from workbench.kernels.block_sparse_attention.index import (
    BlockIndex,
    block_table,
    invert,
    require_block_size,
    require_sequences,
    require_top_k,
)

BACKENDS = ("reference", "cpu", "native", "triton")
NATIVE = Path(__file__).with_name("native.c")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRITON_WIDTHS = (16, 32, 64, 128)  # 16 for small tests; the others are those the kernels are compiled for ahead of time
TRITON_TOP_K = 16


def block_gate_topk(
    q: Float[Tensor, "tokens heads dim"],
    k: Float[Tensor, "tokens kv_heads dim"],
    block_size: int,
    top_k: int,
    cu_seqlens: Int32[Tensor, " seqs_plus_1"] | None = None,
    *,
    backend: str | None = None,
) -> BlockIndex:
    """For each query its own block and, of the earlier ones, the K - 1 whose mean key has the largest product with it.

    A query with fewer earlier blocks takes them all. Of blocks that score equally the first is taken.

    Args:
        q: (N, H, d).
        k: (N, G, d), as the attention will see them.
        block_size: B; a sequence may be shorter, and its last block is where B does not divide its length.
        top_k: K, the own block counted.
        cu_seqlens: (S + 1,) int32, first token of each of the S sequences and N; None for one sequence.
        backend: one of `BACKENDS`; None chooses by device.

    Raises:
        InputError: names the argument that does not fit.
    """
    _check_gate(q, k, block_size, top_k, cu_seqlens)
    chosen = dispatch.choose("block_gate_topk", backend, q.device, BACKENDS, q.dtype, NATIVE)
    if chosen == "triton":
        _check_triton(q, top_k)
    return BlockIndex(block_size, *_gate(q.detach(), k.detach(), block_size, top_k, cu_seqlens, chosen))


def block_sparse_attention(
    q: Float[Tensor, "tokens heads dim"],
    k: Float[Tensor, "tokens kv_heads dim"],
    v: Float[Tensor, "tokens kv_heads dim"],
    index: BlockIndex,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Float[Tensor, "tokens heads dim"]:
    """Softmax attention of each query over the keys of its blocks that are not after it; differentiable once.

    Args:
        q: (N, H, d), any strides.
        k, v: (N, G, d).
        index: from `block_gate_topk`, or any choice by `BlockIndex.from_blocks`; it knows the sequences.
        scale: of the products; None for 1 / sqrt(d).
        backend: one of `BACKENDS`; None chooses by device. `dispatch.last_backend` says which one ran.

    Raises:
        InputError: names the argument that does not fit, or what the path does not take.
    """
    _check(q, k, v)
    index.require_form(*q.shape[:2])
    if index.blocks.device != q.device:
        raise InputError(f"index is on {index.blocks.device} but must be where q is, on {q.device}")
    chosen = dispatch.choose("block_sparse_attention", backend, q.device, BACKENDS, q.dtype, NATIVE)
    if chosen == "triton":
        _check_triton(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "reference":
        index.require(*q.shape[:2])
        dispatch.begin("block_sparse_attention", chosen)
        return _path(chosen).attention(q, k, v, index, scale)[0]
    return _attend(q, k, v, *index.tensors(), index.block_size, scale, chosen)[0]


def _path(backend: str):
    """The module of a path, imported when it is used: importing an operator must not import triton."""
    return import_module(f"{__name__}.{backend}")


@torch.library.custom_op("workbench::block_gate_topk", mutates_args=())
def _gate(
    q: Tensor, k: Tensor, block_size: int, top_k: int, cu_seqlens: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a `BlockIndex`."""
    _check_gate(q, k, block_size, top_k, cu_seqlens)
    dispatch.admit("block_gate_topk", backend, q.device, BACKENDS, q.dtype)
    if backend == "triton":
        _check_triton(q, top_k)
    backend = dispatch.begin("block_gate_topk", backend, NATIVE)
    starts, lengths = block_table(q.shape[0], block_size, cu_seqlens, q.device)
    if q.shape[0] == 0:
        blocks = torch.empty(*q.shape[:2], top_k, dtype=torch.int32, device=q.device)
    elif backend == "cpu":
        found = import_module(f"{__name__}.gate").index(q, k, block_size, top_k, cu_seqlens, starts)
        return *found, starts, lengths
    elif backend == "native":
        return *_path(backend).gate(q, k, block_size, top_k, cu_seqlens, starts, lengths), starts, lengths
    else:
        blocks = _path(backend).gate(q, k, block_size, top_k, cu_seqlens, starts, lengths).contiguous()
    return blocks, *invert(blocks, starts.numel()), starts, lengths


@_gate.register_fake
def _(q, k, block_size, top_k, cu_seqlens, backend):
    n_tokens, heads, _ = q.shape
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    n_blocks = (n_tokens + block_size - 1) // block_size if cu_seqlens is None else n_tokens // block_size + sequences
    int32 = {"dtype": torch.int32, "device": q.device}
    return (
        torch.empty(n_tokens, heads, top_k, **int32),
        torch.empty(n_tokens * heads * top_k, **int32),
        torch.empty(heads * n_blocks + 1, dtype=torch.int64, device=q.device),
        torch.empty(n_tokens, heads, top_k, **int32),
        torch.empty(n_blocks, **int32),
        torch.empty(n_blocks, **int32),
    )


@torch.library.custom_op("workbench::block_sparse_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    rows: Tensor,
    col_offs: Tensor,
    pair: Tensor,
    starts: Tensor,
    lengths: Tensor,
    block_size: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The output, in the memory layout of q, and L (N, H)."""
    index = BlockIndex(block_size, blocks, rows, col_offs, pair, starts, lengths)
    path = _enter("block_sparse_attention", backend, q, k, v, index)
    if q.shape[0] == 0:
        return torch.empty_like(q), _lse(q)
    return path.forward(q, k, v, index, scale)


@_attend.register_fake
def _(q, k, v, blocks, rows, col_offs, pair, starts, lengths, block_size, scale, backend):
    return torch.empty_like(q), _lse(q)


@torch.library.custom_op("workbench::block_sparse_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Tensor,
    rows: Tensor,
    col_offs: Tensor,
    pair: Tensor,
    starts: Tensor,
    lengths: Tensor,
    block_size: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    index = BlockIndex(block_size, blocks, rows, col_offs, pair, starts, lengths)
    path = _enter("block_sparse_attention.backward", backend, q, k, v, index)
    for name, x, like in (("grad", grad, q), ("out", out, q), ("lse", lse, _lse(q))):
        if x.shape != like.shape or x.dtype != like.dtype or x.device != like.device:
            raise InputError(
                f"{name} is {x.dtype} of shape {tuple(x.shape)} on {x.device} but must be {like.dtype} of shape "
                f"{tuple(like.shape)} on {like.device}"
            )
    if q.shape[0] == 0:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    return path.backward(grad, q, k, v, out, lse, index, scale)


@_attend_backward.register_fake
def _(grad, q, k, v, out, lse, blocks, rows, col_offs, pair, starts, lengths, block_size, scale, backend):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output) -> None:
    ctx.block_size, ctx.scale, ctx.backend = inputs[9:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:9])


def _grads(ctx, grad, _):
    if grad is None:
        return (None,) * 12
    return *_attend_backward(grad, *ctx.saved_tensors, ctx.block_size, ctx.scale, ctx.backend), *(None,) * 9


_attend.register_autograd(_grads, setup_context=_save)


def _lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


@register_flop_formula(torch.ops.workbench.block_sparse_attention, get_raw=True)
def _forward_flops(q, k, v, blocks, rows, col_offs, pair, starts, lengths, block_size, *_, out_val=None, **__) -> int:
    """Two products with every key of every chosen block; a query's own block counts whole."""
    choices = blocks.numel() if blocks.is_meta else int((blocks >= 0).sum())
    return 4 * choices * block_size * q.shape[-1]


@register_flop_formula(torch.ops.workbench.block_sparse_attention_backward, get_raw=True)
def _backward_flops(grad, q, k, v, out, lse, blocks, rows, col_offs, pair, *rest, out_val=None, **_) -> int:
    return _forward_flops(q, k, v, blocks, rows, col_offs, pair, *rest) * 5 // 2


@register_flop_formula(torch.ops.workbench.block_gate_topk)
def _gate_flops(q_shape, k_shape, block_size, *_, out_shape=None, **__) -> int:
    """One product with every mean key."""
    return 2 * q_shape[0] * q_shape[1] * q_shape[2] * out_shape[4][0]


def _enter(op: str, backend: str, q: Tensor, k: Tensor, v: Tensor, index: BlockIndex):
    """The module of the path that begins to run; it can take what is there, and follow the index wherever it points."""
    _check(q, k, v)
    dispatch.admit(op, backend, q.device, tuple(name for name in BACKENDS if name != "reference"), q.dtype)
    if backend == "triton":
        _check_triton(q)
    if index.blocks.device != q.device:
        raise InputError(f"index is on {index.blocks.device} but must be where q is, on {q.device}")
    path = _path(dispatch.begin(op, backend, NATIVE))
    index.require(*q.shape[:2], getattr(path, "fits", None))
    return path


def _check_gate(q: Tensor, k: Tensor, block_size: int, top_k: int, cu_seqlens: Tensor | None) -> None:
    _check(q, k)
    require_block_size(block_size, q.shape[0])
    if cu_seqlens is not None:
        require_sequences(cu_seqlens, q.shape[0], q.device)
    n_sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    require_top_k(top_k, *q.shape[:2], q.shape[0] // block_size + n_sequences)


def _check(q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is None:
            continue
        if x.ndim != 3:
            raise InputError(f"{name} has shape {tuple(x.shape)} but must be (tokens, heads, width)")
        if x.dtype not in DTYPES:
            raise InputError(f"{name} is {x.dtype} but must be one of {', '.join(map(str, DTYPES))}")
        if x.dtype != q.dtype:
            raise InputError(f"{name} is {x.dtype} but must be {q.dtype}, as q is")
        if x.device != q.device:
            raise InputError(f"{name} is on {x.device} but must be where q is, on {q.device}")
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise InputError(f"k has shape {tuple(k.shape)} but must have the tokens and the width of q, {tuple(q.shape)}")
    if v is not None and v.shape != k.shape:
        raise InputError(f"v has shape {tuple(v.shape)} but must be {tuple(k.shape)}, as k has")
    if q.shape[2] < 1 or q.shape[1] < 1:
        raise InputError(f"q has shape {tuple(q.shape)} but must have at least one head and a width of at least 1")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise InputError(f"k has {k.shape[1]} heads but their number must divide the {q.shape[1]} heads of q")


def _check_triton(q: Tensor, top_k: int = 1) -> None:
    if q.shape[2] not in TRITON_WIDTHS:
        raise InputError(
            f"q has head width {q.shape[2]} but the triton path takes {', '.join(map(str, TRITON_WIDTHS))}"
        )
    if q.dtype == torch.float64:
        raise InputError("q is torch.float64 but the triton path takes float16, bfloat16 and float32")
    if top_k > TRITON_TOP_K:
        raise InputError(f"top_k is {top_k} but the triton path takes at most {TRITON_TOP_K}")
