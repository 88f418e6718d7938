"""Calls of the operators from a seed: random shapes, and arguments that cannot be. For the sanitizer and for tests.

Every second call is sound. In the others one argument is another: an index that points elsewhere, a list that is cut
short, a size beyond all memory. Such a call must be refused, by `InputError`; where an index could only be the one it
was, there is no excuse for taking it.

Tensor letters: T tokens, D and H widths, E experts, K experts or blocks a token, P routed pairs.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from workbench.kernels.block_sparse_attention import block_gate_topk, block_sparse_attention
from workbench.kernels.block_sparse_attention.index import BlockIndex
from workbench.kernels.column_adam import column_adam
from workbench.kernels.haar import haar_dwt2, haar_idwt2
from workbench.kernels.hashed_lookup import BY_ID, Lookups
from workbench.kernels.moe_mlp import ACTIVATIONS, moe_mlp
from workbench.kernels.pcb_merge import pcb_merge
from workbench.kernels.plan import RoutePlan
from workbench.kernels.random_basis import random_basis, random_basis_adjoint
from workbench.kernels.selective_scan import kept_shape
from workbench.kernels.shared_store import shared_linear, shared_weight
from workbench.kernels.trim_elect_merge import DIVIDE, ELECT, magnitude_threshold, trim_elect_merge
from workbench.kernels.walsh_hadamard import walsh_hadamard

WIDTHS = (1, 2, 3, 5, 7, 8, 15, 16, 17, 24, 31, 33, 48, 63, 64, 65, 80, 129)  # about whole vectors, tiles and panels
NUMBERS = (-(2**63), -(2**31), -1, 0, 1, 3, 1000, 2**16 + 1, 2**31 - 1, 2**31, 2**40, 2**63 - 1)
PLAN = ("order", "inv", "tok", "offs", "tok_offs")
INDEX = ("blocks", "rows", "col_offs", "pair", "starts", "lengths")
FLOATS = ("b1", "b2", "weight", "base", "thresholds", "out")  # tensors, where they are given

ops = torch.ops.workbench


@dataclass(frozen=True)
class Call:
    """A call of an operator.

    Attributes:
        name: of the operator, and what was done to an argument.
        function: called with the arguments in their order.
        arguments: by name.
        only: those of which no other value is right beside the rest.
        refused: whether it must be.
    """

    name: str
    function: Callable[..., object]
    arguments: dict[str, Any]
    only: Sequence[str] = ()
    refused: bool = False

    def __call__(self) -> object:
        return self.function(*self.arguments.values())


def calls(seed: int, native: bool = False) -> Iterator[Call]:
    """Without end; `native` for those alone that a path in C takes."""
    problems = IN_C if native else (*IN_C, sums, spans, slots)
    for number in itertools.count():
        draw = random.Random(f"{seed} {number}")
        torch.manual_seed(draw.randrange(2**31))
        call = draw.choice(problems[number // 2 % len(problems)](draw, native))
        yield damaged(draw, call) if number % 2 else call


def experts(draw: random.Random, native: bool) -> list[Call]:
    n_experts, top_k, activation = draw.randrange(1, 7), draw.randrange(1, 4), draw.choice(tuple(ACTIVATIONS))
    dim, hidden = draw.choice(WIDTHS), draw.choice(WIDTHS)
    plan = _plan(draw, n_experts, top_k)
    backend = "native" if native else draw.choice(("native", "native", "cpu", "reference", "grouped_mm"))
    if backend == "grouped_mm":
        dim, hidden = -(-dim // 4) * 4, -(-hidden // 4) * 4
    up, biased = ACTIVATIONS[activation] * hidden, draw.random() < 0.5
    x = torch.randn(plan.n_tokens, dim + draw.choice((0, 3)))[:, :dim]  # rows may lie apart
    arguments = {
        "x": x,
        "w1": torch.randn(n_experts, up, dim),
        "w2": torch.randn(n_experts, dim, hidden),
        "score": torch.rand(plan.n_pairs),
        "b1": torch.randn(n_experts, up) if biased else None,
        "b2": torch.randn(n_experts, dim) if biased else None,
        **{name: getattr(plan, name) for name in PLAN},
        "top_k": plan.top_k,
        "activation": activation,
        "backend": backend,
    }

    def forward(*given):
        return ops.moe_mlp(*given, True)

    def by_plan(x, w1, w2, score, b1, b2, order, inv, tok, offs, tok_offs, top_k, activation, backend):
        made = RoutePlan(order, inv, tok, offs, tok_offs, x.shape[0], w1.shape[0], top_k)
        return moe_mlp(x, w1, w2, made, score, b1, b2, activation=activation, backend=backend)

    out, z = forward(*arguments.values())
    kept = {"grad": torch.randn_like(out), "x": x, "z": z} | {k: v for k, v in arguments.items() if k != "x"}
    return [
        Call("moe_mlp", forward, arguments, PLAN),
        Call("moe_mlp of a RoutePlan", by_plan, arguments, PLAN),
        Call("moe_mlp_backward", ops.moe_mlp_backward, kept, PLAN),
    ]


def bank(draw: random.Random, native: bool) -> list[Call]:
    n_experts, top_k, rank = draw.randrange(1, 7), draw.randrange(1, 4), draw.choice((1, 2, 3, 4, 7, 8, 9, 16))
    d_in, d_out = draw.choice(WIDTHS), draw.choice(WIDTHS)
    backend = "native" if native else draw.choice(("native", "native", "cpu", "reference", "dense"))
    plan = _plan(draw, n_experts, top_k)
    arguments = {
        "x": torch.randn(plan.n_tokens, d_in),
        "a": torch.randn(n_experts, rank, d_in),
        "b": torch.randn(n_experts, d_out, rank),
        "score": torch.rand(plan.n_pairs),
        "expert": _experts(plan),
        "tok_offs": plan.tok_offs,
        "top_k": plan.top_k,
        "backend": backend,
    }
    out, codes, index = ops.low_rank(*arguments.values(), True)
    x, a, b, score, expert, tok_offs, *_ = arguments.values()
    kept = {"grad": torch.randn_like(out), "x": x, "codes": codes, "a": a, "b": b, "score": score, "expert": expert}
    needs = [draw.random() < 0.8 for _ in range(4)]
    kept |= {"index": index, "tok_offs": tok_offs, "top_k": plan.top_k, "backend": backend}
    return [
        Call("low_rank", lambda *given: ops.low_rank(*given, True), arguments),
        Call("low_rank_backward", lambda *given: ops.low_rank_backward(*given, needs), kept, ("index",)),
    ]


def attention(draw: random.Random, native: bool) -> list[Call]:
    arguments = gate(draw, native)[0].arguments
    q, k, block_size, top_k, cu_seqlens, _ = arguments.values()
    index = block_gate_topk(q, k, block_size, top_k, cu_seqlens, backend="cpu")
    backend = "native" if native else draw.choice(("native", "native", "cpu"))
    arguments = {
        "q": q,
        "k": k,
        "v": torch.randn_like(k),
        **dict(zip(INDEX, index.tensors(), strict=True)),
        "block_size": block_size,
        "scale": 0.5,
        "backend": backend,
    }
    out, lse = ops.block_sparse_attention(*arguments.values())
    rest = {name: arguments[name] for name in (*INDEX, "block_size", "scale", "backend")}
    kept = {"grad": torch.randn_like(out), "q": q, "k": k, "v": arguments["v"], "out": out, "lse": lse, **rest}

    def by_index(q, k, v, blocks, rows, col_offs, pair, starts, lengths, block_size, scale, backend):
        made = BlockIndex(block_size, blocks, rows, col_offs, pair, starts, lengths)
        return block_sparse_attention(q, k, v, made, scale=scale, backend=backend)

    def by_blocks(q, k, v, blocks, block_size, scale, backend):
        made = BlockIndex.from_blocks(blocks, block_size, cu_seqlens)
        return block_sparse_attention(q, k, v, made, scale=scale, backend=backend)

    by_reference = arguments | {"backend": backend if native else "reference"}
    chosen = {name: arguments[name] for name in ("q", "k", "v", "blocks", "block_size", "scale", "backend")}
    return [
        Call("block_sparse_attention", ops.block_sparse_attention, arguments, INDEX),
        Call("block_sparse_attention of a BlockIndex", by_index, by_reference, INDEX),
        Call("block_sparse_attention of blocks", by_blocks, chosen),
        Call("block_sparse_attention_backward", ops.block_sparse_attention_backward, kept, INDEX),
    ]


def gate(draw: random.Random, native: bool) -> list[Call]:
    n_tokens, groups, heads = draw.randrange(0, 80), draw.randrange(1, 3), draw.randrange(1, 3)
    width = draw.choice(WIDTHS)
    q, k = torch.randn(n_tokens, groups * heads, width), torch.randn(n_tokens, groups, width)
    if draw.random() < 0.3:  # any strides
        q = torch.randn(groups * heads, n_tokens, 2 * width).transpose(0, 1)[..., ::2]
    ends = sorted(draw.randrange(0, n_tokens + 1) for _ in range(draw.randrange(0, 4)))
    cu_seqlens = torch.tensor([0, *ends, n_tokens], dtype=torch.int32) if draw.random() < 0.6 else None
    arguments = {
        "q": q,
        "k": k,
        "block_size": draw.choice((1, 2, 3, 8, 16, 20, 100)),
        "top_k": draw.choice((1, 2, 3, 5, 9)),
        "cu_seqlens": cu_seqlens,
        "backend": "native" if native else draw.choice(("native", "native", "cpu", "reference")),
    }
    return [Call("block_gate_topk", ops.block_gate_topk, arguments)]


def sums(draw: random.Random, native: bool) -> list[Call]:
    plan = _plan(draw, draw.randrange(1, 7), draw.randrange(1, 4))
    arguments = {
        "y": torch.randn(plan.n_pairs, draw.choice(WIDTHS)),
        "weight": torch.rand(plan.n_pairs) if draw.random() < 0.5 else None,
        **{name: getattr(plan, name) for name in PLAN},
        "n_tokens": plan.n_tokens,
        "n_experts": plan.n_experts,
        "top_k": plan.top_k,
        "backend": draw.choice(("cpu", "reference")),
    }
    return [Call("gather_sum", ops.gather_sum, arguments, PLAN)]


def spans(draw: random.Random, native: bool) -> list[Call]:
    n_tokens, groups, heads, width = draw.randrange(0, 70), draw.randrange(1, 3), draw.randrange(1, 3), 8
    q, k = torch.randn(2, groups * heads, n_tokens, width), torch.randn(2, groups, n_tokens, width)
    arguments = {
        "q": q,
        "k": k,
        "v": torch.randn_like(k),
        "spans": [draw.randrange(1, 90) for _ in range(groups * heads)],
        "sink": draw.randrange(0, 9),
        "backend": draw.choice(("cpu", "reference")),
    }
    return [
        Call("span_attention", ops.span_attention, arguments),
        Call("span_attention_backward", ops.span_attention_backward, {"grad": torch.randn_like(q)} | arguments),
    ]


def slots(draw: random.Random, native: bool) -> list[Call]:
    groups, heads, width = draw.randrange(1, 4), draw.randrange(1, 3), 8
    length = [draw.randrange(1, 9) for _ in range(groups)]
    start = [sum(length[:group]) for group in range(groups)]
    k = torch.randn(2, sum(length), width)
    q, backend = torch.randn(2, groups * heads, width), draw.choice(("cpu", "reference"))
    arguments = {"q": q, "k": k, "v": torch.randn_like(k), "start": start, "length": length, "backend": backend}
    return [Call("span_decode", ops.span_decode, arguments)]


def models(draw: random.Random, native: bool) -> list[Call]:
    n, size = draw.randrange(1, 6), draw.choice((2, 3, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1025))
    dtype = draw.choice((torch.float32, torch.float32, torch.bfloat16))
    experts, base = torch.randn(n, size).to(dtype), torch.randn(size).to(dtype)
    elect, divide = draw.choice((None, *ELECT)), draw.choice((None, *DIVIDE))
    backend = "native" if native else draw.choice(("native", "native", "reference"))
    merge = {
        "experts": experts,
        "base": draw.choice((None, base)),
        "weights": torch.rand(n).tolist(),
        "thresholds": draw.choice((None, torch.rand(n))),
        "scale": 0.7,
        "out": draw.choice((None, base)),
        "backend": backend,
    }
    select = {
        "experts": experts,
        "k": draw.randrange(size + 1),
        "base": draw.choice((None, experts)),
        "backend": backend,
    }
    low = draw.randrange(size // 2)
    contest = {
        "experts": torch.randn(n, size),  # without equal magnitudes
        "base": draw.choice((None, torch.zeros(size))),
        "clip": [low, size - 1 - draw.randrange(size - low - 1)],
        "drop": draw.randrange(size),
        "scale": torch.rand(n).tolist(),
        "backend": backend,
    }

    def merged(experts, base, weights, thresholds, scale, out, backend):
        how = {"weights": weights, "thresholds": thresholds, "scale": scale, "out": out, "backend": backend}
        return trim_elect_merge(experts, base, elect=elect, divide=divide, **how)

    return [
        Call("trim_elect_merge", merged, merge),
        Call("magnitude_threshold", lambda x, k, base, path: magnitude_threshold(x, k, base, backend=path), select),
        Call(
            "pcb_merge",
            lambda x, base, clip, drop, scale, path: pcb_merge(
                x, base, clip=clip, drop=drop, scale=scale, backend=path
            ),
            contest,
        ),
    ]


def seeded(draw: random.Random, native: bool) -> list[Call]:
    """The sizes are those of tensors: a number that is another would be as right, and may take a day."""
    k, size = draw.randrange(0, 9), draw.choice((0, *WIDTHS, 1023, 1024, 1025, 2500))
    arguments = {
        "coefficients": torch.randn(k),
        "x": torch.randn(size),
        "seed": torch.tensor(draw.randrange(-(2**63), 2**63)),
        "start": draw.choice((0, 1, 7, 2**34 + 3)),
        "backend": "native" if native else draw.choice(("native", "native", "reference")),
    }

    def mixed(coefficients, x, seed, start, backend):
        return random_basis(coefficients, seed, x.shape, start=start, backend=backend)

    def products(coefficients, x, seed, start, backend):
        return random_basis_adjoint(x, seed, coefficients.numel(), start=start, backend=backend)

    return [Call("random_basis", mixed, arguments), Call("random_basis_adjoint", products, arguments)]


def transforms(draw: random.Random, native: bool) -> list[Call]:
    x = torch.randn(draw.randrange(4), 2 ** draw.randrange(16))
    if draw.random() < 0.3:  # any strides
        x = torch.stack([x, x], -1)[..., 0]
    arguments = {"x": x, "backend": "native" if native else draw.choice(("native", "native", "reference"))}
    return [Call("walsh_hadamard", lambda x, path: walsh_hadamard(x, backend=path), arguments)]


def wavelets(draw: random.Random, native: bool) -> list[Call]:
    n, channels, height, width = draw.randrange(3), draw.randrange(1, 5), draw.randrange(5), draw.choice(WIDTHS)
    path = "native" if native else draw.choice(("native", "native", "reference"))
    image = {"x": torch.randn(n, channels, 2 * height, 2 * width + 2)[..., : 2 * width], "backend": path}
    bands = {"y": torch.randn(n, 4 * channels, height, width), "backend": path}
    return [
        Call("haar_dwt2", lambda x, path: haar_dwt2(x, backend=path), image),
        Call("haar_idwt2", lambda y, path: haar_idwt2(y, backend=path), bands),
    ]


def shared(draw: random.Random, native: bool) -> list[Call]:
    """The sizes are those of tensors, as in `seeded`."""
    rows, depth, width = draw.randrange(0, 5), draw.choice(WIDTHS), draw.choice(WIDTHS)
    arguments = {
        "x": torch.randn(rows, depth + draw.choice((0, 3)))[:, :depth],
        "grad": torch.randn(rows, width),
        "memory": torch.randn(draw.choice((*WIDTHS, 1000))),
        "seed": torch.tensor(draw.randrange(-(2**63), 2**63)),
        "scale": draw.random(),
        "offset": draw.choice((0, 1, 31, 127, 2**34 + 3)),
        "backend": "native" if native else draw.choice(("native", "native", "reference")),
    }

    def made(x, grad, memory, seed, scale, offset, backend):
        return shared_weight(memory, seed, torch.tensor(scale), grad.shape, offset=offset, backend=backend)

    def folded(x, grad, memory, seed, scale, offset, backend):
        return ops.shared_fold(grad, seed, torch.tensor(scale), offset, memory.numel(), backend)

    def multiplied(x, grad, memory, seed, scale, offset, backend):
        width = grad.numel() // max(1, rows)
        return shared_linear(x, memory, seed, torch.tensor(scale), width, offset=offset, backend=backend)

    def back(x, grad, memory, seed, scale, offset, backend):
        return (
            ops.shared_product(grad, memory, seed, torch.tensor(scale), offset, depth, True, backend),
            ops.shared_outer(grad, x, seed, torch.tensor(scale), offset, memory.numel(), backend),
        )

    named = {"weight": made, "fold": folded, "linear": multiplied, "back": back}
    return [Call(f"shared_{name}", function, arguments) for name, function in named.items()]


def columns(draw: random.Random, native: bool) -> list[Call]:
    """Every index is taken, as none is asked what is there."""
    n, m = draw.choice(WIDTHS), draw.choice((5, 64, *range(127, 133), 255, 256))
    r = draw.randrange(1, m + 1)
    arguments = {
        "grad": torch.randn(n, m + draw.choice((0, 3)))[:, :m],
        "exp_avg": torch.randn(n, r),
        "exp_avg_sq": torch.rand(n, r),
        "index": torch.randint(-3, m + 3, (r,), dtype=torch.int32),
        "step": draw.choice((1, 2, 1000)),
        "norm": draw.choice((1, 2)),
        "remap": draw.random() < 0.7,
        "backend": "native" if native else draw.choice(("native", "native", "reference")),
    }

    def stepped(grad, exp_avg, exp_avg_sq, index, step, norm, remap, backend):
        if not native and backend == "reference":  # it looks columns up by the index
            index = index.clamp(0, m - 1)
        how = {"step": step, "norm": norm, "remap": remap, "backend": backend}
        return column_adam(grad, exp_avg, exp_avg_sq, index, **how)

    return [Call("column_adam", stepped, arguments)]


def scans(draw: random.Random, native: bool) -> list[Call]:
    batch, channels, states = draw.randrange(3), draw.choice(WIDTHS), draw.choice((1, 2, 3, 4, 5, 8, 9, 16))
    steps = draw.choice((0, 1, 3, 16, 17, 63, 64, 65, 130))

    def cube():
        """Steps side by side, channels side by side, or neither."""
        layout = draw.randrange(3)
        if layout == 2:
            return torch.randn(batch, channels, 2 * steps)[..., ::2]
        return torch.randn(batch, steps, channels).transpose(1, 2) if layout else torch.randn(batch, channels, steps)

    arguments = {
        "x": cube(),
        "delta": cube(),
        "a": -torch.rand(channels, states),
        "b": torch.randn(batch, states, steps),
        "c": torch.randn(batch, steps, states).transpose(1, 2),
        "d": torch.randn(channels),
        "z": cube(),
        "state": torch.randn(batch, channels, states),
        "backend": "native" if native else draw.choice(("native", "native", "reference")),
    }
    x, *rest, state, backend = arguments.values()
    kept = {"grad": cube(), "grad_last": state, "x": x} | dict(
        zip(("delta", "a", "b", "c", "d", "z"), rest, strict=True)
    )
    kept |= {"kept": torch.randn(kept_shape(x, arguments["a"])), "backend": backend}
    return [
        Call("selective_scan", lambda *given: ops.selective_scan(*given, True), arguments),
        Call("selective_scan_backward", ops.selective_scan_backward, kept),
    ]


def lookups(draw: random.Random, native: bool) -> list[Call]:
    """Sizes of tables are those of tensors, as in `seeded`."""
    sizes, dim = [draw.choice((1, 2, 7, 40)) for _ in range(draw.randrange(1, 4))], draw.choice(WIDTHS)
    count, fields, n = draw.randrange(1, 6), draw.randrange(1, 4), draw.choice((0, 1, 2, 31, 32, 33, 70))
    table = [draw.randrange(len(sizes)) for _ in range(count)]
    first = [draw.randrange(sizes[t]) for t in table]
    rows = [draw.randrange(1, sizes[t] - begin + 1) for t, begin in zip(table, first, strict=True)]
    salt = [draw.choice((BY_ID, 0, 5, 2**63 - 1)) for _ in range(count)]
    slot = list(itertools.accumulate([0, *(draw.randrange(2) for _ in range(count - 1))]))
    asked = Lookups(*map(tuple, (table, first, rows, salt, (draw.randrange(fields) for _ in range(count)), slot)))
    by_id = min([size for size, salted in zip(rows, salt, strict=True) if salted == BY_ID], default=2**62)
    how = {"mean": draw.random() < 0.5, "backend": "native" if native else draw.choice(("native", "reference"))}
    arguments = {
        "tables": torch.randn(sum(sizes), dim + draw.choice((0, 3)))[:, :dim],
        "ids": torch.randint(by_id, (n, fields)),
        "lookups": asked.flat(),
    } | how

    def split(tables):
        return tables.split(sizes) if tables.shape[:1] == (sum(sizes),) else [tables]

    def looked_up(tables, ids, flat, mean, backend):
        return ops.hashed_lookup(list(split(tables)), ids, flat, mean, backend)

    out, places = looked_up(*arguments.values())
    kept = {"grad": torch.randn_like(out), "rows": places, "lookups": asked.flat()} | how

    def back(grad, rows, flat, mean, backend):
        return ops.hashed_scatter(grad, rows, flat, sizes, dim, mean, backend)

    return [Call("hashed_lookup", looked_up, arguments), Call("hashed_scatter", back, kept)]


IN_C = (experts, bank, attention, gate, models, seeded, transforms, wavelets, shared, columns, scans, lookups)


def damaged(draw: random.Random, call: Call) -> Call:
    """The call with one argument that is another."""
    indices = [name for name in call.only if call.arguments[name] is not None]
    name = draw.choice(indices if indices and draw.random() < 0.6 else list(call.arguments))
    value = call.arguments[name]
    if isinstance(value, Tensor):
        what, other = _index(draw, value) if not value.is_floating_point() else _numbers(draw, value)
    elif isinstance(value, str):
        what, other = "unknown", "order"  # a module of that name there is
    elif isinstance(value, float):
        what, other = "not a number", float("nan")
    elif isinstance(value, list):
        place, number = draw.randrange(len(value)), draw.choice(NUMBERS)
        what, other = f"{number} at {place}", [*value[:place], number, *value[place + 1 :]]
    else:
        number = draw.choice(NUMBERS)
        other = (
            torch.tensor([0, number]).clamp(-(2**31), 2**31 - 1).int() if name in ("tok_offs", "cu_seqlens") else number
        )
        other, what = (torch.rand(3), "given") if name in FLOATS and value is None else (other, str(number))
    changed = isinstance(value, Tensor) and not (value.shape == other.shape and bool((value == other).all()))
    return replace(
        call,
        name=f"{call.name}, {name} {what}",
        arguments=call.arguments | {name: other},
        refused=name in call.only and changed,
    )


def _index(draw: random.Random, index: Tensor) -> tuple[str, Tensor]:
    """An index of which a number, the length, the order or the type is another."""
    how = draw.choice(("one", "one", "one", "two", "swapped", "shorter", "longer", "back", "type", "apart"))
    other, flat = index.clone(), index.numel()
    if how == "shorter" or not flat:
        return "cut short", index.flatten()[: draw.randrange(flat) if flat else 0].clone()
    if how == "longer":
        return "longer", torch.cat([index.flatten(), index.flatten()[-1:]])
    if how == "back":
        return "turned round", index.flip(0)
    if how == "type":
        return "of another type", index.to(draw.choice((torch.int64, torch.int16, torch.uint8, torch.float32)))
    if how == "apart":
        return "with room between", torch.stack([index, index], -1)[..., 0]
    limits = torch.iinfo(index.dtype)
    for _ in range(2 if how == "two" else 1):
        place, number = draw.randrange(flat), draw.choice((*NUMBERS, flat, flat + 1, draw.randrange(-3, flat + 3)))
        if how == "swapped":
            number, other.view(-1)[place] = int(other.view(-1)[place]), int(other.view(-1)[0])
            other.view(-1)[0] = number
        else:
            other.view(-1)[place] = min(max(number, limits.min), limits.max)
    return ("two numbers swapped" if how == "swapped" else f"{number} at {place}"), other


def _numbers(draw: random.Random, x: Tensor) -> tuple[str, Tensor]:
    """A tensor of another shape, type or layout."""
    how = draw.choice(("shorter", "narrower", "flat", "type", "none", "apart"))
    if how == "shorter":
        return "one shorter", x[:-1]
    if how == "narrower":
        return "one narrower", x[..., :-1]
    if how == "flat":
        return "flat", x.flatten()
    if how == "type":
        return "of another type", x.to(draw.choice((torch.float64, torch.bfloat16, torch.int32)))
    if how == "none":
        return "of one number", torch.tensor(0.0)
    return "with room between", torch.stack([x, x], -1)[..., 0]


def _plan(draw: random.Random, n_experts: int, top_k: int) -> RoutePlan:
    n_tokens = draw.choice((0, 1, 2, 5, 16, 40, 90))
    if draw.random() < 0.6:
        return RoutePlan.build(torch.randint(n_experts, (n_tokens * top_k,)), n_experts, top_k=top_k)
    counts = torch.randint(0, 4, (n_tokens,))
    tok_offs = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return RoutePlan.build(torch.randint(n_experts, (int(counts.sum()),)), n_experts, tok_offs=tok_offs)


def _experts(plan: RoutePlan) -> Tensor:
    """(P,) expert of each pair, token-major."""
    return torch.arange(plan.n_experts).repeat_interleave(plan.offs.diff())[plan.inv]
