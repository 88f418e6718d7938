"""Phase portraits: where a field points in the plane of two variables, and trajectories in it."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.basic import LEGEND
from workbench.figures.theme import blank, theme_named


def phase_portrait(
    trajectories: Mapping[str, np.ndarray],
    rates: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    title: str,
    subtitle: str = "",
    x_title: str = "first variable",
    y_title: str = "second variable",
    theme: str = "light",
) -> go.Figure:
    """Trajectories in the plane, a colour for each name and a dot at each start, over the directions of a field.

    Args:
        trajectories: name -> (starts, points, 2); colours repeat after the eighth.
        rates: points (n, 2) and the rates there (n, 2), drawn as short strokes of one length that begin at the points.

    Raises:
        InputError: there is no trajectory, or an array is of another shape.
    """
    if not trajectories:
        raise InputError("trajectories is empty but must have at least one")
    for name, states in trajectories.items():
        if states.ndim != 3 or states.shape[-1] != 2:
            raise InputError(f"trajectories has {states.shape} of {name!r} but it must be (starts, points, 2)")
    colours = theme_named(theme)
    figure = blank(theme, title, subtitle, x=x_title, y=y_title)
    if rates is not None:
        x, y = _strokes(*rates)
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines",
            opacity=0.5,
            line={"width": 1, "color": colours.muted},
            name="field",
            hoverinfo="skip",
        )
    for colour, (name, states) in zip(colours.nominal(len(trajectories)), trajectories.items(), strict=True):
        gap = np.full((len(states), 1, 2), np.nan)
        line = np.concatenate([states, gap], 1).reshape(-1, 2)
        figure.add_scatter(
            x=line[:, 0], y=line[:, 1], mode="lines", line={"color": colour}, name=name, legendgroup=name
        )
        figure.add_scatter(
            x=states[:, 0, 0],
            y=states[:, 0, 1],
            mode="markers",
            marker={"color": colour, "size": 7},
            name=f"{name}, starts",
            showlegend=False,
            legendgroup=name,
        )
    return figure.update_layout(legend=LEGEND, showlegend=True)


def _strokes(points: np.ndarray, rates: np.ndarray) -> tuple[list, list]:
    """Lines with gaps, a fortieth of the width of the plane long."""
    if points.shape != rates.shape or points.ndim != 2 or points.shape[1] != 2:
        raise InputError(f"rates has {points.shape} and {rates.shape} but both must be (n, 2)")
    length = np.ptp(points, axis=0) / 40
    ends = points + length * rates / (np.linalg.norm(rates, axis=1, keepdims=True) + 1e-12)
    lines = np.stack([points, ends, np.full_like(points, np.nan)], 1).reshape(-1, 2)
    return lines[:, 0].tolist(), lines[:, 1].tolist()
