"""What takes long, in one thread of its own: a server's event loop is free to answer, and its pages take turns.

One thread, because a bed is trained from torch's global generator, which is one for the whole process.
"""

import logging
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

from workbench.errors import InputError
from workbench.merging.measure import Merges, open_bed

T = TypeVar("T")


class Job(Generic[T]):
    """Results that come one after the other, made in the background; a page looks at the newest.

    Attributes:
        latest: the newest result; None before the first.
        done: whether there will be no other.
        error: what went wrong, in words; "" where nothing did.
    """

    def __init__(self, results: Iterable[T]):
        self._results = results
        self._wanted = True
        self.latest: T | None = None
        self.done, self.error = False, ""

    def drop(self) -> None:
        """Nobody waits for it any longer: it ends before its next result."""
        self._wanted = False

    def run(self) -> None:
        """Make the results; in the thread for it."""
        try:
            results = iter(self._results)
            while self._wanted:
                self.latest = next(results)
        except StopIteration:
            pass
        except InputError as error:
            self.error = str(error)
        except Exception as error:  # a page that says nothing would wait for ever
            logging.getLogger(__name__).exception("a job of the page of merges failed")
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self.done = True


_waiting: SimpleQueue[Job] = SimpleQueue()
_threads: list[Thread] = []
_beds: dict[str, Job[str | Merges]] = {}


def begin(results: Iterable[T]) -> Job[T]:
    """Make the results after all that was begun before."""
    job: Job[T] = Job(results)
    _waiting.put(job)
    if not _threads:
        _threads.append(Thread(target=_work, name="merging", daemon=True))  # a server that is ended does not wait
        _threads[0].start()
    return job


def bed_of(size: str, open_: Callable[[str], Iterable[str | Merges]] = open_bed) -> Job[str | Merges]:
    """The bed of a size, the same for all pages; one that failed is opened anew."""
    if size not in _beds or _beds[size].error:
        _beds[size] = begin(open_(size))
    return _beds[size]


def _work() -> None:
    while True:
        _waiting.get().run()
