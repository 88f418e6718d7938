"""The meaning of `hashed_lookup`: a hash, rows of tables, and the sum of those that go to the same slot."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.kernels.hashed_lookup import BY_ID, refuse, refuse_rows

if TYPE_CHECKING:
    from workbench.kernels.hashed_lookup import Plan

GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros from the left: torch's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mixed(values: Tensor, salt: int) -> Tensor:
    """64 bits of which each depends on all of a value and of the salt (Steele, Lea and Flood 2014, splitmix64)."""
    x = values + signed(GOLDEN * (salt + 1))
    x = (x ^ shifted(x, 30)) * signed(FIRST)
    x = (x ^ shifted(x, 27)) * signed(SECOND)
    return x ^ shifted(x, 31)


def hashed(values: Tensor, salt: int, count: int) -> Tensor:
    """From 0 to count - 1."""
    return shifted(mixed(values, salt), 1) % count


def lookup(tables: Sequence[Tensor], ids: Tensor, plan: "Plan", mean: bool) -> tuple[Tensor, Tensor]:
    refuse(ids, plan)
    found = [
        first + (ids[:, field] if salt == BY_ID else hashed(ids[:, field], salt, count))
        for _, first, count, salt, field, _ in plan.lookups
    ]
    rows = torch.stack(found, 1)
    return _gather(tables, rows, plan, mean), rows


def gather(tables: Sequence[Tensor], rows: Tensor, plan: "Plan", mean: bool) -> Tensor:
    refuse_rows(rows, plan)
    return _gather(tables, rows, plan, mean)


def _gather(tables: Sequence[Tensor], rows: Tensor, plan: "Plan", mean: bool) -> Tensor:
    wide = torch.promote_types(tables[0].dtype, torch.float32)
    out = tables[0].new_empty(len(rows), plan.slots, plan.dim)
    for slot in range(plan.slots):
        begin, end = plan.offs[slot : slot + 2]
        total = tables[plan.lookups[begin][0]][rows[:, begin]].to(wide)
        for p in range(begin + 1, end):
            total = total + tables[plan.lookups[p][0]][rows[:, p]].to(wide)
        out[:, slot] = total / (end - begin) if mean else total
    return out.flatten(1)


def scatter(tables: Sequence[Tensor], grad: Tensor, rows: Tensor, plan: "Plan", mean: bool, scale: float) -> None:
    refuse_rows(rows, plan)
    wide = torch.promote_types(grad.dtype, torch.float32)
    parts = grad.to(wide).view(len(rows), plan.slots, plan.dim)
    pooled = torch.tensor([end - begin for begin, end in zip(plan.offs, plan.offs[1:], strict=False)], dtype=wide)
    if mean:
        parts = parts / pooled.to(parts.device)[:, None]
    for number, table in enumerate(tables):
        own = [p for p, one in enumerate(plan.lookups) if one[0] == number]
        if own and len(rows):
            values = parts[:, [plan.lookups[p][5] for p in own]].flatten(0, 1)
            at, place = rows[:, own].flatten().unique(return_inverse=True)
            sums = torch.zeros(len(at), plan.dim, dtype=wide, device=grad.device)
            sums.index_put_((place,), values, accumulate=True)
            table[at] = (table[at].to(wide) + scale * sums).to(table.dtype)
