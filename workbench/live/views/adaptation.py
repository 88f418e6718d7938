"""What was put on an adapted model: layers, ranks, experts, trained parameters, and what was left out."""

import re
from collections.abc import Mapping
from typing import Any

from workbench.live.views.card import Card
from workbench.live.views.markup import Markup, html, joined, table
from workbench.live.views.readings import Nothing, Readings
from workbench.live.views.view import View

HOW = (
    "One line for layers that are alike: a * stands for the number of a layer or of an expert, and how many there are "
    "is beside it. The rank and the scale are those of the low-rank updates; experts are what a router chooses from in "
    "each layer, or what the model has by itself. Trained are parameters that the adapters have, those that layers "
    "share in the first; all others are frozen. What the targets match and was left out is named with the reason."
)


class AdaptationView(View):
    """The report of the model's adaptation, as `Adapted.report` gives it, of a run that is watched."""

    title = "Adapters"

    def make_cards(self) -> dict[str, Card]:
        return {"report": Card("Adapters", HOW, span=12, height=520)}

    def draw(self, shown: list[Readings]) -> None:
        found = self.read(_adaptation)
        self.put("report", lambda: self.each(found, self._report), [run.status for run in shown])

    def _report(self, run: Readings, found: Mapping[str, Any]) -> Markup:
        total, trained = found["base"] + found["added"], found["trained"]
        options = ", ".join(f"{key} {_shown(value)}" for key, value in found["options"].items() if value is not None)
        small = f"{trained:,} of {total:,} parameters are trained, {100 * trained / max(total, 1):.3g} %; {options}"
        groups: dict[tuple, list[tuple[str, int]]] = {}
        for name, row in found["targets"].items():
            said = tuple(_shown(row.get(key)) for key in ("rank", "scale", "experts", "router"))
            groups.setdefault((_pattern(name), row.get("part") or "", *said), []).append((name, row["trained"]))
        rows = [
            (_label(pattern, part, [name for name, _ in of]), len(of), *said, f"{sum(n for _, n in of):,}")
            for (pattern, part, *said), of in groups.items()
        ]
        heads = ("layers", "number", "rank", "scale", "experts", "router", "trained")
        parts = [table(f"{found['slug']}{self.suffix(run)}", small, heads, rows)]
        parts.append(_reasons("Left out", "what the targets match and was not adapted", found["left_out"]))
        parts.append(_reasons("Layer by layer", "blocks that were not taken whole", found["by_layer"]))
        return joined(parts)


def _adaptation(run: Readings) -> Mapping[str, Any]:
    found = run.model.get("adaptation")
    if not found:
        raise Nothing("the model of this run is not adapted: workbench.adapt(model) before it is watched")
    return found


def _reasons(title: str, small: str, reasons: Mapping[str, str]) -> Markup:
    """A table of names with the reason, alike ones in one line; nothing where there are none."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, why in reasons.items():
        groups.setdefault((_pattern(name), why), []).append(name)
    rows = [(_label(pattern, "", names), len(names), why) for (pattern, why), names in groups.items()]
    return (
        html('<div class="words">{table}</div>', table=table(title, small, ("name", "number", "why"), rows))
        if rows
        else Markup()
    )


def _pattern(name: str) -> str:
    """The name of a layer with a * for each number in it."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _label(pattern: str, part: str, names: list[str]) -> Markup:
    shown = names[0] if len(names) == 1 else pattern
    said = html('<span title="{all}">{shown}</span>', all=", ".join(names[:50]), shown=shown)
    return html("{said} <span class='muted'>{part}</span>", said=said, part=part) if part else said


def _shown(value: object) -> str:
    """A number, several, or a dash for none."""
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
