"""What span attention and span decoding compute, in plain torch: dense scores under a mask, in the dtype given."""

from collections.abc import Sequence

import torch
from torch import Tensor


def visible(n: int, span: int, sink: int, device: torch.device | None = None) -> Tensor:
    """(n, n) bool: query i sees key j of a head, j <= i and (j < sink or i - j < span)."""
    i = torch.arange(n, device=device)[:, None]
    j = torch.arange(n, device=device)
    return (j <= i) & ((j < sink) | (i - j < span))


def span_attention(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[int], sink: int) -> Tensor:
    """Heads one by one: q (B, Hq, N, d), k and v (B, Hkv, N, d), one span for each query head -> (B, Hq, N, d)."""
    group = q.shape[1] // max(k.shape[1], 1)
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    for head, span in enumerate(spans):
        keys, values = k[:, head // group], v[:, head // group]
        scores = q[:, head] @ keys.mT * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~visible(q.shape[2], span, sink, q.device), float("-inf"))
        output[:, head] = scores.softmax(-1) @ values
    return output


def span_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: Sequence[int], sink: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the output.

    With P the row-wise softmax: dV = P^T dO, dS = P (dP - sum_k P dP) with dP = dO V^T, dQ = dS K and dK = dS^T Q.
    """
    group, scale = q.shape[1] // max(k.shape[1], 1), q.shape[-1] ** -0.5
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    for head, span in enumerate(spans):
        kv = head // group
        scores = q[:, head] @ k[:, kv].mT * scale
        p = scores.masked_fill(~visible(q.shape[2], span, sink, q.device), float("-inf")).softmax(-1)
        dp = grad[:, head] @ v[:, kv].mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq[:, head] = ds @ k[:, kv]
        dk[:, kv] += ds.mT @ q[:, head]
        dv[:, kv] += p.mT @ grad[:, head]
    return dq, dk, dv


def span_decode(q: Tensor, k: Tensor, v: Tensor, start: Sequence[int], length: Sequence[int]) -> Tensor:
    """One query a head, q (B, Hq, d), over the slots start .. start + length of its key head in k and v (B, S, d)."""
    group = q.shape[1] // len(start)
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    for head in range(q.shape[1]):
        slots = slice(start[head // group], start[head // group] + length[head // group])
        scores = (k[:, slots] @ q[:, head, :, None]).squeeze(-1) * q.shape[-1] ** -0.5
        output[:, head] = (scores.softmax(-1)[:, None] @ v[:, slots]).squeeze(1)
    return output
