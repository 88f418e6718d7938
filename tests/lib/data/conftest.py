"""Every test of data has an empty home of its own, and archives are made here instead of being downloaded."""

import io
import tarfile
import zipfile
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import pytest

from workbench.lib.data import fetch, sets
from workbench.lib.data.sets import Source


@pytest.fixture(autouse=True)
def home(empty_home):
    """No test of data sees, or changes, what is there for the other tests."""
    return empty_home


@dataclass
class Index:
    """A package index of local archives, in the place of the real one.

    Attributes:
        folder: where the archives are made.
        asked: the packages that were downloaded from it, in order.
    """

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    asked: list[str]

    def offer(self, name: str, files: dict[str, bytes], form: str = "whl", members: tuple[str, ...] = ()) -> Source:
        """Make an archive of these files, and the data set `name` one that comes from it."""
        old = sets.SETS[name]
        path = self.folder / f"{old.source.package}-1.{form}"
        if form == "whl":
            with zipfile.ZipFile(path, "w") as archive:
                for member, content in files.items():
                    archive.writestr(member, content)
        else:
            with tarfile.open(path, "w:gz") as archive:
                for member, content in files.items():
                    entry = tarfile.TarInfo(member)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
        content = path.read_bytes()
        source = replace(old.source, version="1", archive=path.name, sha256=sha256(content).hexdigest())
        row = replace(old, source=source, members=members or old.members)
        self.monkeypatch.setitem(sets.SETS, name, row)
        return source

    def download(self, source: Source, into: Path) -> Path:
        """What stands for `fetch.download`."""
        self.asked.append(source.package)
        into.mkdir()
        path = into / source.archive
        path.write_bytes((self.folder / source.archive).read_bytes())
        return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A local index that `get` downloads from."""
    folder = tmp_path / "index"
    folder.mkdir()
    found = Index(folder, monkeypatch, [])
    monkeypatch.setattr(fetch, "download", found.download)
    return found
