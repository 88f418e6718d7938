"""The meaning of `selective_scan`: one step after the other, and its gradients by the same recurrence backwards."""

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64
"""Steps between two states that are kept for the backward."""


def forward(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, state: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y in the type and layout of x, last state, kept or nothing), computed in the type of a."""
    out, (x, delta, b, c, z) = torch.empty_like(x), _wide(a, x, delta, b, c, z)
    step, h, sums, kept = F.softplus(delta), state, [], []
    for t in range(x.shape[2]):
        if t % CHUNK == 0:
            kept.append(h.transpose(1, 2))
        h = _decay(step, a, t) * h + _input(step * x, b, t)
        sums.append((h * c[:, None, :, t]).sum(-1))
    y = (torch.stack(sums, -1) if sums else x) + d[:, None] * x
    kept = torch.stack(kept, 1) if kept else a.new_empty(x.shape[0], 0, a.shape[1], a.shape[0])
    return out.copy_(y * F.silu(z)), h.clone(), kept if save else a.new_empty(0)


def backward(
    grad: Tensor,
    grad_last: Tensor,
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    z: Tensor,
    kept: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of x, delta, a, b, c, d, z and state, each in the type and layout of what it is of."""
    likes = x, delta, a, b, c, d, z, grad_last
    grad, x, delta, b, c, z = _wide(a, grad, x, delta, b, c, z)
    step, gate, opened = F.softplus(delta), F.silu(z), torch.sigmoid(z)
    dy = grad * gate  # of what is gated
    y, dsx, dstep = d[:, None] * x, torch.zeros_like(x), torch.zeros_like(x)  # dsx: of step * x
    da, db, dc, dh = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(c), grad_last
    for first in reversed(range(0, x.shape[2], CHUNK)):
        steps = range(first, min(first + CHUNK, x.shape[2]))
        h = [kept[:, first // CHUNK].transpose(1, 2)]
        for t in steps:
            h.append(_decay(step, a, t) * h[-1] + _input(step * x, b, t))
        for t in reversed(steps):
            here, before, decay = h[t - first + 1], h[t - first], _decay(step, a, t)
            y[:, :, t] += (here * c[:, None, :, t]).sum(-1)
            dc[:, :, t] = (dy[:, :, t, None] * here).sum(1)
            dh = dh + dy[:, :, t, None] * c[:, None, :, t]
            dsx[:, :, t] = (dh * b[:, None, :, t]).sum(-1)
            db[:, :, t] = (dh * (step * x)[:, :, t, None]).sum(1)
            rate = dh * decay * before  # of step * a
            dstep[:, :, t] = (rate * a).sum(-1)
            da += (rate * step[:, :, t, None]).sum(0)
            dh = dh * decay
    dx = dsx * step + dy * d[:, None]
    ddelta = (dstep + dsx * x) * torch.sigmoid(delta)
    dz = grad * y * opened * (1 + z * (1 - opened))
    grads = dx, ddelta, da, db, dc, (dy * x).sum((0, 2)), dz, dh
    return tuple(torch.empty_like(like).copy_(found) for like, found in zip(likes, grads, strict=True))


def _wide(like: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(like.dtype) for tensor in tensors]


def _decay(step: Tensor, a: Tensor, t: int) -> Tensor:
    """(B, I, N) what is left of each state in step t."""
    return torch.exp(step[:, :, t, None] * a)


def _input(step_x: Tensor, b: Tensor, t: int) -> Tensor:
    """(B, I, N) what step t adds to each state."""
    return step_x[:, :, t, None] * b[:, None, :, t]
