"""A search of plans: a space of settings, an objective that may fail, a budget of trials.

    space = Space.of(GPT["175B"], world=1024)
    tuning = tune(space.settings, space.objective(simulator), budget=60, method="forest", seed=0)
    tuning.best.setting, tuning.best.value, tuning.failures
    importance(tuning)                                # which setting matters, most first

A setting that is no plan, or does not fit in memory, is a trial that failed: it is kept with its reason, it has no
value, and whatever learns from trials is told a value below all that were measured. So a search is taught where not to
go, and pays for it as for any other trial.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from workbench.errors import InputError, unknown
from workbench.lib.distributed.frontier_plans import DenseConfig, ParallelPlan
from workbench.lib.distributed.frontier_sim import StepSimulator

METHODS = ("random", "grid", "tpe", "forest")
FIRST = 10
"""Trials of a forest that are drawn, before there is something to learn from."""
TREES, BOLD = 50, 1.0

Value = int | bool
Setting = Mapping[str, Value]
Objective = Callable[[Setting], float]
"""What is to be large; an `InputError` is a failure, with its words as the reason."""


@dataclass(frozen=True)
class Trial:
    """A setting that was tried, and what it gave; None where it failed, and why."""

    setting: dict[str, Value]
    value: float | None
    reason: str = ""


@dataclass(frozen=True)
class Tuning:
    """What a search has found.

    Attributes:
        trials: in their order; no setting twice.
        settings: the space: name -> its values.
    """

    method: str
    trials: tuple[Trial, ...]
    settings: dict[str, tuple[Value, ...]]

    @property
    def measured(self) -> list[Trial]:
        """The trials that did not fail."""
        return [trial for trial in self.trials if trial.value is not None]

    @property
    def failures(self) -> int:
        return len(self.trials) - len(self.measured)

    @property
    def best(self) -> Trial:
        """
        Raises:
            InputError: all trials failed.
        """
        if not self.measured:
            raise InputError(f"all {len(self.trials)} trials failed, the last of them: {self.trials[-1].reason}")
        return max(self.measured, key=lambda trial: trial.value)

    @property
    def curve(self) -> list[float]:
        """The best value after each trial; 0 until one is measured."""
        values = [0.0 if trial.value is None else trial.value for trial in self.trials]
        return list(itertools.accumulate(values, max))


def tune(
    settings: Mapping[str, Sequence[Value]], objective: Objective, budget: int, method: str = "forest", seed: int = 0
) -> Tuning:
    """The best of `budget` settings, of which none is tried twice.

    Args:
        settings: name -> the values it may have, in order.
        method: "random" draws; "grid" takes every n-th of the space, in drawn order; "tpe" is optuna's sampler as it
            comes; "forest" tries what a random forest thinks best, its trees' spread added (after ten draws).
        seed: all its randomness.

    Raises:
        InputError: a method that is unknown, a setting without values, or a budget that is not from 1 to the size of
            the space.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    space = {name: tuple(values) for name, values in settings.items()}
    if empty := [name for name, values in space.items() if not values or len(set(values)) < len(values)]:
        raise InputError(f"settings[{empty[0]!r}] is {space[empty[0]]} but must have one value or more, each once")
    points = list(itertools.product(*space.values()))
    if isinstance(budget, bool) or not 1 <= budget <= len(points):
        raise InputError(f"budget is {budget!r} but must be from 1 to the {len(points)} settings there are")
    trials: list[Trial] = []

    def tried(point: tuple[Value, ...]) -> Trial:
        setting = dict(zip(space, point, strict=True))
        try:
            value = float(objective(setting))
        except InputError as error:
            trials.append(Trial(setting, None, str(error)))
        else:
            if not math.isfinite(value):
                raise InputError(f"objective of {setting} is {value} but must be a finite number")
            trials.append(Trial(setting, value))
        return trials[-1]

    if method in ("random", "grid"):
        for point in _drawn(points, budget, method == "grid", random.Random(seed)):
            tried(point)
    elif method == "tpe":
        _tpe(space, budget, seed, tried)
    else:
        _forest(points, budget, seed, tried, trials)
    return Tuning(method, tuple(trials), space)


def penalised(trials: Iterable[Trial]) -> list[float]:
    """The values of trials, and of those that failed the least that was measured (0 where nothing was)."""
    found = list(trials)
    least = min((trial.value for trial in found if trial.value is not None), default=0.0)
    return [least if trial.value is None else trial.value for trial in found]


def coded(points: Iterable[Sequence[Value]]) -> Float[np.ndarray, "points settings"]:
    """Settings as numbers: sizes by their logarithm, for each is a multiple of the last."""
    return np.array([[math.log2(value) if value > 0 else -1.0 for value in point] for point in points])


def importance(tuning: Tuning, seed: int = 0) -> dict[str, float]:
    """How much worse a forest of the trials foretells them once a setting is shuffled (R2 lost), the most first."""
    from sklearn.inspection import permutation_importance  # slow to import, and few ask

    x, y = coded(trial.setting.values() for trial in tuning.trials), np.array(penalised(tuning.trials))
    model = _forest_of(seed).fit(x, y)
    found = permutation_importance(model, x, y, n_repeats=10, random_state=seed, n_jobs=1).importances_mean
    pairs = zip(tuning.settings, found.tolist(), strict=True)
    return dict(sorted(pairs, key=lambda pair: -pair[1]))


def _drawn(points: list, budget: int, even: bool, draw: random.Random) -> list:
    if not even:
        return draw.sample(points, budget)
    first, step = draw.random(), len(points) / budget
    found = [points[int((first + i) * step)] for i in range(budget)]
    draw.shuffle(found)
    return found


def _tpe(space: dict[str, tuple[Value, ...]], budget: int, seed: int, tried: Callable[[tuple], Trial]) -> None:
    """A setting that optuna asks for again is told again, and is no trial; asked for too often, one is drawn."""
    try:
        import optuna
    except ImportError as error:
        raise InputError(f"method 'tpe' needs optuna (pip install 'optuna>=4.0'): {error}") from None
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells stderr that a study was made
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    optuna.logging.set_verbosity(level)
    kinds = {name: optuna.distributions.IntDistribution(0, len(values) - 1) for name, values in space.items()}
    told: dict[tuple[Value, ...], Trial] = {}
    draw, again = random.Random(seed), 0
    while len(told) < budget:
        asked = study.ask(kinds)
        point = tuple(values[asked.params[name]] for name, values in space.items())
        if again > 20:  # it is sure of what it has tried
            point = draw.choice([one for one in itertools.product(*space.values()) if one not in told])
        again = again + 1 if point in told else 0
        if point not in told:
            told[point] = tried(point)
        study.tell(asked, penalised(told.values())[list(told).index(point)])


def _forest_of(seed: int):
    from sklearn.ensemble import RandomForestRegressor

    return RandomForestRegressor(TREES, min_samples_leaf=1, random_state=seed, n_jobs=1)


def _forest(points: list[tuple], budget: int, seed: int, tried: Callable[[tuple], Trial], trials: list[Trial]) -> None:
    draw, x = random.Random(seed), coded(points)
    left = list(range(len(points)))
    taken: list[int] = []

    def take(i: int) -> None:
        left.remove(i)
        taken.append(i)
        tried(points[i])

    for i in draw.sample(left, min(FIRST, budget)):
        take(i)
    while len(taken) < budget:
        model = _forest_of(draw.randrange(2**31)).fit(x[taken], np.array(penalised(trials)))
        rest = x[left].astype(np.float32)  # as trees have it, so that it is not looked through for each of them
        said = np.stack([tree.predict(rest, check_input=False) for tree in model.estimators_])
        worth = said.mean(0) + BOLD * said.std(0)
        take(left[draw.choice(np.flatnonzero(worth >= worth.max() - 1e-12).tolist())])


@dataclass(frozen=True)
class Space:
    """Plans of a model on so many ranks: settings, and what each of them is worth on a simulator.

    Attributes:
        settings: of `ParallelPlan`, without dp, which takes the ranks that are left.
        recompute: of all of them.
    """

    config: DenseConfig
    world: int
    settings: Mapping[str, tuple[Value, ...]]
    recompute: bool = True

    @classmethod
    def of(cls, config: DenseConfig, world: int) -> "Space":
        """The 1,400 of the study: tp, stages, micro-batches and their number, and ZeRO-1, as the paper searched."""
        settings = {
            "tp": (1, 2, 4, 8, 16),
            "pp": (1, 2, 4, 8, 16, 32, 64),
            "micro_batch": (1, 2, 4, 8),
            "accum": (8, 16, 32, 64, 128),
            "zero": (0, 1),
        }
        return cls(config, world, settings)

    @cached_property
    def points(self) -> list[dict[str, Value]]:
        return [dict(zip(self.settings, point, strict=True)) for point in itertools.product(*self.settings.values())]

    def plan(self, setting: Setting) -> ParallelPlan:
        """
        Raises:
            InputError: it is no plan of this model on these ranks.
        """
        plan = ParallelPlan.fitted(self.world, **setting, recompute=self.recompute)
        return plan.check(self.config, self.world)

    def value(self, setting: Setting, simulator: StepSimulator) -> float:
        """The share of the peak, in %.

        Raises:
            InputError: it is no plan, or does not fit in memory.
        """
        plan = self.plan(setting)
        if not simulator.fits(self.config, plan):
            raise InputError(f"plan {plan} needs more memory than the {simulator.cluster.memory_bytes / 1e9:.1f} GB")
        return 100 * simulator.run(self.config, plan).share

    def fitting(self, simulator: StepSimulator) -> list[tuple[dict[str, Value], ParallelPlan]]:
        """The settings that are plans and fit in memory, which takes no simulated step to know."""
        found = []
        for setting in self.points:
            try:
                plan = self.plan(setting)
            except InputError:
                continue
            if simulator.fits(self.config, plan):
                found.append((setting, plan))
        return found

    def fits(self, simulator: StepSimulator) -> bool:
        """Whether any plan does."""
        return bool(self.fitting(simulator))

    def best(
        self, simulator: StepSimulator, among: Callable[[Setting], bool] | None = None
    ) -> tuple[dict[str, Value], float] | None:
        """The setting that has most of all that fit, or of some of them, and its share in %; None where none fits.

        It is exact: plans are simulated by what they cannot exceed, the most first, until no other can have more.
        """
        fit = [pair for pair in self.fitting(simulator) if among is None or among(pair[0])]
        bounds = [simulator.bound(self.config, plan) for _, plan in fit]
        found = None
        for i in sorted(range(len(fit)), key=lambda i: -bounds[i]):
            if found is not None and 100 * bounds[i] <= found[1]:
                break
            setting, plan = fit[i]
            share = 100 * simulator.run(self.config, plan).share
            if found is None or share > found[1]:
                found = setting, share
        return found

    def optimum(self, simulator: StepSimulator) -> float:
        """The most that any plan of the space has, in % of the peak.

        Raises:
            InputError: no plan fits in memory.
        """
        if (found := self.best(simulator)) is None:
            raise InputError(f"world is {self.world} but no plan of {self.config.name!r} fits in memory on so few")
        return found[1]

    def objective(self, simulator: StepSimulator) -> Objective:
        return lambda setting: self.value(setting, simulator)

    def all_values(self, simulator: StepSimulator) -> dict[tuple[Value, ...], float]:
        """The values of all plans that fit: the space, enumerated."""
        run = simulator.run
        fit = self.fitting(simulator)
        return {tuple(setting.values()): 100 * run(self.config, plan).share for setting, plan in fit}
