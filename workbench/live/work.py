"""What takes long, in one thread of its own: a server's event loop is free to answer, and its pages take turns.

One thread, because networks are trained from torch's global generator, which is one for the whole process.
"""

import logging
from collections.abc import Callable, Hashable, Iterable
from queue import SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

from workbench.errors import InputError

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
            logging.getLogger(__name__).exception("a job of a page failed")
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self.done = True


_waiting: SimpleQueue[Job] = SimpleQueue()
_threads: list[Thread] = []
_opened: dict[Hashable, Job] = {}


def begin(results: Iterable[T]) -> Job[T]:
    """Make the results after all that was begun before."""
    job: Job[T] = Job(results)
    _waiting.put(job)
    if not _threads:
        _threads.append(Thread(target=_work, name="work", daemon=True))  # a server that is ended does not wait
        _threads[0].start()
    return job


def opened(key: Hashable, open_: Callable[[], Iterable[T]]) -> Job[T]:
    """What is opened once and is the same for all pages; where that has failed it is opened anew."""
    if key not in _opened or _opened[key].error:
        _opened[key] = begin(open_())
    return _opened[key]


def _work() -> None:
    while True:
        _waiting.get().run()
