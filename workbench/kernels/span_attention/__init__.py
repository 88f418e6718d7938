"""Span attention: every head sees the first `sink` tokens and the last `span` ones, each head its own span.

The operator under mixtures of attention spans (Fu et al. 2024, arXiv:2406.14909) and, with one span for all heads,
under attention sinks with a sliding window (Xiao et al. 2023, arXiv:2309.17453). Query i sees key j iff

    j <= i  and  (j < sink  or  i - j < span)

so a span of 1 is the token itself, and a span of at least N is dense causal attention. Work and reads are
O(N (span + sink)) a head.

`span_attention` is differentiable on the "reference" and "cpu" paths; the "triton" path is forward only, because the
method needs no training. `span_decode` is one step of decoding over a cache in which every head keeps as many tokens as
it sees.

Tensor letters: B batch, Hq query heads, Hkv key-value heads (query head h uses key head h // (Hq / Hkv)), N tokens,
S cache slots, d head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from workbench.errors import InputError
from workbench.kernels import dispatch
from workbench.kernels.span_attention import cpu, reference

BACKENDS = ("reference", "cpu", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def span_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: Sequence[int] | Tensor, sink: int = 0, *, backend: str | None = None
) -> Tensor:
    """Causal attention in which each head has its own span; scores are scaled by d**-0.5.

    Args:
        q: (B, Hq, N, d).
        k, v: (B, Hkv, N, d), Hkv divides Hq.
        spans: (Hq,) tokens, at least 1 each; a list, or an integer tensor (kept on the CPU: it is read here).
        sink: first tokens that every query sees.
        backend: "reference", "cpu" or "triton"; default: what suits the device.

    Returns:
        (B, Hq, N, d), contiguous.

    Raises:
        InputError: a shape, dtype, span or backend that cannot be used; a gradient asked of the "triton" path.
    """
    spans = _check_spans(q, k, v, spans, sink)
    backend = dispatch.choose("span_attention", backend, q.device, BACKENDS)
    if backend == "triton":
        _check_triton(q)
        _no_gradient("span_attention on the triton path", q, k, v)
    return _attend(q, k, v, spans, sink, backend)


def span_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Sequence[int] | Tensor,
    length: Sequence[int] | Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """One decoding step: the newest token's query over what the cache of its head holds. No gradient.

    The order of the slots is free, because the tokens in them carry their position already (rotated keys).

    Args:
        q: (B, Hq, d).
        k, v: (B, S, d), the caches of all key heads one after the other.
        start, length: (Hkv,) first slot and number of slots in use of each key head.
        backend: as for `span_attention`.

    Returns:
        (B, Hq, d).
    """
    start, length = _check_slots(q, k, v, start, length)
    backend = dispatch.choose("span_decode", backend, q.device, BACKENDS)
    if backend == "triton":
        _check_triton(q)
    _no_gradient("span_decode", q, k, v)
    return _decode(q, k, v, start, length, backend)


def _path(backend: str):
    """The module of a path; Triton is imported only where it is used."""
    if backend == "triton":
        from workbench.kernels.span_attention import triton

        return triton
    return {"reference": reference, "cpu": cpu}[backend]


@torch.library.custom_op("workbench::span_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[int], sink: int, backend: str) -> Tensor:
    _check_spans(q, k, v, spans, sink)
    _admit("span_attention", backend, q)
    dispatch.begin("span_attention", backend)
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    return _path(backend).span_attention(q, k, v, spans, sink)


@_attend.register_fake
def _(q, k, v, spans, sink, backend):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("workbench::span_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: Sequence[int], sink: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    _check_spans(q, k, v, spans, sink)
    _admit("span_attention", backend, q)
    if grad.shape != q.shape or grad.dtype != q.dtype or grad.device != q.device:
        raise InputError(
            f"grad is {grad.dtype} of shape {tuple(grad.shape)} on {grad.device} but must be {q.dtype} of shape "
            f"{tuple(q.shape)} on {q.device}"
        )
    if backend == "triton":
        raise InputError("backend is 'triton' but that path of span_attention has no gradient")
    dispatch.begin("span_attention.backward", backend)
    return _path(backend).span_attention_backward(grad, q, k, v, spans, sink)


@_attend_backward.register_fake
def _(grad, q, k, v, spans, sink, backend):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, ctx.spans, ctx.sink, ctx.backend = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx, grad):
    return (*_attend_backward(grad, *ctx.saved_tensors, ctx.spans, ctx.sink, ctx.backend), None, None, None)


_attend.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("workbench::span_decode", mutates_args=())
def _decode(q: Tensor, k: Tensor, v: Tensor, start: Sequence[int], length: Sequence[int], backend: str) -> Tensor:
    _check_slots(q, k, v, start, length)
    _admit("span_decode", backend, q)
    dispatch.begin("span_decode", backend)
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    return _path(backend).span_decode(q, k, v, start, length)


@_decode.register_fake
def _(q, k, v, start, length, backend):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@register_flop_formula(torch.ops.workbench.span_attention)
def _flops(q, k, v, spans, sink, *_, **__) -> int:
    """Two products over min(N, span + sink) keys a query: as torch counts dense attention, without a causal half."""
    batch, _, n, d = q
    return 4 * batch * n * d * sum(min(n, span + sink) for span in spans)


@register_flop_formula(torch.ops.workbench.span_attention_backward)
def _backward_flops(grad, q, k, v, spans, sink, *_, **__) -> int:
    """Five products, one of which makes the scores again."""
    return _flops(q, k, v, spans, sink) * 5 // 2


@register_flop_formula(torch.ops.workbench.span_decode)
def _decode_flops(q, k, v, start, length, *_, **__) -> int:
    batch, heads, d = q
    return 4 * batch * d * sum(length) * heads // len(length)


def _admit(op: str, backend: str, q: Tensor) -> None:
    dispatch.admit(op, backend, q.device, BACKENDS)
    if backend == "triton":
        _check_triton(q)


def _check_spans(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[int] | Tensor, sink: int) -> list[int]:
    """The spans as integers."""
    _check(q, k, v, 4)
    if k.shape[2] != q.shape[2]:
        raise InputError(f"k has {k.shape[2]} tokens but must have as many as q, {q.shape[2]}")
    if isinstance(sink, bool) or not isinstance(sink, int | torch.SymInt) or sink < 0:
        raise InputError(f"sink is {sink!r} but must be a number of tokens, at least 0")
    return _integers("spans", spans, q.shape[1], "query head", 1)


def _check_slots(
    q: Tensor, k: Tensor, v: Tensor, start: Sequence[int] | Tensor, length: Sequence[int] | Tensor
) -> tuple[list[int], list[int]]:
    """Start and length as integers."""
    _check(q, k, v, 3)
    heads = len(start)
    if not heads or q.shape[1] % heads:
        raise InputError(f"start has {heads} entries but their number must divide the {q.shape[1]} heads of q")
    start = _integers("start", start, heads, "key head", 0)
    length = _integers("length", length, heads, "key head", 1)
    for s, n in zip(start, length, strict=True):
        if s + n > k.shape[1]:
            raise InputError(f"start {s} and length {n} reach slot {s + n} but k has {k.shape[1]} slots")
    return start, length


def _check(q: Tensor, k: Tensor, v: Tensor, rank: int) -> None:
    """Ranks, dtypes, devices and the sizes that all paths need."""
    form = "(batch, heads, tokens, width)" if rank == 4 else "(batch, heads, width)"
    for name, x, shape in (("q", q, form), ("k", k, form), ("v", v, form)):
        if x.ndim != rank:
            shape = shape if rank == 4 or name == "q" else "(batch, slots, width)"
            raise InputError(f"{name} has shape {tuple(x.shape)} but must be {shape}")
        if x.dtype not in DTYPES:
            raise InputError(f"{name} is {x.dtype} but must be float16, bfloat16, float32 or float64")
        if x.dtype != q.dtype:
            raise InputError(f"{name} is {x.dtype} but must be {q.dtype} as q is")
        if x.device != q.device:
            raise InputError(f"{name} is on {x.device} but must be on {q.device} as q is")
    if k.shape != v.shape:
        raise InputError(f"v has shape {tuple(v.shape)} but must be {tuple(k.shape)} as k has")
    if k.shape[0] != q.shape[0] or k.shape[-1] != q.shape[-1]:
        raise InputError(
            f"k has shape {tuple(k.shape)} but must have the batch {q.shape[0]} and the width {q.shape[-1]} of q"
        )
    if q.shape[-1] == 0:
        raise InputError(f"q has shape {tuple(q.shape)} but its width must be at least 1")
    if rank == 4 and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        raise InputError(f"k has {k.shape[1]} heads but their number must divide the {q.shape[1]} heads of q")


def _check_triton(q: Tensor) -> None:
    from workbench.kernels.span_attention.triton import WIDTHS

    if q.shape[-1] not in WIDTHS:
        raise InputError(f"q has head width {q.shape[-1]} but the triton path takes {', '.join(map(str, WIDTHS))}")
    if q.dtype == torch.float64:
        raise InputError("q is torch.float64 but the triton path takes float16, bfloat16 and float32")


def _no_gradient(what: str, *tensors: Tensor) -> None:
    for name, x in zip("qkv", tensors, strict=True):
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError(f"{name} requires a gradient but {what} has none: call it under torch.no_grad()")


def _integers(name: str, values: Sequence[int] | Tensor, count: int, of: str, low: int) -> list[int]:
    if isinstance(values, Tensor):
        if values.ndim != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise InputError(f"{name} is {values.dtype} of shape {tuple(values.shape)} but must be integers ({count},)")
        values = values.tolist()
    values = list(values)
    if len(values) != count:
        raise InputError(f"{name} has {len(values)} entries but must have one for each {of}, {count}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            raise InputError(f"{name} holds {value!r} but must hold integers")
        if value < low:
            raise InputError(f"{name} holds {value} but must be at least {low}")
    return values
