"""Whether a learning rate transfers across widths: the loss over the rates at each width, and norms over time."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.theme import blank, null_label, null_shape, rgba, text, theme_named

GAP = 0.05  # between panels, as a share of the figure
HEIGHT = 350
TOP = 0.9  # of the panels; their names are above it
EDGE = 1.2
"""Free above and below what is drawn, as a factor; a band of 0.5 to 2 and two edges have two of the ticks 1, 2, 5."""


def rate_curves(
    curves: Mapping[str, tuple[Sequence[float], np.ndarray]],
    widths: Sequence[int],
    *,
    title: str = "The best learning rate at each width",
    unit: str = "nats",
    theme: str = "light",
) -> go.Figure:
    """A panel an arm: the loss at each rate, a line a width, and the best rate of each width marked.

    ``curves`` maps an arm to its rates (R,), ascending, and losses (..., widths, R), whose mean over what comes first
    is drawn (seeds, say). The dashed line is the rate that is best for the narrowest: where all the marks lie on it,
    the rate transfers.

    Raises:
        InputError: the losses of an arm are not (..., widths, R).
    """
    colours = theme_named(theme)
    traces, shapes, notes = [], [], []
    layout = _panels(list(curves), theme, x="learning rate", y=f"loss ({unit})", notes=notes)
    drawn = {}
    for arm, (rates, losses) in curves.items():
        losses = np.asarray(losses, dtype=np.float64)
        if losses.ndim < 2 or losses.shape[-2:] != (len(widths), len(rates)):
            raise InputError(
                f"curves has losses of shape {losses.shape} for {arm!r} but they must be (..., {len(widths)} widths, "
                f"{len(rates)} rates)"
            )
        drawn[arm] = np.asarray(rates, dtype=np.float64), losses.reshape(-1, *losses.shape[-2:]).mean(0)
    positive = [values[values > 0] for _, values in drawn.values()]
    limits = np.log10([min(v.min() for v in positive) / 1.3, max(v.max() for v in positive) * 1.3])
    for panel, (rates, losses) in enumerate(drawn.values()):
        axis = "" if panel == 0 else str(panel + 1)
        layout[f"xaxis{axis}"] |= {"type": "log", "dtick": 1, "tickformat": "~g"}
        layout[f"yaxis{axis}"] |= {"type": "log", "dtick": 1, "tickformat": "~g", "range": list(limits)}
        for width, shade, values in zip(widths, colours.ordered(len(widths)), losses, strict=True):
            best = int(np.argmin(values))
            marker = {"size": [11 if i == best else 4 for i in range(len(rates))], "color": shade}
            marker |= {"symbol": ["diamond" if i == best else "circle" for i in range(len(rates))]}
            traces.append(
                go.Scatter(
                    x=rates,
                    y=values.astype(np.float32),
                    name=f"width {width}",
                    legendgroup=str(width),
                    showlegend=panel == 0,
                    mode="lines+markers",
                    line={"color": shade, "width": 1.9},
                    marker=marker,
                    xaxis=f"x{axis}",
                    yaxis=f"y{axis}",
                    hovertemplate=f"width {width}, rate %{{x:.3g}}<br><b>%{{y:.4g}}</b> {text(unit)}<extra></extra>",
                )
            )
        at = float(rates[np.argmin(losses[0])])
        line = {"color": colours.null, "width": 1.2, "dash": "dash"}
        down = {"xref": f"x{axis}", "yref": f"y{axis} domain", "y0": 0, "y1": 1}
        shapes.append({"type": "line", "x0": at, "x1": at, "line": line} | down)
    said = f"mean loss, lower is better · diamond = best rate · dashed = best rate at width {widths[0]}"
    return blank(theme, title, said, data=traces, shapes=shapes, annotations=notes, height=HEIGHT, **layout)


def norm_traces(
    steps: Sequence[int],
    weights: np.ndarray,
    updates: np.ndarray,
    widths: Sequence[int],
    *,
    ceiling: float | None = None,
    title: str = "Spectral sizes over time",
    theme: str = "light",
) -> go.Figure:
    """The RMS operator norms of a layer's weight and of its updates over the learning rate, a line a width.

    ``weights`` and ``updates`` are (widths, steps). The band is half to twice the first weight of the narrowest,
    ``ceiling`` what an update cannot pass. Both panels span the same factor, so that flat looks flat in both.
    """
    colours = theme_named(theme)
    panels = {
        "weight, ‖W‖ᴿ": np.asarray(weights, dtype=float),
        "update, ‖ΔW‖ᴿ ÷ rate": np.asarray(updates, dtype=float),
    }
    if any(values.shape != (len(widths), len(steps)) for values in panels.values()):
        shapes = [values.shape for values in panels.values()]
        raise InputError(f"weights and updates have shapes {shapes} but must be ({len(widths)}, {len(steps)})")
    notes: list[dict] = []
    layout = _panels(list(panels), theme, x="step", y="RMS operator norm", notes=notes)
    traces, shapes = [], []
    first = float(panels["weight, ‖W‖ᴿ"][0, 0])
    marks = [first / 2, 2 * first], [] if ceiling is None else [ceiling]
    ranges = _ranges([np.append(values, more) for values, more in zip(panels.values(), marks, strict=True)])
    for panel, values in enumerate(panels.values()):
        axis = "" if panel == 0 else str(panel + 1)
        ticks = {"tickformat": "~g", "dtick": "D2", "showticklabels": True}
        layout[f"yaxis{axis}"] |= {"type": "log", "range": ranges[panel]} | ticks
        for width, shade, row in zip(widths, colours.ordered(len(widths)), values, strict=True):
            traces.append(
                go.Scatter(
                    x=list(steps),
                    y=row.astype(np.float32),
                    name=f"width {width}",
                    legendgroup=str(width),
                    showlegend=panel == 0,
                    mode="lines+markers",
                    line={"color": shade, "width": 1.9},
                    marker={"size": 4},
                    xaxis=f"x{axis}",
                    yaxis=f"y{axis}",
                    hovertemplate=f"width {width}, step %{{x}}<br><b>%{{y:.4g}}</b><extra></extra>",
                )
            )
    across = {"xref": "x domain", "yref": "y", "x0": 0, "x1": 1, "line": {"width": 0}, "layer": "below"}
    shapes.append({"type": "rect", "y0": first / 2, "y1": 2 * first, "fillcolor": rgba(colours.null, 0.22)} | across)
    if ceiling is not None:
        shapes.append(null_shape(theme, ceiling, "2"))
        notes.append(null_label(theme, float(np.log10(ceiling)), f"ceiling {ceiling:.4g}", "2"))
    said = "flat over time and alike at every width, if the spectral condition holds · band = 0.5–2 × at the start"
    return blank(theme, title, said, data=traces, shapes=shapes, annotations=notes, height=HEIGHT, **layout)


def _ranges(shown: Sequence[np.ndarray]) -> list[list[float]]:
    """Of logarithmic axes, in decades: what is shown on each in its middle, all as wide as the widest needs."""
    ends = []
    for values in shown:
        decades = np.log10(values[np.isfinite(values) & (values > 0)])
        ends.append((decades.min(), decades.max()) if len(decades) else (0.0, 0.0))
    span = max(high - low for low, high in ends) + 2 * np.log10(EDGE)
    return [[float(low + high - span) / 2, float(low + high + span) / 2] for low, high in ends]


def _panels(names: Sequence[str], theme: str, *, x: str, y: str, notes: list[dict]) -> dict[str, dict]:
    """Axes of panels side by side, their names as notes above them; the first has the name of the y axis."""
    count = len(names)
    share = (1 - GAP * (count - 1)) / count
    layout = {}
    for panel, name in enumerate(names):
        axis, left = "" if panel == 0 else str(panel + 1), panel * (share + GAP)
        layout[f"xaxis{axis}"] = {"domain": [left, left + share], "anchor": f"y{axis}", "title": {"text": text(x)}}
        layout[f"yaxis{axis}"] = {"anchor": f"x{axis}", "showticklabels": panel == 0, "domain": [0, TOP]}
        if panel == 0:
            layout["yaxis"]["title"] = {"text": text(y)}
        notes.append(
            {
                "text": f"<b>{text(name)}</b>",
                "font": {"size": 12, "color": theme_named(theme).ink},
                "showarrow": False,
                "x": left,
                "xref": "paper",
                "xanchor": "left",
                "y": TOP,
                "yref": "paper",
                "yanchor": "bottom",
            }
        )
    return layout
