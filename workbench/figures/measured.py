"""What a model predicts against what was measured, each point with its error."""

import statistics
from collections.abc import Sequence

import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.theme import blank, rgba, text, theme_named
from workbench.lib.core.simulation.fits import relative_errors


def predicted_against_measured(
    names: Sequence[str],
    predicted: Sequence[float],
    measured: Sequence[float],
    *,
    groups: Sequence[str] | None = None,
    unit: str,
    title: str,
    subtitle: str | None = None,
    within: float = 0.15,
    theme: str = "light",
) -> go.Figure:
    """One point for each configuration on equal logarithmic axes; on the diagonal the two agree.

    The band holds predictions within a share of what was measured; `groups` colours the points. By default the subtitle
    has the median error.

    Raises:
        InputError: not as many of one as of the others, or a value that is not finite and above 0.
    """
    if not len(names) == len(predicted) == len(measured) == len(groups or names):
        raise InputError("names, predicted, measured and groups must have one for each configuration")
    errors = relative_errors(predicted, measured)
    colours, kinds = theme_named(theme), list(groups or ["configurations"] * len(names))
    found = f"median error {statistics.median(errors):.1%} over {len(errors)} configurations, band ±{within:.0%}"
    figure = blank(
        theme, title, found if subtitle is None else subtitle, x=f"measured ({unit})", y=f"predicted ({unit})"
    )
    low, high = min(*predicted, *measured) / 1.3, max(*predicted, *measured) * 1.3
    ends = [low, high]
    band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    figure.add_scatter(x=ends, y=[(1 - within) * end for end in ends], **band)
    figure.add_scatter(
        x=ends, y=[(1 + within) * end for end in ends], fill="tonexty", fillcolor=rgba(colours.null, 0.18), **band
    )
    figure.add_scatter(
        x=ends, y=ends, mode="lines", name="as measured", hoverinfo="skip", line={"color": colours.null, "dash": "dash"}
    )
    order = list(dict.fromkeys(kinds))
    for kind, shade in zip(order, colours.nominal(len(order)), strict=True):
        chosen = [i for i, name in enumerate(kinds) if name == kind]
        figure.add_scatter(
            x=[measured[i] for i in chosen],
            y=[predicted[i] for i in chosen],
            mode="markers",
            name=text(kind),
            marker={"size": 9, "color": shade},
            hovertext=[
                f"{text(names[i])}<br>predicted {predicted[i]:.4g}, measured {measured[i]:.4g} {text(unit)}<br>"
                f"error {errors[i]:.1%}"
                for i in chosen
            ],
            hoverinfo="text",
        )
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log", scaleanchor="x")
    return figure
