"""Figures of mixtures: weights of domains against losses, as a map that can be explored.

    mixture_map(weights, {"proxy": proxy, "true": true}, ["python", "docs", "names"], unit="bits/byte")

Two domains are a line, three a triangle for each loss, side by side, more are parallel coordinates. Where one points,
all numbers of a mixture are there: its weights, every loss and its rank. Lower is better.

Shape letters: M mixtures, K domains.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from workbench.errors import InputError
from workbench.figures.basic import LEGEND
from workbench.figures.theme import Theme, blank, colour_bar, rgba, sequential, text, theme_named

GAP = 0.16
"""Between two triangles, as a share of the width: a colour bar has its place there."""


def mixture_map(
    weights: np.ndarray,
    losses: Mapping[str, Sequence[float]],
    domains: Sequence[str],
    *,
    unit: str = "",
    theme: str = "light",
    title: str = "What a mixture of domains comes to",
) -> go.Figure:
    """Mixtures and what they come to: `segment` of two domains, `ternary` of three, `parallel` of more.

    Args:
        weights: (M, K), rows of sum 1.
        losses: name -> (M,), lower is better; NaN where a mixture was not measured.
        domains: K names.
        unit: of the losses.

    Raises:
        InputError: weights, losses or domains do not fit each other.
    """
    draw = {2: segment, 3: ternary}.get(len(domains), parallel)
    return draw(weights, losses, domains, unit=unit, theme=theme, title=title)


def segment(
    weights: np.ndarray,
    losses: Mapping[str, Sequence[float]],
    domains: Sequence[str],
    *,
    unit: str = "",
    theme: str = "light",
    title: str = "What a mixture of two domains comes to",
) -> go.Figure:
    """Losses over the weight of the first of two domains, a line each, its best mixture marked; see `mixture_map`."""
    weights, losses = _checked(weights, losses, domains, 2)
    colours = theme_named(theme)
    figure = blank(
        theme,
        title,
        f"lower is better · the rest is {text(domains[1])}",
        x=f"share of {domains[0]}",
        y=f"loss, {unit}" if unit else "loss",
    )
    shown, order = _hover(weights, losses, domains, unit), np.argsort(weights[:, 0], kind="stable")
    for (name, values), shade in zip(losses.items(), colours.nominal(len(losses)), strict=True):
        best = _best(values)
        figure.add_scatter(
            x=weights[order, 0],
            y=values[order],
            name=text(name),
            mode="lines+markers",
            line={"color": shade, "width": 2},
            marker={
                "size": [14 if i == best else 7 for i in order],
                "symbol": ["star" if i == best else "circle" for i in order],
            },
            hovertext=[shown[i] for i in order],
            hovertemplate=_POINTED,
        )
    figure.update_layout(legend=LEGEND)
    return figure


def ternary(
    weights: np.ndarray,
    losses: Mapping[str, Sequence[float]],
    domains: Sequence[str],
    *,
    unit: str = "",
    theme: str = "light",
    title: str = "What a mixture of three domains comes to",
) -> go.Figure:
    """A triangle for each loss, side by side; in each the best mixture by every one of them. See `mixture_map`.

    Each has its own colours, for what a proxy has to get right is the order and not the value.
    """
    weights, losses = _checked(weights, losses, domains, 3)
    colours = theme_named(theme)
    below = "strong colour: low, which is better · grey: not measured"
    figure = blank(theme, title, below, margin={"l": 34, "r": 16, "t": 92, "b": 46})
    shown, n = _hover(weights, losses, domains, unit), max(len(losses), 1)
    width = (1 - GAP * (n - 1) - 0.08) / n
    for i, (name, values) in enumerate(losses.items()):
        left, scene = i * (width + GAP), f"ternary{i + 1 if i else ''}"
        figure.update_layout({scene: _triangle(colours, domains, left, left + width)})
        # short and on top: below is the name of the third domain, however long
        bar = colour_bar(unit=unit) | {"x": left + width, "xanchor": "left", "y": 1, "yanchor": "top", "len": 0.65}
        known = np.isfinite(values)
        for which, marker in (
            (known, _dots(values[known], theme) | {"colorbar": bar}),
            (~known, {"size": 11, "color": colours.undefined}),
        ):
            figure.add_trace(
                _corners(
                    weights[which],
                    subplot=scene,
                    name=text(name),
                    mode="markers",
                    showlegend=False,
                    marker=marker,
                    hovertext=[shown[i] for i in np.flatnonzero(which)],
                    hovertemplate=_POINTED,
                )
            )
        for (other, its), shade in zip(losses.items(), colours.nominal(len(losses)), strict=True):
            if (best := _best(its)) is not None:
                ring = {
                    "size": 25 if other == name else 32,
                    "color": "rgba(0,0,0,0)",
                    "line": {"color": shade, "width": 2.5},
                }
                figure.add_trace(
                    _corners(
                        weights[[best]],
                        subplot=scene,
                        name=f"best by {text(other)}",
                        mode="markers",
                        marker=ring,
                        legendgroup=other,
                        showlegend=i == 0,
                        hoverinfo="skip",
                    )
                )
        figure.add_annotation(
            text=f"<b>{text(name)}</b>",
            x=left + width / 2,
            y=1.03,
            xref="paper",
            yref="paper",
            xanchor="center",
            yanchor="bottom",
            showarrow=False,
        )
    figure.update_layout(legend=LEGEND | {"y": 1.12})
    return figure


def parallel(
    weights: np.ndarray,
    losses: Mapping[str, Sequence[float]],
    domains: Sequence[str],
    *,
    unit: str = "",
    theme: str = "light",
    title: str = "What a mixture of domains comes to",
) -> go.Figure:
    """A line for each mixture through its weights and its losses, in the colour of the first loss; see `mixture_map`.

    Every loss has its own scale, from its best at the bottom to its worst at the top, written at the ends.
    """
    weights, losses = _checked(weights, losses, domains)
    colours = theme_named(theme)
    first = next(iter(losses.values()), np.full(len(weights), np.nan))
    names = [*map(text, domains), *(f"<b>{text(name)}</b>" for name in losses)]
    top = float(weights.max(initial=0.0)) or 1.0
    heights = np.hstack([weights, *(top * _scaled(values)[:, None] for values in losses.values())])  # (M, K + losses)
    figure = blank(theme, title, "a line a mixture · strong colour: low, which is better", y="share")
    shown, best, shares = _hover(weights, losses, domains, unit), _best(first), _scaled(first)
    for i in np.argsort(-np.nan_to_num(first, nan=np.inf), kind="stable"):  # the best is drawn last, on top
        shade = _shade(colours, shares[i]) if i != best else colours.accent
        figure.add_scatter(
            x=list(range(len(names))),
            y=heights[i],
            mode="lines+markers",
            line={"color": shade, "width": 3.5 if i == best else 1.2},
            marker={"size": 8 if i == best else 5, "color": shade},
            name="best",
            showlegend=bool(i == best),
            hovertext=[shown[i]] * len(names),
            hovertemplate=_POINTED,
        )
    for column, values in enumerate(losses.values(), len(domains)):
        finite = values[np.isfinite(values)]
        for at, side, value in ((0.0, "top", finite.min(initial=np.inf)), (top, "bottom", finite.max(initial=-np.inf))):
            if len(finite):
                figure.add_annotation(
                    text=f"{value:.4g} {text(unit)}".strip(),
                    x=column,
                    y=at,
                    yanchor=side,
                    yshift=-6 if side == "top" else 6,
                    showarrow=False,
                    font={"size": 10.5, "color": colours.muted},
                )
    figure.update_xaxes(
        tickvals=list(range(len(names))), ticktext=names, gridcolor=colours.muted, range=[-0.4, len(names) - 0.6]
    )
    figure.update_yaxes(range=[-0.09 * top, 1.1 * top])
    figure.update_layout(legend=LEGEND)
    return figure


def against_truth(
    proxy: Sequence[float],
    true: Sequence[float],
    weights: np.ndarray,
    domains: Sequence[str],
    *,
    unit: str = "",
    theme: str = "light",
    title: str = "Does the proxy rank the mixtures?",
    subtitle: str = "",
) -> go.Figure:
    """The true loss of each mixture over that of its proxy; marked are the mixture that the proxy chooses and the best.

    Raises:
        InputError: as `mixture_map`.
    """
    weights, losses = _checked(weights, {"proxy": proxy, "true": true}, domains)
    colours, shown = theme_named(theme), _hover(weights, losses, domains, unit)
    chosen, best = _best(losses["proxy"]), _best(losses["true"])
    regret = (
        "" if None in (chosen, best) else f"regret {losses['true'][chosen] - losses['true'][best]:.3g} {text(unit)}"
    )
    below = " · ".join(filter(None, (text(subtitle), regret.strip())))
    ends = [f"{name}, {unit}" if unit else name for name in ("loss of the proxy", "loss when trained on it")]
    figure = blank(theme, title, below, x=ends[0], y=ends[1])
    marks = (
        ("mixture", range(len(weights)), {"size": 8, "color": rgba(colours.cycle[0], 0.65)}),
        (
            "chosen by the proxy",
            [chosen],
            {"size": 17, "symbol": "circle-open", "color": colours.cycle[1], "line": {"width": 2.5}},
        ),
        ("best", [best], {"size": 24, "symbol": "circle-open", "color": colours.cycle[2], "line": {"width": 2.5}}),
    )
    for name, which, look in marks:
        at = [i for i in which if i is not None]
        figure.add_scatter(
            x=losses["proxy"][at],
            y=losses["true"][at],
            mode="markers",
            name=name,
            marker=look,
            hovertext=[shown[i] for i in at],
            hovertemplate=_POINTED,
        )
    figure.update_layout(legend=LEGEND)
    return figure


_POINTED = "%{hovertext}<extra></extra>"


def _checked(
    weights: np.ndarray, losses: Mapping[str, Sequence[float]], domains: Sequence[str], wanted: int | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Weights (M, K) and losses (M,) as float arrays, or an `InputError`."""
    weights = np.asarray(weights, dtype=float)
    if wanted is not None and len(domains) != wanted:
        raise InputError(f"domains has {len(domains)} names but must have {wanted}")
    if weights.ndim != 2 or weights.shape[1] != len(domains):
        raise InputError(
            f"weights has shape {weights.shape} but must be (mixtures, {len(domains)}), as there are domains"
        )
    found = {name: np.asarray(values, dtype=float) for name, values in losses.items()}
    for name, values in found.items():
        if values.shape != (len(weights),):
            raise InputError(f"losses[{name!r}] has shape {values.shape} but must be ({len(weights)},), one a mixture")
    return weights, found


def _best(values: np.ndarray) -> int | None:
    """The mixture of the lowest loss, the first of equals; None where none was measured."""
    return int(np.nanargmin(values)) if np.isfinite(values).any() else None


def _scaled(values: np.ndarray) -> np.ndarray:
    """From 0, the lowest, to 1, the highest; a half where all are the same, NaN where there is none."""
    finite = values[np.isfinite(values)]
    span = np.ptp(finite) if len(finite) else 0.0
    return (values - finite.min()) / span if span > 0 else np.where(np.isfinite(values), 0.5, np.nan)


def _shade(colours: Theme, share: float) -> str:
    """The colour of a loss from 0, the lowest, to 1."""
    if np.isnan(share):
        return colours.undefined
    return sample_colorscale([colours.sequential[-1], colours.sequential[1]], [share])[0]


def _hover(weights: np.ndarray, losses: Mapping[str, np.ndarray], domains: Sequence[str], unit: str) -> list[str]:
    """All numbers of each mixture."""
    shown = []
    for i, row in enumerate(weights):
        lines = [" · ".join(f"{text(name)} {share:.3f}" for name, share in zip(domains, row, strict=True))]
        for name, values in losses.items():
            measured = values[np.isfinite(values)]
            rank = f" (rank {1 + int((measured < values[i]).sum())} of {len(measured)})"
            said = f"<b>{values[i]:.4g}</b> {text(unit)}{rank}" if np.isfinite(values[i]) else "not measured"
            lines.append(f"{text(name)} {said}")
        shown.append("<br>".join(lines))
    return shown


def _corners(weights: np.ndarray, **look) -> go.Scatterternary:
    return go.Scatterternary(a=weights[:, 0], b=weights[:, 1], c=weights[:, 2], cliponaxis=False, **look)


def _dots(values: np.ndarray, theme: str) -> dict:
    """Markers in the colours of their losses, from light for the highest to dark for the lowest."""
    colours, (low, high) = theme_named(theme), (values.min(initial=np.inf), values.max(initial=-np.inf))
    return {
        "size": 17,
        "color": values,
        "colorscale": [[1 - stop, colour] for stop, colour in sequential(theme)[::-1]],
        "cmin": low if low <= high else 0,
        "cmax": high if high > low else low + 1 if low == high else 1,
        "line": {"color": colours.muted, "width": 0.8},
    }


def _triangle(colours: Theme, domains: Sequence[str], left: float, right: float) -> dict:
    """The axes of one triangle between two shares of the figure's width."""
    axis = {
        "gridcolor": colours.grid,
        "linecolor": colours.muted,
        "tickfont": {"size": 10, "color": colours.muted},
        "tickvals": [0.25, 0.5, 0.75],
        "tickformat": ".0%",
        "ticks": "",
    }
    named = {
        f"{side}axis": axis | {"title": {"text": text(name), "font": {"size": 12, "color": colours.ink}}}
        for side, name in zip("abc", domains, strict=True)
    }
    return {"domain": {"x": [left, right], "y": [0, 0.95]}, "bgcolor": colours.card, "sum": 1} | named
