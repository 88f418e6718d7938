"""Which experts are chosen together: in one layer, from one layer to the next, and in layers that share them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from workbench.figures.theme import blank, colour_bar, diverging, text, theme_named


@dataclass(frozen=True)
class PairMeasure:
    """How one co-activation measure is drawn: its name, its unit, the line below the title and its fixed bounds."""

    title: str
    unit: str
    subtitle: str
    low: float
    high: float | None


KINDS = {
    "lift_corrected": PairMeasure("Corrected lift", "× chance", "pairs chosen together ÷ chance", 0.0, None),
    "conditional": PairMeasure("Conditional", "P(j | i)", "probability of column j given row i", 0.0, None),
    "jaccard": PairMeasure("Jaccard", "Jaccard", "tokens shared by i and j ÷ tokens of either", 0.0, None),
    "npmi": PairMeasure("NPMI", "NPMI", "normalised pointwise mutual information", -1.0, 1.0),
}


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    """The matrix in floating point with its diagonal undefined: an expert with itself says nothing."""
    matrix = np.array(matrix, dtype=np.float64)
    np.fill_diagonal(matrix, np.nan)
    return matrix


def pair_ceiling(kind: str, null: float, *matrices: np.ndarray) -> float:
    """The top of a colour scale that fits all matrices (E, E) off the diagonal; at least twice the null value."""
    if KINDS[kind].high is not None:
        return KINDS[kind].high
    tops = [np.nanpercentile(m, 99.5) for m in map(off_diagonal, matrices) if np.isfinite(m).any()]
    return float(max([2 * null, *tops]))


def coactivation_matrix(
    matrix: np.ndarray,
    *,
    kind: str = "lift_corrected",
    null: float = 1.0,
    order: Sequence[int] | None = None,
    ceiling: float | None = None,
    theme: str = "light",
    title: str | None = None,
) -> go.Figure:
    """Co-activation of the experts of one layer, ``matrix`` (E, E) of the given kind.

    Rows and columns follow ``order`` (E,), so that experts that work together stand together. The scale is centred at
    ``null``, the value under balanced random routing; the diagonal and undefined pairs are grey.
    """
    look = KINDS[kind]
    order = np.arange(len(matrix)) if order is None else np.asarray(order)
    values = off_diagonal(matrix)[np.ix_(order, order)]
    low, high = look.low, pair_ceiling(kind, null, matrix) if ceiling is None else ceiling
    names = [str(i) for i in order]
    return _square(
        values,
        names,
        names,
        theme=theme,
        title=title or f"{look.title} of expert pairs",
        subtitle=look.subtitle,
        axes=("expert j", "expert i"),
        scale=(low, null, high),
        bar=colour_bar({low: f"{low:g}", null: f"{null:.3g} null", high: f"{'' if look.high else '≥ '}{high:.2g}"}),
        hover="expert %{customdata[0]} with %{customdata[1]}<br><b>%{z:.3f}</b><extra></extra>",
    )


def transition_ceiling(*lifts: np.ndarray) -> float:
    """The top of a colour scale that fits all the given transition matrices; 2 to `STRONGEST`."""
    tops = [np.nanpercentile(lift, 99.5) for lift in lifts if np.isfinite(lift).any()]
    return float(min(max([2.0, *tops]), STRONGEST))


WRITTEN = 12
"""Layers up to which their agreement is written in."""

STRONGEST = 10.0
"""Lift above which colours do not tell: of experts that hardly get a token it is in the hundreds, and 1 beside 0."""


def transition_matrix(
    lift: np.ndarray,
    layers: tuple[str, str],
    *,
    theme: str = "light",
    title: str | None = None,
    ceiling: float | None = None,
) -> go.Figure:
    """Where the tokens of each expert go in the next layer: ``lift`` (E, E') = P(j next | i here) ÷ P(j next).

    1 is independence of the two layers. ``layers`` names them.
    """
    values = np.asarray(lift, dtype=np.float64)
    high = ceiling or transition_ceiling(values)
    return _square(
        values,
        *([str(i) for i in range(n)] for n in values.shape),
        theme=theme,
        title=title or "From this layer to the next",
        subtitle="P(there | here) ÷ P(there) · 1 = independent",
        axes=(f"expert in layer {layers[1]}", f"expert in layer {layers[0]}"),
        scale=(0.0, 1.0, high),
        bar=colour_bar({0: "0", 1: "1 null", high: f"≥ {high:.2g}"}),
        hover="expert %{customdata[0]} → %{customdata[1]}<br>lift <b>%{z:.3f}</b><extra></extra>",
    )


def agreement_matrix(
    share: np.ndarray, chance: np.ndarray, layers: Sequence[str], *, theme: str = "light", title: str | None = None
) -> go.Figure:
    """Whether layers that share their experts choose the same: ``share`` (L, L) of tokens whose first expert is.

    Drawn is (share - chance) / (1 - chance), with ``chance`` (L, L) what independent choices with the same loads give:
    0 is independence and 1 that all tokens have the same expert. Grey is undefined: a layer with itself, and layers
    that can only agree.
    """
    share, chance = (np.asarray(values, dtype=np.float64) for values in (share, chance))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = off_diagonal(np.where(chance < 1, (share - chance) / (1 - chance), np.nan))
    low, names = float(np.nanmin(values, initial=-0.25)), [text(layer) for layer in layers]
    figure = _square(
        values,
        names,
        names,
        theme=theme,
        title=title or "Agreement between depths",
        subtitle="same first expert, above chance · 0 = independent, 1 = always",
        axes=("layer", "layer"),
        scale=(low, 0.0, 1.0),
        bar=colour_bar({low: f"{low:.2g}", 0: "0 null", 1: "1"}),
        hover="layers %{customdata[0]} and %{customdata[1]}<br>above chance <b>%{z:.3f}</b><br>"
        "same first expert %{customdata[2]:.1%}, by chance %{customdata[3]:.1%}<extra></extra>",
    )
    (cells,) = figure.data
    pairs = np.asarray(cells.customdata, dtype=object)
    cells.customdata = np.concatenate([pairs, share[..., None], chance[..., None]], axis=-1)
    if len(names) <= WRITTEN:  # small agreement is hard to tell by its colour
        written = [["" if np.isnan(value) else f"{value:.2f}" for value in row] for row in values]
        cells.update(text=written, texttemplate="%{text}")
    return figure


def _square(
    values: np.ndarray,
    rows: list[str],
    cols: list[str],
    *,
    theme: str,
    title: str,
    subtitle: str,
    axes: tuple[str, str],
    scale: tuple[float, float, float],
    bar: dict,
    hover: str,
) -> go.Figure:
    """A heat map with expert numbers on both axes, undefined cells in grey."""
    figure = blank(theme, title, subtitle, x=axes[0], y=axes[1], plot_bgcolor=theme_named(theme).undefined)
    figure.add_trace(
        go.Heatmap(
            z=values.astype(np.float32),
            x=np.arange(len(cols)),
            y=np.arange(len(rows)),
            customdata=np.stack(np.meshgrid(rows, cols, indexing="ij"), axis=-1),
            zmin=scale[0],
            zmax=scale[2],
            colorscale=diverging(theme, *scale),
            colorbar=bar,
            hovertemplate=hover,
            hoverongaps=False,
            xgap=1 if len(cols) <= 32 else 0,
            ygap=1 if len(rows) <= 32 else 0,
        )
    )
    for axis, names, reverse in ((figure.update_xaxes, cols, False), (figure.update_yaxes, rows, True)):
        stride = max(1, -(-len(names) // 16))
        ends = [-0.5, len(names) - 0.5]
        axis(
            tickmode="array",
            tickvals=list(range(0, len(names), stride)),
            ticktext=names[::stride],
            range=ends[::-1] if reverse else ends,
            showgrid=False,
        )
    return figure
