"""Singular spectra of weights, updates and gradients, and the ranks and norms drawn from them over time."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from workbench.figures.theme import band_shape, blank, mark_step, null_line, rgba, text, theme_named

OBJECTS = ("weight", "update", "gradient")
"""What a spectrum is taken of; each has its colour in every figure here, and others have the colours behind these."""


def _lines(theme: str, names: Iterable[str]) -> dict[str, dict]:
    """Colour and dash by name: where there are more others than colours, the next ones are dashed."""
    palette = theme_named(theme).cycle
    found = {name: {"color": colour} for name, colour in zip(OBJECTS, palette, strict=False)}
    left = palette[len(OBJECTS) :]
    for place, name in enumerate(name for name in names if name not in OBJECTS):
        again, colour = divmod(place, len(left))
        found[name] = {"color": left[colour], "dash": ("solid", "dashdot", "longdash")[min(again, 2)]}
    return found


def _short(name: str) -> str:
    """The gradient of one part in a legend beside a small plot, where it stands below "gradient"."""
    return f"· {name.removeprefix('gradient, ')}" if name.startswith("gradient, ") else name


def spectrum(
    values: Mapping[str, np.ndarray],
    *,
    n: int | None = None,
    null: np.ndarray | None = None,
    first: np.ndarray | None = None,
    theme: str = "light",
    title: str = "Singular spectrum",
    floor: float | None = None,
) -> go.Figure:
    """Normalised spectra sigma_k / sigma_1 against k / n on a log axis.

    ``values`` maps "weight", "update", "gradient" to descending singular values (n,); ``first`` is the weight spectrum
    of the first record. ``n`` is the shorter side of the matrix, if a spectrum holds fewer values. ``null`` (n,) is the
    Marchenko-Pastur curve: an i.i.d. random matrix of the same shape.
    ``floor`` is the lower end of the y axis.
    """
    colours = theme_named(theme)
    figure = blank(theme, title, "σₖ ÷ σ₁ · dashed = random matrix of its shape", x="k ÷ n", y="σₖ ÷ σ₁ (log)")

    def line(sigma: np.ndarray, name: str, **look) -> None:
        sigma = np.asarray(sigma, dtype=np.float64)
        top = sigma[0] if len(sigma) and sigma[0] > 0 else np.nan
        share = np.where(sigma > 0, sigma, np.nan) / top
        figure.add_trace(
            go.Scatter(
                x=np.arange(1, len(sigma) + 1) / max(n or len(sigma), 1),
                y=share.astype(np.float32),
                name=text(name),
                mode="lines+markers" if len(sigma) <= 16 else "lines",
                line=look,
                marker={"size": 4},
                hovertemplate=f"{text(name)}<br>k/n = %{{x:.3f}}<br>σₖ/σ₁ = <b>%{{y:.3g}}</b><extra></extra>",
            )
        )

    looks = _lines(theme, values)
    if first is not None:
        line(first, "weight at first", color=rgba(looks["weight"]["color"], 0.45), width=1.4, dash="dot")
    for name, sigma in values.items():
        line(sigma, name, **looks[name], width=2)
    if null is not None:
        line(null, "Marchenko–Pastur", color=colours.null, width=1.5, dash="dash")
    figure.update_yaxes(type="log", tickformat="~g", dtick=1)
    if floor is not None:
        figure.update_yaxes(range=[np.log10(floor), 0.08])
    figure.update_xaxes(range=[0, 1.01])
    return figure


def spectrum_floor(*spectra: np.ndarray) -> float:
    """A lower end for the log axis that fits all spectra but ignores rounding noise: within 1e-6 .. 0.1 of sigma_1."""
    lows = [np.min(s[s > 0]) / s[0] for s in map(np.asarray, spectra) if len(s) and s[0] > 0]
    return float(np.clip(0.7 * min(lows, default=0.1), 1e-6, 0.1))


@dataclass(frozen=True)
class SpectralMeasure:
    """How one measure of a spectrum is drawn over time."""

    title: str
    subtitle: str
    unit: str
    log: bool


MEASURES = {
    "effective_rank": SpectralMeasure("Effective rank", "exp(entropy of σ) ÷ n", "share of n", False),
    "stable_rank": SpectralMeasure("Stable rank", "‖W‖²_F ÷ σ₁² ÷ n", "share of n", False),
    "rms_norm": SpectralMeasure(
        "RMS operator norm", "σ₁ √(in ÷ out) · band = 0.5–2 × first weight", "RMS gain (log)", True
    ),
    "update_norm": SpectralMeasure(
        "Size of a step", "RMS norm ÷ rate · band = 0.5–2 × first", "RMS gain ÷ rate (log)", True
    ),
}


def rank_lines(
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    measure: str = "effective_rank",
    null: float | None = None,
    of: str = "n",
    band: tuple[float, float] | None = None,
    theme: str = "light",
    title: str | None = None,
    step: float | None = None,
    limits: tuple[float, float] | None = None,
) -> go.Figure:
    """One measure of `MEASURES` over time, a line for each of weight, update and gradient.

    ``series`` maps the object to (steps (S,), values (S,)). ``null`` is the value of a random matrix of the same
    shape, ``of`` what ranks are shares of, "n" or "r", ``band`` an interval to stay in, ``limits`` the y axis (in the
    measure's own unit, also on a log axis).
    """
    look = MEASURES[measure]
    subtitle, unit = look.subtitle.replace("÷ n", f"÷ {of}"), look.unit.replace("of n", f"of {of}")
    figure = blank(theme, title or look.title, subtitle, x="step", y=unit)
    looks = _lines(theme, series)
    for name, (steps, values) in series.items():
        steps, values = np.asarray(steps), np.asarray(values, dtype=np.float64)
        figure.add_trace(
            go.Scatter(
                x=steps,
                y=values.astype(np.float32),
                name=text(_short(name)),
                mode="lines+markers" if len(steps) < 3 else "lines",
                line=looks[name] | {"width": 1.9},
                hovertemplate=f"{text(name)} · step %{{x}}<br><b>%{{y:.4g}}</b><extra></extra>",
            )
        )
    if band is not None:
        figure.add_shape(band_shape(theme, *band))
    if null is not None:
        null_line(figure, theme, null, f"random matrix {null:.2f}")
    mark_step(figure, theme, step)
    if look.log:
        figure.update_yaxes(type="log", tickformat="~g", dtick=1)
    if limits is not None:
        figure.update_yaxes(range=[np.log10(v) for v in limits] if look.log else list(limits))
    return figure
