"""What the file of a run may hold of meta, state, names and rows: asked of what is written and again of what is read.

A file may come from anywhere, so whoever reads one trusts nothing in it. What does not fit is a ValueError that names
it, its value and what is allowed.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from math import prod
from reprlib import repr as short
from typing import Any

import numpy as np

from workbench.live.blobs import KINDS

STATES = ("running", "paused", "finished", "stopped", "failed")
STEPS = 2**63 - 1
NUMBER, NONE = {int, float}, {type(None)}
LARGEST = 2**40  # bytes of one array; nobody has recorded a thousandth of it
EXPERTS = 2**16  # of a layer; the page offers each to look into
SIDE = 2**24  # of a matrix
RANKS = 2**16
PART = 230  # bytes of a part of a name: with the dtype and ".parquet" behind it, it is the name of a file
NAME = 1000


def _is_whole(value: object, low: int = 0, high: int = STEPS) -> bool:
    return type(value) is int and low <= value <= high


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_moment(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value) is not None
    except ValueError:
        return False


def _are(item: Callable[[Any], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(item, value))


def _name_to(item: Callable[[Any], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(item, value.values()))


def _or_none(item: Callable[[Any], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or item(value)


def _is_layer(value: object) -> bool:
    return (
        isinstance(value, dict)
        and _is_text(value.get("name"))
        and _is_whole(value.get("n_experts"), 1, EXPERTS)
        and (value.get("top_k") is None or _is_whole(value["top_k"], 1, value["n_experts"]))
        and isinstance(value.get("recursive", False), bool)
    )


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_whole(side, 1, SIDE) for side in value)


def _is_adaptation(value: object) -> bool:
    return (
        isinstance(value, dict)
        and _is_text(value.get("slug"))
        and isinstance(value.get("options"), dict)
        and all(_is_whole(value.get(key)) for key in ("base", "added", "trained"))
        and _name_to(lambda row: isinstance(row, dict) and _is_whole(row.get("trained")))(value.get("targets"))
        and all(_name_to(_is_text)(value.get(key)) for key in ("left_out", "by_layer"))
    )


def _is_model(value: object) -> bool:
    return isinstance(value, dict) and all(value.get(key) is None or fits(value[key]) for key, fits in _MODEL.items())


def _is_recipe(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return value.get("arm") is None or all(_is_text(value.get(key)) for key in ("arm", "study", "preset"))


def _is_processes(value: object) -> bool:
    return isinstance(value, dict) and _is_whole(value.get("world"), 2, RANKS) and _is_text(value.get("layout"))


_MODEL = {
    "layers": _are(_is_layer),
    "groups": _name_to(_or_none(_is_whole)),
    "matrices": _name_to(_is_shape),
    "low_rank": _are(_is_text),
    "pools": _name_to(_are(_is_text)),
    "forms": _name_to(_name_to(lambda shape: shape == [] or _is_shape(shape))),
    "domains": _are(_is_text),
    "modalities": _are(_is_text),
    "adaptation": _is_adaptation,
    "vocabulary": _is_text,
}
_META = {
    "format": (_is_whole, "a whole number"),
    "created": (_is_moment, "a date and time"),
    "kind": (_is_text, "text"),
    "total_steps": (_or_none(_is_whole), "a number of steps"),
    "cadence": (_name_to(_is_whole), "numbers of steps by kind"),
    "recipe": (_is_recipe, "values by name, and of an arm its study and preset as text"),
    "data": (lambda value: isinstance(value, dict), "data sets by name"),
    "model": (
        _is_model,
        "layers (name, n_experts, top_k, recursive), groups, matrices, low_rank, pools, forms, domains, "
        "modalities, adaptation and vocabulary",
    ),
    "weights_sha256": (_or_none(_is_text), "text"),
    "processes": (_or_none(_is_processes), "world, from 2 on, and layout"),
}


def check_meta(values: Mapping[str, Any]) -> None:
    """Of the entries that the workbench itself reads, those that are there; what else a run says of itself is free."""
    for key, (fits, allowed) in _META.items():
        if key in values and not fits(values[key]):
            raise ValueError(f"meta {key!r} is {short(values[key])} but must be {allowed}")


def read_meta(rows: list[tuple[object, object]]) -> dict[str, Any]:
    """The meta of the rows of its table."""
    found = {}
    for key, value in rows:
        if not (_is_text(key) and _is_text(value)):
            raise ValueError(f"meta {short(key)} is {short(value)} but must be JSON")
        try:
            found[key] = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"meta {key!r} is no JSON that can be read ({error})") from None
    for key in ("format", "created"):
        if key not in found:
            raise ValueError(f"meta has no {key!r}")
    check_meta(found)
    return found


def check_state(row: tuple[object, ...] | None) -> tuple[str, str, int]:
    """(state, message, last step) of the one row of its table."""
    if row is None:
        raise ValueError("it has no state")
    state, message, step = row
    if state not in STATES:
        raise ValueError(f"state is {short(state)} but must be one of {', '.join(STATES)}")
    if not (_is_text(message) and _is_whole(step, -1)):
        raise ValueError(f"message and last step are {short(message)} and {short(step)} but must be text and a step")
    return state, message, step


def check_name(name: object) -> None:
    """Names are paths of the record and become paths of an export."""
    parts = name.split("/") if isinstance(name, str) else []
    if not parts or not name.isprintable() or any(part.strip() in ("", ".", "..") for part in parts):
        raise ValueError(
            f"name {short(name)} cannot be used: it must be words joined by '/', such as 'load/blocks.0.ffn'"
        )
    if len(name.encode()) > NAME or max(len(part.encode()) for part in parts) > PART:
        raise ValueError(f"name {short(name)} cannot be used: a part has at most {PART} bytes, and all have {NAME}")


def read_series(name: object, dtype: object, shape: object) -> tuple[str | None, tuple[int, ...] | None]:
    """(dtype, shape) of a series of tensors, or None twice for one of scalars, of its row in the table of names."""
    check_name(name)
    if dtype is None and shape is None:
        return None, None
    if not (isinstance(dtype, str) and re.fullmatch(rf"[<|][{KINDS}]\d{{1,2}}", dtype)):
        raise ValueError(f"{name!r} has dtype {short(dtype)} but must be bool, integer or floating point")
    try:
        kind, sides = np.dtype(dtype), json.loads(shape) if isinstance(shape, str) else None
    except (TypeError, ValueError, RecursionError):
        kind, sides = None, None
    if kind is None or not (isinstance(sides, list) and len(sides) <= 32 and all(map(_is_whole, sides))):
        raise ValueError(f"{name!r} has dtype {short(dtype)} and shape {short(shape)}, which are none")
    if max(prod(sides), 1) * kind.itemsize > LARGEST:
        raise ValueError(f"{name!r} has shape {sides}, more than can be recorded")
    return dtype, tuple(sides)


def check_rows(rows: Sequence[tuple[object, ...]], *kinds: set[type], low: int = 0) -> None:
    """Rows of a step from ``low`` on, and values that are of these kinds."""
    columns = tuple(zip(*rows, strict=True)) or ((),) * (1 + len(kinds))
    good = all(set(map(type, column)) <= allowed for column, allowed in zip(columns, ({int}, *kinds), strict=True))
    if not good or min(columns[0], default=low) < low:
        for row in rows:
            if not (_is_whole(row[0], low) and all(map(set.__contains__, kinds, map(type, row[1:])))):
                raise ValueError(f"a row is {short(row)}: its step, or a value, is of another kind than it must be")
