"""Rows that have run are kept, one file each, so that none is paid for twice and a killed study goes on where it was.

A row is kept as `$WORKBENCH_HOME/results/<slug>/<code>/<arm>-<seed>-<digest>.json`. It is known by its slug, arm, seed
and settings, and by the code: the bytes of every file of the
workbench that the study imports, itself or by what it imports, with the versions of torch and of Python, whose library
is one of the texts. The time a row took is kept with it and is no part of what it is known by.

A file that was changed, cut off, or is not the row that its name says, is named and not used.
"""

import fcntl
import hashlib
import inspect
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from workbench import sealed
from workbench.errors import InputError
from workbench.imports import PACKAGE, files_below
from workbench.paths import home
from workbench.studies import sheets
from workbench.studies.rows import Row
from workbench.studies.sheets import Damaged

CLAIM = ".claim"
FIELDS = Row.__dataclass_fields__.keys()


def code_of(run: Callable) -> str:
    """Digest of the code that a function stands on, 16 hexadecimal digits."""
    try:
        source = "".join(inspect.findsource(run)[0])
    except OSError:
        raise InputError(f"run is {run.__qualname__} but must be a function of a file, for its rows are kept") from None
    found = hashlib.sha256(f"{run.__qualname__} {torch.__version__} {platform.python_version()}\n{source}".encode())
    for path in files_below(source):
        found.update(f"\n{path.relative_to(PACKAGE).as_posix()}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class Kept:
    """Where the rows of a study at some settings are kept.

    Attributes:
        slug, settings, code: what all of its rows have in common.
        root: the folder of all kept rows.
    """

    slug: str
    settings: Mapping[str, Any]
    code: str
    root: Path

    @classmethod
    def of(cls, slug: str, settings: Mapping[str, Any], run: Callable) -> "Kept":
        return cls(slug, sheets.plain(settings), code_of(run), home() / "results")

    def path(self, arm: str, seed: int) -> Path:
        return self.root / self.slug / self.code / self._name(arm, seed)

    def read(self, arm: str, seed: int) -> Row | None:
        """The row, or None where it is not kept.

        Raises:
            Damaged: the file is not as it was written, or is another row.
        """
        path = self.path(arm, seed)
        try:
            content = sheets.read(path)
        except FileNotFoundError:
            return None
        row = content.pop("row", None)
        if content != self._identity(arm, seed) or not isinstance(row, dict) or row.keys() != FIELDS:
            raise Damaged(f"{path} is not the row that its name says")
        return Row(**row)

    def write(self, row: Row) -> None:
        sheets.write(self.path(row.arm, row.seed), self._identity(row.arm, row.seed) | {"row": asdict(row)})

    def of_other_code(self, plan: Iterable[tuple[str, int]]) -> list[Path]:
        """Files of the rows of a plan that other code has made."""
        folders = sorted(path for path in (self.root / self.slug).glob("*/") if path.name != self.code)
        names = [self._name(arm, seed) for arm, seed in plan]
        return [path for folder in folders for name in names if (path := folder / name).exists()]

    def sweep(self) -> None:
        """Clear away what killed processes have left."""
        folder = self.root / self.slug / self.code
        sealed.sweep(folder)
        for path in folder.glob(f"*{CLAIM}"):
            with suppress(OSError):
                descriptor = sealed.locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                os.close(descriptor)

    @contextmanager
    def claim(self, arm: str, seed: int) -> Iterator[None]:
        """One process at a time; the others wait. The kernel lets go for one that is killed, and the next clears up.

        Where nothing can be written nothing can be claimed, and the block runs as it is.
        """
        path = self.path(arm, seed).with_suffix(CLAIM)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = sealed.locked(path)
        except OSError:
            yield
            return
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)

    def _name(self, arm: str, seed: int) -> str:
        return f"{re.sub(r'[^A-Za-z0-9.@=+-]', '_', arm)}-{seed}-{sheets.digest([arm, self._settings])[:12]}.json"

    @cached_property
    def _settings(self) -> str:
        return sheets.digest(self.settings)

    def _identity(self, arm: str, seed: int) -> dict[str, Any]:
        return {"slug": self.slug, "arm": arm, "seed": seed, "settings": self.settings, "code": self.code}
