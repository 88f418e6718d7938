"""OFDM that communicates and senses under phase noise: frame, channel, receiver (Giroto de Oliveira et al. 2024).

    config = OFDMConfig(n_sub=256, n_sym=128, cp=64, df=120e3, order=4)
    frame = sense(config, [Target(delay=16)], Wiener(200.0), "independent", realisations=50, generator=generator)
    image = range_doppler(estimate(frame.received, frame.sent))          # (50, 128, 256), complex
    corrected = correct_cpe(frame.received, frame.sent)                  # turned back, symbol by symbol

The phase noise turns every sample of the received signal, not every symbol: within a symbol it mixes the subcarriers.
With one oscillator ("shared", a monostatic radar) only what changed within the echo's delay is left; with two
("independent", bistatic) the receiver's own noise is common to all targets. Images and their measures are in
`range_doppler`, what is known in closed form in `expected`.

Tensor letters: R realisations, M symbols, N subcarriers, P targets, L samples of a frame.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Complex128, Float64
from torch import Tensor

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.dynamics.expected import residual_sir, seen_phase, symbol_interference
from workbench.lib.dynamics.phase_noise import PhaseNoise, Pll, PoleZero, White, Wiener, above_zero
from workbench.lib.dynamics.range_doppler import image_measures, range_doppler

METHOD = Method(
    slug="ofdm-isac",
    title="On the Sensing Performance of OFDM-based ISAC under the Influence of Oscillator Phase Noise",
    family="dynamics",
    year=2024,
    paper="arXiv, October 2024",
    claim="Phase noise lowers target peaks and raises sidelobes, mostly along Doppler, and masks weak targets.",
    objects=("sense", "OFDMConfig", "Target", "estimate", "correct_cpe", "correct_exactly", "evm"),
    kind="simulator",
)

__all__ = ["Pll", "PoleZero", "White", "Wiener", *METHOD.objects]

ORDERS = (4, 16, 64, 256)
ARCHITECTURES = ("shared", "independent")
ESTIMATES = ("zero_forcing", "matched")


def example() -> Callable[[int], dict[str, Any]]:
    """seed -> what a small bistatic frame measures before and after correction, in decibels."""

    def simulate(seed: int) -> dict[str, Any]:
        config, noise = OFDMConfig(n_sub=64, n_sym=32, cp=16), Wiener(200.0)
        target = Target(delay=5)
        generator = torch.Generator().manual_seed(seed)
        frame = sense(config, [target], noise, "independent", realisations=20, generator=generator)
        reference = range_doppler(estimate(frame.clean, frame.sent))
        found: dict[str, Any] = {"frame_seconds": config.frame_seconds}
        for name in ("uncorrected", "corrected"):
            received = frame.received if name == "uncorrected" else correct_cpe(frame.received, frame.sent)
            measures = image_measures(range_doppler(estimate(received, frame.sent)), reference, config.place([target]))
            found[name] = {measure: ratio.decibels for measure, ratio in measures.items()}
        structure = seen_phase(config, noise, "independent", delay=5)
        found["expected_sir"] = residual_sir(config, symbol_interference(config, structure), config.order)
        return found

    return simulate


@dataclass(frozen=True)
class OFDMConfig:
    """A frame of `n_sym` symbols on `n_sub` subcarriers `df` Hz apart, each led by `cp` samples of its own end.

    Subcarriers are numbered -n_sub/2 ... from the carrier, and stored in the order of the transform. `order` is how
    many points the square constellation has, of unit mean power.
    """

    n_sub: int = 256
    n_sym: int = 128
    cp: int = 64
    df: float = 120e3
    order: int = 4

    def __post_init__(self):
        for name, least in {"n_sub": 2, "n_sym": 2, "cp": 0}.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)} but must be at least {least}")
        if self.cp > self.n_sub:
            raise InputError(f"cp is {self.cp} but must be at most n_sub, {self.n_sub}: it repeats a symbol's own end")
        above_zero(df=self.df)
        if self.order not in ORDERS:
            raise unknown("order", self.order, map(str, ORDERS))

    @property
    def fs(self) -> float:
        """Samples a second."""
        return self.n_sub * self.df

    @property
    def length(self) -> int:
        """Samples of a frame."""
        return self.n_sym * (self.n_sub + self.cp)

    @property
    def frame_seconds(self) -> float:
        return self.length / self.fs

    @property
    def doppler_bin(self) -> float:
        """Hz from one row of an image to the next."""
        return 1 / self.frame_seconds

    def place(self, targets: Sequence["Target"]) -> list[tuple[float, float]]:
        """Where targets are in an image: (Doppler, range), in bins without padding."""
        return [(target.doppler * self.frame_seconds, target.delay) for target in targets]


@dataclass(frozen=True)
class Target:
    """An echo: its delay in samples (whole or not), its Doppler shift in Hz, its amplitude."""

    delay: float
    doppler: float = 0.0
    gain: complex = 1.0


@dataclass(frozen=True)
class Frame:
    """What was sent and what came back.

    Attributes:
        sent: the symbols; received: the same cells after the receiver's transform; clean: received with the same noise
            of the receiver and without phase noise.
        phase: of each target, at the samples that the receiver keeps.
    """

    config: OFDMConfig
    sent: Complex128[Tensor, "R M N"]
    received: Complex128[Tensor, "R M N"]
    clean: Complex128[Tensor, "R M N"]
    phase: Float64[Tensor, "R P M N"]

    @property
    def spectra(self) -> Complex128[Tensor, "R P M N"]:
        """Of exp(j phase), symbol by symbol: [..., 0] is the common phase error, the others mix subcarriers."""
        return torch.fft.fft(torch.polar(torch.ones_like(self.phase), self.phase), norm="forward")


def sense(
    config: OFDMConfig,
    targets: Sequence[Target],
    noise: PhaseNoise | None,
    oscillators: str = "independent",
    snr_db: float | None = None,
    realisations: int = 50,
    *,
    generator: torch.Generator,
) -> Frame:
    """Send frames of random symbols and receive their echoes; all realisations at once.

    Args:
        noise: of each oscillator; None has none.
        oscillators: "shared" (monostatic: phi = theta[n - delay] - theta[n]) or "independent" (bistatic: the two terms
            are of two draws). The delay of the phase is rounded to whole samples, that of the signal is not.
        snr_db: of a target of gain 1, by sample; None is no noise of the receiver.
        generator: all the randomness.

    Raises:
        InputError: there is no target, one lies outside the frame, or an argument is out of its range.
    """
    if oscillators not in ARCHITECTURES:
        raise unknown("oscillators", oscillators, ARCHITECTURES)
    if realisations < 1:
        raise InputError(f"realisations is {realisations} but must be at least 1")
    _check(config, targets)
    sent = constellation(config.order)[
        torch.randint(config.order, (realisations, config.n_sym, config.n_sub), generator=generator)
    ]
    head = max(math.ceil(target.delay) for target in targets)
    phases = _phases(noise, oscillators, head, targets, config, realisations, generator)
    clean = torch.zeros(realisations, config.length, dtype=torch.complex128)
    turned = torch.zeros_like(clean)
    n = torch.arange(config.length, dtype=torch.float64)
    for target, phase in zip(targets, phases, strict=True):
        carrier = torch.polar(torch.ones_like(n), 2 * math.pi * target.doppler / config.fs * n)
        echo = target.gain * carrier * _delayed(sent, target.delay, config)
        clean += echo
        turned += echo * torch.polar(torch.ones_like(phase), phase)
    if snr_db is not None:
        sigma = 10 ** (-snr_db / 20)
        thermal = sigma * torch.randn(clean.shape, dtype=torch.complex128, generator=generator)
        clean, turned = clean + thermal, turned + thermal
    kept = torch.stack([_kept(phase, config) for phase in phases], dim=1)
    return Frame(config, sent, *(torch.fft.fft(_kept(y, config), norm="ortho") for y in (turned, clean)), kept)


def estimate(
    received: Complex128[Tensor, "R M N"], sent: Complex128[Tensor, "R M N"], kind: str = "zero_forcing"
) -> Complex128[Tensor, "R M N"]:
    """The channel in every cell: received / sent ("zero_forcing"), or received times conj(sent) ("matched")."""
    if kind not in ESTIMATES:
        raise unknown("kind", kind, ESTIMATES)
    return received / sent if kind == "zero_forcing" else received * sent.conj()


def correct_cpe(
    received: Complex128[Tensor, "R M N"],
    sent: Complex128[Tensor, "R M N"],
    every: int = 1,
    reference: Complex128[Tensor, "*R N"] | None = None,
) -> Complex128[Tensor, "R M N"]:
    """Turn every symbol back by its common phase error, as far as known symbols show it.

    The angle of a symbol is that of sum_k received conj(sent) conj(reference) over the known subcarriers, one in
    `every`. The `reference` channel is that of the first symbol where none is given; a target that moves turns, and
    the Doppler shift of the strongest goes with the correction.
    """
    if not 1 <= every <= received.shape[-1]:
        raise InputError(f"every is {every} but must be from 1 to the {received.shape[-1]} subcarriers")
    known = received[..., ::every] * sent[..., ::every].conj()
    if reference is None:
        reference = received[..., 0, :] / sent[..., 0, :]
    angle = (known * reference[..., None, ::every].conj()).sum(-1).angle()
    return received * torch.polar(torch.ones_like(angle), angle[..., :1] - angle)[..., None]


def correct_exactly(frame: Frame, target: int = 0) -> Complex128[Tensor, "R M N"]:
    """Turn every symbol back by the common phase error that it really has, of one target: no receiver knows it."""
    angle = frame.spectra[:, target, :, 0].angle()
    return frame.received * torch.polar(torch.ones_like(angle), -angle)[..., None]


def evm(frame: Frame, received: Complex128[Tensor, "R M N"] | None = None) -> Float64[Tensor, " R"]:
    """Error of the symbols after division by the channel of the first symbol without phase noise, relative rms."""
    channel = frame.clean[:, :1] / frame.sent[:, :1]
    found = (frame.received if received is None else received) / channel
    return ((found - frame.sent).abs().square().mean((-2, -1)) / frame.sent.abs().square().mean((-2, -1))).sqrt()


def constellation(order: int) -> Complex128[Tensor, " order"]:
    """The points of a square constellation, of unit mean power."""
    side = math.isqrt(order)
    levels = torch.arange(side, dtype=torch.float64) * 2 - (side - 1)
    points = torch.complex(*(grid.flatten() for grid in torch.meshgrid(levels, levels, indexing="ij")))
    return points / points.abs().square().mean().sqrt()


def _check(config: OFDMConfig, targets: Sequence[Target]) -> None:
    if not targets:
        raise InputError("targets is empty but must have at least one")
    for i, target in enumerate(targets):
        if not 0 <= target.delay < config.length:
            raise InputError(f"targets[{i}].delay is {target.delay} but must be from 0 to the frame's {config.length}")
        if not (math.isfinite(target.doppler) and abs(target.doppler) < config.fs / 2):
            raise InputError(f"targets[{i}].doppler is {target.doppler} but must be within half of {config.fs:g} Hz")


def _phases(noise, oscillators, head, targets, config, realisations, generator) -> list[Float64[Tensor, "R L"]]:
    """phi of each target over the whole frame."""
    length = config.length + head
    if noise is None:
        return [torch.zeros(realisations, config.length, dtype=torch.float64) for _ in targets]
    sender = noise.draw(realisations, length, config.fs, generator)
    receiver = sender if oscillators == "shared" else noise.draw(realisations, length, config.fs, generator)
    starts = [head - round(target.delay) for target in targets]
    return [sender[:, start : start + config.length] - receiver[:, head:] for start in starts]


def _delayed(sent: Complex128[Tensor, "R M N"], delay: float, config: OFDMConfig) -> Complex128[Tensor, "R L"]:
    """The sent samples after a delay: part of a sample as a turn of each subcarrier, the rest over the whole frame."""
    whole = math.floor(delay)
    subcarriers = torch.fft.fftfreq(config.n_sub, 1 / config.n_sub, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(subcarriers), -2 * math.pi * (delay - whole) / config.n_sub * subcarriers)
    symbols = torch.fft.ifft(sent * turn, norm="ortho")
    samples = torch.cat([symbols[..., config.n_sub - config.cp :], symbols], dim=-1).flatten(-2)
    return torch.cat([torch.zeros_like(samples[:, :whole]), samples[:, : config.length - whole]], dim=-1)


def _kept(samples: Tensor, config: OFDMConfig) -> Tensor:
    """(R, L) -> (R, M, N): without what leads each symbol."""
    return samples.unflatten(-1, (config.n_sym, config.n_sub + config.cp))[..., config.cp :]
