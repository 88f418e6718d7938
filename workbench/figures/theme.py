"""Colours, type and the parts every figure shares, once for the light theme and once for the dark one.

Palettes are safe for colour-blind readers: nominal series use the Okabe-Ito colours, ordered series one ramp of
rising lightness, and diverging scales go from blue to orange with the null value in the neutral middle.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from workbench.errors import unknown

FONT = "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"

MARGIN = {"l": 54, "r": 16, "t": 60, "b": 42}
WIDEST, LINE = 96, 18
"""Letters in a line of a title, and its height in pixels."""


@dataclass(frozen=True)
class Theme:
    """The colours of one theme; ``diverging`` and ``sequential`` run from low to high."""

    name: str
    page: str
    card: str
    ink: str
    muted: str
    grid: str
    null: str
    accent: str
    undefined: str
    cycle: tuple[str, ...]
    ramp: tuple[str, ...]
    diverging: tuple[str, ...]
    sequential: tuple[str, ...]

    def nominal(self, n: int) -> list[str]:
        """``n`` colours for things without an order (domains, arms); they repeat after the eighth."""
        return [self.cycle[i % len(self.cycle)] for i in range(n)]

    def ordered(self, n: int) -> list[str]:
        """``n`` colours for things with an order (layers), from the first to the last."""
        return sample_colorscale(list(self.ramp), np.linspace(0, 1, n) if n > 1 else [0.5])


LIGHT = Theme(
    name="light",
    page="#f4f5f7",
    card="#ffffff",
    ink="#17202b",
    muted="#5a6675",
    grid="#e7eaee",
    null="#6c7785",
    accent="#0b62b8",
    undefined="#d5d9df",
    cycle=("#0072b2", "#d55e00", "#009e73", "#b9588f", "#c98500", "#3b9bd6", "#7a5195", "#5a6675"),
    ramp=("#2c105c", "#3f4b94", "#2a788e", "#22a884", "#8fbf2f"),
    diverging=("#0a3d7c", "#5c9bd1", "#f3f4f5", "#f0a35e", "#a8470a"),
    sequential=("#f6f8fa", "#c9ddec", "#86b5d6", "#3d82b8", "#0d4a80"),
)
DARK = Theme(
    name="dark",
    page="#0e1216",
    card="#161b21",
    ink="#e8ecf1",
    muted="#9aa5b3",
    grid="#272f38",
    null="#8e99a7",
    accent="#5eb0ff",
    undefined="#3a424d",
    cycle=("#4aa8e8", "#ff8a4c", "#33c79b", "#e08fc0", "#edb53c", "#8fd0ff", "#b595dd", "#9aa5b3"),
    ramp=("#8b7be0", "#5f95e6", "#3cb7c6", "#58d39a", "#d3e25c"),
    diverging=("#7cc4ff", "#2f6ea8", "#222932", "#b8682a", "#ffb066"),
    sequential=("#1b222a", "#1d4566", "#2a77a8", "#62b3df", "#d8f0ff"),
)
THEMES = {"light": LIGHT, "dark": DARK}


def text(value: object) -> str:
    """What plotly shows as it is: it reads tags in all that it writes, and what stands in braces in a hover text.

    Every name, label and title that a figure is given goes through here, once; `blank` does it for its own.
    """
    return escape(str(value), quote=False).replace("%{", "%&#123;")


def theme_named(name: str) -> Theme:
    """The theme called ``name``; ``InputError`` for any other name."""
    if name not in THEMES:
        raise unknown("theme", name, THEMES)
    return THEMES[name]


@cache
def _template(name: str) -> go.layout.Template:
    theme = THEMES[name]
    axis = {
        "gridcolor": theme.grid,
        "linecolor": theme.grid,
        "showline": True,
        "zeroline": False,
        "ticks": "",
        "tickfont": {"size": 11, "color": theme.muted},
        "title": {"font": {"size": 12, "color": theme.muted}, "standoff": 6},
        "automargin": True,
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 12, "color": theme.ink},
            "paper_bgcolor": theme.card,
            "plot_bgcolor": theme.card,
            "colorway": theme.cycle,
            "xaxis": axis,
            "yaxis": axis,
            "margin": MARGIN,
            "hoverlabel": {
                "bgcolor": theme.card,
                "bordercolor": theme.grid,
                "font": {"family": FONT, "size": 12, "color": theme.ink},
            },
            "showlegend": True,
            "legend": {
                "font": {"size": 11, "color": theme.muted},
                "title": {"font": {"size": 11, "color": theme.muted}},
                "bgcolor": "rgba(0,0,0,0)",
                "tracegroupgap": 2,
            },
            "bargap": 0.25,
            "dragmode": "zoom",
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": theme.muted, "activecolor": theme.accent},
        }
    )


def blank(
    theme: str, title: str, subtitle: str = "", *, x: str = "", y: str = "", data: Sequence = (), **layout
) -> go.Figure:
    """A figure in the house style: bold title, one muted line below it, named axes, and nothing in it but ``data``.

    Title and axes are text; the subtitle may hold tags, and what is put into it went through `text`. A long title has
    several lines.

    ``layout`` is passed to ``go.Layout``. The view of a reader who zoomed in is kept from one update to the next
    (``uirevision``). Traces given as ``data`` cost a third of what they cost when added one by one.
    """
    colours = theme_named(theme)
    below = f"<span style='font-size:11.5px;color:{colours.muted}'>{subtitle}</span>"
    lines = textwrap.wrap(title, WIDEST) or [""]
    figure = go.Figure(
        data=list(data),
        layout={
            "template": _template(theme),
            # one text for both lines: plotly's own subtitle leaves a wide gap
            "title": {
                "text": f"<b>{'<br>'.join(map(text, lines))}</b><br>{below}",
                "font": {"size": 14, "color": colours.ink},
                "x": 0,
                "xref": "container",
                "xanchor": "left",
                "y": 1,
                "yref": "container",
                "yanchor": "top",
                "pad": {"l": 14, "t": 24},
            },
            "uirevision": "kept",
        }
        | layout
        | {
            "xaxis": {"title": {"text": text(x)}} | layout.get("xaxis", {}),
            "yaxis": {"title": {"text": text(y)}} | layout.get("yaxis", {}),
        },
    )
    if len(lines) > 1:
        top = figure.layout.margin.t
        figure.layout.margin.t = (MARGIN["t"] if top is None else top) + LINE * (len(lines) - 1)
    return figure


def diverging(theme: str, low: float, centre: float, high: float) -> list[list]:
    """A colour scale over [low, high] whose neutral middle sits exactly at ``centre``, however unequal the arms."""
    colours = theme_named(theme).diverging
    span = high - low
    middle = min(max((centre - low) / span, 1e-6), 1 - 1e-6)
    stops = [0.0, middle / 2, middle, (1 + middle) / 2, 1.0]
    return [[stop, colour] for stop, colour in zip(stops, colours, strict=True)]


def cosine_scale(theme: str) -> list[list]:
    """A colour scale over [-1, 1]: conflict (negative) in orange, agreement in blue, orthogonal neutral."""
    scale = diverging(theme, -1, 0, 1)
    return [[stop, colour] for (stop, _), (_, colour) in zip(scale, scale[::-1], strict=True)]


COSINE_TICKS = {-1: "−1 conflict", 0: "0 null", 1: "1 agree"}


def sequential(theme: str) -> list[list]:
    """A colour scale from nothing (the card's own colour) to the strongest colour."""
    colours = theme_named(theme).sequential
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


def colour_bar(ticks: Mapping[float, str] | None = None, *, unit: str = "") -> dict:
    """A thin colour bar, labelled at the given values (the labels name the null) or with its unit on top."""
    labels = {} if ticks is None else {"tickmode": "array", "tickvals": list(ticks), "ticktext": list(ticks.values())}
    return {
        "title": {"text": unit, "side": "top", "font": {"size": 11}},
        "thickness": 10,
        "len": 1.0,
        "outlinewidth": 0,
        "tickfont": {"size": 10.5},
        "xpad": 6,
        "ypad": 0,
    } | labels


def null_shape(theme: str, value: float, axis: str = "") -> dict:
    """A dashed horizontal line at the null ``value``; ``axis`` is the number of a subplot's axes ("" for the first)."""
    line = {"color": theme_named(theme).null, "width": 1.2, "dash": "dash"}
    across = {"xref": f"x{axis} domain", "yref": f"y{axis}", "x0": 0, "x1": 1}
    return {"type": "line", "y0": value, "y1": value, "line": line} | across


def null_label(theme: str, value: float, label: str, axis: str = "") -> dict:
    """The name of a null line, above its right end."""
    colours = theme_named(theme)
    return {
        "text": text(label),
        "font": {"size": 10.5, "color": colours.null},
        "bgcolor": rgba(colours.card, 0.7),
        "borderpad": 1,
        "showarrow": False,
        "x": 1,
        "xref": f"x{axis} domain",
        "xanchor": "right",
        "y": value,
        "yref": f"y{axis}",
        "yanchor": "bottom",
    }


def null_line(figure: go.Figure, theme: str, value: float, label: str) -> None:
    """A dashed horizontal line at the null ``value``, with its name at the right end."""
    figure.add_shape(null_shape(theme, value))
    figure.add_annotation(null_label(theme, value, label))


def band_shape(theme: str, low: float, high: float, axis: str = "") -> dict:
    """A grey band over the interval that chance alone stays in."""
    across = {"xref": f"x{axis} domain", "yref": f"y{axis}", "x0": 0, "x1": 1}
    fill = {"fillcolor": rgba(theme_named(theme).null, 0.22), "line": {"width": 0}, "layer": "below"}
    return {"type": "rect", "y0": low, "y1": high} | across | fill


STEP_MARK = "step"  # by this name a page finds the line to move


def step_shape(theme: str, step: float | None, axis: str = "") -> dict:
    """A thin vertical line at the step the reader has scrubbed to; hidden when ``step`` is None."""
    down = {"xref": f"x{axis}", "yref": f"y{axis} domain", "y0": 0, "y1": 1}
    line = {"color": theme_named(theme).accent, "width": 1.2}
    at = {"x0": step or 0, "x1": step or 0, "visible": step is not None}
    return {"type": "line", "name": STEP_MARK, "line": line} | down | at


def mark_step(figure: go.Figure, theme: str, step: float | None) -> None:
    """Add the line of `step_shape`."""
    figure.add_shape(step_shape(theme, step))


def legend_below_title() -> dict:
    """A one-line legend in the place of the subtitle: for two or three short names."""
    return {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom"}


def expert_ticks(n: int) -> dict:
    """Axis settings that number ``n`` experts from 0 with at most about nine labels."""
    stride = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if n <= 9 * s or s == 1024)
    return {"tickmode": "array", "tickvals": list(range(0, n, stride)), "range": [-0.5, n - 0.5]}


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the dotted parts that all of them share: blocks.0.ffn, blocks.1.ffn -> 0, 1.

    A single name, and names that would become empty, keep their own text.
    """
    parts = [name.split(".") for name in names]
    if len(names) < 2 or len(set(names)) < len(names):
        return list(names)
    shortest = min(map(len, parts))
    head = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest)
    tail = next((i for i in range(shortest) if len({p[-1 - i] for p in parts}) > 1), shortest)
    cut = [".".join(p[head : len(p) - tail]) for p in parts]
    return cut if all(cut) else list(names)


def outline_row(figure: go.Figure, theme: str, row: int) -> None:
    """A frame around one row of a heat map whose rows are numbered on the y axis."""
    line = {"color": theme_named(theme).accent, "width": 1.8}
    figure.add_shape(type="rect", xref="x domain", x0=0, x1=1, yref="y", y0=row - 0.5, y1=row + 0.5, line=line)


def rgba(colour: str, alpha: float) -> str:
    """A ``#rrggbb`` or ``rgb(r, g, b)`` colour with an opacity."""
    if colour.startswith("#"):
        r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    else:
        r, g, b = (int(float(part)) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    return f"rgba({r},{g},{b},{alpha})"
