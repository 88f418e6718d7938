"""One line on how a run stands: state, step, speed, and what watching it costs."""

import numpy as np

from workbench.live.records import PROBE_SECONDS, STEP_SECONDS, STORE_SECONDS
from workbench.live.views.markup import Markup, html, joined
from workbench.live.views.readings import Nothing, Readings

WINDOW = 100  # steps


def status_line(readings: Readings, named: bool = False) -> Markup:
    """HTML: state as a coloured chip, step of total, steps a second, share of the step time that probes take.

    ``named`` puts the name of the run before it, or what it is; that of the arm of a study is always there.
    """
    state, message = readings.status
    total = readings.meta.get("total_steps")
    parts = []
    if named or readings.arm:
        parts.append(html('<b title="{name}">{about}</b>', name=readings.name, about=readings.about))
    parts.append(html('<span class="chip {state}" title="{message}">{state}</span>', state=state, message=message))
    if readings.last_step >= 0:
        of = f" of {total:,}" if total else ""
        parts.append(html("<span>step <b>{step}</b>{of}</span>", step=f"{readings.last_step:,}", of=of))
    else:
        parts.append(html("<span>no step yet</span>"))
    try:
        seconds = readings.recent(STEP_SECONDS.name(), WINDOW)
        if len(seconds) and np.median(seconds) > 0:
            parts.append(html("<span><b>{rate}</b> steps/s</span>", rate=f"{1 / np.median(seconds):.3g}"))
        share = probe_share(readings)
        if np.isfinite(share):
            title = f"time of the probes and the store over the last {WINDOW} steps, as a share of the step time"
            told = html('<span title="{title}">probes <b>{share} %</b></span>', title=title, share=f"{100 * share:.1f}")
            parts.append(told)
    except Nothing:  # a damaged run: its message follows
        pass
    if message and state in ("failed", "died", "damaged"):
        parts.append(html('<span class="bad">{message}</span>', message=message))
    return html('<div class="status">{parts}</div>', parts=joined(parts))


def probe_share(readings: Readings) -> float:
    """(probe + store seconds) / step seconds over the last steps; NaN where they are not recorded."""
    steps = readings.recent(STEP_SECONDS.name(), WINDOW).sum()
    cost = sum(readings.recent(record.name(), WINDOW).sum() for record in (PROBE_SECONDS, STORE_SECONDS))
    return float(cost / steps) if steps > 0 else float("nan")
