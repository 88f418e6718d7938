"""Trajectories of six dynamical systems, each in environments that differ in one parameter; integrated here.

lotka-volterra  prey and predators         x' = x (a - y / 2), y' = y (x / 2 - 1/2)              a  0.5 to 1.5
pendulum        angle and its rate         x' = y, y' = -a sin x - y / 10                        a  1 to 3
duffing         a damped double well       x' = y, y' = a x - x^3 - y / 5                        a  0.5 to 1.5
van-der-pol     a relaxation oscillator    x' = y, y' = a (1 - x^2) y - x                        a  0.5 to 2.5
glycolysis      Selkov's oscillator        x' = -x + 0.1 y + x^2 y, y' = a - 0.1 y - x^2 y       a  0.4 to 0.9
lorenz          chaos (three variables)    x' = 10 (y - x), y' = x (a - z) - y, z' = x y - 8/3 z a  24 to 32
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version

import numpy as np
import torch

from workbench.errors import InputError, unknown
from workbench.lib.data.cache import Parsed, cached
from workbench.lib.data.sets import SETS
from workbench.lib.data.splits import digest
from workbench.lib.data.types import Trajectories

ENVIRONMENTS, TRAJECTORIES, POINTS = 13, 32, 40
ACCURACY = 1e-8
"""Relative and absolute tolerance of the integrator (DOP853), far below a float32's share of a state of size 1."""


@dataclass(frozen=True)
class Family:
    """`field(state (dim, n), parameter)` gives its rate; `low`, `high` bound the state at the start; `span` in time."""

    field: Callable[[np.ndarray, float], Sequence[np.ndarray]]
    parameter: tuple[float, float]
    low: tuple[float, ...]
    high: tuple[float, ...]
    span: float


FAMILIES = {
    "lotka-volterra": Family(
        lambda s, a: (s[0] * (a - s[1] / 2), s[1] * (s[0] / 2 - 0.5)), (0.5, 1.5), (0.5, 0.5), (2.5, 2.5), 12.0
    ),
    "pendulum": Family(lambda s, a: (s[1], -a * np.sin(s[0]) - s[1] / 10), (1.0, 3.0), (-2.5, -1.0), (2.5, 1.0), 10.0),
    "duffing": Family(lambda s, a: (s[1], a * s[0] - s[0] ** 3 - s[1] / 5), (0.5, 1.5), (-1.5, -1.0), (1.5, 1.0), 12.0),
    "van-der-pol": Family(
        lambda s, a: (s[1], a * (1 - s[0] ** 2) * s[1] - s[0]), (0.5, 2.5), (-2.0, -2.0), (2.0, 2.0), 12.0
    ),
    "glycolysis": Family(
        lambda s, a: (-s[0] + 0.1 * s[1] + s[0] ** 2 * s[1], a - 0.1 * s[1] - s[0] ** 2 * s[1]),
        (0.4, 0.9),
        (0.3, 0.5),
        (1.5, 2.5),
        16.0,
    ),
    "lorenz": Family(
        lambda s, a: (10 * (s[1] - s[0]), s[0] * (a - s[2]) - s[1], s[0] * s[1] - 8 / 3 * s[2]),
        (24.0, 32.0),
        (-10.0, -10.0, 15.0),
        (10.0, 10.0, 35.0),
        5.0,
    ),
}
"""By name. The first five have two variables."""


def load(families: Sequence[str] = tuple(FAMILIES)) -> Trajectories:
    """32 trajectories of 40 points in each of 13 environments of these families, from random starts.

    The parameter of an environment is drawn by its digest, uniformly; so environments can be held out by number.

    Raises:
        InputError: a family is unknown, twice, or there is none.
    """
    if not families or len(set(families)) < len(families):
        raise InputError(f"families is {tuple(families)} but must name at least one, each once")
    for family in families:
        if family not in FAMILIES:
            raise unknown("family", family, FAMILIES)
    parts = {family: cached(f"dynamics-{family}", version("scipy"), lambda f=family: _family(f)) for family in families}
    return Trajectories(
        "dynamics",
        tuple(families),
        *(
            {family: tensors[key] for family, (tensors, _) in parts.items()}
            for key in ("states", "parameters", "times")
        ),
        {family: manifest for family, (_, manifest) in parts.items()},
    )


def integrate(family: str, parameter: float, starts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """States (n, points, dim) at `times` from starts (n, dim), the n trajectories together."""
    from scipy.integrate import solve_ivp

    shape = starts.T.shape
    field = FAMILIES[family].field

    def rate(_: float, state: np.ndarray) -> np.ndarray:
        return np.stack(field(state.reshape(shape), parameter)).ravel()

    found = solve_ivp(
        rate, (0, times[-1]), starts.T.ravel(), method="DOP853", t_eval=times, rtol=ACCURACY, atol=ACCURACY
    )
    return found.y.reshape(*shape, len(times)).transpose(1, 2, 0)


def _family(name: str) -> Parsed:
    family = FAMILIES[name]
    (least, most), low, high = family.parameter, np.array(family.low), np.array(family.high)
    times = np.linspace(0, family.span, POINTS)
    states, parameters = [], []
    for environment in range(ENVIRONMENTS):
        # numpy's old generator: its stream is frozen (NEP 19), so the set never changes
        random = np.random.RandomState(digest(f"dynamics/{name}/{environment}") % 2**32)
        parameters.append(least + (most - least) * random.rand())
        starts = low + (high - low) * random.rand(TRAJECTORIES, len(low))
        states.append(integrate(name, parameters[-1], starts, times))
    tensors = {"states": np.stack(states), "parameters": np.array(parameters), "times": times}
    tensors = {key: torch.from_numpy(x.astype(np.float32)).contiguous() for key, x in tensors.items()}
    manifest = {
        "source": "integrated here by scipy",
        "version": version("scipy"),
        "licence": SETS["dynamics"].licence,
        "sha256": sha256(tensors["states"].numpy().tobytes()).hexdigest(),
        "environments": ENVIRONMENTS,
        "splits": {"every environment": TRAJECTORIES},
    }
    return tensors, manifest
