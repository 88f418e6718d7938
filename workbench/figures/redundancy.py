"""How much the experts of a layer say the same, for two kinds of tokens in one square."""

import numpy as np
import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.theme import blank, colour_bar, diverging, theme_named

WRITTEN = 12  # experts up to which values are written in


def redundancy_square(
    below: np.ndarray,
    above: np.ndarray,
    kinds: tuple[str, str] = ("text", "image"),
    *,
    theme: str = "light",
    title: str = "Redundancy of the experts",
) -> go.Figure:
    """Mean cosine (E, E) of the outputs of two experts: below the diagonal on tokens of one kind, above on the other.

    The diagonal, an expert with itself, and undefined pairs are grey.
    """
    below, above = (np.asarray(values, dtype=np.float64) for values in (below, above))
    if below.shape != above.shape or below.ndim != 2 or below.shape[0] != below.shape[1]:
        raise InputError(f"below and above have shapes {below.shape} and {above.shape} but must be (E, E), both")
    values = np.where(np.tri(len(below), k=-1, dtype=bool), below, above)
    np.fill_diagonal(values, np.nan)
    names = [str(expert) for expert in range(len(values))]
    means = [np.nanmean(part[~np.eye(len(part), dtype=bool)]) if len(part) > 1 else np.nan for part in (below, above)]
    said = " · ".join(f"{where} {kind}: mean {m:.2f}" for where, kind, m in zip("◣◥", kinds, means, strict=True))
    figure = blank(theme, title, said, x="expert", y="expert", plot_bgcolor=theme_named(theme).undefined)
    which = np.where(np.tri(len(values), k=-1, dtype=bool), *kinds)
    figure.add_heatmap(
        z=values,
        x=names,
        y=names,
        zmin=-1,
        zmax=1,
        colorscale=diverging(theme, -1, 0, 1),
        colorbar=colour_bar({-1: "−1 opposite", 0: "0 unrelated", 1: "1 the same"}),
        customdata=which,
        text=[["" if np.isnan(value) else f"{value:.2f}" for value in row] for row in values],
        texttemplate="%{text}" if len(values) <= WRITTEN else None,
        hovertemplate="experts %{y} and %{x}, %{customdata}<br>cosine <b>%{z:.3f}</b><extra></extra>",
        hoverongaps=False,
        xgap=2,
        ygap=2,
    )
    figure.update_xaxes(showgrid=False, type="category")
    figure.update_yaxes(showgrid=False, type="category", autorange="reversed")
    return figure
