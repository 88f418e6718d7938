"""A search for a time: what is rated is kept at once, and the same search goes on from there.

A folder holds what decides the search ("settings.json"), what was prepared for it, such as a supernet
("prepared.safetensors"), and a line for each candidate that was rated ("rated.jsonl"). A search that goes on asks for
the same candidates again and is told the ratings that are kept, so that it ends where one without a stop would.
"""

import fcntl
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.core.search.evolution import front
from workbench.sealed import sealed_file

Report = Callable[[int, int, str], None]


@runtime_checkable
class Search(Protocol):
    """What a system offers to be searched with.

    Attributes:
        settings: all that decides the search, as JSON has it.
        rating, cost: what the two numbers of a candidate are, such as "accuracy"; a higher rating is better.
    """

    settings: Mapping[str, Any]
    rating: str
    cost: str

    def prepare(self, report: Report) -> Mapping[str, Tensor]:
        """What is to be done before the first rating; the same again for the same settings."""

    def restore(self, prepared: Mapping[str, Tensor]) -> None:
        """Take what `prepare` returned, then or in an earlier process."""

    def asked(self) -> Generator[Any, float, Any]:
        """Yields candidates and is sent their ratings; the same ones for the same ratings, see `evolution.evolve`."""

    def rate(self, candidate: Any) -> float: ...

    def cost_of(self, candidate: Any) -> float: ...

    def encode(self, candidate: Any) -> list[int]: ...


@dataclass(frozen=True)
class Found:
    """Where a search stands.

    Attributes:
        rated: (genome, cost, rating) of every candidate, in order.
        kept: how many of these were there before.
        ended: whether the search has nothing more to ask.
    """

    rated: list[tuple[list[int], float, float]]
    kept: int
    ended: bool

    @property
    def front(self) -> list[tuple[list[int], float, float]]:
        """Those for which no other one is as cheap and better, cheapest first."""
        points = {place: (cost, rating) for place, (_, cost, rating) in enumerate(self.rated)}
        return [self.rated[place] for place in front(points)]


def go_on(search: Search, folder: Path, seconds: float, report: Report = lambda *said: None) -> Found:
    """Search for `seconds`, from where the folder stands; a candidate that is being rated then is finished.

    Raises:
        InputError: the folder is of a search with other settings, or another process is at it.
    """
    end = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        settings = json.loads(json.dumps(dict(search.settings)))
        if (path := folder / "settings.json").exists():
            if json.loads(path.read_text(encoding="utf-8")) != settings:
                raise InputError(f"{folder} is of a search with other settings than this one: remove it, or name them")
        else:
            _write(path, lambda unfinished: unfinished.write_text(json.dumps(settings), encoding="utf-8"))
        if not (path := folder / "prepared.safetensors").exists():
            prepared = {name: tensor.contiguous() for name, tensor in search.prepare(report).items()}
            _write(path, lambda unfinished: save_file(prepared, str(unfinished)))
        search.restore(load_file(str(path)))
        return _rated(search, folder / "rated.jsonl", end, report)


def _rated(search: Search, path: Path, end: float, report: Report) -> Found:
    known = {tuple(genome): rating for genome, _, rating in read(path)}
    rated, kept, best = [], 0, float("-inf")
    asked = search.asked()
    with path.open("a", encoding="utf-8") as lines:
        try:
            candidate = next(asked)
            while True:
                genome, cost = search.encode(candidate), search.cost_of(candidate)
                if (rating := known.get(tuple(genome))) is None:
                    if time.monotonic() >= end:
                        return Found(rated, kept, False)
                    rating = search.rate(candidate)
                    lines.write(json.dumps([genome, cost, rating]) + "\n")
                    lines.flush()
                else:
                    kept += 1
                rated.append((genome, cost, rating))
                best = max(best, rating)
                report(len(rated), 0, f"best {search.rating} {best:.4g}")
                candidate = asked.send(rating)
        except StopIteration:
            return Found(rated, kept, True)


def read(path: Path) -> list[tuple[list[int], float, float]]:
    """The candidates of a file of ratings; a last line that was not finished is cut off it."""
    if not path.exists():
        return []
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        path.write_bytes(whole + b"\n" if whole else b"")
    return [tuple(json.loads(line)) for line in whole.splitlines()]


def _write(path: Path, write: Callable[[Path], object]) -> None:
    with sealed_file(path) as unfinished:
        write(unfinished)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{folder} is searched by another process: wait, or take another seed") from None
        yield
