"""What ran where and when: a bar for each event, a row for each resource."""

import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.theme import blank, legend_below_title, rgba, text, theme_named
from workbench.lib.core.simulation.timeline import Timeline

MOST = 4000
"""Events that a picture can still show."""


def gantt(
    timeline: Timeline, *, title: str, subtitle: str | None = None, unit: str = "ms", theme: str = "light"
) -> go.Figure:
    """A timeline as bars, coloured by group; by default the subtitle says what it is: simulated or measured, by what.

    The share of the makespan that a resource works stands beside its name.

    Raises:
        InputError: another unit than s, ms or us, or more than 4,000 events: show a part of it (`Timeline.between`).
    """
    scale = {"s": 1, "ms": 1e3, "us": 1e6}
    if unit not in scale:
        raise InputError(f"unit is {unit!r} but must be one of {', '.join(scale)}")
    if len(timeline.events) > MOST:
        raise InputError(f"timeline has {len(timeline.events)} events but must have at most {MOST}")
    first = min((event.start for event in timeline.events), default=0.0)
    last, busy = timeline.makespan, timeline.busy()
    rows = {
        name: f"{text(name)}  {busy[name] / (last - first) if last > first else 0:.0%}" for name in timeline.resources
    }
    groups = list(dict.fromkeys(event.group for event in timeline.events))
    figure = blank(theme, title, text(timeline.basis) if subtitle is None else subtitle, x=f"time ({unit})")
    for group, shade in zip(groups, theme_named(theme).nominal(len(groups)), strict=True):
        events = [event for event in timeline.events if event.group == group]
        figure.add_bar(
            orientation="h",
            y=[rows[event.resource] for event in events],
            base=[event.start * scale[unit] for event in events],
            x=[event.seconds * scale[unit] for event in events],
            name=text(group or "work"),
            marker={"color": rgba(shade, 0.85), "line": {"width": 0.5, "color": theme_named(theme).card}},
            hovertext=[
                f"{text(event.name)}<br>{event.start * scale[unit]:.4g} to {event.end * scale[unit]:.4g} {unit}"
                for event in events
            ],
            hoverinfo="text",
        )
    figure.update_layout(
        barmode="overlay",
        bargap=0.35,
        height=150 + 46 * max(1, len(rows)),
        showlegend=len(groups) > 1,
        legend=legend_below_title() | {"x": 1, "xanchor": "right"},
    )
    figure.update_yaxes(categoryorder="array", categoryarray=list(rows.values())[::-1], showgrid=False)
    return figure
