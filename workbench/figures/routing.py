"""Where the tokens go: load over time and by layer, load beside probability, drops, what an expert takes.

Loads are drawn as multiples of the uniform share, so 1 is perfect balance, 0 a dead expert and E/K the most that one
expert can take when every token picks K of E.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from workbench.figures.theme import (
    blank,
    colour_bar,
    diverging,
    expert_ticks,
    legend_below_title,
    mark_step,
    null_label,
    null_line,
    null_shape,
    outline_row,
    rgba,
    short_names,
    text,
    theme_named,
)


def as_multiple_of_uniform(loads: np.ndarray) -> np.ndarray:
    """Counts (..., E) as multiples of the uniform share of their row; a row without tokens is NaN (undefined)."""
    loads = np.asarray(loads, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return loads / loads.mean(axis=-1, keepdims=True)


def load_ceiling(*loads: np.ndarray) -> float:
    """The top of a colour scale that fits all the given counts (..., E): what lets two runs share one scale.

    It is the 99.5th percentile of the multiples of uniform, within 2 .. 4: one collapsed expert, which can take E/K
    times its share, must not wash out all the others. What lies beyond has the strongest colour.
    """
    tops = [np.nanpercentile(m, 99.5) for m in map(as_multiple_of_uniform, loads) if np.isfinite(m).any()]
    return float(np.clip(max([2.0, *tops]), 2.0, 4.0))


def _load_heat(theme: str, x, y, ratio: np.ndarray, ceiling: float, hover: str, gap: float = 0.0) -> go.Heatmap:
    ticks = {0: "0 dead", 1: "1 uniform", ceiling: f"≥ {ceiling:.3g} ×"}
    return go.Heatmap(
        x=x,
        y=y,
        z=ratio.astype(np.float32),
        zmin=0,
        zmax=ceiling,
        colorscale=diverging(theme, 0, 1, ceiling),
        colorbar=colour_bar(ticks),
        hovertemplate=hover,
        xgap=gap,
        ygap=gap,
        hoverongaps=False,
    )


def load_heatmap(
    steps: np.ndarray,
    loads: np.ndarray,
    *,
    theme: str = "light",
    title: str = "Expert load over training",
    ceiling: float | None = None,
    step: float | None = None,
    selected: int | None = None,
) -> go.Figure:
    """Load of every expert of one layer over time.

    ``steps`` (S,), ``loads`` (S, E) token counts. ``ceiling`` is the top of the colour scale in multiples of uniform
    (`load_ceiling`), ``step`` draws the reader's position, ``selected`` outlines one expert.
    """
    loads = np.asarray(loads)
    figure = blank(theme, title, "load ÷ uniform load, per expert and step", x="step", y="expert")
    ratio = as_multiple_of_uniform(loads)
    figure.add_trace(
        _load_heat(
            theme,
            np.asarray(steps),
            np.arange(loads.shape[1]),
            ratio.T,
            ceiling or load_ceiling(loads),
            "step %{x}<br>expert %{y}<br><b>%{z:.2f}</b> × uniform<extra></extra>",
        )
    )
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False, **expert_ticks(loads.shape[1]))
    if selected is not None:
        outline_row(figure, theme, selected)
    mark_step(figure, theme, step)
    return figure


def load_by_layer(
    loads: Sequence[np.ndarray],
    layers: Sequence[str],
    *,
    theme: str = "light",
    title: str = "Expert load by layer",
    ceiling: float | None = None,
) -> go.Figure:
    """Load of every expert (x) of every layer (y) at one step; ``loads`` holds one (E,) count per layer.

    Layers may differ in their number of experts: the missing cells stay empty.
    """
    width = max(len(load) for load in loads)
    ratio = np.full((len(loads), width), np.nan)
    for row, load in zip(ratio, loads, strict=True):
        row[: len(load)] = as_multiple_of_uniform(load)
    figure = blank(theme, title, "load ÷ uniform load at this step", x="expert", y="layer")
    heat = _load_heat(
        theme,
        np.arange(width),
        np.arange(len(layers)),
        ratio,
        ceiling or max(load_ceiling(load) for load in loads),
        "layer %{customdata}<br>expert %{x}<br><b>%{z:.2f}</b> × uniform<extra></extra>",
        gap=1 if width <= 64 else 0,
    )
    heat.customdata = np.repeat(np.asarray([text(layer) for layer in layers], dtype=object)[:, None], width, axis=1)
    figure.add_trace(heat)
    figure.update_xaxes(showgrid=False, **expert_ticks(width))
    ticks = expert_ticks(len(layers)) | {"range": [len(layers) - 0.5, -0.5]}  # the first layer on top
    names = short_names(layers)
    figure.update_yaxes(showgrid=False, ticktext=[text(names[i]) for i in ticks["tickvals"]], **ticks)
    return figure


def load_and_probability(
    load: np.ndarray,
    probability: np.ndarray | None,
    *,
    theme: str = "light",
    title: str = "Load and probability",
    ceiling: float | None = None,
    selected: int | None = None,
) -> go.Figure:
    """The share f of assignments and the mean router probability P of every expert of one layer at one step.

    ``load`` (E,) counts, ``probability`` (E,) or None where it was not recorded; both are drawn as multiples of 1/E.
    Bars and dots that part company are the case a balance loss on f·P does not see. ``ceiling`` fixes the y axis.
    """
    colours = theme_named(theme)
    f = as_multiple_of_uniform(load)
    experts = np.arange(len(f))
    edge = [2 if i == selected else 0 for i in experts]
    traces = [
        {
            "type": "bar",
            "x": experts,
            "y": f,
            "name": "f: assignments",
            "marker": {"color": rgba(colours.cycle[0], 0.8), "line": {"width": edge, "color": colours.accent}},
            "hovertemplate": "expert %{x}<br>f = <b>%{y:.2f}</b> × uniform<extra></extra>",
        }
    ]
    if probability is not None:
        traces.append(
            {
                "type": "scatter",
                "x": experts,
                "y": as_multiple_of_uniform(probability),
                "name": "P: probability",
                "mode": "markers",
                "marker": {"color": colours.cycle[1], "size": 7 if len(f) <= 32 else 5, "symbol": "diamond"},
                "hovertemplate": "expert %{x}<br>P = <b>%{y:.2f}</b> × uniform<extra></extra>",
            }
        )
    return blank(
        theme,
        title,
        x="expert",
        y="× uniform (1/E)",
        data=traces,
        xaxis={"showgrid": False} | expert_ticks(len(f)),
        yaxis={"rangemode": "tozero"} if ceiling is None else {"range": [0, ceiling]},
        legend=legend_below_title(),
        shapes=[null_shape(theme, 1)],
        annotations=[null_label(theme, 1, "uniform")],
    )


def dropped_rates(
    steps: np.ndarray,
    rates: np.ndarray,
    *,
    theme: str = "light",
    title: str = "Dropped by capacity",
    step: float | None = None,
    ceiling: float | None = None,
) -> go.Figure:
    """Share of assignments beyond capacity, and of tokens that lost ALL their experts; ``rates`` (S, 2) in [0, 1]."""
    colours = theme_named(theme)
    figure = blank(theme, title, "", x="step", y="dropped (%)")
    for i, name in enumerate(("assignments", "tokens (all K dropped)")):
        figure.add_trace(
            go.Scatter(
                x=np.asarray(steps),
                y=100 * np.asarray(rates, dtype=np.float64)[:, i],
                name=name,
                mode="lines",
                line={"color": colours.cycle[i], "width": 1.8},
                hovertemplate=f"{name} · step %{{x}}<br><b>%{{y:.2f}} %</b><extra></extra>",
            )
        )
    null_line(figure, theme, 0, "none dropped")
    mark_step(figure, theme, step)
    figure.update_yaxes(rangemode="tozero")
    if ceiling is not None:
        figure.update_yaxes(range=[-0.03 * ceiling, ceiling])
    figure.update_layout(legend=legend_below_title())
    return figure


def composition(
    labels: Sequence[str],
    shares: np.ndarray,
    overall: np.ndarray,
    *,
    theme: str = "light",
    title: str,
    of: str,
) -> go.Figure:
    """What one expert takes: bars for its own shares, ticks for the shares over all experts (its null).

    ``labels`` (n,), ``shares`` and ``overall`` (n,) in [0, 1], largest first; ``of`` names the whole ("of the
    expert's tokens").
    """
    colours = theme_named(theme)
    rows, labels = list(range(len(labels))), [text(label) for label in labels]
    mine = {
        "type": "bar",
        "x": 100 * np.asarray(shares, dtype=np.float64),
        "y": rows,
        "orientation": "h",
        "name": "this expert",
        "marker": {"color": rgba(colours.cycle[0], 0.85)},
        "customdata": labels,
        "hovertemplate": "%{customdata}<br><b>%{x:.2f} %</b><extra></extra>",
    }
    everyone = {
        "type": "scatter",
        "x": 100 * np.asarray(overall, dtype=np.float64),
        "y": rows,
        "name": "all experts",
        "mode": "markers",
        "marker": {"symbol": "line-ns", "size": 11, "line": {"width": 2.2, "color": colours.cycle[1]}},
        "customdata": labels,
        "hovertemplate": "%{customdata}, all experts<br><b>%{x:.2f} %</b><extra></extra>",
    }
    return blank(
        theme,
        title,
        x=f"% {of}",
        data=[mine, everyone],
        xaxis={"rangemode": "tozero"},
        yaxis={
            "tickmode": "array",
            "tickvals": rows,
            "ticktext": labels,
            "tickfont": {"size": 11, "color": colours.ink},
            "range": [len(rows) - 0.5, -0.5],
            "showgrid": False,
        },
        legend=legend_below_title(),
        bargap=0.3,
    )
