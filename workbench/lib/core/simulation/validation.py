"""Predictions beside what was really measured: the record that every simulator is held to.

The machine and the date stand in it, what the model was calibrated by, and a row for each configuration that was run.
"""

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from workbench.errors import InputError
from workbench.lib.core.simulation.fits import relative_errors


@dataclass(frozen=True)
class Validation:
    """What one system's model predicted, and what was measured.

    Attributes:
        system: its slug.
        machine: "cpu", "cores", "system", "torch".
        date: of the measurement, in UTC.
        calibration: what the model was calibrated by, measured before and on none of the configurations; plain values.
        rows: one for each configuration, plain values: "configuration" (a text), "predicted" and "measured" (of one
            unit), and whatever else was seen.
        unit: of both.
    """

    system: str
    machine: Mapping[str, Any]
    date: str
    calibration: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    unit: str

    @classmethod
    def made(
        cls, system: str, calibration: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], unit: str
    ) -> "Validation":
        """The record of this machine, now."""
        rows = list(rows)
        if len(rows) < 4:
            raise InputError(f"rows has {len(rows)} configurations but a model is held to at least 4")
        return cls(system, machine(), f"{datetime.now(UTC):%Y-%m-%d}", calibration, rows, unit)

    @property
    def errors(self) -> list[float]:
        """|predicted - measured| / measured of each configuration."""
        return relative_errors([row["predicted"] for row in self.rows], [row["measured"] for row in self.rows])

    @property
    def median_error(self) -> float:
        return statistics.median(self.errors)

    @property
    def accuracy(self) -> float:
        """1 minus the mean error."""
        return 1 - statistics.fmean(self.errors)

    @property
    def label(self) -> str:
        """What stands on figures and tables of what was simulated by this calibration."""
        return f"simulated, calibrated by {self.machine['cpu']}, {self.date} (measured)"

    def table(self) -> list[dict[str, Any]]:
        """The rows with their errors, as they are printed."""
        return [
            {"configuration": row["configuration"], f"predicted, {self.unit}": round(row["predicted"], 4)}
            | {f"measured, {self.unit}": round(row["measured"], 4), "error": f"{error:.1%}"}
            for row, error in zip(self.rows, self.errors, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the errors, their median and the accuracy for whoever reads the file itself."""
        found = asdict(self)
        found["rows"] = [{**row, "error": error} for row, error in zip(self.rows, self.errors, strict=True)]
        return found | {"median_error": self.median_error, "accuracy": self.accuracy}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Validation":
        """The inverse of `to_dict`; errors are computed anew."""
        rows = [{key: value for key, value in row.items() if key != "error"} for row in found["rows"]]
        names = ("system", "machine", "date", "calibration")
        return cls(**{name: found[name] for name in names}, rows=rows, unit=found["unit"])

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> "Validation":
        """A record that was written; `InputError` where there is none."""
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"validation {str(file)!r} cannot be read: {error}") from None


def machine() -> dict[str, Any]:
    """What measurements are taken on."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
