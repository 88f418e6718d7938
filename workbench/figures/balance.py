"""How evenly the tokens are spread, over time: one line per layer, null bands, small panels side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from workbench.figures.theme import (
    band_shape,
    blank,
    mark_step,
    null_label,
    null_line,
    null_shape,
    short_names,
    step_shape,
    text,
    theme_named,
)


@dataclass(frozen=True)
class BalanceMeasure:
    """How one balance measure is named on a plot: its panel title, its unit and its value at perfect balance."""

    title: str
    unit: str
    ideal: float


BALANCE = {
    "max_vio": BalanceMeasure("MaxVio", "max/mean − 1", 0.0),
    "cv": BalanceMeasure("CV", "std/mean", 0.0),
    "min_ratio": BalanceMeasure("Least load", "min/mean", 1.0),
    "dead": BalanceMeasure("Dead", "experts", 0.0),
}


def balance_lines(
    steps: np.ndarray,
    values: Mapping[str, np.ndarray],
    layers: Sequence[str],
    *,
    nulls: Mapping[str, tuple[float, float]] | None = None,
    theme: str = "light",
    title: str = "Balance over training",
    step: float | None = None,
    selected: int | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> go.Figure:
    """Balance measures over time, one line per layer and one panel per measure (at most four).

    ``steps`` (S,), ``values[measure]`` (L, S) with the measures of `BALANCE`; ``nulls[measure]`` is the interval that
    uniform random routing stays in, drawn as a band. ``selected`` draws one layer on top. ``ranges`` fixes y axes.
    """
    colours, names = theme_named(theme), short_names(layers)
    layout: dict = {"shapes": [], "annotations": []}
    traces: list[dict] = []
    for panel, (measure, lines) in enumerate(values.items()):
        look, axis = BALANCE[measure], str(panel + 1) if panel else ""
        low, high = (nulls or {}).get(measure, (np.nan, np.nan))
        if np.isfinite([low, high]).all():
            layout["shapes"].append(band_shape(theme, low, high, axis))
        layout["shapes"] += [null_shape(theme, look.ideal, axis), step_shape(theme, step, axis)]
        if not panel:
            layout["annotations"].append(null_label(theme, look.ideal, "balanced"))
        if len(values) > 1:
            layout["annotations"].append(_panel_title(look, axis, colours.muted))
        layout[f"xaxis{axis}"], layout[f"yaxis{axis}"] = _panel_axes(panel, len(values), axis)
        if ranges and measure in ranges:
            layout[f"yaxis{axis}"]["range"] = list(ranges[measure])
        for row, (name, shade) in enumerate(zip(names, colours.ordered(len(layers)), strict=True)):
            traces.append(
                _layer_line(steps, lines[row], name, shade, None if selected is None else row == selected)
                | {"xaxis": f"x{axis}", "yaxis": f"y{axis}", "legendgroup": text(name), "showlegend": not panel}
            )
    if len(values) == 1:
        layout["yaxis"]["title"] = {"text": f"{look.title} ({look.unit})"}
    return blank(
        theme,
        title,
        "one line per layer · band = uniform random routing",
        data=traces,
        legend={"title": {"text": "layer"}, "tracegroupgap": 0, "y": 1.06},
        margin_t=84 if len(values) > 1 else 60,
        **layout,
    )


def _panel_axes(panel: int, n: int, axis: str) -> tuple[dict, dict]:
    """The x and y axis of one of n panels, two to a row, rows from the top."""
    row, col, rows = panel // 2, panel % 2, (n + 1) // 2
    width, height = (1.0 if n == 1 else 0.44), (1.0 if rows == 1 else 0.38)
    left, bottom = col * (1 - width), (1 - height) * (rows - 1 - row)
    x = {"domain": [left, left + width], "anchor": f"y{axis}", "title": {"text": "step"}}
    if panel + 2 < n:  # the panel below has the labels
        x |= {"showticklabels": False, "title": {"text": ""}}
    return x, {"domain": [bottom, bottom + height], "anchor": f"x{axis}"}


def _panel_title(look: BalanceMeasure, axis: str, muted: str) -> dict:
    return {
        "text": f"{look.title} <span style='color:{muted}'>{look.unit}</span>",
        "font": {"size": 11.5},
        "showarrow": False,
        "x": 0,
        "xref": f"x{axis} domain",
        "xanchor": "left",
        "y": 1,
        "yref": f"y{axis} domain",
        "yanchor": "bottom",
        "yshift": 2,
    }


def routing_information(
    steps: np.ndarray,
    information: np.ndarray,
    baseline: np.ndarray,
    layers: Sequence[str],
    *,
    of: str = "domain",
    theme: str = "light",
    title: str = "Routing information",
    step: float | None = None,
    selected: int | None = None,
    ceiling: float | None = None,
) -> go.Figure:
    """Mutual information between expert and domain, or what ``of`` names, a line per layer, with its shuffled baseline.

    ``information`` and ``baseline`` (L, S) as shares of the entropy of the domain, 0 .. 1; the baseline is what
    shuffled domains would still show, and is drawn dashed for the selected layer (the first, if none is). ``ceiling``
    fixes the y axis (a share too).
    """
    colours = theme_named(theme)
    traces = [
        _layer_line(
            steps,
            100 * np.asarray(information[row]),
            name,
            shade,
            None if selected is None else row == selected,
            " %",
        )
        for row, (name, shade) in enumerate(zip(short_names(layers), colours.ordered(len(layers)), strict=True))
    ]
    null = _layer_line(steps, 100 * np.asarray(baseline[selected or 0]), "shuffled", colours.null, None, " %")
    null["line"] = {"color": colours.null, "width": 1.4, "dash": "dash"}
    figure = blank(
        theme,
        title,
        f"mutual information ÷ entropy of the {of}",
        x="step",
        y=f"% of {of} entropy",
        data=[*traces, null],
        legend_title_text="layer",
    )
    mark_step(figure, theme, step)
    figure.update_yaxes(rangemode="tozero", range=None if ceiling is None else [0, 100 * ceiling])
    return figure


def support_sizes(
    steps: np.ndarray,
    sizes: np.ndarray,
    layers: Sequence[str],
    *,
    of_probabilities: tuple[np.ndarray, np.ndarray] | None = None,
    chosen: int | None = None,
    theme: str = "light",
    title: str = "Effective support size",
    step: float | None = None,
    selected: int | None = None,
    ceiling: float | None = None,
) -> go.Figure:
    """How many experts' worth of weight a token has, over time, one line per layer.

    ``sizes`` (L, S), 1 .. K. ``of_probabilities`` is (steps, sizes) of the selected layer's probabilities over all
    experts, dashed; ``chosen`` its K, a null line: equal weights. ``ceiling`` fixes the y axis.
    """
    colours = theme_named(theme)
    traces = [
        _layer_line(steps, sizes[row], name, shade, None if selected is None else row == selected)
        for row, (name, shade) in enumerate(zip(short_names(layers), colours.ordered(len(layers)), strict=True))
    ]
    if of_probabilities is not None:
        line = _layer_line(*of_probabilities, "of p", colours.null, None)
        traces.append(line | {"line": {"color": colours.null, "width": 1.4, "dash": "dash"}})
    figure = blank(
        theme, title, "(Σw)² ÷ Σw², mean over tokens", x="step", y="experts", data=traces, legend_title_text="layer"
    )
    if chosen is not None:
        null_line(figure, theme, chosen, "K, equal weights")
    mark_step(figure, theme, step)
    figure.update_yaxes(range=None if ceiling is None else [0.9, ceiling])
    return figure


def _layer_line(steps: np.ndarray, values: np.ndarray, name: str, colour: str, chosen: bool | None, unit="") -> dict:
    """The line of one layer; ``chosen`` is whether it is the selected one, None where none is."""
    name = text(name)
    return {
        "type": "scatter",
        "x": np.asarray(steps),
        "y": np.asarray(values, dtype=np.float32),
        "name": name,
        "mode": "lines+markers" if len(steps) < 3 else "lines",
        "line": {"color": colour, "width": 2.4 if chosen else 1.3},
        "opacity": 0.55 if chosen is False else 1.0,
        "zorder": int(bool(chosen)),
        "hovertemplate": f"layer {name} · step %{{x}}<br><b>%{{y:.3g}}</b>{unit}<extra></extra>",
    }
