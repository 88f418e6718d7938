"""Pictures side by side: rows and columns of small maps of numbers, such as images, or the sub-bands of one."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.theme import blank, colour_bar, diverging, text

GAP = 0.08
"""Between two pictures, as a share of a side."""


def pictures(
    maps: Sequence[Sequence[np.ndarray]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    subtitle: str = "",
    grey: tuple[float, float] | None = None,
    theme: str = "light",
) -> go.Figure:
    """A grid of square maps, all drawn at one size; each is coloured by its numbers over its own largest magnitude.

    Zero is the neutral middle, blue is below it and orange above. The numbers themselves show under the pointer.

    Args:
        maps: a row of pictures for each of `rows`, one for each of `columns`; (side, side), whatever the side.
        grey: what is black and what is white, for images; all have the one scale.

    Raises:
        InputError: the grid has another shape than its names, a map is not square, or white is not above black.
    """
    if grey is not None and not grey[0] < grey[1]:
        raise InputError(f"grey is {grey} but white must be above black")
    if len(maps) != len(rows) or any(len(row) != len(columns) for row in maps) or not (rows and columns):
        raise InputError(
            f"maps has rows of {[len(row) for row in maps]} pictures but must have {len(rows)} rows of {len(columns)}, "
            "at least one"
        )
    values = [[np.asarray(one, dtype=float) for one in row] for row in maps]
    for one in (one for row in values for one in row):
        if one.ndim != 2 or one.shape[0] != one.shape[1] or not one.size:
            raise InputError(f"maps has a picture of {one.shape} but all must be square")
    traces = [
        _tile(one, i, j, rows[i], columns[j], theme, grey, first=i == j == 0)
        for i, row in enumerate(values)
        for j, one in enumerate(row)
    ]
    names = {"showgrid": False, "showline": False}
    figure = blank(
        theme,
        title,
        subtitle,
        data=traces,
        showlegend=False,
        xaxis=names | {"tickvals": [*range(len(columns))], "ticktext": [text(name) for name in columns], "side": "top"},
        yaxis=names
        | {"tickvals": [*range(len(rows))], "ticktext": [text(name) for name in rows], "autorange": "reversed"},
    )
    figure.update_yaxes(scaleanchor="x")
    figure.update_layout(margin={"t": 84, "l": 110, "b": 12}, height=110 + 130 * len(rows))
    return figure


def _tile(one: np.ndarray, i: int, j: int, row: str, column: str, theme: str, grey, first: bool) -> go.Heatmap:
    side, step = len(one), (1 - GAP) / len(one)
    largest = np.abs(one).max()
    if grey is None:
        z, (low, high) = one / largest if largest > 0 else one, (-1, 1)
        scale = {
            "colorscale": diverging(theme, -1, 0, 1),
            "colorbar": colour_bar({-1: "−1", 0: "0", 1: "1"}, unit="of its largest"),
        }
    else:
        z, (low, high) = one, grey
        scale = {"colorscale": ["black", "white"], "colorbar": colour_bar({low: f"{low:g}", high: f"{high:g}"})}
    places = (np.arange(side) + 0.5) * step - (1 - GAP) / 2
    return go.Heatmap(
        x=j + places,
        y=i + places,
        z=z,
        customdata=one,
        zmin=low,
        zmax=high,
        showscale=first,
        hovertemplate=f"{text(row)}, {text(column)}<br>%{{customdata:.4g}}<extra></extra>",
        **scale,
    )
