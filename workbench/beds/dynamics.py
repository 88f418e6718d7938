"""Forecasts of dynamical systems: the next points of a trajectory from a few, in families of several environments.

For mixtures of experts over families and for meta-learning over environments. A row is a window of a trajectory: the
model sees `seen` points and says the next `ahead`, all in the units of the family (its states in training have mean 0
and deviation 1). Nine environments of each family are trained on, and judged on trajectories that were held out; four
are kept for adaptation ("adapt": a few of their trajectories, "adapted": the others).

The error is in units of the variance. To say that the last point stays is 0.84 off. One perceptron for all five planar
families is 0.09 off in environments that it has seen and 0.10 in new ones, and could be 0: three points say nearly all.

For fields that are learned themselves (`forecasts`), the same trajectories are whole: from the first point all others.

    lotka-volterra, pendulum, duffing, van-der-pol, glycolysis    two variables
    lorenz                                                         three, so it does not go with the others

Made here (`lib/data/dynamics.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from workbench.beds.baseline import MLP, Measured, seeded
from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.core.routing import Context
from workbench.lib.core.task import ArrayTask, Batch, Regression, device_of, mean_by_domain
from workbench.lib.core.train import TrainConfig, train

NEEDS = ()
PLANAR = ("lotka-volterra", "pendulum", "duffing", "van-der-pol", "glycolysis")
MIXED = ("lotka-volterra", "pendulum", "duffing", "van-der-pol")
"""Four families that differ in kind: a cycle about a centre, a damped well, two of them, and a limit cycle."""
TRAINED = 9
"""Environments of each family that are trained on."""
SPLITS = {"train": slice(0, 22), "validation": slice(22, 26), "test": slice(26, 32)}
ADAPTATION = {"adapt": slice(0, 4), "adapted": slice(4, 32)}
"""Which trajectories of an environment are in a split; the last two are of the environments kept for adaptation."""

SMOKE = {"steps": 20, "batch": 64}
SMALL = {"steps": 1000, "batch": 128}
FULL = {"steps": 10_000, "batch": 256}


def make(families: Sequence[str] = PLANAR, seen: int = 3, ahead: int = 5) -> Regression:
    """Windows of all trajectories of these families: inputs (rows, seen, dim), targets (rows, ahead, dim).

    The domains are the families. Splits: "train", "validation", "test", and "adapt", "adapted" of new environments.

    Raises:
        InputError: a family is unknown, families differ in the number of variables, or a window has no place.
    """
    found = data.load("dynamics", families=tuple(families))
    dims = {family: states.shape[-1] for family, states in found.states.items()}
    if len(set(dims.values())) > 1:
        raise InputError(f"families have {dims} variables but must all have the same number")
    points = next(iter(found.states.values())).shape[2]
    if min(seen, ahead) < 1 or seen + ahead > points:
        raise InputError(f"seen and ahead are {seen} and {ahead} but must be at least 1 and together at most {points}")
    splits: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for family, states in found.states.items():
        learned = states[:TRAINED, SPLITS["train"]].flatten(0, 2)
        states = (states - learned.mean(0)) / learned.std(0)
        for split, part in (SPLITS | ADAPTATION).items():
            environments = slice(TRAINED, None) if split in ADAPTATION else slice(TRAINED)
            windows = states[environments, part].unfold(2, seen + ahead, 1)  # (..., starts, dim, seen + ahead)
            rows = windows.flatten(0, 2).transpose(1, 2)
            splits.setdefault(split, {})[family] = rows[:, :seen].contiguous(), rows[:, seen:].contiguous()
    manifest = {family: row | {"seen": seen, "ahead": ahead} for family, row in found.manifest.items()}
    return Regression("dynamics", splits, manifest)


class Forecasts(ArrayTask):
    """Trajectories from their first points; a row is an environment with all its trajectories.

    Inputs are the numbers of the environments, targets their trajectories (B, starts, points, dim). A model is called
    as model(environment (B,), first points (B, starts, dim), times (B, points), context), and says (B, starts, points,
    dim). Metric and loss: the mean square error of all points but the first, in units of the family's variance.

    Attributes:
        times: (families, points); a family has its own grid.
        family: (environments,) of each environment that is trained on.
        new: "adapt" and "adapted" -> trajectories (environments, starts, points, dim) of environments that are not.
        new_family: of those.
    """

    metric, unit, higher_is_better = "mse", "of the variance", False

    def __init__(
        self,
        splits: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
        manifest: dict,
        times: Float[Tensor, "families points"],
        new: Mapping[str, Float[Tensor, "environments starts points dim"]],
        new_family: Int64[Tensor, " environments"],
    ):
        super().__init__("dynamics", splits, manifest)
        self.times, self.new, self.new_family = times, new, new_family
        counts = torch.tensor([len(numbers) for numbers, _ in self._split("train")])
        self.family = torch.arange(len(counts)).repeat_interleave(counts)

    @property
    def trajectories(self) -> Float[Tensor, "environments starts points dim"]:
        """All that is trained on."""
        return torch.cat([states for _, states in self._split("train")])

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        """Each environment once, in their order, where there are no more than `size`; otherwise as drawn."""
        if domain is None and len(self.family) <= size:
            numbers, states = (torch.cat(part) for part in zip(*self._split(split), strict=True))
            return Batch(numbers, states, self.family)
        return super().batch(split, size, generator, domain)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        context = self.context(batch := batch.to(device_of(model)))
        return self.criterion(self._say(model, batch, context), batch), context

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        def value(batch: Batch) -> Tensor:
            return self.loss(model, batch)[0].double()

        mean = mean_by_domain(self, model, split, max_batches, value)
        return {self.metric: sum(mean.values()) / len(mean)} | {f"{self.metric}/{d}": v for d, v in mean.items()}

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs - batch.targets)[:, :, 1:].square().mean()

    def _say(self, model: nn.Module, batch: Batch, context: Context) -> Tensor:
        times = self.times.to(batch.targets.device)[batch.domain]
        return model(batch.inputs, batch.targets[:, :, 0], times, context)


def forecasts(
    families: Sequence[str] = MIXED, environments: int = 5, starts: int = 4, points: int = 10, new: int = 2
) -> Forecasts:
    """The first points of the trajectories of these families, in the first environments of each, and in `new` ones.

    The domains are the families. "train" has so many starts, "validation" and "test" those of `SPLITS`; states have
    mean 0 and deviation 1 in what is trained on, for each family and variable.

    Raises:
        InputError: a family is unknown, families differ in the number of variables, or a number has no place.
    """
    found = data.load("dynamics", families=tuple(families))
    dims = {family: states.shape[-1] for family, states in found.states.items()}
    if len(set(dims.values())) > 1:
        raise InputError(f"families have {dims} variables but must all have the same number")
    here, _, grid, _ = next(iter(found.states.values())).shape
    for name, value, least, most in (
        ("environments", environments, 1, TRAINED),
        ("starts", starts, 1, SPLITS["train"].stop),
        ("points", points, 2, grid),
        ("new", new, 1, here - TRAINED),
    ):
        if not least <= value <= most:
            raise InputError(f"{name} is {value} but must be between {least} and {most}")
    splits: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    adaptation: dict[str, list[Tensor]] = {"adapt": [], "adapted": []}
    for index, (family, states) in enumerate(found.states.items()):
        states = states[:, :, :points]
        learned = states[:environments, :starts].flatten(0, 2)
        states = (states - learned.mean(0)) / learned.std(0)
        numbers = torch.arange(environments) + index * environments
        for split, part in (SPLITS | {"train": slice(starts)}).items():
            splits.setdefault(split, {})[family] = numbers, states[:environments, part].contiguous()
        for split, part in ADAPTATION.items():
            adaptation[split].append(states[TRAINED : TRAINED + new, part])
    times = torch.stack([found.times[family][:points] for family in found.states])
    kept = {split: torch.cat(parts) for split, parts in adaptation.items()}
    new_family = torch.arange(len(times)).repeat_interleave(new)
    sizes = {"environments": environments, "starts": starts, "points": points}
    manifest = {family: row | sizes for family, row in found.manifest.items()}
    return Forecasts(splits, manifest, times, kept, new_family)


class Persistence(nn.Module):
    """The last point seen, again and again."""

    def __init__(self, ahead: int):
        super().__init__()
        self.ahead = ahead

    def forward(
        self, x: Float[Tensor, "batch seen dim"], context: Context | None = None
    ) -> Float[Tensor, "batch ahead dim"]:
        return x[:, -1:].expand(-1, self.ahead, -1)


class Forecaster(nn.Module):
    """A perceptron that says how far each next point is from the last one seen."""

    def __init__(self, seen: int, ahead: int, dim: int, hidden: int = 64):
        super().__init__()
        self.persistence = Persistence(ahead)
        self.mlp = MLP((seen * dim, hidden, hidden, ahead * dim))

    def forward(
        self, x: Float[Tensor, "batch seen dim"], context: Context | None = None
    ) -> Float[Tensor, "batch ahead dim"]:
        last = self.persistence(x)
        return last + self.mlp(x).view_as(last)


def prepare(settings: Mapping[str, Any] = SMALL) -> list[Regression]:
    return [make(), make(("lorenz",))]


def measure(settings: Mapping[str, Any] = SMALL) -> list[Measured]:
    """One perceptron 64-64 for all planar families, and one for Lorenz's."""
    rows = []
    for task in prepare(settings):
        x, y = task.splits["train"][task.domains[0]]
        model = seeded(0, lambda x=x, y=y: Forecaster(x.shape[1], y.shape[1], x.shape[2]))
        train(model, task, TrainConfig(settings["steps"], settings["batch"]))
        count = sum(len(rows) for rows, _ in task.splits["train"].values())
        for split in ("test", "adapted"):
            trivial = task.evaluate(Persistence(y.shape[1]), split)["nmse"]
            reached = task.evaluate(model, split)["nmse"]
            case = f"{'planar families' if len(task.domains) > 1 else task.domains[0]}, {split}"
            rows.append(Measured(case, f"{count:,} windows", "perceptron 64-64", "nmse", trivial, reached, 0.0))
    return rows
