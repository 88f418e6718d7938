"""The run store: what is written is what is read, by name, by step, thinned out, exported."""

import math
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from workbench.errors import InputError
from workbench.live import blobs
from workbench.live.store import FORMAT, Run, RunWriter, find, new_folder, runs

LAYERS = {"kind": "train", "model": {"layers": [{"name": "a", "n_experts": 4, "top_k": 2}]}}


@pytest.fixture
def writer(tmp_path):
    with RunWriter.create(tmp_path / "run", LAYERS) as writer:
        yield writer


@pytest.fixture
def run(writer):
    with Run(writer.folder) as run:
        yield run


def fill(writer: RunWriter, steps, name: str = "x") -> None:
    for step in steps:
        writer.scalars(step, {name: float(step)})
        writer.tensors(step, {f"t/{name}": np.full(3, step, np.int32)})
        writer.commit(step)


# -- arrays and names as they were

ARRAYS = npst.arrays(
    dtype=npst.boolean_dtypes() | npst.integer_dtypes() | npst.unsigned_integer_dtypes() | npst.floating_dtypes(),
    shape=npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40),
)


@given(array=ARRAYS)
@settings(deadline=None)
def test_an_array_comes_back_bit_for_bit(array):
    typed = blobs.typed("x", array)
    back = blobs.decode([blobs.encode(typed)] * 2, typed.dtype.str, typed.shape)
    assert back.shape == (2, *array.shape)
    assert back.dtype == array.dtype.newbyteorder("<")
    assert back[1].tobytes() == typed.tobytes()  # bits: NaN payloads and -0.0 too


@given(
    names=st.lists(st.from_regex(r"[\w .:%#?é-]{1,12}(/[\w'\"*-]{1,8}){0,2}", fullmatch=True), min_size=1, unique=True),
    value=st.floats(),
)
@settings(deadline=None, max_examples=30)
def test_names_and_values_come_back(tmp_path_factory, names, value):
    names = [name for name in names if all(part.strip() not in ("", ".", "..") for part in name.split("/"))]
    with RunWriter.create(tmp_path_factory.mktemp("run"), {}) as writer, Run(writer.folder) as run:
        writer.scalars(3, dict.fromkeys(names, value))
        writer.commit(3)
        assert run.names() == names
        for name in names:
            steps, values = run.scalars(name)
            assert steps.tolist() == [3]
            np.testing.assert_array_equal(values, [value])


def test_counts_cost_what_their_values_need():
    counts = np.random.default_rng(0).integers(0, 200, size=(64, 64)).astype(np.uint32)
    assert len(blobs.encode(counts)) < 1.1 * counts.size  # one byte each, not four


@pytest.mark.parametrize("array", [np.array([{}]), np.array(["a"]), np.zeros(2, complex), np.array(["2020"], "M8[Y]")])
def test_an_array_of_anything_else_is_refused(writer, array):
    with pytest.raises(InputError, match=r"tensor 'x' has dtype .* but must be bool, integer or floating point"):
        writer.tensors(0, {"x": array})


@pytest.mark.parametrize("name", ["", "/", "a//b", "a/", "../a", "a/./b", "a\nb", "a\x00"])
def test_a_name_that_is_no_path_of_words_is_refused(writer, name):
    with pytest.raises(InputError, match="must be words joined by '/'"):
        writer.scalars(0, {name: 1.0})


def test_big_endian_and_strided_arrays_keep_their_values(writer, run):
    array = np.arange(600, dtype=">f4").reshape(20, 30)[::2, ::-3]
    writer.tensors(0, {"x": array})
    writer.commit(0)
    np.testing.assert_array_equal(run.tensor("x")[1], array)


def test_a_tensor_is_copied_when_it_is_recorded(writer, run):
    array = np.zeros(3)
    writer.tensors(0, {"x": array})
    array += 1
    writer.commit(0)
    assert run.tensor("x")[1].tolist() == [0, 0, 0]


# -- commits and steps


def test_nothing_is_seen_before_its_commit(writer, run):
    writer.scalars(0, {"x": 1.0})
    writer.tensors(0, {"t": np.ones(2)})
    assert run.names() == [] and run.last_step == -1
    writer.commit(0)
    assert run.names() == ["x", "t"] and run.last_step == 0


def test_what_is_not_recorded_yet_is_empty(run):
    assert [part.shape for part in run.scalars("train/loss")] == [(0,), (0,)]
    assert [part.shape for part in run.tensors("load/a", points=5)] == [(0,), (0,)]
    assert run.tensor("load/a") is None
    assert run.steps("load/a").shape == (0,)


def test_history_is_not_rewritten(writer):
    fill(writer, [0, 5])
    with pytest.raises(InputError, match="step is 4 but must be at least 5"):
        writer.scalars(4, {"y": 0.0})
    with pytest.raises(InputError, match="step is -1 but must be at least 0"):
        RunWriter.create(writer.folder.parent / "other", {}).commit(-1)
    writer.scalars(9, {"y": 0.0})
    with pytest.raises(InputError, match="commit step is 8 but must be at least 9"):
        writer.commit(8)


def test_a_step_has_one_value_for_a_name(writer, run):
    writer.scalars(0, {"x": 1.0})
    with pytest.raises(InputError, match="'x' is recorded already for step 0"):
        writer.scalars(0, {"x": 2.0})
    writer.commit(0)
    with pytest.raises(InputError, match="'x' is recorded already for step 0"):
        writer.scalars(0, {"x": 2.0})
    writer.scalars(0, {"valid/x": 3.0})  # an evaluation after the step's own commit
    writer.commit(0)
    assert run.scalars("x")[1].tolist() == [1.0] and run.scalars("valid/x")[1].tolist() == [3.0]


def test_a_name_keeps_its_kind_dtype_and_shape(writer):
    writer.tensors(0, {"t": np.zeros(3, np.float32)})
    with pytest.raises(InputError, match=r"'t' is a tensor of float32 \[4\] but was first a tensor of float32 \[3\]"):
        writer.tensors(1, {"t": np.zeros(4, np.float32)})
    with pytest.raises(InputError, match=r"'t' is a scalar but was first a tensor"):
        writer.scalars(1, {"t": 0.0})


def test_scalars_and_tensors_are_not_mixed_up_on_reading(writer, run):
    fill(writer, [0])
    with pytest.raises(InputError, match="'x' is a series of scalars"):
        run.tensors("x")
    assert run.dtype("x") is None and run.dtype("t/x") == "int32"
    with pytest.raises(InputError, match="did you mean 't/x'"):
        run.dtype("t/xx")


def test_nan_and_infinity_are_kept(writer, run):
    for step, value in enumerate([math.nan, math.inf, -math.inf, -0.0]):
        writer.scalars(step, {"x": value})
    writer.commit(3)
    np.testing.assert_array_equal(run.scalars("x")[1], [math.nan, math.inf, -math.inf, 0.0])


def test_truncate_forgets_what_came_after(writer, run):
    fill(writer, range(0, 100, 10))
    fill(writer, [100], name="late")
    writer.event(95, "control", "stop")
    writer.event(40, "note", "kept")
    writer.scalars(105, {"x": 0.0})  # not committed: forgotten too
    writer.truncate(50)
    assert run.last_step == writer.last_step == 50
    assert run.steps("x").tolist() == run.steps("t/x").tolist() == [0, 10, 20, 30, 40, 50]
    assert run.names() == ["x", "t/x"]
    assert [event.text for event in run.events()] == ["kept"]
    fill(writer, range(60, 120, 10))
    writer.tensors(110, {"t/late": np.zeros(7)})  # the name is free again, for another shape
    writer.commit(110)
    assert run.scalars("x")[1].tolist() == list(range(0, 120, 10))
    writer.truncate(-1)
    assert run.last_step == -1 and run.names() == []
    fill(writer, [0])
    assert run.steps("x").tolist() == [0]


# -- reading a part


@given(
    steps=st.sets(st.integers(0, 3000), min_size=1, max_size=80).map(sorted),
    points=st.integers(2, 60),
    bounds=st.tuples(st.none() | st.integers(0, 3000), st.none() | st.integers(0, 3000)),
)
@settings(deadline=None, max_examples=40)
def test_thinning_out_keeps_the_ends_and_never_invents(tmp_path_factory, steps, points, bounds):
    with RunWriter.create(tmp_path_factory.mktemp("run"), {}) as writer, Run(writer.folder) as run:
        fill(writer, steps)
        start, stop = bounds
        inside = [s for s in steps if (start is None or s >= start) and (stop is None or s <= stop)]
        got, values = run.scalars("x", start, stop, points)
        assert values.tolist() == got.tolist()
        rows, arrays = run.tensors("t/x", start, stop, points)
        np.testing.assert_array_equal(rows, got)
        np.testing.assert_array_equal(arrays, np.repeat(got[:, None], 3, 1) if len(got) else np.zeros((0, 3)))
        assert set(got.tolist()) <= set(inside) and len(got) <= points
        if len(inside) <= points:
            assert got.tolist() == inside
        else:
            assert got[0] == inside[0] and got[-1] == inside[-1]


def test_thinned_rows_are_evenly_spaced(writer, run):
    fill(writer, range(0, 1000, 10))
    assert run.steps("x", 100, 130).tolist() == [100, 110, 120, 130]
    gaps = np.diff(run.scalars("x", points=34)[0])
    assert gaps.min() == gaps.max() == 30
    with pytest.raises(InputError, match="points is 1 but must be at least 2"):
        run.scalars("x", points=1)


def test_skipped_blobs_are_not_read(writer, run):
    fill(writer, range(100))
    writer._db.execute("UPDATE tensors SET data = x'00' WHERE step % 33 != 0")  # none of these can be decoded
    assert run.tensors("t/x", points=4)[0].tolist() == [0, 33, 66, 99]
    with pytest.raises(InputError, match=r"run run is damaged: a stored array"):
        run.tensors("t/x")


def test_the_newest_tensor_at_or_before_a_step(writer, run):
    fill(writer, [10, 20, 30])
    assert run.tensor("t/x")[0] == 30
    assert [run.tensor("t/x", step)[0] for step in (10, 19, np.int64(20), 99)] == [10, 10, 20, 30]
    assert run.tensor("t/x", 9) is None


# -- meta, events, status


def test_meta_comes_back(writer, run):
    writer.set_meta("total_steps", 7)
    writer.set_meta("total_steps", 8)
    assert run.meta["format"] == FORMAT and run.meta["model"] == LAYERS["model"] and run.meta["total_steps"] == 8
    with pytest.raises(InputError, match="meta 'x' cannot be kept as JSON"):
        writer.set_meta("x", object())


def test_events_are_seen_at_once_and_in_order(writer, run):
    before = time.time()
    writer.event(3, "control", "top_k = 1")
    writer.event(2, "note", "später")
    assert [event[:3] for event in run.events()] == [(3, "control", "top_k = 1"), (2, "note", "später")]
    assert before <= run.events()[0].time <= time.time()


def test_status_says_how_a_run_ended(tmp_path):
    def end(name, error=None):
        try:
            with RunWriter.create(tmp_path / name, {}) as writer:
                assert Run(writer.folder).status == ("running", "")
                writer.status("paused", "by hand")
                assert Run(writer.folder).status == ("paused", "by hand") and Run(writer.folder).status.live
                if error:
                    raise error
        except BaseException as raised:
            assert raised is error
        return Run(tmp_path / name).status

    assert end("a") == ("finished", "by hand")
    assert end("b", ValueError("NaN loss")) == ("failed", "ValueError: NaN loss")
    assert end("c", KeyboardInterrupt()).state == "stopped"
    with pytest.raises(InputError, match="state 'runing' is unknown; did you mean 'running'"):
        RunWriter.create(tmp_path / "d", {}).status("runing")


def test_a_state_set_by_hand_outlives_the_close(writer, run):
    writer.status("stopped", "by command")
    writer.close()
    writer.close()  # twice is once
    assert run.status == ("stopped", "by command")


def test_a_closed_reader_opens_again(writer, run):
    fill(writer, [0])
    run.close()
    assert run.last_step == 0
    assert not Path(f"{writer.folder}/run.sqlite-journal").exists()


# -- which runs there are


def test_runs_are_listed_newest_first_and_found(home):
    assert runs() == []
    with pytest.raises(InputError, match=r"run 'x' is unknown\. Allowed: none yet"):
        find("x")
    with pytest.raises(InputError, match="there is no run in"):
        find("latest")
    for name in ("2026-01-01-lm-b", "2026-01-01-lm-a", "2025-12-31-vision-c"):
        RunWriter.create(home / "runs" / name, {}).close()
    assert [run.name for run in runs()] == ["2025-12-31-vision-c", "2026-01-01-lm-a", "2026-01-01-lm-b"]
    assert find("latest").name == find("2025").name == "2025-12-31-vision-c"
    assert find("2026-01-01-lm-b").name == "2026-01-01-lm-b"
    assert find(home / "runs" / "2026-01-01-lm-a").name == "2026-01-01-lm-a"
    with pytest.raises(InputError, match="could be any of 2026-01-01-lm-a, 2026-01-01-lm-b"):
        find("2026")
    with pytest.raises(InputError, match=r"did you mean .*2026-01-01-lm-a"):
        find("2026-01-01-ml-a")
    with pytest.raises(InputError, match="is not a run folder"):
        find(home)


def test_a_damaged_run_is_listed_as_such(home):
    RunWriter.create(home / "runs" / "good", {}).close()
    bad = home / "runs" / "bad"
    bad.mkdir()
    (bad / "run.sqlite").write_bytes(b"not a database at all" * 100)
    (home / "runs" / "notes").mkdir()
    listed = {run.name: run.status for run in runs()}
    assert listed["good"].state == "finished" and listed["bad"].state == "damaged" and len(listed) == 2
    assert "not an SQLite file" in listed["bad"].message
    damaged = next(run for run in runs() if run.name == "bad")
    for use in (lambda: damaged.meta, damaged.names, lambda: damaged.scalars("x"), lambda: damaged.send("stop")):
        with pytest.raises(InputError, match="is not a run folder"):
            use()
    assert find("latest").name == "good"


def test_new_folders_have_names_of_their_own(home):
    paths = {new_folder("lm") for _ in range(20)}
    assert len(paths) == 20 and all(path.parent == home / "runs" for path in paths)
    with pytest.raises(InputError, match=r"kind is '\.\./x' but must be"):
        new_folder("../x")


# -- many at once


def test_readers_in_threads_see_whole_commits_only(writer):
    stop = threading.Event()
    wrong: list[str] = []
    shared = Run(writer.folder)

    def read(run: Run):
        seen = -1
        while not stop.is_set():
            last = run.last_step
            steps, values = run.scalars("x", stop=last)
            if last < seen or steps.tolist() != list(range(last + 1)) or values.tolist() != steps.tolist():
                wrong.append(f"scalars {last} {len(steps)}")
            rows, arrays = run.tensors("t/x", stop=last)
            if rows.tolist() != steps.tolist() or (len(rows) and (arrays != rows[:, None]).any()):
                wrong.append(f"tensors {last} {len(rows)}")
            seen = last

    threads = [threading.Thread(target=read, args=(run,)) for run in (shared, shared, Run(writer.folder))]
    for thread in threads:
        thread.start()
    fill(writer, range(300))
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert shared.last_step == 299


def test_readers_do_not_keep_the_log_from_being_cleared(writer):
    readers = [Run(writer.folder) for _ in range(3)]
    fill(writer, range(50))
    for run in readers:
        run.scalars("x"), run.tensor("t/x"), run.names()
    busy, pages, moved = writer._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert (busy, pages, moved) == (0, 0, 0)  # all of it went into the main file, though the readers are open
    assert [run.last_step for run in readers] == [49] * 3
