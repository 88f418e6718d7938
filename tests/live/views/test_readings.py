"""Reading a run for the screen: thinned, followed as it grows, and saying why there is nothing."""

import numpy as np
import pytest

from workbench.live.store import Run, RunWriter
from workbench.live.views import readings as module
from workbench.live.views.readings import Nothing, Readings, attempt, present, stamped


def write(writer: RunWriter, steps: range) -> None:
    for step in steps:
        writer.scalars(step, {"loss": step / 2})
        writer.tensors(step, {"load/a": np.full(3, step, dtype=np.uint32)})
        writer.commit(step)


@pytest.fixture
def writer(tmp_path) -> RunWriter:
    with RunWriter.create(tmp_path / "run", {"cadence": {"routing": 5, "conflict": 0}}) as writer:
        yield writer


def test_a_series_is_followed_as_it_grows(writer):
    write(writer, range(3))
    readings = Readings(Run(writer.folder))
    assert list(readings.tensors("load/a")[0]) == [0, 1, 2]
    write(writer, range(3, 6))
    assert list(readings.tensors("load/a")[0]) == [0, 1, 2]  # not before it looks again
    assert readings.poll()
    steps, values = readings.tensors("load/a")
    assert list(steps) == [0, 1, 2, 3, 4, 5]
    assert (values == steps[:, None]).all()
    assert not readings.poll()


@pytest.mark.parametrize("at_once", [True, False])
def test_a_long_series_is_thinned_and_does_not_shimmer(writer, monkeypatch, at_once):
    monkeypatch.setattr(module, "POINTS", 20)
    readings = Readings(Run(writer.folder))
    earlier: set[int] = set()
    for start in (0, 100, 200, 210, 220, 230, 900):
        if at_once and start < 200:
            write(writer, range(start, start + 100))
            continue
        write(writer, range(start, start + 10))
        readings.poll()
        steps, values = readings.tensors("load/a")
        assert len(steps) <= 2 * 20
        assert steps[0] == 0 and steps[-1] == start + 9
        assert (values == steps[:, None]).all()
        assert earlier - set(steps[:-1].tolist()) == set() or len(steps) < len(earlier)  # rows stay, or all are thinned
        earlier = set(steps[:-1].tolist())


def test_going_back_to_a_checkpoint_forgets_what_was_taken_back(writer):
    write(writer, range(10))
    readings = Readings(Run(writer.folder))
    readings.tensors("load/a")
    writer.truncate(4)
    assert readings.poll()
    assert list(readings.tensors("load/a")[0]) == [0, 1, 2, 3, 4]


def test_nothing_says_what_to_wait_for(writer):
    readings = Readings(Run(writer.folder))
    with pytest.raises(Nothing, match="due with the first step, then every 5 steps"):
        readings.tensors("load/a")
    write(writer, range(1))
    readings.poll()
    with pytest.raises(Nothing, match="due within 5 steps"):
        readings.tensors("importance/a")
    with pytest.raises(Nothing, match="does not record it"):
        readings.tensors("conflict/trunk")
    with pytest.raises(Nothing, match=r"nothing is recorded yet$"):
        readings.tensors("spectrum/weight/a")
    with pytest.raises(Nothing, match="scrub forward"):
        readings.at("load/a", -1)
    writer.close()
    readings.poll()
    with pytest.raises(Nothing, match="holds no record"):
        readings.tensors("importance/a")


def test_the_newest_record_at_a_step(writer):
    for step in (0, 5, 10):
        write(writer, range(step, step + 1))
    readings = Readings(Run(writer.folder))
    assert readings.at("load/a", 7)[0] == 5
    assert readings.at("load/a", None)[0] == 10
    assert readings.newest("load/a") == 10


def test_a_window_sums_the_newest_records(writer):
    for step in (0, 5, 10, 15):
        write(writer, range(step, step + 1))
    readings = Readings(Run(writer.folder))
    assert [int(readings.window("load/a", 12, n)[1][0]) for n in (1, 2, 3, 9)] == [10, 15, 15, 15]
    assert readings.window("load/a", None, 2)[0] == 15


def test_a_run_that_becomes_unreadable_is_named_damaged(writer):
    write(writer, range(3))
    readings = Readings(Run(writer.folder))
    readings.run.close()
    writer.close()
    (writer.folder / "run.sqlite").write_bytes(b"x" * 5000)
    assert readings.poll()
    assert readings.status.state == "damaged" and readings.status.message
    with pytest.raises(Nothing):
        readings.has("load/a")
    assert not readings.poll()


def test_layers_beyond_the_last_are_the_last(run, tmp_path):
    readings = Readings(run)
    assert [readings.layer(i).name for i in (0, 2, 7)] == ["blocks.0.ffn", "blocks.2.ffn", "blocks.2.ffn"]
    with RunWriter.create(tmp_path / "bare", {}) as writer:
        bare = Readings(Run(writer.folder))
        assert (bare.layers, bare.domains) == ([], [])
        with pytest.raises(Nothing, match="no mixture-of-experts layer"):
            bare.layer(0)


def test_what_is_missing_is_kept_beside_what_is_there(run, single):
    def read(readings):
        if readings.name == "single":
            raise Nothing("not this one")
        return 7

    found = attempt(read, [Readings(run), Readings(single)])
    assert list(present(found)) == [7]
    assert stamped(found, lambda n: n + 1) == (8, "not this one")
