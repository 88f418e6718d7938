"""A run as parquet and JSON, for pandas, polars, duckdb, R, ...

    meta.json                        meta, status, last step, and what the series are (`records`)
    scalars.parquet                  name, step, value
    events.parquet                   step, kind, text, time
    tensors/<prefix>.<dtype>.parquet name, step, shape, values (flat, C order)

A prefix is a name without its last part: ``valid/load/blocks.0.ffn`` is in ``tensors/valid/load.uint32.parquet``.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from workbench.errors import InputError
from workbench.live.records import RECORDS, find
from workbench.sealed import sealed_folder

if TYPE_CHECKING:
    from workbench.live.reader import Run

ROWS = 256  # tensors in memory at a time


def export(run: "Run", folder: Path) -> Path:
    """Write ``run`` up to its last step into ``folder``, which must be new or empty: all of it, or nothing."""
    try:
        folder = folder.expanduser().absolute()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"folder {folder} must be new or empty")
        with sealed_folder(folder) as unfinished:
            _fill(run, unfinished)
            if folder.exists():
                folder.rmdir()  # if it is empty still
    except (OSError, RuntimeError, pa.ArrowException) as error:  # RuntimeError: a ~user that there is not
        raise InputError(f"run {run.name} cannot be exported to {folder}: {error}") from error
    return folder


def _fill(run: "Run", folder: Path) -> None:
    last = run.last_step  # the run may go on meanwhile
    state, message = run.status
    recorded = {find(name) for name in run.names()}
    summary = {"meta": run.meta, "state": state, "message": message, "last_step": last}
    summary["records"] = [record.as_dict() for record in RECORDS if record in recorded]
    (folder / "meta.json").write_text(json.dumps(summary, indent=1) + "\n")
    _write(folder / "scalars.parquet", _SCALARS, _scalars(run, last))
    events = [event._asdict() for event in run.events() if event.step <= last]
    _write(folder / "events.parquet", _EVENTS, [pa.Table.from_pylist(events, schema=_EVENTS)])
    for path, names in _files(run).items():
        dtype = pa.from_numpy_dtype(path.rpartition(".")[2])
        schema = pa.schema({**_KEY, "shape": pa.list_(pa.int64()), "values": pa.list_(dtype)})
        _write(folder / "tensors" / f"{path}.parquet", schema, _tensors(run, names, schema, last))


_KEY = {"name": pa.dictionary(pa.int32(), pa.string()), "step": pa.int64()}
_SCALARS = pa.schema({**_KEY, "value": pa.float64()})
_EVENTS = pa.schema({"step": pa.int64(), "kind": pa.string(), "text": pa.string(), "time": pa.float64()})


def _write(path: Path, schema: pa.Schema, tables: Iterator[pa.Table] | list[pa.Table]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema, compression="zstd") as file:
        for table in tables:
            file.write_table(table)


def _files(run: "Run") -> dict[str, list[str]]:
    """The names of tensors that share a file, by its path without the ending."""
    found = defaultdict(list)
    for name in run.names():
        if (kind := run.dtype(name)) is not None:
            found[f"{name.rpartition('/')[0] or name}.{kind}"].append(name)
    return found


def _scalars(run: "Run", last: int) -> Iterator[pa.Table]:
    for name in run.names():
        if run.dtype(name) is None:
            steps, values = run.scalars(name, stop=last)
            yield pa.table([_repeat(name, len(steps)), steps, values], schema=_SCALARS)


def _tensors(run: "Run", names: list[str], schema: pa.Schema, last: int) -> Iterator[pa.Table]:
    for name in names:
        steps = run.steps(name, stop=last)
        for at in range(0, len(steps), ROWS):
            chunk, arrays = run.tensors(name, start=steps[at], stop=steps[at : at + ROWS][-1])
            rows, shape = len(chunk), arrays.shape[1:]
            dimensions = np.tile(np.array(shape, dtype=np.int64), rows)
            columns = [_repeat(name, rows), chunk, _lists(dimensions, len(shape), rows)]
            yield pa.table([*columns, _lists(arrays.reshape(-1), prod(shape), rows)], schema=schema)


def _repeat(name: str, rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(np.zeros(rows, dtype=np.int32), [name])


def _lists(flat: np.ndarray, length: int, rows: int) -> pa.ListArray:
    return pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * length, pa.array(flat))
