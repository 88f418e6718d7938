"""Results that travel with the package: `workbench/studies/<family>/<system>.json` beside the study that made them.

    workbench.results()           # a table of all: verdict, effect, interval, seeds
    workbench.result("rmoe")      # one, judged anew by the study's rule

Plain JSON with the rows, the settings, and the version that the study declares. It is read without importing torch. A
file that was changed, cut off, or is of no system is named and not used.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.catalogue import PACKAGE, Method, method, methods
from workbench.errors import InputError
from workbench.studies import sheets

if TYPE_CHECKING:
    from workbench.studies.result import StudyResult


@dataclass(frozen=True)
class Stored:
    """A result as its file has it.

    Attributes:
        version: of the study, as it declared it.
        preset, seeds, settings: what ran.
        verdict, effect, ci, reason: of the judgement.
        rows: the fields of each `Row` but its seconds.
    """

    slug: str
    version: int
    preset: str
    seeds: list[int]
    settings: dict
    verdict: str
    effect: float
    ci: tuple[float, float]
    reason: str
    rows: list[dict]

    def as_dict(self) -> dict:
        """All but the rows, as plain values; infinities as text."""
        shown = ("slug", "version", "preset", "seeds", "verdict", "effect", "ci", "reason")
        low, high = (end if abs(end) < float("inf") else str(end) for end in self.ci)
        return {name: getattr(self, name) for name in shown} | {"ci": [low, high]}


class StoredTable(list[Stored]):
    """Stored results that show themselves as a table."""

    def cells(self) -> list[tuple[str, ...]]:
        return [
            (row.slug, row.verdict, f"{row.effect:.4g}", "[{:.4g}, {:.4g}]".format(*row.ci), str(len(row.seeds)))
            for row in self
        ]

    def __repr__(self) -> str:
        table = [("slug", "verdict", "effect", "interval", "seeds"), *self.cells()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
        return "\n".join([*lines, f"{len(self)} results"])


def results(slugs: Iterable[str] | None = None) -> StoredTable:
    """The stored results of all systems that have one, in the order of the catalogue; or of those named."""
    rows = methods(status="ready") if slugs is None else [method(slug) for slug in slugs]
    if slugs is None:
        for path in sorted(PACKAGE.glob("studies/*/*.json")):
            if path not in {path_of(row) for row in rows}:
                warnings.warn(f"{path} is the result of no system; not used", sheets.NotUsed, stacklevel=2)
    return StoredTable(found for row in rows if (found := read(row)) is not None)


def path_of(system: Method) -> Path:
    """Where the result of a system is."""
    return PACKAGE / "studies" / system.family / f"{system.slug.replace('-', '_')}.json"


def read(system: Method) -> Stored | None:
    """The stored result of a system; None where there is none that can be used."""
    path = path_of(system)
    try:
        content = sheets.read(path)
        if content.keys() != Stored.__dataclass_fields__.keys() or content["slug"] != system.slug:
            raise sheets.Damaged(f"{path} is not the result of {system.slug}")
    except FileNotFoundError:
        return None
    except sheets.Damaged as error:
        warnings.warn(f"{error}; not used", sheets.NotUsed, stacklevel=2)
        return None
    return Stored(**content | {"ci": tuple(content["ci"])})


def write(result: "StudyResult", settings: Mapping[str, object]) -> None:
    """Write a result to its place in the package; `settings` are those of a row."""
    judgement = result.judgement
    rows = [{key: value for key, value in asdict(row).items() if key != "seconds"} for row in result.rows]
    found = Stored(
        result.study.slug, result.study.version, result.preset, result.seeds, settings,
        judgement.verdict, judgement.effect, judgement.ci, judgement.reason, rows,
    )  # fmt: skip
    sheets.write(path_of(result.study.system), vars(found))


def need(slug: str) -> Stored:
    """The stored result of a system; an `InputError` where there is none."""
    system = method(slug)
    if (found := read(system)) is None:
        how = f"workbench study {slug} runs its study" if system.ready else "its study does not stand yet"
        raise InputError(f"slug {slug!r} has no stored result; {how}")
    return found
