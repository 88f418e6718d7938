"""What every study is made of: arms at a matched budget, seeds, a metric, and a rule for the verdict fixed beforehand.

A study runs each (arm, seed) on its own, one thread each, in as many processes as there are cores. The result is a
table of `Row`s and a `Judgement` by the study's rule. The rule is code, written before the numbers are known.
"""

import importlib
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace

from workbench.catalogue import Method, method
from workbench.errors import InputError, unknown
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import Judgement

Settings = Mapping[str, object]
Progress = Callable[[int, int, str], None]
"""Called as progress(runs done, runs in all, what was just done)."""


@dataclass(frozen=True)
class Study:
    """A claim, and how it is tested.

    Attributes:
        system: the row of the catalogue whose claim is tested.
        metric, unit, higher_is_better: what a row's `metric` is.
        rule: in words, what `judge` does; printed with every result.
        presets: name -> settings: "smoke" (seconds), "small" (a minute or two on two cores), "full" (a GPU or a night).
            The key "seeds" holds the number of seeds.
        arms: names of the arms, the paper's method and its baselines; or settings -> names, where presets differ.
        run: (arm, seed, settings) -> Row; a module-level function, because it runs in another process.
        judge: (rows, settings) -> Judgement.
        tested: the part of the claim that is tested, where that is narrower or sharper than the paper's; else None.
    """

    system: Method
    metric: str
    unit: str
    higher_is_better: bool
    rule: str
    presets: Mapping[str, Settings]
    arms: Collection[str] | Callable[[Settings], Collection[str]]
    run: Callable[[str, int, Settings], Row]
    judge: Callable[[Rows, Settings], Judgement]
    tested: str | None = None

    @property
    def slug(self) -> str:
        return self.system.slug

    def arms_of(self, settings: Settings) -> list[str]:
        """The arms that run at these settings."""
        return list(self.arms(settings) if callable(self.arms) else self.arms)

    def execute(self, preset: str, seed: int = 0, jobs: int | None = None, progress: Progress | None = None):
        """Run every arm at every seed and judge; see `run_study`."""
        if preset not in self.presets:
            raise unknown("preset", preset, self.presets)
        if not 0 <= seed < 2**31:
            raise InputError(f"seed is {seed} but must be between 0 and 2**31 - 1")
        settings = self.presets[preset]
        seeds = list(range(seed, seed + int(settings["seeds"])))
        if jobs is None:
            jobs = 1 if preset == "smoke" else _cores()  # starting a worker takes longer than a smoke run
        if jobs < 1:
            raise InputError(f"jobs is {jobs} but must be at least 1")
        began = time.perf_counter()
        # Seed by seed, so that an interrupted look at the progress compares like with like.
        plan = [(arm, s) for s in seeds for arm in self.arms_of(settings)]
        rows = _run_all(self.run, plan, settings, min(jobs, len(plan)), progress)
        judgement = self.judge(rows, settings)
        return StudyResult(self, preset, seeds, dict(settings), rows, judgement, time.perf_counter() - began)


@dataclass(frozen=True, repr=False)
class StudyResult:
    """The rows of a study and the judgement on them; prints itself as a table with the verdict."""

    study: Study
    preset: str
    seeds: list[int]
    settings: dict
    rows: Rows
    judgement: Judgement
    seconds: float

    @property
    def verdict(self) -> str:
        return self.judgement.verdict

    def to_dict(self) -> dict:
        """Everything as plain values; only the keys named "seconds" differ between two runs of one seed."""
        study, judgement = self.study, self.judgement
        return {
            "slug": study.slug,
            "title": study.system.title,
            "claim": study.system.claim,
            "tested": study.tested,
            "preset": self.preset,
            "seeds": self.seeds,
            "settings": self.settings,
            "metric": study.metric,
            "unit": study.unit,
            "higher_is_better": study.higher_is_better,
            "arms": [_plain(asdict(row)) for row in self.rows],
            "effect": _plain(judgement.effect),
            "ci": _plain(judgement.ci),
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
        return "\n".join([*head, "", *text, "", self._verdict_line()])

    def __str__(self) -> str:
        """With what a run took, which a notebook (it keeps the repr) would store as noise."""
        means = {arm: statistics.fmean(row.seconds for row in self.rows.arm(arm)) for arm in self.rows.arms}
        return f"{self!r}\nSeconds a run: {', '.join(f'{arm} {seconds:.1f}' for arm, seconds in means.items())}."

    def _repr_markdown_(self) -> str:
        lines = self.table()
        head = "| " + " | ".join(lines[0]) + " |\n|" + " --- |" * len(lines[0])
        body = "\n".join("| " + " | ".join(line.values()) + " |" for line in lines)
        because = self._verdict_line().split(": ", 1)[1]
        tested = f"*Tested here:* {self.study.tested}\n\n" if self.study.tested else ""
        return f"{tested}{head}\n{body}\n\n**{self.verdict}**: {because}\n\n*Rule:* {self.study.rule}"

    def _verdict_line(self) -> str:
        low, high = self.judgement.ci
        interval = f"[{low:.4g}, {high:.4g}]"
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        return f"{self.verdict}: {self.judgement.reason} Effect {self.judgement.effect:.4g} {interval}, {seeds}."


def run_study(
    slug: str, preset: str = "small", seed: int = 0, jobs: int | None = None, progress: Progress | None = None
) -> StudyResult:
    """Run the study of a system and judge its paper's claim.

    Args:
        slug: of a ready system, see `workbench.methods()`.
        preset: "smoke", "small" or "full".
        seed: the first seed; the preset says how many follow.
        jobs: processes, one thread each; default all cores (one for smoke).
        progress: see `Progress`.
    """
    return load_study(slug).execute(preset, seed, jobs, progress)


def load_study(slug: str) -> Study:
    """The `STUDY` of a ready system."""
    row = method(slug)
    if row.status != "ready":
        raise InputError(f"slug {slug!r} is {row.status}: it has no study yet")
    return importlib.import_module(f"workbench.studies.{row.family}.{slug.replace('-', '_')}").STUDY


def _cores() -> int:
    from joblib import cpu_count  # heavy enough to wait until it is needed

    return cpu_count()


def _run_one(run, arm: str, seed: int, settings: Settings) -> Row:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same numbers on any machine, and no two runs fighting for a core
    began = time.perf_counter()
    try:
        row = run(arm, seed, settings)
    finally:
        torch.set_num_threads(threads)
    return replace(row, seconds=time.perf_counter() - began)


def _run_all(run, plan, settings: Settings, jobs: int, progress: Progress | None) -> Rows:
    """The rows in the order of the plan."""
    if jobs == 1:
        results = (_run_one(run, arm, seed, settings) for arm, seed in plan)
    else:
        from joblib import Parallel, delayed, parallel_config

        with parallel_config("loky", n_jobs=jobs, inner_max_num_threads=1):
            parallel = Parallel(return_as="generator", batch_size=1)
            results = parallel(delayed(_run_one)(run, arm, seed, settings) for arm, seed in plan)
    rows = []
    for (arm, seed), row in zip(plan, results, strict=True):
        rows.append(row)
        if progress is not None:
            progress(len(rows), len(plan), f"{arm}, seed {seed}: {row.metric:.4f}")
    return Rows(rows)


def _plain(value):
    """The value as JSON can carry it: NaN and infinities as strings, tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
