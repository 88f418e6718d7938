"""The result of a study: every seed of every arm, their means, and the verdict; one figure for all families."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from workbench.figures.theme import blank, rgba, text, theme_named
from workbench.lib.measures import sequential, statistics


def study_figure(result: Mapping, *, theme: str = "light", confidence: float = 0.95) -> go.Figure:
    """Seeds as dots, the mean of each arm with its interval, the verdict and the effect in the subtitle.

    ``result`` is what ``StudyResult.to_dict()`` gives: slug, title, metric, unit, higher_is_better, arms (rows with
    arm, seed and the metric), effect, ci, verdict, rule. The interval of an arm is Student's t over its seeds (none
    for a single seed), or holds at every look where seeds were added; the effect's interval is the study's own.
    """
    colours = theme_named(theme)
    measures = sequential if result.get("growing") else statistics
    metric, unit = result["metric"], result.get("unit") or ""
    rows = result["arms"]
    values = {
        text(arm): np.array([float(row["metric"]) for row in rows if row["arm"] == arm])
        for arm in dict.fromkeys(row["arm"] for row in rows)
    }
    better = "higher is better" if result.get("higher_is_better") else "lower is better"
    figure = blank(
        theme,
        result["title"],
        f"<b>{text(result['verdict'])}</b>{_effect(result)}",
        x=f"{metric.replace('_', ' ')}{f' ({unit})' if unit else ''}, {better}",
        margin={"l": 54, "r": 24, "t": 64, "b": 76},
    )
    shades = colours.nominal(len(values))
    for row, (arm, seeds) in enumerate(values.items()):
        finite = seeds[np.isfinite(seeds)]
        found = measures.mean_interval(finite, confidence) if len(finite) else None
        mean = found.estimate if found else np.nan
        half = found.high - mean if found and np.isfinite(found.high) else np.nan
        figure.add_trace(
            go.Scatter(
                x=seeds,
                y=row + 0.16 * np.linspace(-1, 1, len(seeds)) if len(seeds) > 1 else [row + 0.16],
                mode="markers",
                name="one seed",
                legendgroup="seed",
                showlegend=row == 0,
                marker={"size": 8, "color": rgba(shades[row], 0.45), "line": {"width": 0}},
                hovertemplate=f"{arm}<br><b>%{{x:.4g}}</b> {text(unit)}<extra></extra>",
            )
        )
        figure.add_trace(
            go.Scatter(
                x=[mean],
                y=[row],
                error_x={"type": "data", "array": [half], "thickness": 2, "width": 7, "color": shades[row]},
                mode="markers",
                name=f"mean, {confidence:.0%} interval",
                legendgroup="mean",
                showlegend=row == 0,
                marker={"size": 11, "symbol": "diamond", "color": shades[row]},
                hovertemplate=f"{arm}, mean of {len(finite)}<br><b>%{{x:.4g}}</b> {text(unit)}<extra></extra>",
            )
        )
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(values))),
        ticktext=list(values),
        range=[len(values) - 0.5, -0.5],
        tickfont={"size": 12, "color": colours.ink},
        showgrid=False,
    )
    figure.update_layout(legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 0.01, "yref": "container"})
    return figure


def _effect(result: Mapping) -> str:
    effect, (low, high) = float(result["effect"]), map(float, result["ci"])  # infinities are text, as in JSON
    return f" · effect {effect:+.3g} [{low:+.3g}, {high:+.3g}]" if np.isfinite(effect) else ""
