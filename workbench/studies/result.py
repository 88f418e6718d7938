"""What a study says: its rows, the judgement on them, and where they come from."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING

from workbench.studies.rows import Rows
from workbench.studies.verdicts import Judgement

if TYPE_CHECKING:
    from workbench.studies.core import Study


@dataclass(frozen=True, repr=False)
class StudyResult:
    """The rows of a study and the judgement on them; prints itself as a table with the verdict.

    Attributes:
        origin: how many rows were "run" now, were "kept" here by an earlier run, and are of the "stored" result that
            travels with the package.
        seconds: wall time of all this.
    """

    study: "Study"
    preset: str
    seeds: list[int]
    settings: dict
    rows: Rows
    judgement: Judgement
    origin: Mapping[str, int]
    seconds: float

    @property
    def verdict(self) -> str:
        return self.judgement.verdict

    @property
    def claimed(self) -> tuple[float, float]:
        """Between which values the effect lies if the claim holds."""
        better = (0.0, math.inf) if self.study.higher_is_better else (-math.inf, 0.0)
        return self.judgement.claimed or better

    def to_dict(self) -> dict:
        """Everything as plain values; only the keys named "seconds" differ between two runs of one seed."""
        study, judgement = self.study, self.judgement
        return {
            "slug": study.slug,
            "version": study.version,
            "title": study.system.title,
            "claim": study.system.claim,
            "tested": study.tested,
            "preset": self.preset,
            "seeds": self.seeds,
            "growing": self.rows.growing,
            "origin": dict(self.origin),
            "settings": self.settings,
            "metric": study.metric,
            "unit": study.unit,
            "higher_is_better": study.higher_is_better,
            "arms": [_plain(asdict(row)) for row in self.rows],
            "effect": _plain(judgement.effect),
            "ci": _plain(judgement.ci),
            "level": judgement.level,
            "sd": _plain(judgement.sd),
            "claimed": _plain(self.claimed),
            "verdict": judgement.verdict,
            "reason": judgement.reason,
            "rule": study.rule,
            "details": _plain(judgement.details),
            "seconds": self.seconds,
        }

    def table(self) -> list[dict[str, str]]:
        """One line per arm: the mean and spread of the metric over the seeds, and the budget."""
        lines = []
        for arm in self.rows.arms:
            rows, values = self.rows.arm(arm), self.rows.of(arm)
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            lines.append(
                {
                    "arm": arm,
                    f"{self.study.metric} ({self.study.unit})": f"{statistics.fmean(values):.4f}{spread}",
                    "parameters": f"{rows[0].params:,}",
                    "active": f"{rows[0].active_params:,}",
                    "GFLOP": f"{rows[0].flops / 1e9:,.1f}",
                    "steps": f"{rows[0].steps:,}",
                }
            )
        return lines

    def __repr__(self) -> str:
        lines = self.table()
        widths = {key: max(len(key), *(len(line[key]) for line in lines)) for key in lines[0]}
        text = ["  ".join(key.ljust(widths[key]) for key in widths)]
        text += ["  ".join(line[key].ljust(widths[key]) for key in widths) for line in lines]
        head = [f"{self.study.slug}: {self.study.system.claim}"]
        if self.study.tested:
            head.append(f"Tested here: {self.study.tested}")
        return "\n".join([*head, "", *text, "", self._verdict_line(), *self._notes()])

    def __str__(self) -> str:
        """With what a run took, which a notebook (it keeps the repr) would store as noise."""
        means = {arm: statistics.fmean(row.seconds for row in self.rows.arm(arm)) for arm in self.rows.arms}
        seconds = ", ".join(f"{arm} {mean:.1f}" for arm, mean in means.items() if mean)  # a stored row has none
        return f"{self!r}\nSeconds a run: {seconds}." if seconds else repr(self)

    def _repr_markdown_(self) -> str:
        lines = self.table()
        head = "| " + " | ".join(lines[0]) + " |\n|" + " --- |" * len(lines[0])
        body = "\n".join("| " + " | ".join(map(_as_text, line.values())) + " |" for line in lines)
        because = _as_text(self._verdict_line().split(": ", 1)[1])
        tested = f"*Tested here:* {self.study.tested}\n\n" if self.study.tested else ""
        rule = f"*Rule:* {self.study.rule}\n\n{' '.join(self._notes())}"
        return f"{tested}{head}\n{body}\n\n**{self.verdict}**: {because}\n\n{rule}"

    def _verdict_line(self) -> str:
        low, high = self.judgement.ci
        interval = f"[{low:.4g}, {high:.4g}]"
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        seeds += ", valid at every look" if self.rows.growing else ""
        return f"{self.verdict}: {self.judgement.reason} Effect {self.judgement.effect:.4g} {interval}, {seeds}."

    def _notes(self) -> list[str]:
        """Where the rows come from, and what the number of seeds rests on."""
        names = {
            "stored": f"of the stored result of version {self.study.version} (fresh=True or --fresh runs them anew)",
            "kept": "kept here by an earlier run",
            "run": "run now",
        }
        rows = [f"{self.origin[key]} {name}" for key, name in names.items() if self.origin.get(key)]
        power = self.study.power and self.study.power.note(self.study, self.preset)
        return [f"Rows: {', '.join(rows)}.", *([power] if power else [])]


def _plain(value):
    """The value as JSON can carry it: NaN and infinities as strings, tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def _as_text(value: str) -> str:
    """What a cell of a table in Markdown shows as it is."""
    return escape(value, quote=False).replace("|", r"\|")
