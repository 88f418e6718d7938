"""Files and folders that are there whole or not at all, whenever the process or the machine stops.

    with sealed_file(path) as unfinished:      # a path beside it
        unfinished.write_text(text)
    with sealed_folder(path) as unfinished:    # a new folder beside it
        (unfinished / "a.json").write_text(text)

What the block has written is flushed to the disk and takes the place of what was there; where the block, the disk or a
rename fails, what was there is as it was.

A file is replaced in one stroke. For a folder there is no such stroke: the old one is moved aside first, and back where
the new one cannot come. A process killed between the two leaves it aside, where `whole` finds it. The next one to write
there puts it back, and clears away what killed processes have left.
"""

import fcntl
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_mine: set[Path] = set()  # being written by this process; a predecessor in a container may have had the same number


@contextmanager
def sealed_file(path: str | Path) -> Iterator[Path]:
    """A path to write a file to, which then is at `path`; its folder is made where there is none.

    Raises:
        OSError: the disk is full or not writable; what was at `path` still is.
    """
    with _beside(Path(path)) as (path, unfinished, _):
        yield unfinished
        _flush(unfinished)
        os.replace(unfinished, path)
        _flush(path.parent)


@contextmanager
def sealed_folder(path: str | Path) -> Iterator[Path]:
    """A new, empty folder, which then is at `path` with what the block puts in it; nothing of an old one is kept.

    Raises:
        OSError: the disk is full or not writable; what was at `path` still is.
    """
    with _beside(Path(path)) as (path, unfinished, aside):
        unfinished.mkdir()
        yield unfinished
        for written in (*unfinished.rglob("*"), unfinished):
            _flush(written)
        try:
            if path.exists():
                os.rename(path, aside)
            os.rename(unfinished, path)
        except BaseException:
            if aside.exists() and not path.exists():
                os.rename(aside, path)
            raise
        _flush(path.parent)
        shutil.rmtree(aside, ignore_errors=True)


def whole(path: str | Path) -> Path:
    """Where to read the folder `path`: there, or aside where a process was killed while it was replacing it."""
    path = Path(path)
    if not path.exists():
        for left, kind, _ in _left(path.parent, path.name):
            if kind == "replaced":
                return left
    return path


def sweep(folder: Path, name: str | None = None) -> None:
    """Clear away what killed processes have left beside the file or folder `name` of a folder, or beside any in it."""
    for left, kind, target in _left(folder, name):
        if _being_written(left):
            continue
        if kind == "replaced" and not target.exists():
            os.rename(left, target)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def _beside(path: Path) -> Iterator[tuple[Path, Path, Path]]:
    """The path itself, and the names beside it for what is not finished and for what is replaced."""
    path = path.resolve()  # a link stays, what it leads to is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    stem = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    _mine.add(stem)
    unfinished, aside = stem.with_name(f"{stem.name}.unfinished"), stem.with_name(f"{stem.name}.replaced")
    try:
        yield path, unfinished, aside
    finally:
        _mine.discard(stem)
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)


def _left(folder: Path, name: str | None) -> Iterator[tuple[Path, str, Path]]:
    """What writers have, or have left, beside a name: where, of which kind, and whose place it has."""
    shown = ".*" if name is None else f".{glob.escape(name)}.*"
    own = ".+" if name is None else re.escape(name)
    for left in sorted(folder.glob(shown)):
        # a database has files of its own beside it, with more at the end of their names
        match = re.fullmatch(rf"\.({own})\.\d+\.[0-9a-f]{{8}}\.(unfinished|replaced)(?:-\w+)?", left.name)
        if match:
            yield left, match[2], folder / match[1]


def _being_written(left: Path) -> bool:
    stem, _, _ = left.name.rpartition(".")
    writer = int(stem.split(".")[-2])
    if writer == os.getpid():
        return left.with_name(stem) in _mine
    try:
        os.kill(writer, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another person's
        return True
    return True


def locked(path: Path, how: int = fcntl.LOCK_EX) -> int:
    """A descriptor of the file, made where there is none, with the lock on it; the kernel lets go for a killed process.

    Raises:
        OSError: nothing can be written there; BlockingIOError: another has the lock, where `how` says not to wait.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, how)
        except OSError:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):  # who had the lock before may have removed the file
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        os.close(descriptor)


def _flush(path: Path) -> None:
    """Wait until the file, or the list of files of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
