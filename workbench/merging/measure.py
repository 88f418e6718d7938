"""What the page of a merge shows, measured on the bed `beds.digit_experts`.

Tensor letters: n tasks, S scales, k singular values.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from workbench.beds import digit_experts as bed
from workbench.errors import unknown
from workbench.lib.core.merge import TaskVectors, make_merger, merged_state, merger_class, mergers
from workbench.lib.core.merge.compare import sign_conflict, task_cosines
from workbench.lib.core.task import Classification
from workbench.lib.measures.operators import subspace_overlap, top_subspace

SIZES = {"small": bed.SMALL, "smoke": bed.SMOKE}
"""How wide the networks are, and how long they are trained."""

SCALES = (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3)
"""The lambdas of the curve: close together where a sum of many task vectors has its best."""

RANK = 16
"""The most leading directions that are compared; an eighth of a layer's width where that is less."""


@cache
def methods() -> dict[str, tuple[str, float] | None]:
    """The methods that need weights alone -> the option for the share of weights that stays, and its default.

    None where a method has no such option. Left out are those that need inputs, or to be told which task to serve.
    """
    found: dict[str, tuple[str, float] | None] = {}
    for name in mergers():
        options = inspect.signature(merger_class(name)).parameters
        if "batches" in options or any(option.default is option.empty for option in options.values()):
            continue
        share = next((key for key in ("density", "ratio") if key in options), None)
        found[name] = share and (share, options[share].default)
    return found


@dataclass(frozen=True)
class Choice:
    """What a reader chose: a method, the share of weights that stays (where it has one), lambda, and a layer.

    Raises:
        InputError: the method is none of `methods()`.
    """

    method: str
    share: float | None
    scale: float
    layer: str

    def __post_init__(self):
        if self.method not in methods():
            raise unknown("method", self.method, methods())

    @property
    def options(self) -> dict[str, float]:
        """The options of the method."""
        known = methods()[self.method]
        return {} if known is None or self.share is None else {known[0]: self.share}

    def __str__(self) -> str:
        parts = [self.method, *(f"{name} {value:.2f}" for name, value in self.options.items()), f"λ = {self.scale:.2f}"]
        return ", ".join(parts)


@dataclass(frozen=True, eq=False)
class Layer:
    """What the experts changed of one matrix: by task singular values (k,), and overlaps (n, n) of `rank` directions.

    The directions are of the `dim` inputs of the layer.
    """

    spectra: Mapping[str, np.ndarray]
    overlaps: np.ndarray
    rank: int
    dim: int


@dataclass(frozen=True, eq=False)
class Measured:
    """What became of a choice.

    Attributes:
        layer: of the experts.
        spectrum: singular values (k,) of the merge's own change of the layer, lambda times the update.
        accuracies: of each task, at the chosen lambda.
        curve: lambda, rising -> the same there; it has one more each time, and in the end all `SCALES`.
    """

    choice: Choice
    layer: Layer
    spectrum: np.ndarray
    accuracies: np.ndarray
    curve: Mapping[float, np.ndarray]


class Merges:
    """A base, its experts, and merges of them: base + lambda (merged - base), all but the head.

    Attributes:
        own, before: accuracy (n,) of each task's own expert and of the base, on the test split.
        vectors: what the experts changed.
        matrices: the merged matrices, in the order of the network.
        cosines: of each matrix, (n, n) between task vectors.
        conflict: of each matrix, the share of weights on whose sign the tasks do not agree.
    """

    def __init__(self, base: bed.DigitNet, experts: Mapping[str, bed.DigitNet], tasks: Mapping[str, Classification]):
        self.tasks = dict(tasks)
        self._base, self._model = base.state_dict(), bed.DigitNet(base.head.in_features)
        self.vectors = TaskVectors(base, list(experts.values()), exclude="head.*")
        self.own = np.array([self._accuracy(name, expert) for name, expert in experts.items()])
        self.before = np.array([self._accuracy(name, base) for name in tasks])
        self.matrices = [name for name in self.vectors.names if len(self.vectors.shapes[name]) == 2]
        cosines, conflict = task_cosines(self.vectors), sign_conflict(self.vectors)
        self.cosines = {name: cosines[name].numpy() for name in self.matrices}
        self.conflict = {name: conflict[name] for name in self.matrices}
        self._layers: dict[str, Layer] = {}
        self._found: dict[tuple, np.ndarray] = {}
        self._merged: tuple[tuple, dict[str, torch.Tensor]] | None = None  # the last one alone

    def measure(self, choice: Choice) -> Iterator[Measured]:
        """First what belongs to the chosen lambda, with as much of the curve as is known, then all of the curve."""
        layer, change = self.layer(choice.layer), self.merged(choice)[choice.layer] - self._base[choice.layer]
        spectrum = choice.scale * _spectrum(change)
        here, known = self.accuracies(choice, choice.scale), _merge_of(choice)
        curve = {scale: self._found[*known, scale] for scale in SCALES if (*known, scale) in self._found}
        yield Measured(choice, layer, spectrum, here, curve)
        for scale in SCALES:
            if scale not in curve:
                curve = dict(sorted((*curve.items(), (scale, self.accuracies(choice, scale)))))
                yield Measured(choice, layer, spectrum, here, curve)

    def merged(self, choice: Choice) -> dict[str, torch.Tensor]:
        """The merge at lambda 1, as `workbench.merge` returns it."""
        key = _merge_of(choice)
        if self._merged is None or self._merged[0] != key:
            self._merged = key, merged_state(self.vectors, make_merger(choice.method, choice.options))
        return self._merged[1]

    def accuracies(self, choice: Choice, scale: float) -> np.ndarray:
        """Of each task (n,), of the choice's merge at another lambda."""
        key = (*_merge_of(choice), scale)
        if key not in self._found:
            merged = self.merged(choice)
            state = {name: torch.lerp(own, merged[name], scale) for name, own in self._base.items()}
            self._model.load_state_dict(state)
            self._found[key] = np.array([self._accuracy(name, self._model) for name in self.tasks])
        return self._found[key]

    def layer(self, name: str) -> Layer:
        """What the experts changed of one of `matrices`."""
        if name not in self._layers:
            deltas = self.vectors.deltas(name)
            rank = min(RANK, max(1, min(deltas.shape[1:]) // 8))
            directions = [top_subspace(delta, rank) for delta in deltas]
            overlaps = np.array([[float(subspace_overlap(a, b)) for b in directions] for a in directions])
            spectra = {task: _spectrum(delta) for task, delta in zip(self.tasks, deltas, strict=True)}
            self._layers[name] = Layer(spectra, overlaps, rank, deltas.shape[-1])
        return self._layers[name]

    def _accuracy(self, task: str, model: torch.nn.Module) -> float:
        return self.tasks[task].evaluate(model, "test")["accuracy"]


def open_bed(size: str) -> Iterator[str | Merges]:
    """The bed of a size, after a line for each network that is read, or trained for the first time.

    Raises:
        InputError: no such size, or the images are not on this machine.
    """
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    settings, many = SIZES[size], 1 + len(bed.TASKS)
    tasks = {name: bed.task(name) for name in bed.TASKS}
    yield f"network 1 of {many}, the base"
    base, experts = bed.base(settings), {}
    for i, name in enumerate(tasks):
        yield f"network {i + 2} of {many}, the expert for “{name}”"
        experts[name] = bed.expert(name, settings)
    yield "comparing them"
    yield Merges(base, experts, tasks)


def _merge_of(choice: Choice) -> tuple[Any, ...]:
    return choice.method, *choice.options.items()


def _spectrum(change: torch.Tensor) -> np.ndarray:
    return torch.linalg.svdvals(change.double()).numpy()
