"""What is had for what it costs: points with intervals, and the front of those that nothing else dominates."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.theme import blank, text, theme_named

Point = tuple[float, float, float, float]
"""Cost, value, and the low and the high end of the value's interval."""


def on_front(points: Mapping[str, Point]) -> list[str]:
    """The names, by cost, of those to which no other is at most as dear and of more value, or cheaper and as good."""
    found: list[str] = []
    for name, (_, value, *_) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if not found or value > points[found[-1]][1]:
            found.append(name)
    return found


def front(
    points: Mapping[str, Point],
    *,
    title: str,
    subtitle: str = "",
    x_title: str,
    y_title: str,
    log_x: bool = False,
    groups: Mapping[str, str] | None = None,
    theme: str = "light",
) -> go.Figure:
    """A point for each name, labelled, and the front as a stair: up to a cost, this is the most that there is.

    Args:
        points: name -> (cost, value, low, high).
        groups: name -> what its colour stands for; all in one without it.

    Raises:
        InputError: there is no point, or a cost of zero or less on a logarithmic axis.
    """
    if not points:
        raise InputError("points is empty but must have at least one")
    if log_x and min(cost for cost, *_ in points.values()) <= 0:
        raise InputError("points has a cost of 0 or less but on a logarithmic axis all must be above 0")
    colours = theme_named(theme)
    figure = blank(theme, title, subtitle, x=x_title, y=y_title)
    stair = [points[name] for name in on_front(points)]
    dearest = max(cost for cost, *_ in points.values())
    figure.add_scatter(
        x=[cost for cost, *_ in stair] + [dearest],
        y=[value for _, value, *_ in stair] + [stair[-1][1]],
        mode="lines",
        line={"color": colours.null, "width": 1.2, "dash": "dash", "shape": "hv"},
        name="front",
        hoverinfo="skip",
    )
    kinds = list(dict.fromkeys((groups or {}).get(name, "") for name in points))
    for kind, shade in zip(kinds, colours.nominal(len(kinds)), strict=True):
        names = [name for name in points if (groups or {}).get(name, "") == kind]
        _points(figure, names, points, kind, shade)
    figure.update_xaxes(type="log" if log_x else "linear")
    figure.update_layout(showlegend=True, legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.01})
    return figure


def _points(figure: go.Figure, names: Sequence[str], points: Mapping[str, Point], kind: str, shade: str) -> None:
    chosen = [points[name] for name in names]
    figure.add_scatter(
        x=[cost for cost, *_ in chosen],
        y=[value for _, value, *_ in chosen],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [high - value for _, value, _, high in chosen],
            "arrayminus": [value - low for _, value, low, _ in chosen],
            "width": 4,
        },
        mode="markers+text",
        text=[text(name) for name in names],
        textposition="middle right",
        textfont={"size": 11},
        cliponaxis=False,
        marker={"size": 10, "symbol": "diamond", "color": shade},
        name=text(kind) if kind else "mean and interval",
    )
