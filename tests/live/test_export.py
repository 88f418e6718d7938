"""A run as parquet and JSON: everything is in it, and read back by another library it is the same."""

import json
import sqlite3
import subprocess
import sys
from contextlib import closing

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.live.synthetic import write_synthetic_run
from workbench.errors import InputError
from workbench.live.records import RECORDS
from workbench.live.store import Run, RunWriter


def test_export_holds_everything(tmp_path):
    folder = write_synthetic_run(tmp_path / "run", n_steps=120, n_layers=2, n_experts=4)
    run = Run(folder)
    out = run.export(tmp_path / "out")
    meta = json.loads((out / "meta.json").read_text())
    assert meta["meta"] == run.meta and meta["state"] == "finished" and meta["last_step"] == 119
    described = {row["pattern"]: row for row in meta["records"]}
    assert list(described) == [record.pattern for record in RECORDS if record.pattern != "train/{value}"]
    assert described["dropped/{layer}"]["shape"] == [2] and described["train/loss"]["dtype"] is None
    scalars = pq.read_table(out / "scalars.parquet").to_pandas()
    exported = {(prefix, name) for prefix, name in zip(scalars["name"], scalars["step"], strict=True)}
    assert len(exported) == len(scalars) == sum(len(run.steps(n)) for n in run.names() if run.dtype(n) is None)
    steps, values = run.scalars("train/loss")
    loss = scalars[scalars["name"] == "train/loss"]
    assert loss["step"].tolist() == steps.tolist() and loss["value"].tolist() == values.tolist()
    seen = set()
    for path in (out / "tensors").rglob("*.parquet"):
        table = pq.read_table(path).to_pandas()
        for name, rows in table.groupby("name", observed=True):
            steps, arrays = run.tensors(name)
            assert rows["step"].tolist() == steps.tolist()
            for shape, flat, array in zip(rows["shape"], rows["values"], arrays, strict=True):
                np.testing.assert_array_equal(flat.reshape(shape), array)
                assert flat.dtype == array.dtype
            seen.add(name)
    assert seen == {name for name in run.names() if run.dtype(name) is not None}
    assert (out / "tensors/valid/load.uint32.parquet").exists()
    with pytest.raises(InputError, match="must be new or empty"):
        run.export(out)


def test_an_export_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """A fault in the middle leaves nothing; what a killed one left beside goes with the next, and blocks none."""
    folder = write_synthetic_run(tmp_path / "run", n_steps=3, n_layers=1, n_experts=4, n_tokens=64)
    script = (
        "import os, sys; from workbench.live import export; from workbench.live.store import Run\n"
        "export._write = lambda *_: os._exit(9)\n"
        "Run(sys.argv[1]).export(sys.argv[2])"
    )
    killed = subprocess.run([sys.executable, "-c", script, folder, tmp_path / "out"])
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".out.")]
    assert killed.returncode == 9 and len(left) == 1 and not (tmp_path / "out").exists()
    run = Run(folder)
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"cannot be exported to .*: no room"):
        patch.setattr("workbench.live.export._scalars", lambda *_: (_ for _ in ()).throw(OSError("no room")))
        run.export(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    (tmp_path / "out").mkdir()  # an empty folder may be there
    assert (run.export(tmp_path / "out") / "meta.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/outside", "a//b", ".", "x" * 300])
def test_a_name_that_leads_elsewhere_is_refused_when_it_is_read(tmp_path, name):
    with RunWriter.create(tmp_path / "run", {}) as writer:
        writer.tensors(0, {"t/x": np.zeros(3)})
        writer.commit(0)
        with pytest.raises(InputError, match="cannot be used"):
            writer.scalars(1, {name: 0.0})
    with closing(sqlite3.connect(tmp_path / "run" / "run.sqlite")) as db, db:
        db.execute("UPDATE names SET name = ?", (f"{name}/x",))
    with pytest.raises(InputError, match=r"run run is damaged: name .* cannot be used"):
        Run(tmp_path / "run").export(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_export_in_more_than_one_piece(tmp_path, monkeypatch):
    writer = RunWriter.create(tmp_path / "run", {})
    run = Run(writer.folder)
    monkeypatch.setattr("workbench.live.export.ROWS", 3)
    for step in range(8):
        writer.tensors(step, {"t/x": np.full(3, step, np.int32)})
    writer.tensors(8, {"s": np.float16(2.5)})
    writer.event(8, "note", "hello")
    writer.event(9, "note", "after the last commit")
    writer.commit(8)
    out = run.export(tmp_path / "out")
    assert pq.read_table(out / "tensors/t.int32.parquet")["step"].to_pylist() == list(range(8))
    assert pq.read_table(out / "tensors/s.float16.parquet").to_pylist() == [
        {"name": "s", "step": 8, "shape": [], "values": [2.5]}
    ]
    assert pq.read_table(out / "events.parquet")["text"].to_pylist() == ["hello"]
