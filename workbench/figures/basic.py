"""Plain figures in the house style for what a notebook measures on the spot: lines, bars, intervals, a matrix."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.theme import blank, colour_bar, null_line, rgba, sequential, text, theme_named

LEGEND = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.01, "yanchor": "bottom"}


def lines(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    subtitle: str = "",
    x_title: str,
    y_title: str,
    null: tuple[float, str] | None = None,
    mark: tuple[float, str] | None = None,
    ordered: bool = False,
    theme: str = "light",
) -> go.Figure:
    """One line per entry of `series` over `x`.

    `null` is the value without an effect and its name, `mark` an x and what happened there; `ordered` colours the
    lines as a sequence (layers) rather than as names (arms). Where colours of names repeat, lines are dashed.
    """
    colours = theme_named(theme)
    figure = blank(theme, title, subtitle, x=x_title, y=y_title)
    shades = colours.ordered(len(series)) if ordered else colours.nominal(len(series))
    for i, ((name, values), shade) in enumerate(zip(series.items(), shades, strict=True)):
        figure.add_scatter(
            x=list(x),
            y=list(values),
            name=text(name),
            mode="lines+markers",
            line={"color": shade, "width": 2, "dash": "solid" if shade not in shades[:i] else "dot"},
            marker_size=6,
        )
    if null is not None:
        null_line(figure, theme, *null)
    if mark is not None:
        figure.add_vline(
            x=mark[0],
            line={"color": colours.accent, "width": 1.2},
            annotation={"text": mark[1], "font": {"size": 11, "color": colours.accent}},
        )
    return figure


def bars(
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    subtitle: str = "",
    x_title: str,
    y_title: str,
    null: tuple[float, str] | None = None,
    theme: str = "light",
) -> go.Figure:
    """Groups of bars: one group per label, one colour per entry of `series`.

    Raises:
        InputError: a label is there twice.
    """
    _distinct("labels", labels)
    colours = theme_named(theme)
    figure = blank(theme, title, subtitle, x=x_title, y=y_title)
    for (name, values), shade in zip(series.items(), colours.nominal(len(series)), strict=True):
        figure.add_bar(
            x=[text(label) for label in labels], y=list(values), name=text(name), marker_color=rgba(shade, 0.85)
        )
    if null is not None:
        null_line(figure, theme, *null)
    figure.update_xaxes(showgrid=False)
    figure.update_layout(legend=LEGEND, showlegend=len(series) > 1)
    return figure


def intervals(
    labels: Sequence[str],
    estimates: Sequence[float],
    limits: Sequence[tuple[float, float]],
    *,
    title: str,
    subtitle: str = "",
    x_title: str,
    margin: float | None = None,
    theme: str = "light",
) -> go.Figure:
    """Estimates with their confidence intervals, one row each, against 0 and an equivalence margin (shaded)."""
    colours = theme_named(theme)
    figure = blank(theme, title, subtitle, x=x_title)
    if margin is not None:
        figure.add_vrect(
            x0=-margin,
            x1=margin,
            fillcolor=rgba(colours.null, 0.15),
            line_width=0,
            layer="below",
            annotation={"text": f"margin ±{margin:.3g}", "font": {"size": 10.5, "color": colours.null}},
            annotation_position="top left",
        )
    figure.add_vline(x=0, line={"color": colours.null, "width": 1.2, "dash": "dash"})
    estimates = np.asarray(estimates, dtype=float)
    low, high = np.asarray(limits, dtype=float).reshape(-1, 2).T
    figure.add_scatter(
        x=estimates,
        y=np.arange(len(labels)),
        error_x={"type": "data", "symmetric": False, "array": high - estimates, "arrayminus": estimates - low},
        mode="markers",
        marker={"size": 10, "symbol": "diamond", "color": colours.cycle[0]},
        name="estimate and interval",
    )
    figure.update_yaxes(
        tickvals=list(range(len(labels))), ticktext=[text(label) for label in labels], range=[len(labels) - 0.5, -0.5]
    )
    figure.update_layout(height=140 + 46 * len(labels), showlegend=False)
    return figure


def matrix(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    subtitle: str = "",
    x_title: str,
    y_title: str,
    unit: str,
    theme: str = "light",
) -> go.Figure:
    """A small matrix with its values written in; NaN cells stay empty.

    Raises:
        InputError: a row or a column is there twice.
    """
    _distinct("rows", rows), _distinct("columns", columns)
    values = np.asarray(values, dtype=float)
    figure = blank(theme, title, subtitle, x=x_title, y=y_title)
    written = [["" if np.isnan(value) else f"{value:.3g}" for value in row] for row in values]
    figure.add_heatmap(
        z=values,
        x=[text(column) for column in columns],
        y=[text(row) for row in rows],
        text=written,
        texttemplate="%{text}",
        colorscale=sequential(theme),
        zmin=0,
        colorbar=colour_bar(unit=unit),
        hoverongaps=False,
    )
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure


def _distinct(name: str, labels: Sequence[str]) -> None:
    """Plotly draws what has one label in one place, and the last of it hides the rest."""
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise InputError(f"{name} holds {', '.join(map(repr, twice))} more than once but each must be another")
