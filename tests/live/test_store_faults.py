"""The run store when things go wrong: kills, full disks, read-only folders, several writers and several apps."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.live import lock, schema
from workbench.live.store import Run, RunStopped, RunWriter

CRASH = Path(__file__).parent / "crash.py"


def crash(action: str, folder: Path, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, CRASH, action, folder, *arguments]
    return subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)


def lines(process: subprocess.Popen) -> list[dict]:
    out, _ = process.communicate()
    assert process.returncode == 0
    return [json.loads(line) for line in out.splitlines()]


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


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.05)


# -- the writer dies


def test_a_killed_run_reads_to_its_last_commit_and_goes_on(tmp_path):
    seen = lines(crash("killed", tmp_path / "run", 25))  # the process checks every value after every kill
    states = [each["state"] for each in seen]
    first = states.index("died")  # a life that is killed before it opens the run leaves it as it was
    assert states == ["finished"] * first + ["died"] * (25 - first) + ["finished"] and first < 10
    assert seen[-1]["last"] > 10  # they did get to write


def test_a_run_is_dead_although_a_child_of_its_writer_lives(tmp_path):
    process = crash("orphan", tmp_path / "run")
    said = json.loads(process.stdout.readline())
    child = said["child"]
    try:
        run = Run(tmp_path / "run")
        assert "is written by the process that opened it" in said["error"]
        assert run.status.state == "running" and run.events() == []  # the helper's attempt left no trace
        process.kill()
        process.wait()
        state, message = run.status
        assert state == "died" and f"process {process.pid} " in message and message.endswith("after step 2")
        os.kill(child, 0)  # still there
        RunWriter.open(tmp_path / "run").close()
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_a_closed_run_is_whole_in_its_one_file(tmp_path):
    with RunWriter.create(tmp_path / "run", {}) as writer:
        reader = Run(writer.folder)  # keeps SQLite from clearing the log away by itself
        fill(writer, range(5))
    (tmp_path / "copy").mkdir()
    shutil.copy(writer.folder / "run.sqlite", tmp_path / "copy")
    assert Run(tmp_path / "copy").steps("t").tolist() == reader.steps("t").tolist() == list(range(5))


def test_a_torn_log_costs_the_last_commits_only(tmp_path):
    """As after a loss of power: the end of the write-ahead log never reached the disk."""
    writer = RunWriter.create(tmp_path / "run", {})
    fill(writer, range(20))
    copy = tmp_path / "copy"
    shutil.copytree(writer.folder, copy)
    log = copy / "run.sqlite-wal"
    os.truncate(log, log.stat().st_size * 2 // 3)
    (copy / "run.sqlite-shm").unlink()
    with Run(copy) as run:
        assert run.status.state == "died"
        assert 0 <= run.last_step < 19
        assert run.steps("a").tolist() == run.steps("t").tolist() == list(range(run.last_step + 1))
    with RunWriter.open(copy) as again:
        fill(again, [again.last_step + 1])


# -- a second writer


def test_a_live_run_takes_no_second_writer(tmp_path, impatient):
    writer = RunWriter.create(tmp_path / "run", {})
    said = f"run run is being written by process {os.getpid()} on .*: a run has one writer"
    with pytest.raises(InputError, match=said):
        RunWriter.open(tmp_path / "run")
    with pytest.raises(InputError, match=said):
        RunWriter.create(tmp_path / "run", {})
    fill(writer, range(3))  # and the first one did not notice
    writer.close()
    with pytest.raises(InputError, match="holds a run already"):
        RunWriter.create(tmp_path / "run", {})
    with RunWriter.open(tmp_path / "run") as again:
        fill(again, [3])
    assert Run(tmp_path / "run").last_step == 3


def test_asking_for_the_status_does_not_pass_for_writing(finished, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 300)  # the timer may be late
    held = os.open(finished / "lock", os.O_RDONLY)
    assert lock._try(held, lock.fcntl.LOCK_SH)  # a reader in the middle of asking
    assert Run(finished).status.state == "finished" and not lock.held(finished)  # nor does it look like a writer
    timer = threading.Timer(0.1, os.close, [held])
    timer.start()
    RunWriter.open(finished).close()
    timer.join()


# -- the folder is gone


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_run_whose_folder_is_gone_stops_with_the_next_commit(tmp_path, how):
    said = pytest.raises(RunStopped, match=r"run run stopped: its folder .*/run was moved, replaced or deleted")
    with said, RunWriter.create(tmp_path / "run", {}) as writer:
        fill(writer, range(3))
        if how == "deleted":
            shutil.rmtree(writer.folder)
        else:
            writer.folder.rename(tmp_path / "elsewhere")
        if how == "replaced":
            RunWriter.create(tmp_path / "run", {}).close()
        fill(writer, [3])
    there = {"deleted": [], "moved": ["elsewhere"], "replaced": ["elsewhere", "run"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == there[how]
    if how == "replaced":
        assert Run(tmp_path / "run").last_step == -1


# -- other people of this machine


def test_nobody_else_may_write_or_hold_a_run(tmp_path):
    """Who may write the file may command the trainer; who may read the lock may hold it."""
    before = os.umask(0)
    try:
        with RunWriter.create(tmp_path / "run", {}) as writer:
            fill(writer, range(2))
            modes = {path.name: path.stat().st_mode & 0o777 for path in (writer.folder, *writer.folder.iterdir())}
        RunWriter.replace(writer.folder, {}).close()
    finally:
        os.umask(before)
    assert {"run.sqlite", "run.sqlite-wal", "run.sqlite-shm", "lock", "checkpoints", "run"} == set(modes)
    assert {name for name, mode in modes.items() if mode & 0o077} == set()
    assert writer.folder.stat().st_mode & 0o777 == 0o700


# -- the disk is full


def test_a_full_disk_stops_the_run_and_keeps_what_was_committed(tmp_path):
    writer = RunWriter.create(tmp_path / "run", {})
    fill(writer, range(5))
    pages = writer._db.execute("PRAGMA page_count").fetchone()[0]
    writer._db.execute(f"PRAGMA max_page_count = {pages + 3}").fetchall()
    with pytest.raises(
        RunStopped, match=r"run run stopped: no space left for .*run\.sqlite; what was committed is kept"
    ):
        fill(writer, range(5, 100))
    last = writer.last_step
    run = Run(tmp_path / "run")
    assert 5 <= last < 99 and run.last_step == last and run.steps("t").tolist() == list(range(last + 1))
    run.check()
    writer.status("failed", "no space left")  # needs no new page
    assert run.status == ("failed", "no space left")
    writer._db.execute("PRAGMA max_page_count = 100000").fetchall()
    writer.commit(last + 1)  # what could not be written then is still here
    assert run.steps("t").tolist() == run.steps("a").tolist() == list(range(last + 2))
    writer.close()


def test_a_file_that_may_not_grow_stops_the_run(tmp_path):
    (found,) = lines(crash("full", tmp_path / "run"))
    assert "run run stopped" in found["error"]
    assert found["writer"] == found["reader"] > 5


def test_how_a_run_ended_is_known_though_nothing_could_be_written(tmp_path):
    with pytest.raises(RunStopped), RunWriter.create(tmp_path / "run", {"kind": "train"}) as writer:
        fill(writer, range(5))
        writer._db.execute("PRAGMA query_only = 1")
        fill(writer, range(5, 6))
    with Run(writer.folder) as run:
        state, message = run.status
        assert state == "failed" and message.startswith("run run stopped: ") and message.endswith("is kept")
        with pytest.raises(InputError, match="run run takes no commands: it has failed"):
            run.send("pause")
        assert run.last_step == 4
        RunWriter.open(writer.folder).close()
        assert run.status == ("finished", "")


def test_an_interrupted_commit_is_made_up_for_by_the_next(tmp_path):
    writer = RunWriter.create(tmp_path / "run", {})
    writer.scalars(0, {"a": 0.0})
    writer.tensors(0, {"t": np.ones(3)})
    with pytest.raises(KeyboardInterrupt), writer._transaction() as db:
        db.execute("INSERT INTO names VALUES (1, 'a', NULL, NULL)")
        raise KeyboardInterrupt
    writer.commit(0)
    assert Run(writer.folder).names() == ["a", "t"]
    writer.close()


# -- read-only folders


@pytest.fixture
def open_folder():
    """A folder that any user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="workbench-"))
    folder.chmod(0o755)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(folder)


def protect(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o555)


def test_read_only_runs_can_be_read_and_not_written(open_folder):
    with RunWriter.create(open_folder / "closed", {}) as writer:
        fill(writer, range(3))
    with Run(writer.folder) as run:
        run.names()  # leaves an empty log behind
    with RunWriter.create(open_folder / "closed-bare", {}) as writer:
        fill(writer, range(3))
    assert not list(writer.folder.glob("*-wal"))
    alive = RunWriter.create(open_folder / "alive", {"kind": "train"})
    fill(alive, range(3))
    shutil.copytree(alive.folder, open_folder / "dead")
    shutil.copytree(alive.folder, open_folder / "dead-without-index")
    (open_folder / "dead-without-index" / "run.sqlite-shm").unlink()
    protect(open_folder)
    found = {
        each.pop("name"): each for each in lines(crash("nobody" if os.getuid() == 0 else "unprivileged", open_folder))
    }
    for name in ("closed", "closed-bare"):
        assert found[name]["state"] == "finished" and found[name]["last"] == 2
        assert "takes no commands: it has finished" in found[name]["send"]
    assert found["alive"]["state"] == "running" and found["alive"]["last"] == 2
    assert "run alive cannot take a command" in found["alive"]["send"]
    assert found["dead"]["state"] == "died" and found["dead"]["last"] == 2
    assert "copy it to a folder that can be written" in found["dead-without-index"]["read"]
    for name in ("closed", "closed-bare", "alive", "dead"):
        assert "read-only" in found[name]["open"]
        assert "cannot be made: Permission denied" in found[name]["create"]
    alive.close()


# -- commands from several apps


def test_commands_of_two_apps_are_all_answered_in_order(tmp_path):
    layers = [{"name": "a", "n_experts": 4, "top_k": 2}]
    with RunWriter.create(tmp_path / "run", {"kind": "train", "model": {"layers": layers}}) as writer:
        apps = [crash("send", writer.folder, first) for first in (1, 1001)]
        taken, step = [], 0
        deadline = time.monotonic() + 300
        while len(taken) < 80 and time.monotonic() < deadline:
            for command in writer.commands():
                taken.append(command)
                writer.answer(command, step)
            fill(writer, [step])
            step += 1
        for app in apps:
            assert lines(app) == []
    assert [command.id for command in taken] == sorted({command.id for command in taken})
    for first in (1, 1001):
        own = [round(command.value * 1e6) for command in taken if first <= round(command.value * 1e6) < first + 40]
        assert own == list(range(first, first + 40))
    answers = Run(writer.folder).answers()
    assert len(answers) == 80 and all(answer.step is not None and answer.error is None for answer in answers)
    assert Run(writer.folder).steps("t").tolist() == list(range(step))


def test_a_command_that_came_too_late_is_refused(tmp_path):
    writer = RunWriter.create(tmp_path / "run", {"kind": "train"})
    fill(writer, range(3))
    run = Run(writer.folder)
    run.send("pause")
    assert run.answers()[0].step is None
    writer.close()
    assert run.answers()[0][4:] == (2, "the run ended")
    with pytest.raises(InputError, match="run run takes no commands: it has finished"):
        run.send("pause")


def test_a_run_that_ends_while_a_command_is_sent_refuses_it(tmp_path, monkeypatch):
    writer = RunWriter.create(tmp_path / "run", {"kind": "train"})
    run = Run(writer.folder)

    def connect(*arguments):  # the run has been found live, and ends now
        writer.close()
        return schema_connect(*arguments)

    schema_connect = schema.connect
    monkeypatch.setattr(schema, "connect", connect)
    with pytest.raises(InputError, match="takes no commands: it has finished"):
        run.send("pause")
    assert run.answers() == []


def test_a_command_is_handed_out_once_and_asking_is_cheap(tmp_path):
    with RunWriter.create(tmp_path / "run", {"kind": "train"}) as writer, Run(writer.folder) as run:
        run.send("pause")
        assert [command.name for command in writer.commands()] == ["pause"]
        run.send("step")  # the first is not answered yet
        assert [command.name for command in writer.commands()] == ["step"]
        asked = []
        writer._db.set_trace_callback(asked.append)
        fill(writer, [0])
        asked.clear()
        assert writer.commands() == []
        assert asked == ["PRAGMA data_version"]


def test_commands_to_a_run_that_died_do_not_reach_its_successor(tmp_path):
    process = crash("orphan", tmp_path / "run")
    os_child = json.loads(process.stdout.readline())["child"]
    os.kill(os_child, signal.SIGKILL)
    run = Run(tmp_path / "run")
    run.send("stop")
    process.kill()
    process.wait()
    process.stdout.close()
    with pytest.raises(InputError, match="run run takes no commands: it died"):
        run.send("stop")
    with RunWriter.open(tmp_path / "run") as writer:
        assert writer.commands() == []
        assert run.answers()[0].error == "the run ended" and run.status.state == "running"
        run.send("pause")
        assert [command.name for command in writer.commands()] == ["pause"]
        assert writer.commands() == []


def test_a_watched_model_takes_no_commands(tmp_path):
    with (
        RunWriter.create(tmp_path / "run", {"kind": "watch"}) as writer,
        pytest.raises(InputError, match="is a watched model"),
    ):
        Run(writer.folder).send("stop")
