"""Tokens that go through a block a different number of times: how many stop where, text coloured by depth, the price.

A depth is how often the block was applied: 0 to R recursions.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.text import text_cells
from workbench.figures.theme import blank, legend_below_title, mark_step, rgba, text, theme_named


def depth_shares(
    steps: np.ndarray,
    counts: np.ndarray,
    *,
    theme: str = "light",
    title: str = "Depth over training",
    step: float | None = None,
) -> go.Figure:
    """The share of tokens that stop at each depth, stacked, over time; the line is their mean depth, read on the right.

    ``steps`` (S,), ``counts`` (S, R + 1) tokens by depth. A depth that no token ever had is left out.
    """
    counts = np.asarray(counts, dtype=np.float64)
    deepest = counts.shape[1] - 1
    total = counts.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares, mean = 100 * counts / total[:, None], counts @ np.arange(deepest + 1) / total
    colours = theme_named(theme)
    shades = colours.ordered(deepest + 1)
    mode = "lines" if len(steps) > 1 else "lines+markers"  # one record has no line
    traces = [
        {
            "type": "scatter",
            "x": np.asarray(steps),
            "y": shares[:, depth],
            "name": str(depth),
            "mode": mode,
            "stackgroup": "depth",
            "line": {"width": 0.5, "color": shades[depth]},
            "fillcolor": rgba(shades[depth], 0.75),
            "hovertemplate": f"depth {depth} · step %{{x}}<br><b>%{{y:.1f}} %</b> of the tokens<extra></extra>",
        }
        for depth in range(deepest + 1)
        if counts[:, depth].any()
    ]
    line = {
        "type": "scatter",
        "x": np.asarray(steps),
        "y": mean,
        "name": "mean",
        "yaxis": "y2",
        "mode": mode,
        "line": {"color": colours.ink, "width": 2},
        "hovertemplate": "step %{x}<br>mean depth <b>%{y:.2f}</b><extra></extra>",
    }
    figure = blank(
        theme,
        title,
        x="step",
        y="tokens (%)",
        data=[*traces, line],
        yaxis={"range": [0, 100], "showgrid": False},
        yaxis2={
            "overlaying": "y",
            "side": "right",
            "range": [0, deepest],
            "showgrid": False,
            "title": {"text": "mean"},
        },
        legend=legend_below_title(),
    )
    mark_step(figure, theme, step)
    return figure


def text_by_depth(
    tokens: Sequence[str],
    depths: np.ndarray,
    deepest: int,
    *,
    columns: int = 64,
    theme: str = "light",
    title: str = "Text by depth",
    subtitle: str = "each token by how often the block was applied to it",
) -> go.Figure:
    """Text, one token a cell, line by line of ``columns`` cells, coloured by depth.

    ``tokens`` (N,) what stands in each cell, ``depths`` (N,) from 0 to ``deepest``. A space is shown as a middle dot, a
    newline as a return sign.

    Raises:
        InputError: a depth for each token is not there, or one lies outside.
    """
    depths = np.asarray(depths)
    if depths.shape != (len(tokens),) or not len(tokens):
        raise InputError(f"depths has shape {depths.shape} but must have one for each of the {len(tokens)} tokens")
    if depths.min() < 0 or depths.max() > deepest:
        raise InputError(f"depths are {depths.min()} to {depths.max()} but must be between 0 and deepest = {deepest}")
    starts = range(0, len(tokens), columns)
    return text_cells(
        [tokens[i : i + columns] for i in starts],
        [depths[i : i + columns] for i in starts],
        {depth: str(depth) for depth in range(deepest + 1)},
        what="depth",
        x=f"{columns} tokens a line",
        y="line",
        theme=theme,
        title=title,
        subtitle=subtitle,
    )


def loss_over_flops(
    curves: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
    *,
    unit: str = "bits/byte",
    theme: str = "light",
    title: str = "Loss over training operations",
    subtitle: str = "mean over the seeds on validation text; the last point is the end of training",
) -> go.Figure:
    """What each arm has learned by what it has spent; ``curves`` maps an arm to (operations, losses) of every seed.

    The seeds of an arm were evaluated at the same points.

    Raises:
        InputError: they were not.
    """
    colours = theme_named(theme)
    figure = blank(theme, title, subtitle, x="GFLOP", y=unit)
    for (arm, seeds), shade in zip(curves.items(), colours.nominal(len(curves)), strict=True):
        spent, losses = (np.array(part, dtype=np.float64) for part in zip(*seeds, strict=True))
        if (spent != spent[0]).any():
            raise InputError(f"curves[{arm!r}] has seeds that were evaluated at different operations")
        figure.add_scatter(
            x=spent[0] / 1e9,
            y=losses.mean(0),
            name=text(arm),
            mode="lines+markers",
            line={"color": shade, "width": 2},
            hovertemplate=f"{text(arm)} · %{{x:.1f}} GFLOP<br><b>%{{y:.3f}}</b> {text(unit)}<extra></extra>",
        )
    return figure
