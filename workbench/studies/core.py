"""What every study is made of: arms at a matched budget, seeds, a metric, and a rule for the verdict fixed beforehand.

A study runs each (arm, seed) on its own, one thread each, in as many processes as there are cores. The result is a
table of `Row`s and a `Judgement` by the study's rule. The rule is code, written before the numbers are known. No row is
run that is kept already (`gather`) or stored with the package (`stored`).
"""

import importlib
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from workbench.catalogue import Method, method
from workbench.engines import EVERY_CORE, HERE, Workers
from workbench.errors import InputError, unknown
from workbench.studies import sheets, stored
from workbench.studies.gather import Progress, gather
from workbench.studies.power import SEEDS, Measured, Power, measured
from workbench.studies.result import StudyResult
from workbench.studies.rows import Row, Rows
from workbench.studies.stored import Stored
from workbench.studies.verdicts import Judgement

Settings = Mapping[str, object]
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Study:
    """A claim, and how it is tested.

    Attributes:
        system: the row of the catalogue whose claim is tested.
        metric, unit, higher_is_better: what a row's `metric` is.
        rule: in words, what `judge` does; printed with every result.
        presets: name -> settings: "smoke" (seconds), "small" (a minute or two on two cores), "full" (a GPU or a night).
            The key "seeds" holds the number of seeds, and "first_seed" the first of them where it is not 0: where
            others were looked at before the study was as it is.
        arms: names of the arms, the paper's method and its baselines; or settings -> names, where presets differ.
        run: (arm, seed, settings) -> Row; a module-level function, because it runs in another process.
        judge: (rows, settings) -> Judgement.
        tested: the part of the claim that is tested, where that is narrower or sharper than the paper's; else None.
        version: raised whenever the numbers change; a stored result of another version is not used.
        power: what the number of seeds has to be enough for, and what was found of it.
        main: the paper's method among the arms, or settings -> its name: what is trained live where no arm is named. If
            left out, the arm called like the system, or else the first.
        trainings: arm -> how many trainings of one model make the arm, one after the other; or, of an arm that trains
            nothing, what it does instead, in words. What an arm trains after these is not shown live.
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
    version: int = 1
    power: Power | None = None
    main: str | Callable[[Settings], str] | None = None
    trainings: Callable[[str], int | str] = lambda arm: 1

    @property
    def slug(self) -> str:
        return self.system.slug

    def arms_of(self, settings: Settings) -> list[str]:
        """The arms that run at these settings."""
        return list(self.arms(settings) if callable(self.arms) else self.arms)

    def main_arm(self, settings: Settings) -> str:
        """The arm of the paper's method at these settings."""
        if self.main is not None:
            return self.main(settings) if callable(self.main) else self.main
        arms = self.arms_of(settings)
        return self.slug if self.slug in arms else arms[0]

    def execute(
        self,
        preset: str,
        seed: int | None = None,
        seeds: int | None = None,
        workers: Workers = EVERY_CORE,
        progress: Progress | None = None,
        fresh: bool = False,
    ) -> StudyResult:
        """Run every arm at every seed that is not there yet, and judge; see `run_study`."""
        asked = seeds_of(self.settings(preset))
        least, first = len(asked), asked[0] if seed is None else seed
        if seeds is not None and not least <= seeds <= MOST_SEEDS:
            raise InputError(f"seeds is {seeds} but must be from {least}, as {preset} has, to {MOST_SEEDS}")
        given = () if fresh else self._stored_rows(preset)
        return self._judged(preset, range(first, first + (seeds or least)), workers, progress, given, fresh)

    def measure_power(
        self, preset: str, seed: int | None = None, workers: Workers = EVERY_CORE, progress: Progress | None = None
    ) -> Measured:
        """Run the baselines of `power` alone, or read what is kept of them, and say how many seeds the preset needs.

        Raises:
            InputError: the study declares none.
        """
        arms = self.arms_of(self.settings(preset))
        if self.power is None:
            raise InputError(f"slug {self.slug!r} names no baselines: its STUDY has to declare power=Power(...)")
        for arm in self.power.baselines:
            if arm not in arms:
                raise unknown("arm", arm, arms)
        first = seeds_of(self.presets[preset])[0] if seed is None else seed
        seeds = range(first, first + SEEDS)
        rows, _ = self._gather(preset, seeds, self.power.baselines, workers, progress, self._stored_rows(preset))
        return measured(self, preset, Rows(rows))

    def store(self, workers: Workers = EVERY_CORE, progress: Progress | None = None) -> StudyResult:
        """Write the result of "small" into the package, of kept rows and of what has to be run."""
        result = self._judged("small", seeds_of(self.presets["small"]), workers, progress)
        stored.write(result, row_settings(result.settings))
        return result

    def foreign(self, found: Stored) -> str | None:
        """Why a stored result does not belong to this study as it is declared; None where it does."""
        settings = self.presets[found.preset]
        plan = [(arm, seed) for seed in seeds_of(settings) for arm in self.arms_of(settings)]
        if found.version != self.version:
            return f"is of version {found.version} and the study is of version {self.version}"
        if found.settings != sheets.plain(row_settings(settings)):
            return f"has other settings than {found.preset}"
        if [(row["arm"], row["seed"]) for row in found.rows] != plan:
            return f"has other arms or seeds than {found.preset}"
        return None

    def settings(self, preset: str) -> Settings:
        if preset not in self.presets:
            raise unknown("preset", preset, self.presets)
        return self.presets[preset]

    def _stored_rows(self, preset: str) -> list[Row]:
        found = stored.read(self.system)
        if found is None or found.preset != preset:
            return []
        if problem := self.foreign(found):
            warnings.warn(f"{stored.path_of(self.system)} {problem}; not used", sheets.NotUsed, stacklevel=3)
            return []
        return [Row(**row) for row in found.rows]

    def _judged(
        self,
        preset: str,
        seeds: range,
        workers: Workers,
        progress: Progress | None,
        given: Iterable[Row] = (),
        fresh: bool = False,
    ) -> StudyResult:
        settings, began = self.presets[preset], time.perf_counter()
        rows, origin = self._gather(preset, seeds, self.arms_of(settings), workers, progress, given, fresh)
        rows = Rows(rows, growing=len(seeds) > int(settings["seeds"]))
        judgement = self.judge(rows, settings)
        spent = time.perf_counter() - began
        return StudyResult(self, preset, [*seeds], dict(settings), rows, judgement, origin, spent)

    def _gather(self, preset: str, seeds: range, arms, workers, progress, given=(), fresh=False):
        if not 0 <= seeds[0] <= 2**31 - MOST_SEEDS:
            raise InputError(f"seed is {seeds[0]} but must be between 0 and 2**31 - {MOST_SEEDS}")
        if preset == "smoke" and workers == EVERY_CORE:  # starting a worker takes longer than a smoke run
            workers = HERE
        # Seed by seed, so that an interrupted look at the progress compares like with like.
        plan = [(arm, seed) for seed in seeds for arm in arms]
        return gather(self.slug, row_settings(self.presets[preset]), self.run, plan, workers, progress, given, fresh)


def seeds_of(settings: Settings) -> range:
    """The seeds that a preset asks for."""
    first = int(settings.get("first_seed", 0))
    return range(first, first + int(settings["seeds"]))


def row_settings(settings: Settings) -> Settings:
    """What a row is told of a preset: all but which seeds, which make no row another."""
    return {key: value for key, value in settings.items() if key not in ("seeds", "first_seed")}


def run_study(
    slug: str,
    preset: str = "small",
    seed: int | None = None,
    seeds: int | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    engine: str = "loky",
    address: str | None = None,
) -> StudyResult:
    """Run the study of a system and judge its paper's claim. No row that is there already is run again.

    Args:
        slug: of a ready system, see `workbench.methods()`.
        preset: "smoke", "small" or "full".
        seed: the first seed; by default the preset's, which is 0 unless it says so.
        seeds: how many; by default as many as the preset has. With more, the intervals hold at every look, so that
            seeds may be added for as long as they are wanted; they are wider than those of a number that was fixed.
        jobs: rows at the same time, one thread each; default all cores (one for smoke), or all that a cluster has.
        progress: called as progress(rows done, rows in all, what was just done).
        fresh: run everything, whatever is kept or stored.
        engine: where rows run: "loky" for processes of this machine, "dask" or "ray" for a cluster. They are the same
            bit for bit, and kept here.
        address: of the cluster; without it, one of this machine that ends with the study.
    """
    workers = Workers(jobs, engine, address)
    return load_study(slug).execute(preset, seed, seeds, workers, progress, fresh)


def load_result(slug: str) -> StudyResult:
    """The result that travels with the package, judged anew by the study's rule.

    Raises:
        InputError: there is none, or it does not belong to the study as it is declared now.
    """
    found, study = stored.need(slug), load_study(slug)
    if problem := study.foreign(found):
        raise InputError(f"slug {slug!r} has a stored result that {problem}; workbench study {slug} runs it")
    settings, rows = study.presets[found.preset], Rows(Row(**row) for row in found.rows)
    judgement, origin = study.judge(rows, settings), {"stored": len(rows)}
    return StudyResult(study, found.preset, found.seeds, dict(settings), rows, judgement, origin, 0.0)


def load_study(slug: str) -> Study:
    """The `STUDY` of a ready system."""
    row = method(slug)
    if row.status != "ready":
        raise InputError(f"slug {slug!r} is {row.status}: it has no study yet")
    return importlib.import_module(f"workbench.studies.{row.family}.{slug.replace('-', '_')}").STUDY
