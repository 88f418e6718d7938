"""Training in several processes: what each computes, waits for and sends."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from workbench.figures.theme import blank, colour_bar, mark_step, null_line, rgba, sequential, text, theme_named

LEGEND = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.01, "yanchor": "bottom"}


def rank_lines(
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    title: str,
    subtitle: str,
    unit: str,
    null: tuple[float, str] | None = None,
    limits: tuple[float, float] | None = None,
    theme: str = "light",
    step: float | None = None,
) -> go.Figure:
    """One number of each process, or of each collective, over time: (steps (S,), values (S,)) by its name."""
    colours = theme_named(theme)
    figure = blank(theme, title, subtitle, x="step", y=unit)
    for (name, (steps, values)), shade in zip(series.items(), colours.nominal(len(series)), strict=True):
        figure.add_scatter(
            x=np.asarray(steps),
            y=np.asarray(values, dtype=np.float64),
            name=text(name),
            mode="lines+markers" if len(steps) < 3 else "lines",
            line={"color": shade, "width": 1.6},
            hovertemplate=f"{text(name)} · step %{{x}}<br><b>%{{y:.4g}}</b> {text(unit)}<extra></extra>",
        )
    if null is not None:
        null_line(figure, theme, *null)
    if limits is not None:
        figure.update_yaxes(range=list(limits))
    figure.update_layout(legend=LEGEND)
    mark_step(figure, theme, step)
    return figure


def time_by_rank(
    seconds: np.ndarray, waiting: np.ndarray, *, title: str, ceiling: float | None = None, theme: str = "light"
) -> go.Figure:
    """A step of each process as bars: seconds (W,), of these waiting (W,), and computing, which is the rest."""
    colours = theme_named(theme)
    ranks = [str(rank) for rank in range(len(seconds))]
    figure = blank(theme, title, "what it went by with", x="rank", y="milliseconds")
    parts = {"computing": (seconds - waiting, colours.cycle[0]), "in collectives": (waiting, colours.cycle[1])}
    for name, (values, shade) in parts.items():
        figure.add_bar(
            x=ranks,
            y=1000 * np.asarray(values, dtype=np.float64),
            name=name,
            marker_color=rgba(shade, 0.85),
            hovertemplate=f"rank %{{x}} · {name}<br><b>%{{y:.3g}}</b> ms<extra></extra>",
        )
    figure.update_layout(barmode="stack", legend=LEGEND)
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(range=None if ceiling is None else [0, 1000 * ceiling])
    return figure


def who_computes(pairs: np.ndarray, *, title: str, ceiling: float | None = None, theme: str = "light") -> go.Figure:
    """Assignments (W, W) by the rank whose tokens they are and the rank whose experts compute them, as shares of all.

    The null is an equal share of each pair of ranks, 1 / W^2; what is off the diagonal travels.
    """
    shares = 100 * np.asarray(pairs, dtype=np.float64) / max(1.0, float(np.sum(pairs)))
    ranks = [str(rank) for rank in range(len(shares))]
    even = 100 / shares.size
    figure = blank(
        theme, title, f"off the diagonal travels · {even:.3g} % is even", x="computed by rank", y="token of rank"
    )
    figure.add_heatmap(
        z=shares,
        x=ranks,
        y=ranks,
        text=[[f"{share:.1f}" for share in row] for row in shares],
        texttemplate="%{text}" if len(shares) <= 8 else None,
        colorscale=sequential(theme),
        zmin=0,
        zmax=100 * ceiling if ceiling else None,
        colorbar=colour_bar(unit="%"),
        hovertemplate="tokens of rank %{y}, experts of rank %{x}<br><b>%{z:.2f}</b> %<extra></extra>",
    )
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure
