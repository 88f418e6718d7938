"""One line on how a run stands: state, step, speed, and what watching it costs."""

from html import escape

import numpy as np

from workbench.live.records import PROBE_SECONDS, STEP_SECONDS, STORE_SECONDS
from workbench.live.views.readings import Nothing, Readings

WINDOW = 100  # steps


def status_line(readings: Readings, named: bool = False) -> str:
    """HTML: state as a coloured chip, step of total, steps a second, share of the step time that probes take.

    ``named`` puts the name of the run before it, or what it is; that of the arm of a study is always there.
    """
    state, message = readings.status
    total = readings.meta.get("total_steps")
    parts = [f'<b title="{escape(readings.name)}">{escape(readings.about)}</b>'] if named or readings.arm else []
    parts.append(f'<span class="chip {state}" title="{escape(message)}">{state}</span>')
    if readings.last_step >= 0:
        of = f" of {total:,}" if total else ""
        parts.append(f"<span>step <b>{readings.last_step:,}</b>{of}</span>")
    else:
        parts.append("<span>no step yet</span>")
    try:
        seconds = readings.recent(STEP_SECONDS.name(), WINDOW)
        if len(seconds) and np.median(seconds) > 0:
            parts.append(f"<span><b>{1 / np.median(seconds):.3g}</b> steps/s</span>")
        share = probe_share(readings)
        if np.isfinite(share):
            title = f"time of the probes and the store over the last {WINDOW} steps, as a share of the step time"
            parts.append(f'<span title="{title}">probes <b>{100 * share:.1f} %</b></span>')
    except Nothing:  # a damaged run: its message follows
        pass
    if message and state in ("failed", "died", "damaged"):
        parts.append(f'<span class="bad">{escape(message)}</span>')
    return f'<div class="status">{"".join(parts)}</div>'


def probe_share(readings: Readings) -> float:
    """(probe + store seconds) / step seconds over the last steps; NaN where they are not recorded."""
    steps = readings.recent(STEP_SECONDS.name(), WINDOW).sum()
    cost = sum(readings.recent(record.name(), WINDOW).sum() for record in (PROBE_SECONDS, STORE_SECONDS))
    return float(cost / steps) if steps > 0 else float("nan")
