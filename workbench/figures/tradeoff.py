"""What one objective costs in another: a curve for each way of control, from one end of its knob to the other."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.theme import blank, text, theme_named

Curve = Sequence[tuple[float, float]]


def trade_off(
    curves: Mapping[str, Curve],
    at: Sequence[float],
    *,
    title: str,
    subtitle: str = "",
    x_title: str,
    y_title: str,
    knob: str = "knob",
    here: tuple[float, float] | None = None,
    theme: str = "light",
) -> go.Figure:
    """A curve for each name through its points (x, y), one for each value of the knob; the ends bear its value.

    Args:
        curves: name -> a point for each of `at`. One whose points are all the same is a single mark.
        at: the values of the knob, in order.
        knob: its name, under the pointer.
        here: a point to mark: where one stands.

    Raises:
        InputError: there is no curve, or a curve has not one point for each value.
    """
    if not curves or any(len(curve) != len(at) for curve in curves.values()) or not len(at):
        raise InputError(
            f"curves have {[len(curve) for curve in curves.values()]} points but each must have {len(at)}, at least one"
        )
    colours = theme_named(theme)
    figure = blank(theme, title, subtitle, x=x_title, y=y_title)
    for (name, curve), shade in zip(curves.items(), colours.nominal(len(curves)), strict=True):
        still = all(tuple(point) == tuple(curve[0]) for point in curve)
        ends = [f"{value:g}" if i in (0, len(at) - 1) else "" for i, value in enumerate(at)]
        figure.add_scatter(
            x=[x for x, _ in curve][: 1 if still else None],
            y=[y for _, y in curve][: 1 if still else None],
            mode="markers" if still else "lines+markers+text",
            text=ends,
            textposition="top right",
            textfont={"size": 10, "color": shade},
            cliponaxis=False,
            line={"color": shade, "width": 2},
            marker={"size": 11 if still else 7, "color": shade, "symbol": "x" if still else "circle"},
            name=text(name),
            customdata=list(at),
            hovertemplate=f"{text(name)}<br>{text(knob)} %{{customdata:g}}<br>%{{x:.4g}}, %{{y:.4g}}<extra></extra>",
        )
    if here is not None:
        figure.add_scatter(
            x=[here[0]],
            y=[here[1]],
            mode="markers",
            marker={"size": 15, "symbol": "circle-open", "color": colours.accent, "line": {"width": 3}},
            name="here",
        )
    figure.update_layout(showlegend=True)
    return figure
