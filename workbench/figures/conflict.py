"""Gradient conflict between domains or modalities: cosines, all groups at a glance, rate and worst pair over time.

A cosine is drawn grey where it is undefined: a group without a gradient for the domain, or a signal below its noise.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from workbench.figures.theme import (
    COSINE_TICKS,
    band_shape,
    blank,
    colour_bar,
    cosine_scale,
    expert_ticks,
    mark_step,
    null_line,
    outline_row,
    rgba,
    sequential,
    short_names,
    text,
    theme_named,
)

BAR = colour_bar(COSINE_TICKS)


def cosine_matrix(
    matrix: np.ndarray,
    domains: Sequence[str],
    *,
    band: float | None = None,
    theme: str = "light",
    title: str = "Gradient cosine between domains",
    kind: str = "raw",
) -> go.Figure:
    """Cosines between the gradients of the domains in one parameter group, ``matrix`` (n, n), values written in.

    ``band`` is 1 / sqrt(P), the size of the cosine of two random directions in P dimensions: cells inside it are
    marked "~0". ``kind`` ("raw", "noise-corrected") goes into the subtitle.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    noise = f" · null ± {band:.1g}" if band else ""
    figure = blank(
        theme,
        title,
        f"{kind} cosine{noise} · grey = undefined",
        plot_bgcolor=theme_named(theme).undefined,
    )
    values = [["" if np.isnan(v) else "~0" if band and abs(v) < band else f"{v:+.2f}" for v in row] for row in matrix]
    figure.add_trace(
        go.Heatmap(
            z=np.clip(matrix, -1, 1).astype(np.float32),
            x=[text(domain) for domain in domains],
            y=[text(domain) for domain in domains],
            zmin=-1,
            zmax=1,
            colorscale=cosine_scale(theme),
            colorbar=BAR,
            text=values,
            texttemplate="%{text}",
            customdata=matrix.astype(np.float32),
            hovertemplate="%{y} and %{x}<br>cosine <b>%{customdata:.4f}</b><extra></extra>",
            hoverongaps=False,
            xgap=2,
            ygap=2,
        )
    )
    figure.update_xaxes(showgrid=False, type="category")
    figure.update_yaxes(showgrid=False, type="category", autorange="reversed")
    return figure


def group_cosines(
    cosines: np.ndarray,
    groups: Sequence[str],
    pairs: Sequence[str],
    *,
    theme: str = "light",
    title: str = "Conflict in every parameter group",
    kind: str = "raw",
    selected: int | None = None,
) -> go.Figure:
    """Cosine of every pair of domains (columns) in every parameter group (rows) at one step.

    ``cosines`` (G, pairs); ``pairs`` are named "first – second"; ``selected`` outlines one group.
    """
    figure = blank(theme, title, f"{kind} cosine · grey = undefined", plot_bgcolor=theme_named(theme).undefined)
    figure.add_trace(
        go.Heatmap(
            z=np.clip(np.asarray(cosines, dtype=np.float64), -1, 1).astype(np.float32),
            x=[text(pair).replace(" – ", "<br>") for pair in pairs],
            y=list(range(len(groups))),
            zmin=-1,
            zmax=1,
            colorscale=cosine_scale(theme),
            colorbar=BAR,
            customdata=np.repeat(
                np.asarray([text(group) for group in groups], dtype=object)[:, None], len(pairs), axis=1
            ),
            hovertemplate="%{customdata}<br>%{x}<br>cosine <b>%{z:.3f}</b><extra></extra>",
            hoverongaps=False,
            ygap=1 if len(groups) <= 40 else 0,
            xgap=2,
        )
    )
    stride = max(1, -(-len(groups) // 18))
    figure.update_yaxes(
        showgrid=False,
        tickmode="array",
        tickvals=list(range(0, len(groups), stride)),
        ticktext=[text(group) for group in groups][::stride],
        tickfont_size=11 if len(groups) <= 10 else 9,
        range=[len(groups) - 0.5, -0.5],
    )
    figure.update_xaxes(showgrid=False, type="category")
    if len(pairs) > 15 or sum(map(len, pairs)) > 200:  # no room for names, which are there when one points at a cell
        figure.update_xaxes(showticklabels=False, title_text=f"{len(pairs)} pairs")
    if selected is not None:
        outline_row(figure, theme, selected)
    return figure


def expert_cosines(
    matrix: np.ndarray, *, theme: str = "light", title: str = "Gradient cosine between experts"
) -> go.Figure:
    """Cosines (E, E) between the gradients of experts on the parameters that both have; grey where they share none."""
    figure = blank(theme, title, "on what both have · grey = nothing", plot_bgcolor=theme_named(theme).undefined)
    return _experts(figure, np.clip(matrix, -1, 1), "cosine", colorscale=cosine_scale(theme), zmin=-1, colorbar=BAR)


def expert_overlaps(matrix: np.ndarray, *, theme: str = "light", title: str = "Overlap of experts") -> go.Figure:
    """The share (E, E) of the parameters of one expert (row) that another one (column) has as well; 0 .. 1."""
    figure = blank(theme, title, "share of the row's units in the column")
    return _experts(figure, matrix, "overlap", colorscale=sequential(theme), zmin=0, colorbar=colour_bar())


def _experts(figure: go.Figure, matrix: np.ndarray, what: str, **scale: object) -> go.Figure:
    values = np.array(matrix, dtype=np.float32)
    np.fill_diagonal(values, np.nan)  # 1 of itself, which says nothing
    hover = f"experts %{{y}} and %{{x}}<br>{what} <b>%{{z:.3f}}</b><extra></extra>"
    figure.add_trace(go.Heatmap(z=values, zmax=1, hovertemplate=hover, hoverongaps=False, xgap=1, ygap=1, **scale))
    ticks = {"title_text": "expert", "showgrid": False} | expert_ticks(len(values))
    figure.update_xaxes(**ticks)
    figure.update_yaxes(**ticks | {"range": ticks["range"][::-1]})  # which plotly turns back itself where all is grey
    return figure


def parting_lines(
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    theme: str = "light",
    title: str = "Is what conflicts parted?",
    step: float | None = None,
) -> go.Figure:
    """Means over pairs of experts over time: "overlap in conflict", "overlap in agreement", and the same of links.

    ``series`` maps each to (steps, values). Pairs in conflict are orange and those that agree blue, as cosines are.
    """
    colours = theme_named(theme)
    figure = blank(
        theme, title, "mean over pairs in conflict, and over pairs that agree", x="step", y="share, strength"
    )
    for name, (steps, values) in series.items():
        figure.add_trace(
            go.Scatter(
                x=np.asarray(steps),
                y=np.asarray(values, dtype=np.float32),
                name=text(name),
                mode="lines+markers" if len(steps) < 3 else "lines",
                line={
                    "color": colours.diverging[-1 if name.endswith("conflict") else 0],
                    "dash": "dot" if name.startswith("link") else "solid",
                    "width": 2,
                },
                hovertemplate=f"{text(name)} · step %{{x}}<br><b>%{{y:.3f}}</b><extra></extra>",
            )
        )
    figure.update_yaxes(range=[0, 1.02])
    mark_step(figure, theme, step)
    return figure


def conflict_lines(
    steps: np.ndarray,
    values: Mapping[str, np.ndarray],
    *,
    measure: str = "rate",
    band: float | None = None,
    theme: str = "light",
    title: str | None = None,
    step: float | None = None,
    selected: str | None = None,
    limits: tuple[float, float] | None = None,
) -> go.Figure:
    """Conflict rate ("rate") or maximum negative cosine ("max_negative") over time, one line per parameter group.

    ``steps`` (S,), ``values[group]`` (S,). The null of the rate is 0.5 (random signs); the null of the maximum
    negative cosine is 0 with ``band`` = 1 / sqrt(P) of the selected group.
    """
    colours = theme_named(theme)
    look = {
        "rate": ("Conflict rate", "share of pairs with negative cosine", "share of pairs"),
        "max_negative": ("Worst conflict", "largest −cosine over pairs", "max of −cosine"),
    }[measure]
    figure = blank(theme, title or look[0], look[1], x="step", y=look[2])
    many, faint = len(values) > 8, rgba(colours.muted, 0.35)
    names = short_names(list(values))
    for i, (group, line) in enumerate(values.items()):
        chosen = group == selected
        figure.add_trace(
            go.Scatter(
                x=np.asarray(steps),
                y=np.asarray(line, dtype=np.float32),
                name=text(names[i]),
                mode="lines+markers" if len(steps) < 3 else "lines",
                line={
                    "color": colours.accent if many and chosen else faint if many else colours.cycle[i % 8],
                    "width": 2.4 if chosen else 1.3,
                },
                opacity=1.0 if chosen or many or selected is None else 0.6,
                showlegend=chosen or not many,
                zorder=1 if chosen else 0,
                hovertemplate=f"{text(group)} · step %{{x}}<br><b>%{{y:.3f}}</b><extra></extra>",
            )
        )
    if measure == "rate":
        null_line(figure, theme, 0.5, "random signs")
        figure.update_yaxes(range=[-0.04, 1.04])
    else:
        if band:
            figure.add_shape(band_shape(theme, -band, band))
        null_line(figure, theme, 0, "orthogonal")
        if limits is not None:
            figure.update_yaxes(range=list(limits))
    mark_step(figure, theme, step)
    return figure


def self_cosines(
    values: np.ndarray,
    domains: Sequence[str],
    *,
    band: float | None = None,
    theme: str = "light",
    title: str = "Is there a signal?",
) -> go.Figure:
    """Cosine between the two half-batch gradients of each domain, ``values`` (n,): near 0 the batch is mostly noise."""
    colours = theme_named(theme)
    figure = blank(theme, title, "cosine of two half batches", y="cosine")
    figure.add_trace(
        go.Bar(
            x=[text(domain) for domain in domains],
            y=np.asarray(values, dtype=np.float32),
            marker_color=rgba(colours.cycle[0], 0.85),
            name="self-cosine",
            hovertemplate="%{x}<br>self-cosine <b>%{y:.3f}</b><extra></extra>",
        )
    )
    if band:
        figure.add_shape(band_shape(theme, -band, band))
    null_line(figure, theme, 0, "only noise")
    figure.update_yaxes(range=[min(-0.1, float(np.nanmin(values, initial=0.0)) - 0.05), 1.05])
    figure.update_xaxes(showgrid=False, type="category")
    figure.update_layout(bargap=0.5, showlegend=False)
    return figure
