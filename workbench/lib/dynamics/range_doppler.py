"""Range-Doppler images of an OFDM frame, and what phase noise does to them: peaks, sidelobes, the floor.

Every measure is a ratio of powers, and in decibels the ratio of their means over the realisations: neither a mean of
decibels, nor a mean of ratios, which the few frames whose peak fades would rule. The main lobe reaches from null to
null of the window's own response, without its ends.

Tensor letters: R realisations, M Doppler rows, N range columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import scipy.signal
import torch
from jaxtyping import Bool, Complex128, Float64
from torch import Tensor

from workbench.errors import InputError, unknown

WINDOWS = ("rect", "hann", "chebyshev")
CHEBYSHEV_DB = 60.0
MEASURES = ("pplr", "pslr_r", "pslr_d", "islr_r", "islr_d", "isr")
"""Power of the peak over that without phase noise; along range and Doppler the highest and the summed sidelobes over
the peak and over the main lobe; the mean floor outside of every main lobe over the peak (the inverse of the SIR)."""
FINE = 64
FAINTEST = 1e-300
"""Of a ratio: an image without phase noise has sidelobes of 0, and decibels stay finite."""

Place = tuple[float, float]
"""(Doppler, range) of a target, in bins without padding."""


@dataclass(frozen=True)
class Ratio:
    """Powers of each realisation: `over` in the numerator, `under` in the denominator."""

    over: Float64[Tensor, " R"]
    under: Float64[Tensor, " R"]

    @property
    def each(self) -> Float64[Tensor, " R"]:
        return self.over / self.under

    @property
    def decibels(self) -> float:
        """10 log10 of the ratio of the means."""
        return 10 * math.log10(max(float(self.over.mean() / self.under.mean()), FAINTEST))


def window(name: str, length: int) -> Float64[Tensor, " length"]:
    """A symmetric window of mean 1, so that the peak of a target is its gain."""
    if name not in WINDOWS:
        raise unknown("window", name, WINDOWS)
    kind = {"rect": "boxcar", "hann": "hann", "chebyshev": ("chebwin", CHEBYSHEV_DB)}[name]
    values = torch.from_numpy(scipy.signal.get_window(kind, length, fftbins=name != "chebyshev")).double()
    return values / values.mean()


def half_lobe(name: str, length: int) -> float:
    """From the peak of a window's response to its first null, in bins without padding."""
    response = torch.fft.rfft(window(name, length), length * FINE).abs()
    rises = (response[1:] > response[:-1]).nonzero()
    return float(rises[0, 0]) / FINE if len(rises) else float(length)


def range_doppler(
    channel: Complex128[Tensor, "*R M N"], range_window: str = "rect", doppler_window: str = "rect", pad: int = 1
) -> Complex128[Tensor, "*R pM pN"]:
    """The image of a channel: a transform over symbols, its inverse over subcarriers, each `pad` times as fine.

    A target of gain a, in the middle of a cell, has the value a there.
    """
    if pad < 1:
        raise InputError(f"pad is {pad} but must be at least 1")
    m, n = channel.shape[-2:]
    # A window over subcarriers follows their frequencies, which the transform has in another order.
    over_range = torch.fft.ifftshift(window(range_window, n))
    weighted = channel * window(doppler_window, m)[:, None] * over_range
    if pad > 1:
        centred = torch.fft.fftshift(weighted, dim=-1)
        margin = torch.zeros(*centred.shape[:-1], n * (pad - 1), dtype=centred.dtype)
        weighted = torch.cat([centred, margin], dim=-1).roll(-(n // 2), dims=-1)
    return torch.fft.fft(torch.fft.ifft(weighted, dim=-1), n=m * pad, dim=-2) * (pad / m)


def main_lobe(centre: float, half: float, bins: int, pad: int) -> Bool[Tensor, " bins"]:
    """Which of the bins of a padded axis lie strictly between the nulls around `centre`."""
    away = torch.arange(bins, dtype=torch.float64) / pad - centre
    period = bins / pad
    return (away - period * (away / period).round()).abs() < half - 1e-9


def image_measures(
    image: Complex128[Tensor, "R pM pN"],
    reference: Complex128[Tensor, "..."],
    places: Sequence[Place],
    range_window: str = "rect",
    doppler_window: str = "rect",
    pad: int = 1,
) -> dict[str, Ratio]:
    """`MEASURES` of the first target, at the cell where it is and not at the highest one.

    Args:
        reference: the image of the same frames without phase noise.
        places: of all targets; the floor is what is outside of the main lobes of all.
    """
    if image.shape != reference.shape:
        raise InputError(f"reference has shape {tuple(reference.shape)} but image has {tuple(image.shape)}")
    if not places:
        raise InputError("places is empty but must have at least one")
    power = image.abs().square()
    rows, columns = power.shape[-2:]
    halves = half_lobe(doppler_window, rows // pad), half_lobe(range_window, columns // pad)
    lobes = [
        (main_lobe(doppler, halves[0], rows, pad), main_lobe(delay, halves[1], columns, pad))
        for doppler, delay in places
    ]
    row, column = round(places[0][0] * pad) % rows, round(places[0][1] * pad) % columns
    peak = power[:, row, column]
    outside = ~torch.stack([a[:, None] & b for a, b in lobes]).any(0)
    found = {"pplr": Ratio(peak, reference[:, row, column].abs().square())}
    for axis, cut, lobe in (("r", power[:, row], lobes[0][1]), ("d", power[:, :, column], lobes[0][0])):
        found[f"pslr_{axis}"] = Ratio(cut[:, ~lobe].amax(-1), peak)
        found[f"islr_{axis}"] = Ratio(cut[:, ~lobe].sum(-1), cut[:, lobe].sum(-1))
    return found | {"isr": Ratio(power[:, outside].mean(-1), peak)}


def stands_out(
    image: Complex128[Tensor, "R M N"], place: Place, others: Sequence[Place], by_db: float = 10.0, reach: int = 8
) -> Bool[Tensor, " R"]:
    """Whether a target exceeds the mean floor near it along Doppler, `reach` rows to either side, by so many decibels.

    Of an image without padding and under rectangular windows: the cells of all targets are not of the floor.
    """
    rows, columns = image.shape[-2:]
    row, column = (round(at) % bins for at, bins in zip(place, (rows, columns), strict=True))
    taken = {round(at[0]) % rows for at in [place, *others] if round(at[1]) % columns == column}
    near = [r % rows for r in range(row - reach, row + reach + 1) if r % rows not in taken]
    cut = image[:, :, column].abs().square()
    return cut[:, row] > 10 ** (by_db / 10) * cut[:, near].mean(-1)
