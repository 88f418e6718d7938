"""The effects of many studies on one axis: a forest plot, each effect against the margin of its own rule."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from workbench.figures.theme import Theme, blank, rgba, text, theme_named

#: Verdict -> symbol, and the same as a letter. Colours alone do not tell them apart for everybody.
SYMBOLS = {
    "reproduced": ("circle", "●"),
    "not reproduced": ("x", "✖"),
    "not resolved at this scale": ("diamond-open", "◇"),
    "not testable here": ("square-open", "□"),
}
FARTHEST = 100.0  # standard deviations; what is farther is drawn at the edge, as an arrow
NEAREST = 3.0  # the axis always reaches so far
TICKS = (1, 3, 10, 30, 100)
ROW, FRAME = 26, 128  # pixels: of a row, and of the title, the legend and the axis together
AXIS = (
    "← against the claim · effect / its standard deviation over seeds (Cohen's d<sub>z</sub>), asinh scale · for it →"
)
SHORT_AXIS = "effect / SD over seeds, asinh; claim →"


@dataclass(frozen=True)
class Standardised:
    """An effect in standard deviations over the seeds (Cohen's d_z), turned so that the claim is to the right.

    The interval and the limits of the claim are divided by the same deviation, so that the one lies within the others
    exactly where it does in the study's own unit.

    Attributes:
        estimate: the effect.
        low, high: its interval, infinite where the study's is.
        claimed: between which values it lies if the claim holds; (a, inf), or two finite limits for an equivalence.
    """

    estimate: float
    low: float
    high: float
    claimed: tuple[float, float]


def standardised(result: Mapping) -> Standardised | None:
    """The effect of a result (see `forest_figure`); None where the seeds have no spread to measure it by."""
    sd, estimate = float(result["sd"]), float(result["effect"])
    (low, high), claimed = (tuple(map(float, result[name])) for name in ("ci", "claimed"))
    if not (sd > 0 and math.isfinite(estimate)):
        return None
    scale = -sd if claimed[0] == -math.inf else sd
    low, high = sorted((low / scale, high / scale))
    return Standardised(estimate / scale, low, high, tuple(sorted(limit / scale for limit in claimed)))


def forest_figure(results: Sequence[Mapping], *, theme: str = "light") -> go.Figure:
    """A row a study: its effect with its interval, and shaded where the effect lies if the claim holds.

    ``results`` are what ``StudyResult.to_dict()`` gives: slug, verdict, effect, ci, level, sd, claimed, seeds. The axis
    is spaced by asinh: even near zero, logarithmic far from it. For a page that shows some of the rows, every trace of
    a row carries its slug as ``meta``, and the layout the height of a row and a shorter name of the axis.
    """
    colours = theme_named(theme)
    effects = [standardised(result) for result in results]
    ends = [abs(end) for e in effects if e for end in (e.estimate, e.low, e.high, *e.claimed) if math.isfinite(end)]
    edge = min(FARTHEST, max(NEAREST, *ends, NEAREST))
    rows = zip(results, effects, strict=True)
    traces = [trace for result, effect in rows for trace in _row(colours, result, effect, edge)]
    traces += [_key(verdict, colours) for verdict in dict.fromkeys(result["verdict"] for result in results)]
    at = [0, *(sign * tick for tick in TICKS if tick <= edge for sign in (-1, 1))]
    reach = math.asinh(edge) * 1.06
    return blank(
        theme,
        "Effects against what is claimed",
        "shaded: where the effect lies if the claim holds",
        data=traces,
        height=FRAME + ROW * len(results),
        meta={"row": ROW, "short": SHORT_AXIS},
        margin={"l": 130, "r": 20, "t": 58, "b": 70},
        hovermode="y",
        hoverdistance=-1,  # anywhere in a row
        dragmode=False,
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 0.01, "yref": "container"},
        xaxis={
            "title": {"text": AXIS},
            "range": [-reach, reach],
            "fixedrange": True,
            "tickmode": "array",
            "tickvals": [math.asinh(tick) for tick in at],
            "ticktext": [f"{tick:+d}" if tick else "0" for tick in at],
            "zeroline": True,
            "zerolinecolor": colours.null,
            "zerolinewidth": 1,
        },
        yaxis={
            "type": "category",
            "categoryorder": "array",
            "categoryarray": [result["slug"] for result in results],
            "range": [len(results) - 0.5, -0.5],
            "fixedrange": True,
            "showgrid": False,
            "showline": False,
            "tickfont": {"size": 12, "color": colours.ink},
        },
    )


def verdict_colour(verdict: str, theme: Theme) -> str:
    """The colour of a verdict; grey for what says nothing on the claim."""
    return {"reproduced": theme.cycle[2], "not reproduced": theme.cycle[1]}.get(verdict, theme.muted)


def _row(colours: Theme, result: Mapping, effect: Standardised | None, edge: float) -> list[go.Scatter]:
    slug, verdict = result["slug"], result["verdict"]
    told = f"<b>{text(slug)}</b>: {text(verdict)}"
    common = {"meta": slug, "showlegend": False}
    if effect is None:
        why = "one seed: no spread" if len(result["seeds"]) < 2 else "seeds all the same"
        note = {"mode": "text", "text": [why], "textfont": {"color": colours.muted, "size": 11}}
        hover = f"{told}<br>effect {_number(result['effect'])}<extra></extra>"
        return [go.Scatter(x=[0], y=[slug], textposition="middle right", hovertemplate=hover, **note, **common)]
    shade, colour = rgba(colours.accent, 0.13), verdict_colour(verdict, colours)
    claimed = [math.asinh(end) if math.isfinite(end) else math.copysign(10, end) for end in effect.claimed]
    ends = [_place(end, edge) for end in (effect.low, effect.high)]
    caps = [
        "line-ns" if abs(end) <= edge else "triangle-left" if end < 0 else "triangle-right"
        for end in (effect.low, effect.high)
    ]
    hover = (
        f"{told}<br>effect {_number(result['effect'])} "
        f"[{_number(result['ci'][0])}, {_number(result['ci'][1])}], {float(result['level']):.0%} interval, "
        f"{len(result['seeds'])} seeds<br>{effect.estimate:+.3g} [{effect.low:+.3g}, {effect.high:+.3g}] standard "
        f"deviations, claimed {_region(effect.claimed)}<extra></extra>"
    )
    return [
        go.Scatter(
            x=claimed,
            y=[slug, slug],
            mode="lines+markers",
            line={"color": shade, "width": ROW - 8},
            marker={"symbol": "line-ns", "size": 9, "line": {"width": 2, "color": colours.accent}},
            hoverinfo="skip",
            **common,
        ),
        go.Scatter(
            x=ends,
            y=[slug, slug],
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"symbol": caps, "size": 9, "color": colour, "line": {"width": 2, "color": colour}},
            hoverinfo="skip",
            **common,
        ),
        go.Scatter(
            x=[_place(effect.estimate, edge)],
            y=[slug],
            mode="markers",
            marker=_marker(verdict, colours, 11),
            hovertemplate=hover,
            **common,
        ),
    ]


def _key(verdict: str, colours: Theme) -> go.Scatter:
    """An entry of the legend: a trace with nothing in it."""
    marker = _marker(verdict, colours, 10)
    return go.Scatter(x=[None], y=[None], mode="markers", name=verdict, marker=marker, hoverinfo="skip")


def _marker(verdict: str, colours: Theme, size: float) -> dict:
    colour = verdict_colour(verdict, colours)
    return {"symbol": SYMBOLS[verdict][0], "size": size, "color": colour, "line": {"width": 2, "color": colour}}


def _place(value: float, edge: float) -> float:
    return math.asinh(min(max(value, -edge), edge))


def _number(value: float | str) -> str:
    return f"{float(value):+.3g}"


def _region(claimed: tuple[float, float]) -> str:
    low, high = claimed
    return f"above {low:+.3g}" if high == math.inf else f"within {low:+.3g} and {high:+.3g}"
