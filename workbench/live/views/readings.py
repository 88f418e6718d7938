"""A run as the views read it: series thinned to what a screen can show and followed as they grow."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple, TypeVar

import numpy as np

from workbench.errors import InputError
from workbench.live.records import DIVISIONS, Division, Record, find
from workbench.live.store import Event, Run, Status

T = TypeVar("T")
POINTS = 200  # rows of a series on first reading; while it is followed, at most twice as many


class Nothing(Exception):
    """There is nothing to draw; the message tells the reader why and what to wait for."""


class Layer(NamedTuple):
    """One mixture-of-experts layer; top_k is None where the number of experts per token varies.

    Where it is `recursive`, its experts are recursions, and how many of them a token has is its depth.
    """

    name: str
    n_experts: int
    top_k: int | None
    recursive: bool = False


@dataclass
class _Series:
    """Rows of one series: those ``spacing`` steps apart are kept for good, so that a picture does not shimmer."""

    steps: np.ndarray
    values: np.ndarray
    spacing: int  # 0 keeps every row
    seen: int  # last step of the run when this was read

    def append(self, steps: np.ndarray, values: np.ndarray, points: int) -> None:
        """Add newer rows, and thin all of them once there are more than twice ``points``."""
        if len(self.steps):
            steps, values = np.concatenate([self.steps, steps]), np.concatenate([self.values, values])
        self.steps, self.values = steps, values
        self._thin()
        while len(self.steps) > 2 * points:
            self.spacing = 2 * self.spacing or -(-int(steps[-1] - steps[0]) // points)
            self._thin()

    def _thin(self) -> None:
        """Keep rows at least ``spacing`` steps apart, counted from the first, and always the newest."""
        keep, edge = [], None
        for row, step in enumerate(self.steps.tolist()):
            if edge is None or step >= edge + self.spacing:
                keep.append(row)
                edge = step
        if keep[-1] != len(self.steps) - 1:
            keep.append(len(self.steps) - 1)
        self.steps, self.values = self.steps[keep], self.values[keep]


class Readings:
    """Reads one run for the views. ``poll`` looks whether there is anything new; the rest answers from what was seen.

    Attributes:
        run: the run itself.
        last_step: the last committed step at the last ``poll``.
        status: how the run stood then.
        meta: what the run says about itself.
    """

    def __init__(self, run: Run):
        self.run, self.name = run, run.name
        self.last_step, self.status, self.meta = -1, Status("unread"), {}
        self._kept: dict[str, _Series] = {}
        self._names: list[str] | None = None
        self.poll()

    def poll(self) -> bool:
        """Look at the run again; whether a step was committed or its state changed."""
        try:
            step, status = self.run.last_step, self.run.status
            if status != self.status:  # a resumed run may say more about itself
                self.meta = self.run.meta
        except InputError as error:
            step, status = self.last_step, Status("damaged", str(error))
        if (step, status) == (self.last_step, self.status):
            return False
        if step < self.last_step:  # it went back to a checkpoint: what was read may have been taken back
            self._kept.clear()
        self.last_step, self.status, self._names = step, status, None
        return True

    # -- what the run is

    @property
    def model(self) -> dict:
        """The part of meta that describes the model."""
        return self.meta.get("model") or {}

    @property
    def arm(self) -> str | None:
        """The arm of a study that this run is the training of; None of any other run."""
        return (self.meta.get("recipe") or {}).get("arm")

    @property
    def about(self) -> str:
        """What the run is: its study, arm, preset and seed, or its name."""
        recipe = self.meta.get("recipe") or {}
        if self.arm is None:
            return self.name
        return f"{recipe['study']}: {self.arm} ({recipe['preset']}, seed {recipe['seed']})"

    @property
    def layers(self) -> list[Layer]:
        """The mixture-of-experts layers, first to last; may be empty."""
        rows = self.model.get("layers") or []
        return [Layer(row["name"], row["n_experts"], row.get("top_k"), bool(row.get("recursive"))) for row in rows]

    @property
    def domains(self) -> list[str]:
        """The domains of the data, in the order of every record by domain."""
        return list(self.model.get("domains") or [])

    def parts(self, by: Division) -> list[str]:
        """The domains or modalities of the data, in the order of every record; ``Nothing`` where there are none."""
        if names := list(by.names(self.model)):
            return names
        raise Nothing(f"this run has no {by.parts}")

    def moe_layers(self) -> list[Layer]:
        """The mixture-of-experts layers; ``Nothing`` where the run has none."""
        if not self.layers:
            raise Nothing("this run has no mixture-of-experts layer")
        return self.layers

    def layer(self, index: int) -> Layer:
        """The layer of this number, or the last where there are fewer; ``Nothing`` where the run has none."""
        layers = self.moe_layers()
        return layers[min(index, len(layers) - 1)]

    def has(self, name: str) -> bool:
        """Whether there is a series of this name so far."""
        return name in self._all_names()

    def series(self, record: Record) -> list[tuple[str, ...]]:
        """What the recorded series of one kind are of, in the order they first came."""
        return [record.of(name) for name in self._all_names() if find(name) == record]

    def events(self, kind: str) -> list[Event]:
        """What happened to the run, of one kind ("control": the commands that reached the trainer)."""
        return [event for event in self._ask(self.run.events) if event.kind == kind]

    # -- series

    def scalars(self, name: str, needed: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(steps (S,), values (S,)) of a scalar series over the whole run, thinned.

        Where it is not recorded: empty, or ``Nothing`` if it is needed.
        """
        steps, values = self._follow(name, self.run.scalars, 3 * POINTS)
        if needed and not len(steps):
            raise self._not_yet(name)
        return steps, values

    def recent(self, name: str, steps: int) -> np.ndarray:
        """The values of a scalar series over the last ``steps`` steps."""
        return self._ask(lambda: self.run.scalars(name, start=max(0, self.last_step - steps)))[1]

    def tensors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps (S,), arrays (S, ...)) of a series over the whole run, thinned; ``Nothing`` where not recorded."""
        steps, values = self._follow(name, self.run.tensors, POINTS)
        if not len(steps):
            raise self._not_yet(name)
        self._check_kind(name, values[0])
        return steps, values

    def newest(self, name: str) -> int:
        """The last step a tensor series was recorded at; ``Nothing`` where it was not."""
        return int(self.tensors(name)[0][-1])

    def at(self, name: str, step: int | None) -> tuple[int, np.ndarray]:
        """The newest array at or before ``step`` (None: of all) and its step; ``Nothing`` where there is none."""
        found = self._ask(lambda: self.run.tensor(name, step))
        if found is None:
            if self.has(name):
                raise Nothing("nothing was recorded up to this step: scrub forward")
            raise self._not_yet(name)
        self._check_kind(name, found[1])
        return found

    def window(self, name: str, step: int | None, records: int) -> tuple[int, np.ndarray]:
        """The last step and the sum of the newest ``records`` counts at or before ``step``; ``Nothing`` without any."""
        last, newest = self.at(name, step)
        every = self._every(name)
        if records < 2 or not every:
            return last, newest
        start = max(0, last - (records - 1) * every)
        _, counts = self._ask(lambda: self.run.tensors(name, start=start, stop=last))
        return last, counts.sum(axis=0, dtype=np.int64)

    def _check_kind(self, name: str, array: np.ndarray) -> None:
        """``Nothing`` where an array is not of the kind that its name stands for."""
        record = find(name)
        if record is None or record.dtype is None:
            return
        sizes = {by.load.shape[0]: len(by.names(self.model)) for by in DIVISIONS.values()}
        places = {layer.name: place for place, layer in enumerate(self.layers)}
        if (place := next((places[part] for part in record.of(name) if part in places), None)) is not None:
            sizes |= zip(("E", "E'"), [layer.n_experts for layer in self.layers[place:]], strict=False)
        wanted = [sizes.get(side, side) for side in record.shape]
        fits = array.ndim == len(wanted) and all(
            side == size or isinstance(side, str) for side, size in zip(wanted, array.shape, strict=True)
        )
        if array.dtype != record.dtype or not fits or 0 in array.shape:
            shape = ", ".join(map(str, wanted))
            kind = f"{array.dtype} {list(array.shape)} but must be {record.dtype} [{shape}]"
            raise Nothing(f"{name} is recorded as {kind}")

    def _every(self, name: str) -> int | None:
        """Steps between two records of a series, 0 for none; None where the run does not say."""
        return (self.meta.get("cadence") or {}).get(find(name).cadence)

    def _all_names(self) -> list[str]:
        if self._names is None:
            self._names = self._ask(self.run.names)
        return self._names

    def _not_yet(self, name: str) -> Nothing:
        """Why there is nothing of a series, and when there will be."""
        every = self._every(name)
        if every == 0 or not self.status.live:
            return Nothing("this run does not record it" if every == 0 else "this run holds no record of it")
        if every is None:
            return Nothing("nothing is recorded yet")
        if self.last_step >= every:  # it was due, and did not come: a layer that tells no tokens or domains
            return Nothing("this run has no record of it so far")
        due = "with the first step" if self.last_step < 0 else f"within {every} steps"
        return Nothing(f"nothing is recorded yet: the first record is due {due}, then every {every} steps")

    def _follow(self, name: str, read: Callable, points: int) -> tuple[np.ndarray, np.ndarray]:
        kept = self._kept.get(name)
        if kept is None:
            steps, values = self._ask(lambda: read(name, points=points))
            spacing = int(steps[-1] - steps[0]) // (points - 1) if len(steps) >= points else 0
            kept = self._kept[name] = _Series(steps, values, spacing, self.last_step)
        elif kept.seen != self.last_step:
            start = int(kept.steps[-1]) + 1 if len(kept.steps) else None
            steps, values = self._ask(lambda: read(name, start=start))
            kept.seen = self.last_step
            if len(steps):
                kept.append(steps, values, points)
        return kept.steps, kept.values

    def _ask(self, question: Callable):
        try:
            return question()
        except InputError as error:
            raise Nothing(str(error)) from error


def counterpart(name: str | None, known: Iterable[str]) -> str | None:
    """``name`` where it is known; else the first known name of the same part of a model, or the first of all."""
    names = list(known)
    if name is None or name in names or not names:
        return name
    parts = name.split(".")

    def shared(other: str) -> int:
        pairs = zip(parts, other.split("."), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    return max(names, key=shared)


def attempt(read: Callable[[Readings], T], shown: Sequence[Readings]) -> list[T | Nothing]:
    """``read`` for every run that is shown; where it has nothing, the ``Nothing`` that says why."""
    found: list[T | Nothing] = []
    for readings in shown:
        try:
            found.append(read(readings))
        except Nothing as nothing:
            found.append(nothing)
    return found


def stamped(found: Sequence[T | Nothing], stamp: Callable[[T], object]) -> tuple:
    """``stamp`` of every run that has data, else why it has none: what tells one drawing from another."""
    return tuple(str(data) if isinstance(data, Nothing) else stamp(data) for data in found)


def present(found: Sequence[T | Nothing]) -> Iterator[T]:
    """Those that are there: what a shared scale is made from."""
    return (item for item in found if not isinstance(item, Nothing))
