"""What ran where and when: the events of a simulation, or of a run that was timed."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from workbench.errors import InputError

ROUNDING = 1e-9
"""Seconds by which sums of floats may disagree on what is one moment."""


@dataclass(frozen=True)
class Event:
    """One task as it ran, `start` to `end` in seconds; `group` is what a picture colours it by."""

    name: str
    resource: str
    start: float
    end: float
    group: str = ""

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """Events by their start, and what they are known by: "simulated, calibrated by ..." or "measured on ...".

    `resources` has the order in which they are shown; those without events are kept.
    """

    events: tuple[Event, ...]
    basis: str
    resources: tuple[str, ...] = ()

    def __post_init__(self):
        events = tuple(sorted(self.events, key=lambda event: (event.start, event.end)))
        found = dict.fromkeys([*self.resources, *(event.resource for event in events)])
        object.__setattr__(self, "events", events)
        object.__setattr__(self, "resources", tuple(found))

    @property
    def makespan(self) -> float:
        """Seconds from 0 to the end of what ends last."""
        return max((event.end for event in self.events), default=0.0)

    def on(self, resource: str) -> list[Event]:
        """The events of one resource, by their start."""
        return [event for event in self.events if event.resource == resource]

    def busy(self) -> dict[str, float]:
        """Seconds of work on each resource."""
        return {name: sum(event.seconds for event in self.on(name)) for name in self.resources}

    def busy_shares(self) -> dict[str, float]:
        """The part of the makespan that each resource works, 0 to 1."""
        return {name: spent / self.makespan if self.makespan else 0.0 for name, spent in self.busy().items()}

    def overlaps(self) -> list[tuple[Event, Event]]:
        """Neighbours on one resource of which the second starts before the first ends; none in a sound timeline.

        An event without duration takes no room.
        """
        lanes = ([event for event in self.on(name) if event.seconds > 0] for name in self.resources)
        return [(a, b) for lane in lanes for a, b in pairwise(lane) if b.start < a.end - ROUNDING]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return {
            "basis": self.basis,
            "resources": list(self.resources),
            "events": [asdict(event) for event in self.events],
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Timeline":
        """The inverse of `to_dict`."""
        return cls(tuple(Event(**event) for event in found["events"]), found["basis"], tuple(found["resources"]))

    def between(self, start: float, end: float) -> "Timeline":
        """The events that touch an interval, whole and where they are: a long run is shown by a part of it."""
        if not start < end:
            raise InputError(f"start is {start} but must be before end = {end}")
        return Timeline(_touching(self.events, start, end), self.basis, self.resources)


def _touching(events: Iterable[Event], start: float, end: float) -> tuple[Event, ...]:
    return tuple(event for event in events if event.start < end and event.end > start)
