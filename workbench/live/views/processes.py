"""Processes: what each of several that train one run computes, how long it waits, and what it sends."""

from typing import NamedTuple

import numpy as np

from workbench.figures import ranks as figures
from workbench.live.records import RANK_LOAD, RANK_SECONDS, RANK_SENT, RANK_WAITING
from workbench.live.views.bar import layer_select
from workbench.live.views.card import Card
from workbench.live.views.readings import Nothing, Readings, present
from workbench.live.views.view import View

HOW = {
    "work": "The assignments that each process computes in the selected layer, against an even share. Where experts "
    "are spread over the processes, the one above 1 has the popular experts, and all others wait for it in every "
    "layer. Where each process has all experts, it computes its own rows: 1, whatever the router does.",
    "travel": "Whose tokens (rows) go to whose experts (columns), in one batch at the step on the slider. The diagonal "
    "stays at home. A router that knows nothing of processes sends every process its even share; a dark column is a "
    "process that the others queue for.",
    "time": "The step on the slider in each process, the newest if none is chosen: what it computed, and what it stood "
    "in collectives, for the wire and for processes that came later. Who waits least is who the others wait for.",
    "waiting": "The share of a step that each process stands in collectives. What all of them have in common is the "
    "price of the layout on this wire; what one has less is what it keeps the others waiting.",
    "sent": "What all processes together send in a step, by collective: all_reduce sums gradients, all_gather and "
    "reduce_scatter fetch and sum parts of matrices, all_to_all brings tokens to experts and back. Counted by the "
    "formula of each; headers come on top.",
}


class Time(NamedTuple):
    """Seconds (W,) of a step, and of these waiting (W,)."""

    step: int
    seconds: np.ndarray
    waiting: np.ndarray


class ProcessesView(View):
    """Work, travel, waiting and bytes of the processes that train a run together."""

    title = "Processes"

    def make_cards(self) -> dict[str, Card]:
        self.controls = [layer_select(self.selection)]
        return {
            "work": Card("Work of each process", HOW["work"], span=7, height=290),
            "travel": Card("Where tokens travel", HOW["travel"], span=5, height=290),
            "waiting": Card("Waiting", HOW["waiting"], span=4, height=270),
            "time": Card("A step of each process", HOW["time"], span=4, height=270),
            "sent": Card("Bytes on the wire", HOW["sent"], span=4, height=270),
        }

    def draw(self, shown: list[Readings]) -> None:
        newest = self.stamps(lambda run: int(waits(run)[0][-1]))
        step = self.selection.step
        several = any(processes(run) > 1 for run in shown)
        for name, card in self.cards.items():  # where there is one process, one card says so
            card.visible = several or name == "work"
        self.put("work", self._work, newest)
        self.put("travel", self._travel, self.stamps(lambda run: run.at(_load(run, self.selection.layer, 0), step)[0]))
        self.put("waiting", self._waiting, newest)
        self.put("time", self._time, newest, step)
        self.put("sent", self._sent, newest)

    def _work(self) -> list:
        found = self.read(lambda run: work(run, self.selection.layer))
        top = max([1.2, *(float(values.max()) for lines in present(found) for _, values in lines.values())])
        return self.each(
            found,
            lambda run, lines: figures.rank_lines(
                lines,
                title=f"Work of each process, {self.layer_label(run)}{self.suffix(run)}",
                subtitle="assignments computed ÷ an even share",
                unit="× even share",
                null=(1.0, "even"),
                limits=(0.0, 1.08 * top),
                **self.look,
            ),
        )

    def _travel(self) -> list:
        found = self.read(lambda run: travel(run, self.selection.layer, self.selection.step))
        top = max([0.0, *(float(pairs.max() / max(1, pairs.sum())) for pairs in present(found))])
        return self.each(
            found,
            lambda run, pairs: figures.who_computes(
                pairs,
                title=f"Where tokens travel, {self.layer_label(run)}{self.suffix(run)}",
                ceiling=top or None,
                theme=self.selection.theme,
            ),
        )

    def _waiting(self) -> list:
        def read(run: Readings) -> dict[str, tuple[np.ndarray, np.ndarray]]:
            steps, seconds, waiting = waits(run)
            shares = 100 * waiting / np.maximum(seconds, 1e-12)
            return {f"rank {rank}": (steps, row) for rank, row in enumerate(shares)}

        return self.each(
            self.read(read),
            lambda run, lines: figures.rank_lines(
                lines,
                title=f"Waiting{self.suffix(run)}",
                subtitle="in collectives, share of the step",
                unit="% of the step",
                limits=(0.0, 100.0),
                **self.look,
            ),
        )

    def _time(self) -> list:
        def read(run: Readings) -> Time:
            steps, seconds, waiting = waits(run)
            step = self.selection.step
            row = len(steps) if step is None else int(np.searchsorted(steps, step, side="right"))
            if not row:
                raise Nothing("nothing was recorded up to this step: scrub forward")
            return Time(int(steps[row - 1]), seconds[:, row - 1], waiting[:, row - 1])

        found = self.read(read)
        top = max([1e-6, *(float(np.nanmax(data.seconds)) for data in present(found))])
        return self.each(
            found,
            lambda run, data: figures.time_by_rank(
                data.seconds,
                data.waiting,
                title=f"Step {data.step} of each process{self.suffix(run)}",
                ceiling=1.08 * top,
                theme=self.selection.theme,
            ),
        )

    def _sent(self) -> list:
        found = self.read(sent)
        top = max([1e-6, *(float(np.nanmax(values)) for lines in present(found) for _, values in lines.values())])
        return self.each(
            found,
            lambda run, lines: figures.rank_lines(
                lines,
                title=f"Bytes on the wire{self.suffix(run)}",
                subtitle="all processes, a step",
                unit="kB a step",
                limits=(0.0, 1.08 * top),
                **self.look,
            ),
        )


def processes(run: Readings) -> int:
    """How many train the run, or last did."""
    return int((run.meta.get("processes") or {}).get("world", 1))


def _world(run: Readings) -> int:
    if processes(run) < 2:
        raise Nothing("one process trains this run: nothing is shared, sent or waited for")
    return processes(run)


def _load(run: Readings, layer: int, rank: int) -> str:
    _world(run)
    return RANK_LOAD.name(str(rank), run.layer(layer).name)


def waits(run: Readings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(steps (S,), seconds (W, S), of these waiting (W, S)) of the records that all processes of now have."""
    series = [
        [run.scalars(record.name(str(rank)), needed=True) for record in (RANK_SECONDS, RANK_WAITING)]
        for rank in range(_world(run))
    ]
    steps = series[0][0][0]
    for pair in series:
        for its, _ in pair:
            steps = np.intersect1d(steps, its)
    if not len(steps):
        raise Nothing("no step was recorded by all processes yet")
    found = np.array([[values[np.isin(its, steps)] for its, values in pair] for pair in series])
    return steps, found[:, 0], found[:, 1]


def _owners(run: Readings, n_experts: int, world: int) -> np.ndarray | None:
    """(E,) the rank that has each expert; None where each has all."""
    if (run.meta.get("processes") or {}).get("layout") != "experts":
        return None
    return np.arange(n_experts) * world // n_experts


def _computed(loads: np.ndarray, owners: np.ndarray | None) -> np.ndarray:
    """(W, W, ...) by the rank of the token and the rank that computes, from loads (W, E)."""
    world = len(loads)
    if owners is None:
        return np.diag(loads.sum(1, dtype=np.int64))
    return np.stack([loads[:, owners == rank].sum(1, dtype=np.int64) for rank in range(world)], axis=1)


def travel(run: Readings, layer: int, step: int | None) -> np.ndarray:
    """(W, W) assignments by the rank whose tokens they are and the rank that computes them, at a step."""
    world = _world(run)
    loads = np.stack([run.at(_load(run, layer, rank), step)[1] for rank in range(world)])
    return _computed(loads, _owners(run, loads.shape[1], world))


def work(run: Readings, layer: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By rank (steps (S,), assignments that it computes in a layer as multiples of an even share (S,))."""
    world = _world(run)
    series = [run.tensors(_load(run, layer, rank)) for rank in range(world)]
    steps = series[0][0]
    for its, _ in series:
        steps = np.intersect1d(steps, its)
    if not len(steps):
        raise Nothing("no step was recorded by all processes yet")
    loads = np.stack([values[np.isin(its, steps)] for its, values in series])  # (W, S, E)
    owners = _owners(run, loads.shape[2], world)
    computed = np.stack([_computed(loads[:, row], owners).sum(0) for row in range(len(steps))], axis=1)  # (W, S)
    even = np.maximum(computed.sum(0), 1) / world
    return {f"rank {rank}": (steps, row / even) for rank, row in enumerate(computed)}


def sent(run: Readings) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By collective (steps (S,), kilobytes that all processes of now send in a step (S,))."""
    world = _world(run)
    kinds = sorted({kind for rank, kind in run.series(RANK_SENT) if int(rank) < world})
    found = {}
    for kind in kinds:
        total: dict[int, float] = {}
        for rank in range(world):
            steps, values = run.scalars(RANK_SENT.name(str(rank), kind))
            for step, value in zip(steps.tolist(), values.tolist(), strict=True):
                total[step] = total.get(step, 0.0) + value / 1000
        at = sorted(total)
        found[kind] = (np.array(at), np.array([total[step] for step in at]))
    if not found:
        raise Nothing("nothing was sent yet")
    return found
