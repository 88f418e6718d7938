"""Searches of architectures: what was tried at which cost, with the front; and how operators were scored."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.front import on_front
from workbench.figures.theme import blank, colour_bar, sequential, text, theme_named

LEGEND = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.01, "yanchor": "bottom"}


def search_front(
    rated: Sequence[tuple[Sequence[int], float, float]],
    *,
    title: str,
    x_title: str,
    y_title: str,
    groups: Sequence[str] | None = None,
    theme: str = "light",
) -> go.Figure:
    """Every candidate of a search, (genome, cost, rating), and the most that is had up to a cost, as a stair.

    Args:
        groups: what the colour of each candidate stands for, such as its split; all in one without it.

    Raises:
        InputError: nothing was rated, or there is not one group a candidate.
    """
    if not rated:
        raise InputError("rated is empty but must have at least one candidate: give the search more time")
    groups = [""] * len(rated) if groups is None else groups
    if len(groups) != len(rated):
        raise InputError(f"groups has {len(groups)} entries for {len(rated)} candidates")
    colours = theme_named(theme)
    subtitle = f"{len(rated)} candidates · stair: the front"
    figure = blank(theme, title, subtitle, x=x_title, y=y_title)
    kinds = sorted(set(groups))
    shades = colours.ordered(len(kinds))
    for kind, shade in zip(kinds, shades, strict=True):
        mine = [one for one, group in zip(rated, groups, strict=True) if group == kind]
        figure.add_scatter(
            x=[cost for _, cost, _ in mine],
            y=[rating for _, _, rating in mine],
            mode="markers",
            marker={"size": 7, "color": shade, "opacity": 0.8},
            name=text(kind) or "candidates",
            customdata=[" ".join(map(str, genome)) for genome, _, _ in mine],
            hovertemplate=f"%{{customdata}}<br>%{{x:,}} {text(x_title)}<br><b>%{{y:.4g}}</b> {text(y_title)}"
            "<extra></extra>",
        )
    points = {str(place): (cost, rating, rating, rating) for place, (_, cost, rating) in enumerate(rated)}
    stair = [points[name] for name in on_front(points)]
    figure.add_scatter(
        x=[cost for cost, *_ in stair] + [max(cost for _, cost, _ in rated)],
        y=[rating for _, rating, *_ in stair] + [stair[-1][1]],
        mode="lines",
        line={"color": colours.null, "width": 1.4, "dash": "dash", "shape": "hv"},
        name="front",
        hoverinfo="skip",
    )
    figure.update_layout(legend=LEGEND)
    return figure


def operator_map(
    scores: Mapping[tuple[int, int], float],
    kept: Sequence[Sequence[int]],
    names: Mapping[int, str],
    *,
    title: str,
    unit: str = "score",
    theme: str = "light",
) -> go.Figure:
    """The score of each operator (row) of each layer (column); what was dropped is crossed out, what has none is blank.

    Args:
        scores: (layer, operator) -> score.
        kept: the operators of each layer that are left.
        names: operator -> what it is called.

    Raises:
        InputError: an operator has no name.
    """
    used = sorted({op for _, op in scores} | {op for ops in kept for op in ops})
    if missing := [op for op in used if op not in names]:
        raise InputError(f"names has none for the operators {missing}")
    grid = np.full((len(used), len(kept)), np.nan)
    for (layer, op), score in scores.items():
        grid[used.index(op), layer] = score
    figure = blank(theme, title, "crossed out: dropped · blank: not scored", x="layer", y="operator")
    layers, labels = [str(layer) for layer in range(len(kept))], [text(names[op]) for op in used]
    figure.add_heatmap(
        z=grid,
        x=layers,
        y=labels,
        colorscale=sequential(theme),
        colorbar=colour_bar(unit=unit),
        xgap=2,
        ygap=2,
        hovertemplate=f"layer %{{x}} · %{{y}}<br><b>%{{z:.3g}}</b> {text(unit)}<extra></extra>",
    )
    gone = [(str(layer), text(names[op])) for layer, op in scores if op not in kept[layer]]
    figure.add_scatter(
        x=[layer for layer, _ in gone],
        y=[op for _, op in gone],
        mode="markers",
        marker={"symbol": "x-thin", "size": 16, "line": {"width": 2.5, "color": theme_named(theme).accent}},
        hoverinfo="skip",
        showlegend=False,
    )
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    return figure
