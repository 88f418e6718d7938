"""`selective_scan` in Triton: a program has a channel, or going back a group of them, and a chunk of its steps at once.

The steps of a chunk are combined in pairs (an associative scan), `STATES` states at a time; what one chunk leaves to
the next goes through memory, as does what a group's channels add to the gradients of b and c. Nothing is added
atomically, and two runs agree bit for bit. Everything is contiguous here: other layouts are copied.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.selective_scan.reference import CHUNK

if TYPE_CHECKING:
    from workbench.kernels.static import Launch

STATES = 16  # at a time, at most
GROUPS = 32  # of channels, at most
WARPS = 4


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(u), u = exp(-|x|), and log1p(u) = 2 artanh(u / (2 + u)) by its series."""
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    q = s * s
    p = 2 / 11 + q * (2 / 13 + q * (2 / 15))
    p = 2 / 5 + q * (2 / 7 + q * (2 / 9 + q * p))
    p = 2.0 + q * (2 / 3 + q * p)
    return tl.where(x > 0, x, 0.0) + p * s


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _combine(decay, h, next_decay, next_h):
    return decay * next_decay, next_decay * h + next_h


@triton.jit
def _forward(
    x, delta, a, b, c, d, z, y, last, kept, channels, states, steps,
    SAVE: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    i, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, chunks = (batch * channels + i) * steps, tl.cdiv(steps, CHUNK)
    t = tl.arange(0, CHUNK)
    weight = tl.load(d + i)
    for q in range(chunks):
        at = q * CHUNK + t
        inside = at < steps
        xs = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
        # behind the end nothing comes in and everything is left, so that the state stays
        step = tl.where(inside, _softplus(tl.load(delta + row + at, mask=inside, other=0.0).to(tl.float32)), 0.0)
        gate = tl.load(z + row + at, mask=inside, other=0.0).to(tl.float32)
        out = weight * xs
        for first in range(0, states, STATES):
            n = first + tl.arange(0, STATES)
            there = n < states
            line = batch * states + n
            h0 = tl.load(last + line * channels + i, mask=there, other=0.0)
            if SAVE:
                tl.store(kept + ((batch * chunks + q) * states + n) * channels + i, h0, mask=there)
            rate = tl.load(a + i * states + n, mask=there, other=0.0)
            place, both = line[:, None] * steps + at[None, :], there[:, None] & inside[None, :]
            decay = tl.exp(rate[:, None] * step[None, :])
            new = (step * xs)[None, :] * tl.load(b + place, mask=both, other=0.0).to(tl.float32)
            left, h = tl.associative_scan((decay, new), 1, _combine)
            h += left * h0[:, None]
            out += tl.sum(h * tl.load(c + place, mask=both, other=0.0).to(tl.float32), 0)
            tl.debug_barrier()  # everyone has read the last states
            tl.store(last + line * channels + i, tl.sum(tl.where((t == CHUNK - 1)[None, :], h, 0.0), 1), mask=there)
            tl.debug_barrier()
        tl.store(y + row + at, (out * gate * _sigmoid(gate)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, x, delta, a, b, c, d, z, kept, dx, d_delta, da, db, dc, dd, dz, dh, channels, states, steps, span,
    STATES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    group, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    chunks, batches = tl.cdiv(steps, CHUNK), tl.num_programs(1)
    t = tl.arange(0, CHUNK)
    start = group * span
    for i in range(start, tl.minimum(start + span, channels)):
        row = (batch * channels + i) * steps
        weight = tl.load(d + i)
        skipped = tl.zeros((CHUNK,), dtype=tl.float32)
        for back in range(chunks):
            q = chunks - 1 - back
            at = q * CHUNK + t
            inside = at < steps
            xs = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
            raw = tl.load(delta + row + at, mask=inside, other=0.0).to(tl.float32)
            step = tl.where(inside, _softplus(raw), 0.0)
            more = (t < CHUNK - 1) & (at + 1 < steps)
            following = tl.load(delta + row + at + 1, mask=more, other=0.0).to(tl.float32)
            following = tl.where(more, _softplus(following), 0.0)
            gate = tl.load(z + row + at, mask=inside, other=0.0).to(tl.float32)
            given = tl.load(grad + row + at, mask=inside, other=0.0).to(tl.float32)
            opened = _sigmoid(gate)
            dy = given * gate * opened
            skipped += dy * xs
            y = weight * xs
            d_step = tl.zeros((CHUNK,), dtype=tl.float32)
            d_step_x = tl.zeros((CHUNK,), dtype=tl.float32)
            for first in range(0, states, STATES):
                n = first + tl.arange(0, STATES)
                there = n < states
                column = (batch * states + n) * channels + i
                h0 = tl.load(kept + ((batch * chunks + q) * states + n) * channels + i, mask=there, other=0.0)
                dh0 = tl.load(dh + column, mask=there, other=0.0)
                rate = tl.load(a + i * states + n, mask=there, other=0.0)
                place, both = (batch * states + n)[:, None] * steps + at[None, :], there[:, None] & inside[None, :]
                bs = tl.load(b + place, mask=both, other=0.0).to(tl.float32)
                cs = tl.load(c + place, mask=both, other=0.0).to(tl.float32)
                decay = tl.exp(rate[:, None] * step[None, :])
                new = (step * xs)[None, :] * bs
                left, h = tl.associative_scan((decay, new), 1, _combine)
                h += left * h0[:, None]
                y += tl.sum(h * cs, 0)
                next_decay = tl.exp(rate[:, None] * following[None, :])
                left, g = tl.associative_scan((next_decay, dy[None, :] * cs), 1, _combine, reverse=True)
                g += left * dh0[:, None]
                d_step_x += tl.sum(g * bs, 0)
                of_rate = g * (h - new)  # the state before, of which so much is left
                d_step += tl.sum(of_rate * rate[:, None], 0)
                here = (group * batches + batch) * states * steps + n[:, None] * steps + at[None, :]
                db_here, dc_here = g * (step * xs)[None, :], dy[None, :] * h
                if i > start:
                    db_here += tl.load(db + here, mask=both, other=0.0)
                    dc_here += tl.load(dc + here, mask=both, other=0.0)
                da_here = tl.load(da + column, mask=there, other=0.0) + tl.sum(of_rate * step[None, :], 1)
                tl.debug_barrier()  # everyone has read what is written now
                tl.store(db + here, db_here, mask=both)
                tl.store(dc + here, dc_here, mask=both)
                tl.store(da + column, da_here, mask=there)
                tl.store(dh + column, tl.sum(tl.where((t == 0)[None, :], g * decay, 0.0), 1), mask=there)
                tl.debug_barrier()
            tl.store(dx + row + at, (d_step_x * step + dy * weight).to(dx.dtype.element_ty), mask=inside)
            of_delta = (d_step + d_step_x * xs) * _sigmoid(raw)
            tl.store(d_delta + row + at, of_delta.to(d_delta.dtype.element_ty), mask=inside)
            of_gate = given * y * opened * (1.0 + gate * (1.0 - opened))
            tl.store(dz + row + at, of_gate.to(dz.dtype.element_ty), mask=inside)
        tl.store(dd + batch * channels + i, tl.sum(skipped, 0))


def forward(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, state: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`."""
    from workbench.kernels.selective_scan import kept_shape

    out, last = torch.empty_like(x), state.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    kept = a.new_empty(kept_shape(x, a) if save else (0,))
    x, delta, a, b, c, d, z = (tensor.contiguous() for tensor in (x, delta, a, b, c, d, z))
    y = torch.empty_like(x)
    if x.numel():
        grid = x.shape[1], x.shape[0]
        tensors = x, delta, a, b, c, d, z, y, last, kept
        _forward[grid](*tensors, *_sizes(x, a), SAVE=save, **_tile(a), num_warps=WARPS, num_stages=1)
    return out.copy_(y), last.transpose(1, 2).contiguous(), kept


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
    """As `reference.backward`."""
    likes, (batch, channels, steps), states = (x, delta, a, b, c, d, z, grad_last), x.shape, a.shape[1]
    dh = grad_last.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    span = max(1, triton.cdiv(channels, GROUPS))
    groups = triton.cdiv(channels, span)
    da, dd = torch.zeros_like(dh), a.new_zeros(batch, channels)
    db, dc = (a.new_empty(groups, batch, states, steps) for _ in range(2))
    given = [tensor.contiguous() for tensor in (grad, x, delta, a, b, c, d, z, kept)]
    dx, d_delta, dz = (torch.empty_like(given[1]) for _ in range(3))
    if x.numel():
        tensors = *given, dx, d_delta, da, db, dc, dd, dz, dh
        _backward[(groups, batch)](*tensors, *_sizes(x, a), span, **_tile(a), num_warps=WARPS, num_stages=1)
    found = dx, d_delta, da.sum(0).T, db.sum(0), dc.sum(0), dd.sum(0), dz, dh.transpose(1, 2)
    return tuple(torch.empty_like(like).copy_(part) for like, part in zip(likes, found, strict=True))


def _sizes(x: Tensor, a: Tensor) -> tuple[int, int, int]:
    return x.shape[1], a.shape[1], x.shape[2]


def _tile(a: Tensor) -> dict[str, int]:
    return {"STATES": min(triton.next_power_of_2(a.shape[1]), STATES), "CHUNK": CHUNK}


def launches() -> "list[Launch]":
    """What is compiled ahead of time: 8 states, and 16 at a time of any number."""
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    def launch(dtype: str, states: int, back: bool) -> "Launch":
        rows, exact = f"*{dtype}", "*fp32"
        kinds = {"x": rows, "delta": rows, "a": exact, "b": rows, "c": rows, "d": exact, "z": rows}
        if back:
            kinds = {"grad": rows} | kinds | {"kept": exact, "dx": rows, "d_delta": rows, "da": exact, "db": exact}
            kinds |= {"dc": exact, "dd": exact, "dz": rows, "dh": exact}
        else:
            kinds |= {"y": rows, "last": exact, "kept": exact}
        sizes = dict.fromkeys(("channels", "states", "steps", *(("span",) if back else ())), "i32")
        return Launch(
            kernel=f"selective_scan/{'backward' if back else 'forward'}",
            function=_backward if back else _forward,
            signature=kinds | sizes,
            constants={**({} if back else {"SAVE": True}), "STATES": states, "CHUNK": CHUNK},
            divisible=(*kinds, "channels", "steps"),
            num_warps=WARPS,
            num_stages=1,
            dtype=dtype,
            shape=f"N={states}",
            gemm=False,
        )

    return [launch(dtype, n, back) for dtype in ("bf16", "fp16", "fp32") for n in (8, 16) for back in (False, True)]
