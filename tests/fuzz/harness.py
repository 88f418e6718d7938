"""Cases, what comes of them, and the count."""

import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from workbench.errors import InputError

PATIENCE = 20
"""Seconds of processor time after which a case hangs; they take milliseconds."""

WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


@dataclass(frozen=True)
class Case:
    """One input and what is done with it.

    Attributes:
        sort: "adapter JSON" and the like; they are counted apart.
        name: what was done to a good input, in words.
        read: reads it; it must come back, or raise an `InputError`.
        wrong: called after that with whether it came back: what is not as it must be, or None.
        writes: whether reading may write.
    """

    sort: str
    name: str
    read: Callable[[], object]
    wrong: Callable[[bool], str | None] = lambda came_back: None
    writes: bool = False


@dataclass
class Tally:
    """Of each sort how many were read and how many refused; and every fault: the sort, the case, what it was."""

    read: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        sorts = sorted(self.read | self.refused)
        shown = (f"{self.read[s] + self.refused[s]} of {s} ({self.refused[s]} refused)" for s in sorts)
        return f"{', '.join(shown)}; faults: {len(self.faults)}"


class Hang(BaseException):
    """A case took longer than it may."""


def try_all(cases: Iterable[Case]) -> Tally:
    """Run the cases one by one."""
    tally = Tally()
    for case in cases:
        fault, came_back = None, False
        with _written() as written:
            try:
                with _at_most(PATIENCE):
                    case.read()
                came_back = True
            except InputError:
                pass
            except Hang:
                fault = "hang"
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                said = f"{type(error).__name__}: {error}"
                fault = f"internal error: {said[:200]} ({where.filename.rpartition('/')[2]}:{where.lineno})"
        (tally.read if came_back else tally.refused)[case.sort] += 1
        if written and not case.writes:
            fault = f"wrote {written[0]}"
        fault = fault or case.wrong(came_back)
        if fault:
            tally.faults.append(f"{case.sort}: {case.name}: {fault}")
    return tally


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def over(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


_seen: list[list[str]] = []  # an audit hook stays for good, so there is one, and it looks here


@contextmanager
def _written() -> Iterator[list[str]]:
    """What is made, changed or removed on the disk inside."""
    if not _seen:
        sys.addaudithook(_audit)
    _seen[:] = [[]]
    try:
        yield _seen[0]
    finally:
        _seen[:] = [[]]


def _audit(event: str, args: tuple) -> None:
    if not _seen or not args or "__pycache__" in str(args[0]) or str(args[0]) == "/dev/null":
        return
    flags = args[2] if event == "open" and isinstance(args[2], int) else 0
    if event in WRITES or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        _seen[0].append(f"{event} {args[0]}")
