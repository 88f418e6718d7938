"""The loss of a run: training and validation, per domain."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from workbench.figures.theme import blank, mark_step, null_line, rgba, text, theme_named


def loss_curve(
    steps: np.ndarray,
    train: np.ndarray,
    *,
    valid: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    events: Sequence[tuple[int, str]] = (),
    unit: str = "bits/byte",
    null: float | None = None,
    null_name: str = "uniform guess",
    theme: str = "light",
    title: str = "Loss",
    step: float | None = None,
    limits: tuple[float, float] | None = None,
) -> go.Figure:
    """Training loss (thin: each record, thick: running mean) and validation loss, overall and per domain.

    ``steps`` and ``train`` (S,); ``valid`` maps "all" or a domain to (steps (V,), values (V,)); everything in ``unit``.
    ``events`` are (step, what happened), drawn as triangles at the bottom. ``null`` is the loss of a model that has
    learned nothing, drawn where it lies on the axis.
    """
    colours = theme_named(theme)
    figure = blank(
        theme, title, f"{text(unit)}, lower is better{' · dots = validation' if valid else ''}", x="step", y=unit
    )
    steps, train = np.asarray(steps), np.asarray(train, dtype=np.float64)
    hover = f"step %{{x}}<br><b>%{{y:.3f}}</b> {text(unit)}<extra></extra>"
    figure.add_trace(
        go.Scatter(
            x=steps,
            y=train.astype(np.float32),
            mode="lines",
            line={"color": rgba(colours.muted, 0.45), "width": 1},
            hoverinfo="skip",
            showlegend=False,
        )
    )
    figure.add_trace(
        go.Scatter(
            x=steps,
            y=running_mean(train).astype(np.float32),
            name="train",
            mode="lines+markers" if len(steps) < 3 else "lines",
            line={"color": colours.muted, "width": 2.2},
            hovertemplate="train, smoothed · " + hover,
        )
    )
    _validation(figure, theme, valid or {}, unit)
    low, high = limits or loss_limits(train, *(values for _, values in (valid or {}).values()), null=null)
    figure.update_yaxes(range=[low, high])
    if null is not None and low < null < high:
        null_line(figure, theme, null, f"{null_name} {null:.3g}")
    if events:
        figure.add_trace(
            go.Scatter(
                x=[at for at, _ in events],
                y=[low + 0.02 * (high - low)] * len(events),
                name="commands",
                mode="markers",
                marker={"symbol": "triangle-up", "size": 9, "color": colours.accent},
                text=[text(what) for _, what in events],
                hovertemplate="step %{x}<br><b>%{text}</b><extra></extra>",
            )
        )
    mark_step(figure, theme, step)
    return figure


def validation_curves(
    valid: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    unit: str,
    null: float | None = None,
    null_name: str = "uniform guess",
    theme: str = "light",
    title: str = "Validation by domain",
    step: float | None = None,
    limits: tuple[float, float] | None = None,
) -> go.Figure:
    """The validation metric of each domain; ``valid`` maps a domain to (steps (V,), values (V,)) in ``unit``.

    ``null`` is drawn where it lies within ``limits``.
    """
    figure = blank(theme, title, f"{text(unit)}, on held-out data", x="step", y=unit)
    _validation(figure, theme, valid, unit)
    low, high = limits or loss_limits(*(values for _, values in valid.values()), null=null)
    figure.update_yaxes(range=[low, high])
    if null is not None and low < null < high:
        null_line(figure, theme, null, f"{null_name} {null:.3g}")
    mark_step(figure, theme, step)
    return figure


def scalar_line(
    steps: np.ndarray,
    values: np.ndarray,
    *,
    title: str,
    subtitle: str,
    unit: str,
    theme: str = "light",
    step: float | None = None,
    limits: tuple[float, float] | None = None,
) -> go.Figure:
    """One number over time, ``steps`` and ``values`` (S,)."""
    colours = theme_named(theme)
    figure = blank(theme, title, subtitle, x="step", y=unit, showlegend=False)
    figure.add_trace(
        go.Scatter(
            x=np.asarray(steps),
            y=np.asarray(values, dtype=np.float64),
            name=text(title),
            mode="lines",
            line={"color": colours.cycle[0], "width": 1.6},
            hovertemplate=f"step %{{x}}<br><b>%{{y:.4g}}</b> {text(unit)}<extra></extra>",
        )
    )
    if limits is not None:
        figure.update_yaxes(range=list(limits))
    mark_step(figure, theme, step)
    return figure


def _validation(figure: go.Figure, theme: str, valid: Mapping[str, tuple[np.ndarray, np.ndarray]], unit: str) -> None:
    """Dots joined by lines: "all" in ink, the domains in the nominal colours."""
    colours = theme_named(theme)
    shades = iter(colours.nominal(len(valid)))
    for name, (at, values) in valid.items():
        shade = colours.ink if name == "all" else next(shades)
        figure.add_trace(
            go.Scatter(
                x=np.asarray(at),
                y=np.asarray(values, dtype=np.float32),
                name="validation" if name == "all" else text(name),
                mode="lines+markers",
                line={"color": shade, "width": 2 if name == "all" else 1.5},
                marker={"size": 5},
                hovertemplate=f"{text(name)} · step %{{x}}<br><b>%{{y:.3f}}</b> {text(unit)}<extra></extra>",
            )
        )


def running_mean(values: np.ndarray, window: int | None = None) -> np.ndarray:
    """Trailing mean over ``window`` records (by default a thirtieth of them, at least one); NaN are left out."""
    window = window or max(1, len(values) // 30)
    sums = np.cumsum(np.concatenate([[0.0], np.nan_to_num(values)]))
    counts = np.cumsum(np.concatenate([[0.0], np.isfinite(values)]))
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    with np.errstate(invalid="ignore"):
        return (sums[stop] - sums[start]) / (counts[stop] - counts[start])


def loss_limits(*curves: np.ndarray, null: float | None = None) -> tuple[float, float]:
    """A y range for all curves that lets a few early or diverging spikes run out of the frame.

    The ``null`` is included only while the curves are near it, so that a trained model is not squeezed flat.
    """
    finite = [np.asarray(c, dtype=np.float64)[np.isfinite(c)] for c in curves]
    values = np.concatenate([c for c in finite if len(c)] or [np.zeros(1)])
    low, high = float(values.min()), float(np.percentile(values, 99))
    if null is not None and high > 0.75 * null:
        high = max(high, null)
    pad = 0.06 * max(high - low, 0.05 * abs(high), 1e-3)
    return low - pad, high + pad
