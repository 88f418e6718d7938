"""What is known of a single resting target under Gaussian phase noise without drawing it.

All follow from the structure of the seen phase, D(lag) = E[(phi[n] - phi[n + lag])^2] (`seen_phase`), for
zero forcing, rectangular windows, independent symbols and a delay within the cyclic prefix. kappa = E[1 / |X|^2] is
what dividing by the symbols makes of the power that leaked between subcarriers.

Tensor letters: M symbols, N subcarriers.
"""

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float64
from torch import Tensor

from workbench.lib.dynamics.phase_noise import PhaseNoise, Structure, increments

if TYPE_CHECKING:
    from workbench.lib.dynamics.ofdm_isac import OFDMConfig


def seen_phase(config: "OFDMConfig", noise: PhaseNoise, oscillators: str, delay: int) -> Structure:
    """The structure of the phase of one target, `delay` whole samples away, as `sense` draws it."""
    return increments(noise, config.fs, config.length + delay, oscillators == "shared", delay)


def coherence(config: "OFDMConfig", structure: Structure) -> Float64[Tensor, " M"]:
    """E[c_m conj(c_(m + d))] at each distance d, c being the mean of exp(j phi) over the samples of a symbol."""
    within = torch.arange(1 - config.n_sub, config.n_sub)
    weights = (config.n_sub - within.abs()).double() / config.n_sub**2
    lags = torch.arange(config.n_sym)[:, None] * (config.n_sub + config.cp) + within
    return (structure(lags.flatten()).view_as(lags).mul(-0.5).exp() * weights).sum(-1)


def symbol_interference(config: "OFDMConfig", structure: Structure) -> float:
    """The part of a symbol's power that leaks between subcarriers; the rest has a common phase."""
    return 1 - float(coherence(config, structure)[0])


def doppler_cut(config: "OFDMConfig", structure: Structure, order: int) -> Float64[Tensor, " M"]:
    """E[power] of a unit target along Doppler, its own cell first: common phase errors smear it, the rest is flat."""
    of = coherence(config, structure)
    weighted = of * (config.n_sym - torch.arange(config.n_sym)).double() / config.n_sym**2
    smeared = 2 * torch.fft.fft(weighted).real - weighted[0]
    return smeared + kappa(order) * (1 - of[0]) / (config.n_sub * config.n_sym)


def residual_sir(config: "OFDMConfig", interference: float, order: int) -> float:
    """Signal to interference of the image once common phase errors are gone, in decibels."""
    cells = config.n_sub * config.n_sym
    return 10 * math.log10(cells * (1 - interference) / (kappa(order) * interference))


def white_peak(variance: float, cells: int) -> float:
    """The peak's share of power under independent phases of a variance."""
    return math.exp(-variance) + (1 - math.exp(-variance)) / cells


def wiener_interference(linewidths: float, df: float) -> float:
    """About what leaks of a symbol under a Wiener phase, `linewidths` being the sum over both oscillators."""
    return math.pi * linewidths / (3 * df)


def doppler_interference(doppler: float, df: float) -> float:
    """About what leaks of a symbol because its target moves, without any phase noise."""
    return (math.pi * doppler / df) ** 2 / 3


def kappa(order: int) -> float:
    """E[1 / |X|^2] of a square constellation of unit mean power."""
    side = math.isqrt(order)
    levels = [2 * i - (side - 1) for i in range(side)]
    powers = [a * a + b * b for a in levels for b in levels]
    return sum(powers) / order * sum(1 / power for power in powers) / order
