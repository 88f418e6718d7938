"""Figures of a merge: how far task vectors agree, what becomes of their spectra, and what each task keeps.

Task vectors are what experts changed of the base they were fine-tuned from. `lib.core.merge.compare` measures cosines
and signs, `lib.measures.operators` subspaces, `lib.measures.spectra` singular values.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from workbench.figures.theme import (
    blank,
    colour_bar,
    diverging,
    null_line,
    rgba,
    sequential,
    short_names,
    text,
    theme_named,
)

MEAN = "mean"
"""What the mean over tasks is called in every figure here."""


def task_cosines(
    cosines: Mapping[str, np.ndarray],
    tasks: Sequence[str],
    *,
    theme: str = "light",
    title: str = "Do the tasks pull a layer the same way?",
    subtitle: str = "0: they change other things · below: against each other",
) -> go.Figure:
    """Cosines of the task vectors of every pair of tasks, layer by layer.

    ``cosines`` maps a layer, in the order of the model, to (n, n); NaN where a task left the layer as it was.
    """
    colours = theme_named(theme)
    above = np.triu_indices(len(tasks), 1)
    pairs = [text(f"{tasks[a]} – {tasks[b]}") for a, b in zip(*above, strict=True)]
    layers = [text(name) for name in short_names(list(cosines))]
    values = np.array([np.asarray(matrix, dtype=float)[above] for matrix in cosines.values()])  # (layers, pairs)
    figure = blank(
        theme,
        title,
        " · ".join(filter(None, (f"{len(pairs)} pairs of tasks in each layer", text(subtitle)))),
        x="layer",
        y="cosine of task vectors",
    )
    defined = np.isfinite(values)
    spread = np.linspace(-0.28, 0.28, len(pairs)) if len(pairs) > 1 else np.zeros(1)
    where = (np.arange(len(layers))[:, None] + spread)[defined]
    figure.add_scatter(
        x=where,
        y=values[defined],
        mode="markers",
        name="a pair of tasks",
        marker={"size": 6, "color": rgba(colours.cycle[0], 0.45)},
        customdata=np.broadcast_to(np.array(pairs, dtype=object), values.shape)[defined],
        hovertemplate="%{customdata}<br>cosine <b>%{y:.3f}</b><extra></extra>",
    )
    means = [float(row[own].mean()) if own.any() else np.nan for row, own in zip(values, defined, strict=True)]
    figure.add_scatter(
        x=np.arange(len(layers)),
        y=means,
        mode="markers",
        name=MEAN,
        marker={"size": 30, "symbol": "line-ew", "line": {"width": 2.5, "color": colours.ink}},
        hovertemplate="mean <b>%{y:.3f}</b><extra></extra>",
    )
    null_line(figure, theme, 0, "unrelated")
    figure.update_xaxes(_named_ticks(layers), showgrid=False)
    figure.update_layout(legend=_LEGEND)
    return figure


def sign_conflict(
    shares: Mapping[str, float],
    n: int,
    *,
    theme: str = "light",
    title: str = "How many weights are pulled both ways?",
) -> go.Figure:
    """The share of each layer's weights on whose sign ``n`` tasks do not agree, against that of signs by chance."""
    layers = [text(name) for name in short_names(list(shares))]
    figure = blank(
        theme, title, f"of the weights that more than one of {n} tasks changed", x="layer", y="share of weights"
    )
    figure.add_scatter(
        x=np.arange(len(layers)),
        y=np.asarray(list(shares.values()), dtype=float),
        mode="markers",
        marker={"size": 11, "symbol": "diamond", "color": theme_named(theme).cycle[0]},
        hovertemplate="share <b>%{y:.4f}</b><extra></extra>",
    )
    null_line(figure, theme, 1 - 2.0 ** (1 - n), "signs by chance")
    figure.update_xaxes(_named_ticks(layers), showgrid=False)
    figure.update_yaxes(tickformat=".1%")
    figure.update_layout(showlegend=False)
    return figure


def spectra(
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
    *,
    theme: str = "light",
    title: str = "Singular values of a layer's change, before and after the merge",
) -> go.Figure:
    """Descending singular values (k,) of the change of one layer: a thin line a task, a thick one a merge.

    ``before`` is by task, ``after`` by the name of the merge. A value of 0 has no place on the axis.
    """
    colours = theme_named(theme)
    figure = blank(theme, title, "thin: each task's own · thick: merged", x="index k", y="singular value σₖ (log)")

    def line(values: np.ndarray, name: str, **look) -> go.Scatter:
        values = np.asarray(values, dtype=float)
        return go.Scatter(
            x=np.arange(1, len(values) + 1),
            y=np.where(values > 0, values, np.nan),
            name=text(name),
            hovertemplate=f"{text(name)}<br>k = %{{x}} · σₖ = <b>%{{y:.3g}}</b><extra></extra>",
            mode="lines",
            **look,
        )

    thin = {"color": rgba(colours.muted, 0.5), "width": 1}
    figure.add_traces(
        [
            line(values, name, line=thin, legendgroup="tasks", showlegend=i == 0)
            for i, (name, values) in enumerate(before.items())
        ]
    )
    if before:
        figure.data[0].name = "the tasks"  # one entry for all of them; each says its name where one points at it
    shades = colours.nominal(len(after))
    figure.add_traces(
        [
            line(values, name, line={"color": shade, "width": 2.6})
            for (name, values), shade in zip(after.items(), shades, strict=True)
        ]
    )
    shown = [np.asarray(values, dtype=float) for values in (*before.values(), *after.values())]
    top = max((values.max() for values in shown if values.size), default=1.0)
    low = min((values[values > 1e-4 * top].min() for values in shown if (values > 1e-4 * top).any()), default=top)
    if top > 0:  # what is rounding lies below the axis
        figure.update_yaxes(range=[np.log10(0.7 * low), np.log10(1.4 * top)])
    figure.update_yaxes(type="log", tickformat="~g", dtick=1)
    return figure


def subspace_overlap(
    overlaps: np.ndarray,
    tasks: Sequence[str],
    *,
    rank: int,
    dim: int,
    theme: str = "light",
    title: str = "Do the tasks use the same directions?",
) -> go.Figure:
    """Overlap (n, n) of the ``rank`` leading directions of each task's change, of ``dim``: 0 apart, 1 the same."""
    overlaps, names = np.asarray(overlaps, dtype=float), [text(task) for task in tasks]
    figure = blank(theme, title, f"‖QᵀQ′‖² ÷ r of the {rank} leading directions · by chance {rank / dim:.2f}")
    figure.add_heatmap(
        z=overlaps,
        x=names,
        y=names,
        zmin=0,
        zmax=1,
        colorscale=sequential(theme),
        colorbar=colour_bar({0: "0 apart", rank / dim: "chance", 1: "1 the same"}),
        text=[["" if np.isnan(value) else f"{value:.2f}" for value in row] for row in overlaps],
        texttemplate="%{text}",
        hovertemplate="%{y} and %{x}<br>overlap <b>%{z:.3f}</b><extra></extra>",
        xgap=2,
        ygap=2,
    )
    return _square(figure)


def against_scale(
    scales: Sequence[float],
    kept: Mapping[str, Sequence[float]],
    *,
    base: float | None = None,
    chosen: float | None = None,
    theme: str = "light",
    title: str = "How far along the merged update?",
    subtitle: str = "base + λ · update",
) -> go.Figure:
    """Normalised accuracy of every task over λ (S,), the mean over tasks drawn thick, its best λ marked.

    1 is what a task's own expert has; ``base`` is the mean that the base has, ``chosen`` a λ to mark.
    """
    colours = theme_named(theme)
    scales, mean = np.asarray(scales, dtype=float), np.mean([list(values) for values in kept.values()], axis=0)
    best = int(np.argmax(mean))
    figure = blank(
        theme,
        title,
        f"{text(subtitle)} · best mean {mean[best]:.3f} at λ = {scales[best]:.3g}",
        x="λ",
        y="accuracy ÷ expert's",
    )
    for (name, values), shade in zip(kept.items(), colours.nominal(len(kept)), strict=True):
        figure.add_scatter(
            x=scales,
            y=list(values),
            name=text(name),
            mode="lines",
            line={"color": rgba(shade, 0.8), "width": 1.4},
            hovertemplate=f"{text(name)}<br>λ = %{{x:.3g}} · <b>%{{y:.3f}}</b><extra></extra>",
        )
    figure.add_scatter(
        x=scales,
        y=mean,
        name=MEAN,
        mode="lines+markers",
        line={"color": colours.ink, "width": 3},
        marker={"size": [11 if i == best else 4 for i in range(len(scales))]},
        hovertemplate="mean<br>λ = %{x:.3g} · <b>%{y:.3f}</b><extra></extra>",
    )
    null_line(figure, theme, 1, "own expert")
    if base is not None:
        null_line(figure, theme, base, "base")
    if chosen is not None:
        figure.add_vline(x=chosen, line={"color": colours.accent, "width": 1.2})
    return figure


def method_by_task(
    kept: Mapping[str, Sequence[float]],
    tasks: Sequence[str],
    *,
    theme: str = "light",
    title: str = "What each task keeps of its expert, by method",
) -> go.Figure:
    """Normalised accuracy of every method (rows) on every task, and the mean over tasks as a column of its own."""
    values = np.array([[*row, np.mean(row)] for row in map(list, kept.values())], dtype=float)
    figure = blank(theme, title, "accuracy ÷ that of the task's own expert · 1 = as good as the expert")
    low = float(np.floor(10 * np.nanmin(values)) / 10)
    high = max(1.0, float(np.nanmax(values)))
    figure.add_heatmap(
        z=values,
        x=[*map(text, tasks), f"<b>{MEAN}</b>"],
        y=[text(method) for method in kept],
        zmin=min(low, 0.9),
        zmax=high,
        colorscale=sequential(theme),
        colorbar=colour_bar(unit="of expert"),
        text=[["" if np.isnan(value) else f"{value:.2f}" for value in row] for row in values],
        texttemplate="%{text}",
        hovertemplate="%{y}<br>%{x}: <b>%{z:.3f}</b><extra></extra>",
        xgap=2,
        ygap=2,
    )
    figure.update_layout(height=150 + 34 * len(kept))
    figure.add_shape(
        type="line",
        x0=len(tasks) - 0.5,
        x1=len(tasks) - 0.5,
        y0=0,
        y1=1,
        yref="y domain",
        line={"color": theme_named(theme).ink, "width": 1.5},
    )
    return _square(figure)


def expert_similarity(
    similarity: np.ndarray,
    labels: Sequence[int],
    *,
    theme: str = "light",
    title: str = "Experts of one layer, by what they say",
) -> go.Figure:
    """Mean cosine (E, E) of the experts' outputs, the experts in the order of their clusters, which are framed."""
    labels = np.asarray(labels)
    order = np.argsort(labels, kind="stable")
    names = [str(expert) for expert in order]
    figure = blank(
        theme, title, "mean cosine of outputs over tokens · frames: clusters, each made one", x="expert", y="expert"
    )
    ordered = np.asarray(similarity, dtype=float)[np.ix_(order, order)]
    figure.add_heatmap(
        z=ordered,
        x=names,
        y=names,
        zmin=-1,
        zmax=1,
        colorscale=[
            [stop, colour]
            for (stop, _), (_, colour) in zip(diverging(theme, -1, 0, 1), diverging(theme, -1, 0, 1)[::-1], strict=True)
        ],
        colorbar=colour_bar({-1: "−1 opposite", 0: "0 unrelated", 1: "1 the same"}),
        text=[[f"{value:.2f}" for value in row] for row in ordered] if len(labels) <= 16 else None,
        texttemplate="%{text}" if len(labels) <= 16 else None,
        hovertemplate="experts %{y} and %{x}<br>cosine <b>%{z:.3f}</b><extra></extra>",
        xgap=2,
        ygap=2,
    )
    line = {"color": theme_named(theme).ink, "width": 2}
    for cluster in np.unique(labels):
        at = np.flatnonzero(labels[order] == cluster)
        ends = {"x0": at[0] - 0.5, "x1": at[-1] + 0.5, "y0": at[0] - 0.5, "y1": at[-1] + 0.5}
        figure.add_shape(type="rect", line=line, **ends)
    return _square(figure)


_LEGEND = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.01, "yanchor": "bottom"}


def _named_ticks(names: Sequence[str]) -> dict:
    """An axis of numbers that says names, slanted where there are many."""
    return {
        "tickmode": "array",
        "tickvals": list(range(len(names))),
        "ticktext": list(names),
        "tickangle": -35 if len(names) > 5 else 0,
        "range": [-0.6, len(names) - 0.4],
    }


def _square(figure: go.Figure) -> go.Figure:
    """Axes of a heat map by names, the first row on top."""
    figure.update_xaxes(showgrid=False, type="category")
    figure.update_yaxes(showgrid=False, type="category", autorange="reversed")
    return figure
