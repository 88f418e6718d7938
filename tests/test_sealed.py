"""Writes that are whole or not at all: through failing renames, a full disk, kills and writers at the same time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from workbench.sealed import sealed_file, sealed_folder, sweep, whole


def write_file(path: Path, text: str) -> None:
    with sealed_file(path) as unfinished:
        unfinished.write_text(text)


def write_folder(path: Path, text: str) -> None:
    with sealed_folder(path) as unfinished:
        (unfinished / "deep").mkdir()
        (unfinished / "deep" / "text").write_text(text)
        (unfinished / text).touch()


def read_file(path: Path) -> str:
    return path.read_text()


def read_folder(path: Path) -> str:
    path = whole(path)
    text = (path / "deep" / "text").read_text()
    assert sorted(one.name for one in path.iterdir()) == ["deep", text]
    return text


FORMS = pytest.mark.parametrize(("write", "read"), [(write_file, read_file), (write_folder, read_folder)])


def beside(path: Path) -> list[str]:
    return sorted(one.name for one in path.parent.iterdir())


@FORMS
def test_what_is_written_is_there_and_nothing_else(tmp_path: Path, write, read):
    path = tmp_path / "new" / "thing"
    for text in ("first", "second"):
        write(path, text)
        assert read(path) == text and beside(path) == ["thing"]


@FORMS
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("fault", ["fsync", "rename", "block"])
def test_what_was_there_still_is_where_a_write_fails(tmp_path: Path, monkeypatch, write, read, old, fault):
    path = tmp_path / "thing"
    if old:
        write(path, "old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    if fault == "block":
        monkeypatch.setattr(Path, "write_text", fail)
    else:
        for name in ("rename", "replace") if fault == "rename" else ("fsync",):
            monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="No space left"):
        write(path, "new")
    monkeypatch.undo()
    assert beside(path) == (["thing"] if old else []) and (not old or read(path) == "old")
    write(path, "newer")
    assert read(path) == "newer" and beside(path) == ["thing"]


def failing_renames(monkeypatch, failing: set[int]) -> None:
    """Let the renames of these numbers, counted from 1, fail."""
    usual, calls = os.rename, []

    def rename(source, target):
        calls.append(source)
        if len(calls) in failing:
            raise OSError(5, "Input/output error")
        usual(source, target)

    monkeypatch.setattr(os, "rename", rename)


def test_the_old_folder_is_moved_back_where_the_new_one_cannot_come(tmp_path: Path, monkeypatch):
    path = tmp_path / "thing"
    write_folder(path, "old")
    failing_renames(monkeypatch, {2})
    with pytest.raises(OSError, match="Input/output"):
        write_folder(path, "new")
    assert path.is_dir() and read_folder(path) == "old" and beside(path) == ["thing"]


def test_an_old_folder_that_cannot_be_moved_back_is_found_aside_and_put_back_by_the_next(tmp_path: Path, monkeypatch):
    path = tmp_path / "thing"
    write_folder(path, "old")
    failing_renames(monkeypatch, {2, 3})
    with pytest.raises(OSError, match="Input/output"):
        write_folder(path, "new")
    assert not path.exists() and read_folder(path) == "old"
    with pytest.raises(KeyError), sealed_folder(path):
        assert path.is_dir() and read_folder(path) == "old"
        raise KeyError
    assert read_folder(path) == "old" and beside(path) == ["thing"]


KILLED = """
import os, signal
from pathlib import Path
from tests.test_sealed import write_file, write_folder

calls, usual = [], os.{name}
def die(*args):
    calls.append(args)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    usual(*args)
os.{name} = die
{write}(Path({path!r}), "new")
"""


@pytest.mark.parametrize(
    ("write", "read", "name", "call"),
    [
        (write_file, read_file, "fsync", 1),
        (write_file, read_file, "replace", 1),
        (write_folder, read_folder, "fsync", 1),
        (write_folder, read_folder, "rename", 1),
        (write_folder, read_folder, "rename", 2),  # between the two renames
    ],
)
def test_a_killed_writer_leaves_the_old_one_and_the_next_clears_up(tmp_path: Path, write, read, name, call):
    path = tmp_path / "thing"
    write(path, "old")
    script = KILLED.format(name=name, call=call, write=write.__name__, path=str(path))
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent)
    assert done.returncode == -signal.SIGKILL and len(beside(path)) > (0 if call == 2 else 1)
    assert read(path) == "old"
    write(path, "newer")
    assert read(path) == "newer" and beside(path) == ["thing"]


@FORMS
def test_writers_at_the_same_time_do_not_disturb_each_other(tmp_path: Path, write, read):
    """The same process, and another one that lives."""
    path = tmp_path / "thing"
    other = tmp_path / f".thing.{os.getppid()}.0123abcd.unfinished"
    other.write_text("half")
    form = sealed_file if write is write_file else sealed_folder
    with pytest.raises(KeyError), form(path) as unfinished:
        write(path, "second")
        assert unfinished.parent == tmp_path and (form is sealed_file or unfinished.is_dir())
        raise KeyError
    assert read(path) == "second" and beside(path) == [other.name, "thing"]


def test_a_sweep_of_a_folder_clears_what_the_dead_left_and_nothing_else(tmp_path: Path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".a.{dead.pid}.0123abcd.unfinished", f".db.sqlite.{dead.pid}.0123abcd.unfinished-wal"):
        (tmp_path / name).write_text("half")
    (tmp_path / f".b.{dead.pid}.0123abcd.replaced").mkdir()
    mine = [f".a.{dead.pid}.unfinished", ".a.unfinished", f"a.{dead.pid}.0123abcd.unfinished", "c"]
    for name in mine:
        (tmp_path / name).touch()
    sweep(tmp_path, "c")
    assert len(list(tmp_path.iterdir())) == 3 + len(mine)
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*mine, "b"])


def test_a_link_stays_a_link_to_what_is_new(tmp_path: Path):
    write_folder(tmp_path / "thing", "old")
    (tmp_path / "link").symlink_to("thing")
    write_folder(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and read_folder(tmp_path / "thing") == "new"
