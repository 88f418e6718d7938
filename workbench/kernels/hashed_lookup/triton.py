"""`hashed_lookup` in Triton: a program has some rows of ids and one slot; on the way back, one row of a table.

Tables are found by their addresses, so that one launch serves all. For the way back the places are sorted, in the order
of the batch where they are equal: nothing is added atomically, and two runs agree bit for bit. A row that a large part
of a batch looks up is then the work of one program.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels.hashed_lookup import refuse, refuse_rows

if TYPE_CHECKING:
    from workbench.kernels.hashed_lookup import Plan
    from workbench.kernels.static import Launch

ROWS, WIDTH = 32, 128  # of a tile: rows of ids, and numbers of a table's row at most
KINDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _mixed(x):
    """The finaliser of splitmix64, of unsigned numbers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _gather(
    ids, rows, out, addresses, lookups, offs, n, fields, count, slots, dim,
    GIVEN: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    i, slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    col = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    there, inside = i < n, (i < n)[:, None] & (col < dim)[None, :]
    begin, end = tl.load(offs + slot), tl.load(offs + slot + 1)
    stored = tl.where(tl.program_id(2) == 0, n, 0)  # places are the same for all parts of a row
    acc = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for p in range(begin, end):
        table, first = tl.load(lookups + 6 * p), tl.load(lookups + 6 * p + 1)
        if GIVEN:
            row = tl.load(rows + i * count + p, mask=there, other=0)
        else:
            size, salt, field = (
                tl.load(lookups + 6 * p + 2),
                tl.load(lookups + 6 * p + 3),
                tl.load(lookups + 6 * p + 4),
            )
            row = tl.load(ids + i * fields + field, mask=there, other=0)
            if salt >= 0:
                turned = row.to(tl.uint64, bitcast=True) + (salt + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
                row = ((_mixed(turned) >> 1) % size.to(tl.uint64)).to(tl.int64)
            row += first
            tl.store(rows + i * count + p, row, mask=i < stored)
        base = tl.load(addresses + table).to(tl.pointer_type(KIND))
        acc += tl.load(base + row[:, None] * dim + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if MEAN:
        acc = tl.div_rn(acc, tl.zeros_like(acc) + (end - begin).to(tl.float32))
    tl.store(out + (i * slots + slot)[:, None] * dim + col[None, :], acc, mask=inside)


@triton.jit
def _scatter(
    keys, order, grad, addresses, lookups, offs, before, total, count, slots, dim, scale,
    MEAN: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    own, last = tl.load(keys + j), tl.load(keys + j - 1, mask=j > 0, other=-1)
    if own != last:
        acc = tl.zeros((WIDTH,), dtype=tl.float32)
        table = tl.load(lookups + 6 * (tl.load(order + j) % count))
        key = own
        while key == own:
            pair = tl.load(order + j)
            slot = tl.load(lookups + 6 * (pair % count) + 5)
            value = tl.load(grad + (pair // count * slots + slot) * dim + col, mask=col < dim, other=0.0).to(tl.float32)
            if MEAN:
                pooled = tl.load(offs + slot + 1) - tl.load(offs + slot)
                value = tl.div_rn(value, tl.zeros_like(value) + pooled.to(tl.float32))
            acc += value
            j += 1
            key = tl.load(keys + j, mask=j < total, other=-1)
        to = tl.load(addresses + table).to(tl.pointer_type(KIND)) + (own - tl.load(before + table)) * dim + col
        moved = tl.load(to, mask=col < dim, other=0.0).to(tl.float32) + scale * acc
        tl.store(to, moved.to(KIND), mask=col < dim)


def lookup(tables: Sequence[Tensor], ids: Tensor, plan: "Plan", mean: bool) -> tuple[Tensor, Tensor]:
    """As `reference.lookup`. What the ids are is asked first, for which the device is waited for."""
    refuse(ids, plan)
    rows = ids.new_empty(len(ids), len(plan.lookups))
    return _gathered(tables, ids, rows, plan, mean), rows


def gather(tables: Sequence[Tensor], rows: Tensor, plan: "Plan", mean: bool) -> Tensor:
    """As `reference.gather`."""
    refuse_rows(rows, plan)
    return _gathered(tables, None, rows, plan, mean)


def _gathered(tables: Sequence[Tensor], ids: Tensor | None, rows: Tensor, plan: "Plan", mean: bool) -> Tensor:
    out, width = tables[0].new_empty(len(rows), plan.slots * plan.dim), _width(plan.dim)
    if len(rows):
        grid = triton.cdiv(len(rows), ROWS), plan.slots, triton.cdiv(plan.dim, width)
        given = rows if ids is None else ids
        sizes = len(rows), plan.fields, len(plan.lookups), plan.slots, plan.dim
        form = {"GIVEN": ids is None, "MEAN": mean, "ROWS": ROWS, "WIDTH": width, "KIND": _kind(tables[0])}
        _gather[grid](given, rows, out, *_about(tables, plan), *sizes, **form, num_warps=4, num_stages=1)
    return out


def scatter(tables: Sequence[Tensor], grad: Tensor, rows: Tensor, plan: "Plan", mean: bool, scale: float) -> None:
    """As `reference.scatter`."""
    refuse_rows(rows, plan)
    if not len(rows):
        return
    starts = torch.tensor([0, *plan.rows], device=rows.device).cumsum(0)
    of = starts[[one[0] for one in plan.lookups]]
    keys, order = (rows + of).flatten().sort(stable=True)
    width, sizes = _width(plan.dim), (keys.numel(), len(plan.lookups), plan.slots, plan.dim)
    grid = keys.numel(), triton.cdiv(plan.dim, width)
    form = {"MEAN": mean, "WIDTH": width, "KIND": _kind(tables[0])}
    about = *_about(tables, plan), starts
    _scatter[grid](keys, order, grad, *about, *sizes, float(scale), **form, num_warps=1, num_stages=1)


def _about(tables: Sequence[Tensor], plan: "Plan") -> tuple[Tensor, Tensor, Tensor]:
    """Addresses of the tables, lookups, and where those of each slot begin."""
    lists = [table.data_ptr() for table in tables], plan.lookups, plan.offs
    addresses, lookups, offs = (torch.tensor(each, device=tables[0].device) for each in lists)
    return addresses, lookups, offs


def _kind(table: Tensor) -> tl.dtype:
    if table.dtype not in KINDS:
        raise InputError(
            f"backend is 'triton' but hashed_lookup got tensors of {table.dtype}; they must be of 32 bits or 16"
        )
    return KINDS[table.dtype]


def _width(dim: int) -> int:
    return min(WIDTH, triton.next_power_of_2(dim))


def launches() -> "list[Launch]":
    """What is compiled ahead of time: rows 16 and 128 wide. Sizes are run-time arguments, and offsets are 64-bit."""
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    lists = dict.fromkeys(("addresses", "lookups", "offs"), "*i64")

    def launch(function, name: str, signature: dict[str, str], dtype: str, width: int, warps: int, **constants):
        form = {
            "MEAN": True,
            "WIDTH": width,
            "KIND": {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype],
        }
        return Launch(
            kernel=f"hashed_lookup/{name}",
            function=function,
            signature=signature,
            constants=constants | form,
            divisible=(*(key for key, kind in signature.items() if kind.startswith("*")), "dim"),
            num_warps=warps,
            num_stages=1,
            dtype=dtype,
            shape=", ".join([f"dim={width}", *(["rows given"] if constants.get("GIVEN") else [])]),
            gemm=False,
        )

    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        for width in (16, WIDTH):
            sizes = dict.fromkeys(("n", "fields", "count", "slots", "dim"), "i64")
            given = {"ids": "*i64", "rows": "*i64", "out": f"*{dtype}"} | lists | sizes
            found += [
                launch(_gather, "gather", given, dtype, width, 4, GIVEN=by_rows, ROWS=ROWS) for by_rows in (False, True)
            ]
            given = {"keys": "*i64", "order": "*i64", "grad": f"*{dtype}"} | lists | {"before": "*i64"}
            given |= dict.fromkeys(("total", "count", "slots", "dim"), "i64") | {"scale": "fp32"}
            found.append(launch(_scatter, "scatter", given, dtype, width, 1))
    return found
