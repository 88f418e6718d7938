"""Text, a token a cell: coloured by a number that each token has, or by whether it is hidden."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.theme import blank, colour_bar, sequential, text

SHOWN = {" ": "·", "\n": "⏎", "\t": "→", "\r": "␍"}


def text_cells(
    lines: Sequence[Sequence[str]],
    values: Sequence[Sequence[int]],
    names: Mapping[int, str],
    *,
    what: str,
    labels: Sequence[str] | None = None,
    x: str,
    y: str,
    theme: str = "light",
    title: str,
    subtitle: str = "",
) -> go.Figure:
    """Lines of text, the first on top, coloured by the value of each token. Lines may differ in length.

    ``lines`` what stands in the cells, ``values`` as many numbers, ``names`` what each number that there may be is
    called, and ``what`` all of them; ``labels`` stand before the lines. A space is shown as a middle dot, a newline as
    a return sign.

    Raises:
        InputError: a value for each token is not there, or has no name.
    """
    wrong = [i for i, (line, row) in enumerate(zip(lines, values, strict=True)) if len(line) != len(row)]
    if wrong:
        i = wrong[0]
        raise InputError(
            f"values has {len(values[i])} numbers in line {i} but must have one for each of {len(lines[i])}"
        )
    if strangers := {int(value) for row in values for value in row} - set(names):
        raise InputError(f"values hold {sorted(strangers)} but must be among {sorted(names)}")
    width = max(map(len, lines))
    grid = np.full((len(lines), width), np.nan)
    cells, called = (np.full(grid.shape, "", dtype=object) for _ in range(2))
    for i, (line, row) in enumerate(zip(lines, values, strict=True)):
        grid[i, : len(row)] = row
        cells[i, : len(line)] = [text(SHOWN.get(token, token)) for token in line]
        called[i, : len(row)] = [text(names[int(value)]) for value in row]
    heat = {
        "type": "heatmap",
        "z": grid,
        "text": cells,
        "customdata": called,
        "texttemplate": "%{text}",
        "textfont": {"family": "ui-monospace, Menlo, Consolas, monospace", "size": 12},
        "zmin": 0,
        "zmax": max(names),
        "colorscale": sequential(theme),
        "colorbar": colour_bar({value: text(name) for value, name in names.items()}),
        "xgap": 1,
        "ygap": 2,
        "hoverongaps": False,
        "hovertemplate": f"%{{text}}<br>{text(what)} <b>%{{customdata}}</b><extra></extra>",
    }
    hidden = {"showgrid": False, "showticklabels": False, "showline": False}
    beside = {"showticklabels": True, "tickvals": [*range(len(lines))], "ticktext": [*map(text, labels or ())]}
    return blank(
        theme,
        title,
        subtitle,
        x=x,
        y=y,
        data=[heat],
        xaxis=hidden,
        yaxis=hidden | {"range": [len(lines) - 0.5, -0.5]} | (beside if labels else {}),
    )


def text_with_holes(
    lines: Mapping[str, Sequence[str]],
    hidden: Mapping[str, Sequence[bool]],
    *,
    theme: str = "light",
    title: str = "What is hidden",
    subtitle: str = "the same text, a line for each way to hide a part of it",
) -> go.Figure:
    """A line of text for each name, and which of its tokens are hidden."""
    return text_cells(
        list(lines.values()),
        [np.asarray(hidden[name], dtype=int) for name in lines],
        {0: "given", 1: "hidden"},
        what="",
        labels=list(lines),
        x="token",
        y="",
        theme=theme,
        title=title,
        subtitle=subtitle,
    )
