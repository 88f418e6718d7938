"""The CPU path of `moe_mlp`: one expert after the other, each with all its rows, from gathering to the last product.

The formulas are those of `reference`. What makes it fast: an expert's rows, gathered once, are still in the cache for
the products that use them; products go straight to where their result belongs, weight gradients included; beside
results, one (P, H) buffer is written to memory, and it is kept between calls; each expert has its natural size, so that
no row is padded; and with several threads each takes whole experts.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from workbench.kernels import threads
from workbench.kernels.gather_sum.cpu import gather_sum
from workbench.kernels.memory import fresh, scratch
from workbench.kernels.plan import RoutePlan

SHARED = 2**25  # multiply-adds of the first product from which on handing experts to threads pays
TURNS = 8  # experts a thread must have to take in turn, lest it wait for the others at the end
CHUNK = 2**16  # elements a thread of an element-wise step: its operands together stay in the cache of a core

aten = torch.ops.aten
Group = tuple[int, int, int]  # an expert, its first grouped row, and the end of its rows


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
    """As `reference.forward`."""
    (_, dim, hidden), up = w2.shape, w1.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    z = fresh((plan.n_pairs, up), x.dtype) if save else None
    columns = [(dim, x.dtype), (0 if save else up, x.dtype), (hidden, wide)]

    def expert(group: Group, buffers: list[Tensor], y: Tensor) -> None:
        e, start, end = group
        rows, z_rows, act = buffers
        xg = torch.index_select(x, 0, plan.tok[start:end], out=rows)
        ze = _product(xg, w1[e].T, None if b1 is None else b1[e], z_rows if z is None else z[start:end])
        _activate(ze.to(wide), activation, act)
        _product(act.to(x.dtype), w2[e].T, None if b2 is None else b2[e], y[start:end])

    return gather_sum(_each_expert(expert, plan, x, up, columns), plan, score), z


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
    """As `reference.backward`."""
    (_, dim, hidden), up = w2.shape, w1.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    dw1, dw2 = fresh(w1.shape, w1.dtype), fresh(w2.shape, w2.dtype)
    db1, db2 = (None if b is None else torch.zeros_like(b) for b in (b1, b2))
    for e in (plan.offs.diff() == 0).nonzero().flatten().tolist():  # no rows, and nobody writes its gradient below
        dw1[e].zero_()
        dw2[e].zero_()
    s = score.to(wide)[plan.order, None]
    ds = s.new_empty(plan.n_pairs)
    derive = _derive_swiglu if activation == "swiglu" else _derive_relu
    columns = [(dim, x.dtype), (hidden, x.dtype), (hidden, wide), (up, wide)]

    def expert(group: Group, buffers: list[Tensor], dx_rows: Tensor) -> None:
        e, start, end = group
        rows, u_rows, act, dz = buffers
        tok, se, dse = plan.tok[start:end], s[start:end], ds[start:end]
        dout = torch.index_select(grad, 0, tok, out=rows)
        u = torch.mm(dout, w2[e], out=u_rows).to(wide)
        for part in _chunks(end - start, hidden):
            derive(z[start:end][part].to(wide), u[part], se[part], act[part], dz[part], dse[part])
        torch.mm(dout.T, act.to(x.dtype), out=dw2[e])
        if b2 is not None:
            dout = dout.to(wide)
            dse += torch.mv(dout, b2[e].to(wide))
            db2[e] = torch.mv(dout.T, se[:, 0])
        if b1 is not None:
            db1[e] = dz.sum(0)
        dz = dz.to(x.dtype)
        xg = torch.index_select(x, 0, tok, out=rows)
        torch.mm(dz.T, xg, out=dw1[e])
        torch.mm(dz, w1[e], out=dx_rows[start:end])

    dx = gather_sum(_each_expert(expert, plan, x, up, columns), plan, None)
    return dx, dw1, dw2, ds[plan.inv].to(score.dtype), db1, db2


def _each_expert(
    work: Callable[[Group, list[Tensor], Tensor], None],
    plan: RoutePlan,
    x: Tensor,
    up: int,
    columns: list[tuple[int, torch.dtype]],
) -> Tensor:
    """Call work(group, buffers, rows) for every expert that has rows; returns the `rows` (P, H) that it fills.

    `buffers` are scratch, as many rows as the expert has, of the given columns and types. Where the work is worth it,
    threads take the experts in turn, the largest first. An expert with more than 1/`TURNS` of a thread's share of the
    rows would keep the others waiting: it is done before, with torch's operators split over the threads.
    """
    groups = [(e, start, end) for e, (start, end) in enumerate(pairwise(plan.offs.tolist())) if end > start]
    groups.sort(key=_size, reverse=True)
    n_threads = threads.available() if plan.n_pairs * x.shape[1] * up >= SHARED else 1
    alone = [group for group in groups if n_threads == 1 or _size(group) * TURNS * n_threads > plan.n_pairs]
    shared = groups[len(alone) :]
    most = [_size(groups[0]) if groups else 0, *[_size(shared[0]) if shared else 0] * (n_threads - 1)]
    rows, *flat = scratch(
        ((plan.n_pairs, x.shape[1]), x.dtype), *(((n, width), dtype) for n in most for width, dtype in columns)
    )
    buffers = [flat[i : i + len(columns)] for i in range(0, len(flat), len(columns))]

    def run(thread: int, group: Group) -> None:
        work(group, [buffer[: _size(group)] for buffer in buffers[thread]], rows)

    for group in alone:
        run(0, group)
    if shared:
        threads.share(shared, run, n_threads)
    return rows


def _size(group: Group) -> int:
    return group[2] - group[1]


def _chunks(n_rows: int, width: int) -> list[slice]:
    step = max(1, CHUNK * torch.get_num_threads() // max(width, 1))  # one in a thread that takes whole experts
    return [slice(start, start + step) for start in range(0, n_rows, step)]


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def _activate(z: Tensor, activation: str, out: Tensor) -> None:
    """A into `out`."""
    if activation == "relu":
        torch.clamp_min(z, 0, out=out)
    else:
        gate, up = z.chunk(2, dim=1)
        aten.silu.out(gate, out=out).mul_(up)


def _derive_swiglu(z: Tensor, u: Tensor, s: Tensor, act: Tensor, dz: Tensor, ds: Tensor) -> None:
    """From z, u and s: s * A into `act`, dZ into `dz`, <u, A> into `ds`; u is used up. One exponential an element."""
    gate, up = z.chunk(2, dim=1)
    dgate, dup = dz.chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate, out=act)
    silu = torch.mul(gate, sigmoid, out=dup)
    torch.sub(torch.ones((), dtype=z.dtype), sigmoid, out=dgate)
    torch.addcmul(sigmoid, silu, dgate, out=dgate).mul_(up)  # silu' = sigmoid + silu * (1 - sigmoid)
    torch.mul(silu, up, out=act)
    torch.linalg.vecdot(u, act, out=ds)
    u.mul_(s)
    dgate.mul_(u)
    dup.mul_(u)
    act.mul_(s)


def _derive_relu(z: Tensor, u: Tensor, s: Tensor, act: Tensor, dz: Tensor, ds: Tensor) -> None:
    """The same for A = relu(Z)."""
    torch.clamp_min(z, 0, out=act)
    torch.linalg.vecdot(u, act, out=ds)
    u.mul_(s)
    aten.threshold_backward.grad_input(u, z, 0, grad_input=dz)
    act.mul_(s)
