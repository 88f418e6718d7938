"""Embeddings of many fields, looked up in many tables by hashes or by ids, pooled, side by side: in one pass.

A row of ids (F,) is looked up P times. Lookup p takes the id v of field `field`, and of table `table` (rows, dim)

    row = first + v                                        salt -1: v from 0 to count - 1
    row = first + (mix(v, salt) >> 1) mod count            otherwise

and the lookups of one slot are added, or their mean is taken; the slots lie side by side. mix is the finaliser of
splitmix64 (`reference.mixed`). Nothing of (N, P, dim) is made beside the result, and what the backward pass keeps are
the rows, (N, P).

Paths: "reference", "native" (float32; without a C compiler the reference runs) and "triton", each a module with

    lookup(tables, ids, plan, mean) -> out, rows           gather(tables, rows, plan, mean) -> out
    scatter(tables, grad, rows, plan, mean, scale)         adds, where they lie, scale times what is the rows' own

ids, rows int64 and contiguous. Each row's terms are added in the order of the batch, in float32 or wider, whatever
the number of threads; so gradients agree to the last bit on all paths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels import dispatch

BACKENDS = ("reference", "native", "triton")
NATIVE = Path(__file__).with_name("native.c")
COLUMNS = ("table", "first", "count", "salt", "field", "slot")
MOST = 2**31  # rows of a table
BY_ID = -1


@dataclass(frozen=True)
class Lookups:
    """What is looked up for a row of ids: one entry of each for every lookup.

    Attributes:
        table, first, count: in rows first to first + count - 1 of which table.
        salt: of the hash, at least 0; `BY_ID`: the id is the row.
        field: whose id.
        slot: where to, in ascending order, none left out.
    """

    table: tuple[int, ...]
    first: tuple[int, ...]
    count: tuple[int, ...]
    salt: tuple[int, ...]
    field: tuple[int, ...]
    slot: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = [len(getattr(self, name)) for name in COLUMNS]
        if len(set(lengths)) != 1:
            raise InputError(f"{', '.join(COLUMNS)} have {lengths} entries but must have as many each")

    def flat(self) -> list[int]:
        """Lookup by lookup, as the registered operators take them."""
        return [number for one in zip(*(getattr(self, name) for name in COLUMNS), strict=True) for number in one]


@dataclass(frozen=True)
class Plan:
    """Lookups that fit their tables and ids.

    Attributes:
        lookups: (table, first, count, salt, field, slot) of each.
        offs: (slots + 1,) where the lookups of each slot begin.
        rows: of each table.
        fields, dim: of ids and tables.
    """

    lookups: tuple[tuple[int, ...], ...]
    offs: tuple[int, ...]
    rows: tuple[int, ...]
    fields: int
    dim: int

    @property
    def slots(self) -> int:
        return len(self.offs) - 1


def hashed_lookup(
    tables: Sequence[Float[Tensor, "_ dim"]],
    ids: Int64[Tensor, "batch fields"],
    lookups: Lookups,
    *,
    mean: bool = False,
    lr: float | None = None,
    backend: str | None = None,
) -> Float[Tensor, "batch width"]:
    """The slots of each row of ids side by side, `dim` numbers each; differentiable in the tables.

    Args:
        tables: of one width, type and device.
        mean: of the lookups of a slot; else their sum.
        lr: the backward pass moves the rows that were looked up by -lr times their gradient, where they lie, and no
            gradient of a table's size is made. None: tables get dense gradients.
        backend: one of `BACKENDS`; None chooses by device and type.

    Raises:
        InputError: names the argument that does not fit, the field with an id that no row has, or the backend that
            cannot do this.
    """
    tables = list(tables)
    if not tables:
        raise InputError("tables are none but must be at least one")
    device, dtype = tables[0].device, tables[0].dtype
    if ids.device != device:
        raise InputError(f"ids are on {ids.device} but must be on {device}, as tables are")
    if backend is None and dtype == torch.float64:
        backend = "reference"
    chosen = dispatch.choose("hashed_lookup", backend, device, BACKENDS, dtype, NATIVE)
    if lr is None:
        return _lookup(tables, ids, lookups.flat(), mean, chosen)[0]
    if not 0 <= lr < float("inf"):
        raise InputError(f"lr is {lr} but must be finite and at least 0")
    return _Updating.apply(ids, lookups.flat(), mean, float(lr), chosen, *tables)


@torch.library.custom_op("workbench::hashed_lookup", mutates_args=())
def _lookup(
    tables: Sequence[Tensor], ids: Tensor, lookups: Sequence[int], mean: bool, backend: str
) -> tuple[Tensor, Tensor]:
    plan = _plan_of(tables, ids, lookups)
    return _path(backend, tables[0]).lookup([t.contiguous() for t in tables], ids.contiguous(), plan, mean)


@_lookup.register_fake
def _(tables, ids, lookups, mean, backend):
    n = ids.shape[0]
    count = len(lookups) // len(COLUMNS)
    return tables[0].new_empty(n, _slots(lookups) * tables[0].shape[1]), ids.new_empty(n, count)


@torch.library.custom_op("workbench::hashed_gather", mutates_args=())
def _gather(tables: Sequence[Tensor], rows: Tensor, lookups: Sequence[int], mean: bool, backend: str) -> Tensor:
    plan = _plan_by_rows(tables, rows, lookups)
    return _path(backend, tables[0]).gather([t.contiguous() for t in tables], rows.contiguous(), plan, mean)


@_gather.register_fake
def _(tables, rows, lookups, mean, backend):
    return tables[0].new_empty(rows.shape[0], _slots(lookups) * tables[0].shape[1])


@torch.library.custom_op("workbench::hashed_scatter", mutates_args=())
def _scatter(
    grad: Tensor, rows: Tensor, lookups: Sequence[int], sizes: Sequence[int], dim: int, mean: bool, backend: str
) -> list[Tensor]:
    if not grad.is_floating_point() or min(sizes, default=-1) < 0 or dim < 1:
        raise InputError(
            f"sizes are {list(sizes)}, dim {dim}, grad {grad.dtype} but must be rows of each table, its width, and "
            "floating point"
        )
    wide = torch.promote_types(grad.dtype, torch.float32)
    found = [torch.zeros(size, dim, dtype=wide, device=grad.device) for size in sizes]
    _add(found, grad.to(wide), rows, lookups, mean, 1.0, backend)
    return [each.to(grad.dtype) for each in found]


@_scatter.register_fake
def _(grad, rows, lookups, sizes, dim, mean, backend):
    return [grad.new_empty(size, dim) for size in sizes]


@torch.library.custom_op("workbench::hashed_update", mutates_args=("tables",))
def _update(
    tables: Sequence[Tensor], grad: Tensor, rows: Tensor, lookups: Sequence[int], mean: bool, scale: float, backend: str
) -> None:
    _add(tables, grad, rows, lookups, mean, scale, backend)


@_update.register_fake
def _(tables, grad, rows, lookups, mean, scale, backend):
    return None


def _add(
    tables: Sequence[Tensor], grad: Tensor, rows: Tensor, lookups: Sequence[int], mean: bool, scale: float, backend: str
) -> None:
    plan = _plan_by_rows(tables, rows, lookups)
    shape = len(rows), plan.slots * plan.dim
    if grad.shape != shape or grad.dtype != tables[0].dtype or grad.device != tables[0].device:
        raise InputError(
            f"grad is {grad.dtype} of shape {tuple(grad.shape)} on {grad.device} but must be {tables[0].dtype}, "
            f"{shape}, on {tables[0].device}"
        )
    if not all(table.is_contiguous() for table in tables):
        raise InputError("tables must be contiguous, because they are changed where they lie")
    if not abs(scale) < float("inf"):
        raise InputError(f"scale is {scale} but must be finite")
    _path(backend, tables[0]).scatter(list(tables), grad.contiguous(), rows.contiguous(), plan, mean, scale)


# The result is linear in the tables: its adjoint scatters, whose own adjoint gathers by the same rows.


def _keep(ctx, inputs, output) -> None:
    tables, _, ctx.lookups, ctx.mean, ctx.backend = inputs
    ctx.sizes, ctx.dim = [len(table) for table in tables], tables[0].shape[1]
    rows = output[1]
    ctx.mark_non_differentiable(rows)
    ctx.save_for_backward(rows)


def _lookup_grads(ctx, grad, _):
    (rows,) = ctx.saved_tensors
    return _scatter(grad, rows, ctx.lookups, ctx.sizes, ctx.dim, ctx.mean, ctx.backend), None, None, None, None


def _keep_gather(ctx, inputs, output) -> None:
    tables, rows, ctx.lookups, ctx.mean, ctx.backend = inputs
    ctx.sizes, ctx.dim = [len(table) for table in tables], tables[0].shape[1]
    ctx.save_for_backward(rows)


def _gather_grads(ctx, grad):
    return _lookup_grads(ctx, grad, None)


def _keep_scatter(ctx, inputs, output) -> None:
    _, rows, ctx.lookups, _, _, ctx.mean, ctx.backend = inputs
    ctx.save_for_backward(rows)


def _scatter_grads(ctx, grads):
    (rows,) = ctx.saved_tensors
    return _gather(list(grads), rows, ctx.lookups, ctx.mean, ctx.backend), *[None] * 6


_lookup.register_autograd(_lookup_grads, setup_context=_keep)
_gather.register_autograd(_gather_grads, setup_context=_keep_gather)
_scatter.register_autograd(_scatter_grads, setup_context=_keep_scatter)


class _Updating(torch.autograd.Function):
    """A lookup whose backward pass is the step of the rows that it looked up."""

    @staticmethod
    def forward(ctx, ids, lookups, mean, lr, backend, *tables):
        out, rows = _lookup(list(tables), ids, lookups, mean, backend)
        ctx.save_for_backward(rows)
        ctx.tables, ctx.how = tables, (lookups, mean, -lr, backend)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        _update([table.detach() for table in ctx.tables], grad, rows, *ctx.how)
        return (None,) * (5 + len(ctx.tables))


def _path(backend: str, table: Tensor):
    dispatch.admit("hashed_lookup", backend, table.device, BACKENDS, table.dtype)
    chosen = dispatch.begin("hashed_lookup", backend, NATIVE)
    return import_module(f"{__name__}.{'reference' if chosen == 'cpu' else chosen}")


def _slots(lookups: Sequence[int]) -> int:
    return lookups[-1] + 1


def _plan_of(tables: Sequence[Tensor], ids: Tensor, lookups: Sequence[int]) -> Plan:
    if ids.ndim != 2 or ids.dtype != torch.int64:
        raise InputError(f"ids are {ids.dtype} of shape {tuple(ids.shape)} but must be torch.int64, (batch, fields)")
    return _checked(tables, ids, lookups, ids.shape[1])


def _plan_by_rows(tables: Sequence[Tensor], rows: Tensor, lookups: Sequence[int]) -> Plan:
    count = len(lookups) // len(COLUMNS)
    if rows.ndim != 2 or rows.dtype != torch.int64 or rows.shape[1] != count:
        raise InputError(
            f"rows are {rows.dtype} of shape {tuple(rows.shape)} but must be torch.int64, (batch, {count}): of each "
            "lookup one"
        )
    return _checked(tables, rows, lookups, None)


def _checked(tables: Sequence[Tensor], index: Tensor, lookups: Sequence[int], fields: int | None) -> Plan:
    if not tables:
        raise InputError("tables are none but must be at least one")
    first = tables[0]
    for table in tables:
        if table.ndim != 2 or not table.dtype.is_floating_point or table.dtype.itemsize == 1 or not table.shape[1]:
            raise InputError(
                f"a table is {table.dtype} of shape {tuple(table.shape)} but must be floating point, of two bytes at "
                "least, (rows, dim), one wide at least"
            )
        if table.shape[1] != first.shape[1] or table.dtype != first.dtype or table.device != first.device:
            raise InputError(
                f"tables are {first.shape[1]} and {table.shape[1]} wide, {first.dtype} and {table.dtype}, on "
                f"{first.device} and {table.device} but must be alike"
            )
    if index.device != first.device:
        raise InputError(f"ids are on {index.device} but must be on {first.device}, as tables are")
    return _plan(tuple(lookups), tuple(len(table) for table in tables), fields, first.shape[1])


@lru_cache(maxsize=256)
def _plan(flat: tuple[int, ...], rows: tuple[int, ...], fields: int | None, dim: int) -> Plan:
    width = len(COLUMNS)
    if not flat or len(flat) % width:
        raise InputError(f"lookups have {len(flat)} numbers but must have {width} each, one at least")
    lookups = tuple(flat[i : i + width] for i in range(0, len(flat), width))
    at_most = max(one[4] for one in lookups) + 1 if fields is None else fields
    for table, first, count, salt, field, _ in lookups:
        if not 0 <= table < len(rows):
            raise InputError(f"a lookup is in table {table} but must be in one of {len(rows)}, from 0")
        if not (first >= 0 and 1 <= count <= MOST and first + count <= rows[table]):
            raise InputError(
                f"a lookup is in rows {first} to {first + count - 1} of table {table} but must be in one row at least "
                f"of its {rows[table]}, in {MOST} at most"
            )
        if not BY_ID <= salt < 2**63 or not 0 <= field < at_most:
            raise InputError(
                f"a lookup has salt {salt} and field {field} but must have a salt from {BY_ID} and one of {at_most} "
                "fields, from 0"
            )
    slots = [one[5] for one in lookups]
    if slots[0] != 0 or any(later - now not in (0, 1) for now, later in pairwise(slots)):
        raise InputError(f"slots of the lookups are {slots} but must ascend from 0, and none be left out")
    offs = [0, *(at for at in range(1, len(slots)) if slots[at] != slots[at - 1]), len(slots)]
    return Plan(lookups, tuple(offs), rows, at_most, dim)


def refuse(ids: Tensor, plan: Plan) -> None:
    """Raise `InputError` where an id is to be a row and there is none for it."""
    if not len(ids):
        return
    low, high = ids.amin(0).tolist(), ids.amax(0).tolist()
    for _, _, count, salt, field, _ in plan.lookups:
        if salt == BY_ID and not (low[field] >= 0 and high[field] < count):
            raise InputError(
                f"ids of field {field} are from {low[field]} to {high[field]} but must be from 0 to {count - 1}"
            )


def refuse_rows(rows: Tensor, plan: Plan) -> None:
    """Raise `InputError` where a row is none of its lookup's."""
    if not len(rows):
        return
    low, high = rows.amin(0).tolist(), rows.amax(0).tolist()
    for p, (_, first, count, *_) in enumerate(plan.lookups):
        if not first <= low[p] <= high[p] < first + count:
            raise InputError(
                f"rows of lookup {p} are from {low[p]} to {high[p]} but must be from {first} to {first + count - 1}"
            )
