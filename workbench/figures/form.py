"""The form of a model that changes while it trains: ranks, stages and shares over time, importances and overlaps."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from workbench.figures.theme import (
    COSINE_TICKS,
    blank,
    colour_bar,
    cosine_scale,
    diverging,
    mark_step,
    sequential,
    short_names,
    text,
    theme_named,
)

WRITTEN = 64
"""Cells of a table up to which its values are written in."""


def form_lines(
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    what: str,
    selected: str | None = None,
    theme: str = "light",
    title: str | None = None,
    step: float | None = None,
    limits: tuple[float, float] | None = None,
) -> go.Figure:
    """One number of every layer over time, in steps: it holds from one record to the next.

    ``series`` maps a layer to (steps (S,), values (S,)), in the order of the model. Above twelve layers only the
    ``selected`` one is named. ``limits`` is the y axis.
    """
    colours = theme_named(theme)
    many = len(series) > 12
    below = (
        f"{len(series)} layers: violet the first, green the last" if many else "a line a layer, as of its newest record"
    )
    figure = blank(theme, title or what, below, x="step", y=what)
    shades = colours.ordered(len(series))
    for (layer, (steps, values)), name, shade in zip(series.items(), short_names(list(series)), shades, strict=True):
        figure.add_trace(
            go.Scatter(
                x=np.asarray(steps),
                y=np.asarray(values, dtype=np.float32),
                name=text(name),
                mode="lines+markers" if len(steps) < 3 else "lines",
                line={"color": shade, "width": 2.6 if layer == selected else 1.7, "shape": "hv"},
                marker={"size": 5},
                showlegend=not many or layer == selected,
                zorder=int(layer == selected),
                hovertemplate=f"{text(layer)} · step %{{x}}<br>{text(what)} <b>%{{y:.4g}}</b><extra></extra>",
            )
        )
    if len(series) == 1:
        figure.update_layout(showlegend=False)
    mark_step(figure, theme, step)
    if limits is not None:
        figure.update_yaxes(range=list(limits))
    return figure


def form_history(
    steps: np.ndarray,
    values: np.ndarray,
    *,
    what: str,
    theme: str = "light",
    title: str | None = None,
    step: float | None = None,
    limits: tuple[float, float] | None = None,
) -> go.Figure:
    """A vector over time as a heat map, ``values`` (S, k) at ``steps`` (S,): its first entry at the top.

    Where ``limits`` begin above 0, colours are on a log scale, and 0 is grey with what is undefined.
    """
    values = np.asarray(values, dtype=np.float64)
    log = limits is not None and limits[0] > 0
    below = f"{text(what)} by place, over time{' · log colours, grey = 0 or undefined' if log else ''}"
    figure = blank(theme, title or what, below, x="step", y="place", plot_bgcolor=theme_named(theme).undefined)
    shade, scale = values, _scale(theme, values, limits)
    if log:
        shade = np.log10(np.where(values > 0, np.maximum(values, limits[0]), np.nan))
        low, high = np.log10(limits)
        powers = range(int(np.ceil(low)), int(np.floor(high)) + 1)
        scale |= {"zmin": low, "zmax": high, "colorbar": colour_bar({power: f"{10.0**power:g}" for power in powers})}
    figure.add_trace(
        go.Heatmap(
            z=shade.T.astype(np.float32),
            x=np.asarray(steps),
            y=np.arange(values.shape[1]),
            customdata=values.T.astype(np.float32),
            hovertemplate=f"step %{{x}}, place %{{y}}<br>{text(what)} <b>%{{customdata:.4g}}</b><extra></extra>",
            hoverongaps=False,
            **scale,
        )
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(showgrid=False)
    mark_step(figure, theme, step)
    return figure


def form_table(
    values: np.ndarray,
    *,
    what: str,
    names: Sequence[str] | None = None,
    theme: str = "light",
    title: str | None = None,
    limits: tuple[float, float] | None = None,
) -> go.Figure:
    """A matrix at one step as a heat map, ``values`` (m, k), written in where there is room.

    ``names`` are of rows and columns, of a square matrix. Undefined cells are grey. A "cosine" has the colours that it
    has among conflicts: negative is orange.
    """
    values = np.asarray(values, dtype=np.float64)
    figure = blank(theme, title or what, "at this step · grey = undefined", plot_bgcolor=theme_named(theme).undefined)
    rows, columns = ([text(name) for name in names],) * 2 if names else map(list, map(range, values.shape))
    of_cosines = {"colorscale": cosine_scale(theme), "zmin": -1, "zmax": 1, "colorbar": colour_bar(COSINE_TICKS)}
    written = [["" if np.isnan(value) else f"{value:.2g}" for value in row] for row in values]
    figure.add_trace(
        go.Heatmap(
            z=values.astype(np.float32),
            x=columns,
            y=rows,
            text=written if values.size <= WRITTEN else None,
            texttemplate="%{text}" if values.size <= WRITTEN else None,
            hovertemplate=f"row %{{y}}, column %{{x}}<br>{text(what)} <b>%{{z:.4g}}</b><extra></extra>",
            hoverongaps=False,
            xgap=1 if values.size <= WRITTEN else 0,
            ygap=1 if values.size <= WRITTEN else 0,
            **(_scale(theme, values, limits) if what != "cosine" else of_cosines),
        )
    )
    kind = {"type": "category"} if names else {}
    figure.update_xaxes(showgrid=False, **kind)
    figure.update_yaxes(showgrid=False, autorange="reversed", **kind)
    return figure


def _scale(theme: str, values: np.ndarray, limits: tuple[float, float] | None) -> dict:
    """From nothing upwards where no value is below 0, else to either side of 0."""
    finite = values[np.isfinite(values)]
    low, high = limits or (finite.min(initial=0.0), finite.max(initial=0.0))
    high = high if high > low else low + 1  # all 0 so far, as what has not begun to grow
    scale = diverging(theme, low, 0, high) if low < 0 else sequential(theme)
    return {"colorscale": scale, "zmin": low, "zmax": high, "colorbar": colour_bar()}
