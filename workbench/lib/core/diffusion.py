"""Diffusion: noise schedules, and the steps from noise back to data. The one place for every system that draws.

At level t the noised data is x_t = s_t x_0 + g_t e with e standard normal and s_t^2 + g_t^2 = 1. A schedule says both:

    Discrete   t = 0..T-1, s_t^2 = prod_{i <= t} (1 - beta_i). beta is "linear" (Ho et al. 2020, 2006.11239), linear in
               its square root ("linear-sqrt", Rombach et al. 2022, 2112.10752), or from a squared cosine ("cosine",
               Nichol and Dhariwal 2021, 2102.09672; beta at most 0.999). diffusers calls the last two "scaled_linear"
               and "squaredcos_cap_v2".
    VP         t in [0, 1], log s_t = -t^2 (b1 - b0) / 4 - t b0 / 2 (Song et al. 2021, 2011.13456)

Clean data is t = -1 of a `Discrete` (diffusers: "set_alpha_to_one") and t = 0 of a `VP`. A model says the noise e; one
that says the score has e = -g score. A step from t to an earlier level u takes it to

    x_0 = (x_t - g_t e) / s_t
    x_u = s_u x_0 + sqrt(g_u^2 - d^2) e + d n,        d = eta (g_u / g_t) sqrt(1 - s_t^2 / s_u^2), n drawn

This is DDIM (2010.02502) at eta = 0, and at eta = 1 the ancestral step of DDPM with the smaller variance, over any
levels. With `clip`, x_0 is held in a range and e follows from it, so that eta = 1 is still the ancestral step.

Which levels: "trailing" (the default) are round(T - i T / n) - 1, and begin at the last level, where the data is gone;
"leading" are multiples of floor(T / n) from 0, and begin below it (2305.08891 has both). A step goes to the next level
of that list. diffusers' DDIMScheduler goes to t - floor(T / n) instead, which is the same where n divides T.

Tensor letters: B batch, T levels, n steps.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from workbench.errors import InputError, unknown

BETAS = {"linear": (1e-4, 0.02), "linear-sqrt": (0.0015, 0.0195), "cosine": (0.0, 0.0)}
"""First and last beta at T = 1000; the cosine has none."""
SPACINGS = ("trailing", "leading")
MOST_BETA = 0.999


@runtime_checkable
class Schedule(Protocol):
    """How much data and how much noise there is at a level."""

    def signal(self, t: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """s_t, float64."""

    def noise(self, t: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """g_t, float64."""

    def levels(self, steps: int) -> Tensor:
        """(steps + 1,) from the noisiest to clean data."""


class Discrete:
    """T levels.

    Args:
        kind: see the module's docstring.
        size: T.
        start, end: first and last beta; default those of `BETAS` times 1000 / T, so that about as little of the data
            is left at the last level whatever T is. The cosine takes none.
        spacing: which levels a sampler visits.
    """

    def __init__(
        self,
        kind: str = "linear",
        size: int = 1000,
        start: float | None = None,
        end: float | None = None,
        spacing: str = "trailing",
    ):
        if kind not in BETAS:
            raise unknown("kind", kind, BETAS)
        if spacing not in SPACINGS:
            raise unknown("spacing", spacing, SPACINGS)
        if size < 1:
            raise InputError(f"size is {size} but must be at least 1")
        self.kind, self.size, self.spacing = kind, size, spacing
        if kind == "cosine":
            if start is not None or end is not None:
                raise InputError(f"start and end are {start} and {end} but the cosine schedule has none")
            at = [math.cos((i / size + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(size + 1)]
            betas = [min(1 - after / before, MOST_BETA) for before, after in pairwise(at)]
            self.betas = torch.tensor(betas, dtype=torch.float64)
        else:
            start = BETAS[kind][0] * 1000 / size if start is None else start
            end = BETAS[kind][1] * 1000 / size if end is None else end
            if not 0 < start <= end < 1:
                raise InputError(f"start and end are {start} and {end} but must satisfy 0 < start <= end < 1")
            power = 2 if kind == "linear-sqrt" else 1
            ends = (start ** (1 / power), end ** (1 / power))
            self.betas = torch.linspace(*ends, size, dtype=torch.float64) ** power
        self.alpha_bar = (1 - self.betas).cumprod(0)
        self._signal = torch.cat([self.alpha_bar, self.alpha_bar.new_ones(1)])  # clean data is at -1

    def signal(self, t: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self._at(t).sqrt()

    def noise(self, t: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        return (1 - self._at(t)).sqrt()

    def levels(self, steps: int) -> Tensor:
        if not 1 <= steps <= self.size:
            raise InputError(f"steps is {steps} but must be 1 to {self.size}, the levels of the schedule")
        if self.spacing == "trailing":
            found = [round(self.size - i * self.size / steps) - 1 for i in range(steps)]
        else:
            found = [i * (self.size // steps) for i in reversed(range(steps))]
        return torch.tensor([*found, -1])

    def _at(self, t: Tensor) -> Tensor:
        if t.is_floating_point() or t.is_complex():
            raise InputError(f"t is {t.dtype} but the levels of a discrete schedule are whole numbers")
        if t.numel() and not (int(t.min()) >= -1 and int(t.max()) < self.size):
            raise InputError(f"t is {int(t.min())} to {int(t.max())} but must be -1 (clean data) to {self.size - 1}")
        return self._signal.to(t.device)[t]


@dataclass(frozen=True)
class VP:
    """Continuous levels; see the module's docstring.

    Args:
        b0, b1: rates at t = 0 and t = 1.
        first: the lowest level that a sampler visits before clean data.
    """

    b0: float = 0.1
    b1: float = 20.0
    first: float = 0.02

    def __post_init__(self):
        if not 0 < self.b0 <= self.b1 < math.inf:
            raise InputError(f"b0 and b1 are {self.b0} and {self.b1} but must satisfy 0 < b0 <= b1")
        if not 0 < self.first < 1:
            raise InputError(f"first is {self.first} but must be between 0 and 1")

    def signal(self, t: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self._log(t).exp()

    def noise(self, t: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        return (-torch.expm1(2 * self._log(t))).sqrt()

    def levels(self, steps: int) -> Tensor:
        if steps < 1:
            raise InputError(f"steps is {steps} but must be at least 1")
        return torch.cat([torch.linspace(1, self.first, steps, dtype=torch.float64), torch.zeros(1).double()])

    def _log(self, t: Tensor) -> Tensor:
        t = t.double()
        if not bool(((t >= 0) & (t <= 1)).all()):
            raise InputError(f"t is {float(t.min())} to {float(t.max())} but must be 0 (clean data) to 1")
        return -t.square() * (self.b1 - self.b0) / 4 - t * self.b0 / 2


def add_noise(
    schedule: Schedule,
    x: Float[Tensor, "batch ..."],
    noise: Float[Tensor, "batch ..."],
    t: Tensor,
) -> Float[Tensor, "batch ..."]:
    """s_t x + g_t noise, row by row: t is (B,)."""
    if noise.shape != x.shape or t.shape != x.shape[:1]:
        raise InputError(
            f"noise and t are {tuple(noise.shape)} and {tuple(t.shape)} but must be {tuple(x.shape)} and {(len(x),)}"
        )
    signal, noisy = (_like(part(t), x) for part in (schedule.signal, schedule.noise))
    return signal * x + noisy * noise


def step(
    schedule: Schedule,
    x: Float[Tensor, "batch ..."],
    predicted: Float[Tensor, "batch ..."],
    t: Tensor,
    to: Tensor,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    clip: float | None = None,
) -> Float[Tensor, "batch ..."]:
    """From level t to an earlier one, with the noise that a model predicts.

    Args:
        t, to: one level each, as in `Schedule.levels`.
        eta: 0 for DDIM, 1 for the ancestral step of DDPM.
        generator: of what is drawn; needed if eta is above 0. Else nothing is drawn, nor in the step to clean data.
        clip: hold x_0 between -clip and clip.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta is {eta} but must be 0 to 1")
    if eta and generator is None:
        raise InputError(f"eta is {eta} but a generator must be given to draw from")
    if clip is not None and not clip > 0:
        raise InputError(f"clip is {clip} but must be above 0")
    if predicted.shape != x.shape:
        raise InputError(f"predicted is {tuple(predicted.shape)} but must be {tuple(x.shape)}, as x")
    if t.numel() != 1 or to.numel() != 1 or not float(to) < float(t):
        raise InputError(f"to is {to.tolist()} but must be one level below t, which is {t.tolist()}")
    s, g, s_to, g_to = (float(part(level)) for level in (t, to) for part in (schedule.signal, schedule.noise))
    clean = (x - g * predicted) / s
    if clip is not None:
        clean = clean.clamp(-clip, clip)
        predicted = (x - s * clean) / g
    drawn = eta * g_to / g * math.sqrt(max(0.0, 1 - (s / s_to) ** 2))
    found = s_to * clean + math.sqrt(max(0.0, g_to**2 - drawn**2)) * predicted
    if drawn:
        found = found + drawn * _randn(x.shape, x, generator)
    return found


def guided(
    null: Float[Tensor, "batch ..."], conditional: Float[Tensor, "batch ..."], weight: float
) -> Float[Tensor, "batch ..."]:
    """null + weight (conditional - null): no classifier (2207.12598). Weights 0 and 1 give the two bit for bit."""
    if not math.isfinite(weight):
        raise InputError(f"weight is {weight} but must be finite")
    return torch.lerp(null, conditional, weight)


def path(
    predict: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
    schedule: Schedule,
    steps: int,
    generator: torch.Generator,
    eta: float = 0.0,
    clip: float | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(level, x) from pure noise to clean data; n + 1 pairs. See `sample`."""
    levels = schedule.levels(steps)
    x = torch.randn(tuple(shape), generator=generator, device=generator.device)
    yield levels[0], x
    for t, to in pairwise(levels):
        with torch.no_grad():
            predicted = predict(x, t.to(x.device).expand(shape[0]))
        x = step(schedule, x, predicted, t, to, eta, generator, clip)
        yield to, x


def sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
    schedule: Schedule,
    steps: int,
    generator: torch.Generator,
    eta: float = 0.0,
    clip: float | None = None,
) -> Tensor:
    """Data drawn from a model; all that is random comes from the generator, on whose device it is.

    Args:
        predict: noise of x (B, ...) at levels t (B,), which are the schedule's.
        shape: of what is drawn.
        eta, clip: as for `step`.
    """
    *_, (_, x) = path(predict, shape, schedule, steps, generator, eta, clip)
    return x


def _like(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.device, x.dtype).view(-1, *[1] * (x.ndim - 1))


def _randn(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)
