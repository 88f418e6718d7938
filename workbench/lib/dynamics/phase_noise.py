"""Phase noise of an oscillator: drawn in batches, and the variance of its increments, from which closed forms follow.

    noise = Wiener(linewidth=200.0)
    theta = noise.draw(50, 40_960, 30.72e6, generator)          # (50, 40960) radians
    noise.structure(torch.tensor([1, 320]), 30.72e6, 40_960)     # E[(theta[n] - theta[n + lag])^2]

All are Gaussian, so that E[exp(j (phi - phi'))] = exp(-structure / 2) exactly. `increments` makes of the structure of
an oscillator that of the phase which a receiver sees: with the same oscillator, delayed, or with another one.

Tensor letters: R realisations, L samples, K lags.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from workbench.errors import InputError

Structure = Callable[[Tensor], Tensor]
"""Lags (K,), whole samples of either sign -> E[(phi[n] - phi[n + lag])^2], (K,)."""


@dataclass(frozen=True)
class Wiener:
    """A free-running oscillator: independent Gaussian steps of variance 2 pi linewidth / fs, from theta[0] = 0.

    `linewidth` is the full width of the Lorentzian line at half its height, in Hz; of the convention 4 pi beta, beta is
    half of it.
    """

    linewidth: float

    def __post_init__(self):
        not_negative(linewidth=self.linewidth)

    def draw(self, batch: int, length: int, fs: float, generator: torch.Generator) -> Float64[Tensor, "R L"]:
        steps = normal(batch, length, generator).mul_(math.sqrt(2 * math.pi * self.linewidth / fs))
        steps[:, 0] = 0
        return steps.cumsum(-1)

    def structure(self, lags: Int64[Tensor, " K"], fs: float, length: int) -> Float64[Tensor, " K"]:
        return 2 * math.pi * self.linewidth / fs * lags.abs().double()


@dataclass(frozen=True)
class White:
    """Independent phases of a variance, in square radians. No oscillator is like this; its closed forms are simple."""

    variance: float

    def __post_init__(self):
        not_negative(variance=self.variance)

    def draw(self, batch: int, length: int, fs: float, generator: torch.Generator) -> Float64[Tensor, "R L"]:
        return normal(batch, length, generator).mul_(math.sqrt(self.variance))

    def structure(self, lags: Int64[Tensor, " K"], fs: float, length: int) -> Float64[Tensor, " K"]:
        return 2 * self.variance * (lags != 0).double()


class Coloured:
    """Stationary noise of a two-sided power spectral density `psd`, rad^2/Hz.

    Bins of white complex Gaussian numbers get the variance psd(f) fs / L. A draw is periodic in its L samples, and its
    covariance is exactly the inverse transform of these bins: `structure` is that of the drawn samples, not of an
    unending process. The bin at 0 has the density of the lowest frequency, fs / L.
    """

    def psd(self, f: Float64[Tensor, " F"]) -> Float64[Tensor, " F"]:
        raise NotImplementedError

    def bins(self, length: int, fs: float) -> Float64[Tensor, " F"]:
        """The density at the frequencies of a real transform of `length` samples."""
        frequencies = torch.fft.rfftfreq(length, 1 / fs, dtype=torch.float64)
        return self.psd(frequencies.clamp_(min=fs / length))

    def draw(self, batch: int, length: int, fs: float, generator: torch.Generator) -> Float64[Tensor, "R L"]:
        amplitude = (self.bins(length, fs) * fs).sqrt()
        coloured = torch.fft.rfft(normal(batch, length, generator), norm="ortho") * amplitude
        return torch.fft.irfft(coloured, length, norm="ortho")

    def structure(self, lags: Int64[Tensor, " K"], fs: float, length: int) -> Float64[Tensor, " K"]:
        covariance = torch.fft.irfft(self.bins(length, fs) * fs, length)
        return 2 * (covariance[0] - covariance[lags.abs() % length])


@dataclass(frozen=True)
class Pll(Coloured):
    """An oscillator in a phase-locked loop: a plateau `level` up to the loop's `bandwidth`, flicker, and a floor.

    psd(f) = level B^2 (1 + corner / |f|) / (B^2 + f^2) + floor, levels in rad^2/Hz, bandwidth B and corner in Hz.
    """

    level: float
    bandwidth: float
    corner: float = 0.0
    floor: float = 0.0

    def __post_init__(self):
        not_negative(level=self.level, corner=self.corner, floor=self.floor)
        above_zero(bandwidth=self.bandwidth)

    def psd(self, f: Float64[Tensor, " F"]) -> Float64[Tensor, " F"]:
        b2 = self.bandwidth**2
        return self.level * b2 * (1 + self.corner / f) / (b2 + f.square()) + self.floor


@dataclass(frozen=True)
class PoleZero(Coloured):
    """A mask of poles and zeros: psd(f) = level prod(1 + (f / zero)^2) / prod(1 + (f / pole)^2), in rad^2/Hz."""

    level: float
    zeros: Sequence[float]
    poles: Sequence[float]

    def __post_init__(self):
        not_negative(level=self.level)
        above_zero(**{f"zeros[{i}]": zero for i, zero in enumerate(self.zeros)})
        above_zero(**{f"poles[{i}]": pole for i, pole in enumerate(self.poles)})

    def psd(self, f: Float64[Tensor, " F"]) -> Float64[Tensor, " F"]:
        density = torch.full_like(f, self.level)
        for zero in self.zeros:
            density = density * (1 + (f / zero).square())
        for pole in self.poles:
            density = density / (1 + (f / pole).square())
        return density


PhaseNoise = Wiener | White | Coloured


def increments(noise: PhaseNoise, fs: float, length: int, shared: bool, delay: int) -> Structure:
    """The structure of phi[n] = theta[n - delay] - theta'[n], theta' being theta itself (`shared`) or another like it.

    Of one oscillator what changes within the delay alone is left: without a delay phi is 0.
    """

    def of(lags: Tensor) -> Tensor:
        structure = noise.structure(lags, fs, length)
        if not shared:
            return 2 * structure
        apart = noise.structure(torch.tensor([delay]), fs, length)
        nearer, farther = (noise.structure(lags + shift, fs, length) for shift in (-delay, delay))
        return 2 * (structure + apart) - nearer - farther

    return of


def seen_density(
    density: Float64[Tensor, "*R F"], f: Float64[Tensor, " F"], delay_seconds: float | None
) -> Float64[Tensor, "*R F"]:
    """The density of the phase that is seen: 4 sin^2(pi f delay) S(f) of one oscillator, 2 S(f) of two (delay None).

    One oscillator is quieter where |f| delay < 1/4, and up to 3 dB noisier above.
    """
    return 2 * density if delay_seconds is None else 4 * (math.pi * f * delay_seconds).sin().square() * density


def normal(batch: int, length: int, generator: torch.Generator) -> Float64[Tensor, "R L"]:
    return torch.randn(batch, length, dtype=torch.float64, generator=generator)


def not_negative(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} is {value} but must be a finite number, 0 or above")


def above_zero(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} is {value} but must be a finite number above 0")
