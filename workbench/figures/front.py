"""What is had for what it costs: points with intervals, and the front of those that nothing else dominates."""

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.basic import LEGEND
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
    """A point for each name, and the front as a stair: up to a cost, this is the most that there is.

    Args:
        points: name -> (cost, value, low, high).
        groups: name -> what its colour stands for; names stand beside the points of the front alone then, and beside
            all of them without it.

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
    scale = math.log if log_x else float
    middle = (scale(min(cost for cost, *_ in points.values())) + scale(dearest)) / 2
    labelled = on_front(points) if groups else list(points)
    right = {name for name in points if scale(points[name][0]) <= middle}
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
        labels = [text(name) if name in labelled else "" for name in names]
        _points(figure, [points[name] for name in names], labels, kind, shade)
        figure.data[-1].textposition = ["bottom right" if name in right else "bottom left" for name in names]
        figure.data[-1].hovertext = [text(name) for name in names]
    figure.update_xaxes(type="log" if log_x else "linear")
    figure.update_layout(showlegend=True, legend=LEGEND)
    return figure


def _points(figure: go.Figure, chosen: Sequence[Point], labels: Sequence[str], kind: str, shade: str) -> None:
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
        text=list(labels),
        textfont={"size": 11},
        cliponaxis=False,
        marker={"size": 10, "symbol": "diamond", "color": shade},
        name=text(kind) if kind else "mean and interval",
    )
