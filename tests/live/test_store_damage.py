"""Folders that are not what they should be: foreign, of a newer format, truncated, damaged, gone."""

import os
import random
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.live.store import Run, RunWriter, runs


def fill(writer: RunWriter, steps) -> None:
    for step in steps:
        writer.scalars(step, {"a": step, "b": -step})
        writer.tensors(step, {"t": np.random.default_rng(step).standard_normal(300)})
        writer.commit(step)


@pytest.fixture
def finished(tmp_path):
    with RunWriter.create(tmp_path / "run", {"kind": "train"}) as writer:
        fill(writer, range(60))
    return writer.folder


def test_what_is_not_a_run_is_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Run(tmp_path / "none")
    with pytest.raises(InputError, match=r"is not a run folder: it has no run\.sqlite"):
        Run(tmp_path)
    with pytest.raises(InputError, match=r"is not a run folder: it has no run\.sqlite"):
        RunWriter.open(tmp_path)
    with sqlite3.connect(tmp_path / "run.sqlite") as other:
        other.execute("CREATE TABLE things (x)")
    other.close()
    with pytest.raises(InputError, match=r"is not a run folder: its run\.sqlite is something else"):
        Run(tmp_path)
    (tmp_path / "run.sqlite").write_bytes(b"")
    with pytest.raises(InputError, match="is not a run folder"):
        Run(tmp_path)


def test_a_newer_format_is_refused(finished):
    with sqlite3.connect(finished / "run.sqlite") as db:
        db.execute("UPDATE meta SET value = '7' WHERE key = 'format'")
    db.close()
    said = "run run has format 7, this workbench reads up to 1: upgrade the workbench"
    for use in (Run, RunWriter.open):
        with pytest.raises(InputError, match=said):
            use(finished)
    assert [run.status for run in runs(finished.parent)] == [("damaged", said)]


def read_all(folder: Path) -> None:
    with Run(folder) as run:
        run.check(), run.status, run.events(), run.answers()
        for name in run.names():
            run.tensors(name) if run.dtype(name) else run.scalars(name)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_an_input_error(finished, share):
    file = finished / "run.sqlite"
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(InputError, match=r"run run is damaged: .*(malformed|lost its end)"):
        Run(finished)
    with pytest.raises(InputError, match="damaged"):
        RunWriter.open(finished)
    assert runs(finished.parent)[0].status.state == "damaged"


def test_damage_anywhere_is_an_input_error_or_nothing(finished):
    """Bytes overwritten at random places: every read either works or says what is wrong, in one line."""
    moments = random.Random(0)
    good = (finished / "run.sqlite").read_bytes()
    refused = 0
    for _ in range(60):
        bad = bytearray(good)
        at = moments.randrange(len(bad) - 64)
        bad[at : at + 64] = moments.randbytes(64)
        for leftover in finished.glob("run.sqlite-*"):
            leftover.unlink()
        (finished / "run.sqlite").write_bytes(bad)
        try:
            read_all(finished)
        except InputError as error:
            assert "run" in str(error)
            refused += 1
    assert refused > 5


def test_a_folder_that_vanishes_is_an_input_error(finished):
    run = Run(finished)
    run.close()
    shutil.rmtree(finished)
    with pytest.raises(InputError, match="is not a run folder"):
        run.last_step  # noqa: B018
