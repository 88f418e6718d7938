"""What was foretold of candidates over what each came to."""

from collections.abc import Sequence

import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.theme import blank, text, theme_named

LEGEND = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.01, "yanchor": "bottom"}


def ranking(
    foretold: Sequence[float],
    reached: Sequence[float],
    names: Sequence[str],
    *,
    title: str,
    subtitle: str = "",
    x_title: str,
    y_title: str,
    groups: Sequence[str] | None = None,
    theme: str = "light",
) -> go.Figure:
    """A point for each candidate; a ranking without a fault rises from point to point.

    Args:
        groups: what the colour of each candidate stands for; all in one without it.

    Raises:
        InputError: not as many of one as of the others.
    """
    groups = ["candidates"] * len(names) if groups is None else groups
    if not len(foretold) == len(reached) == len(names) == len(groups):
        sizes = f"{len(foretold)}, {len(reached)}, {len(names)} and {len(groups)}"
        raise InputError(f"foretold, reached, names and groups have {sizes} entries but must have one a candidate")
    kinds = list(dict.fromkeys(groups))
    figure = blank(theme, title, subtitle, x=x_title, y=y_title)
    for kind, shade in zip(kinds, theme_named(theme).nominal(len(kinds)), strict=True):
        mine = [place for place, group in enumerate(groups) if group == kind]
        figure.add_scatter(
            x=[foretold[place] for place in mine],
            y=[reached[place] for place in mine],
            mode="markers",
            name=text(kind),
            marker={"size": 9, "color": shade, "opacity": 0.85},
            hovertext=[text(names[place]) for place in mine],
            hovertemplate=f"%{{hovertext}}<br>%{{x:.4g}} {text(x_title)}<br><b>%{{y:.4g}}</b> {text(y_title)}"
            "<extra></extra>",
        )
    figure.update_layout(legend=LEGEND, showlegend=len(kinds) > 1)
    return figure
