"""The raw files of fetched data sets: one folder a set under ``data/``, with a manifest of what must be in it."""

import json
from hashlib import sha256
from pathlib import Path

from workbench.errors import InputError
from workbench.lib.data.sets import DOMAINS, DataSet
from workbench.paths import home

MANIFEST = "manifest.json"


def folder(row: DataSet) -> Path:
    """Where the raw files of this set are, or would be."""
    return home() / "data" / row.name


def manifest(row: DataSet) -> dict | None:
    """What the set's folder says of itself; None where it is absent, unreadable, or of another release than the row."""
    try:
        found = json.loads((folder(row) / MANIFEST).read_text())
        return found if found["archive_sha256"] == row.source.sha256 and found["files"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def present(row: DataSet) -> bool:
    """Whether the set can be loaded: always, or since its archive was fetched."""
    return row.source is None or manifest(row) is not None


def files(row: DataSet) -> dict[str, bytes]:
    """The raw files of a fetched set, member name -> content, each checked against the digest in the manifest.

    Raises:
        InputError: the set is not there, or a file is missing or was changed; the message names the command to get it.
    """
    require(row)
    found = {}
    for name, expected in manifest(row)["files"].items():
        path = folder(row) / name
        content = path.read_bytes() if path.is_file() else b""
        if sha256(content).hexdigest() != expected["sha256"]:
            raise InputError(
                f"{kind(row)} {row.name!r} is damaged ({path}); get it with: workbench data get {row.name}"
            )
        found[name] = content
    return found


def origin(row: DataSet) -> dict[str, str]:
    """Where a fetched set comes from, as a manifest says it."""
    return {
        "source": row.source.package,
        "version": row.source.version,
        "archive": row.source.archive,
        "archive_sha256": row.source.sha256,
    }


def intact(row: DataSet) -> bool:
    """Whether every raw file of the set is there as it was fetched."""
    try:
        return row.source is None or bool(files(row))
    except InputError:
        return False


def require(row: DataSet) -> None:
    """An `InputError` naming the command that gets the set, where it is absent."""
    if not present(row):
        raise InputError(f"{kind(row)} {row.name!r} is not on this machine; get it with: workbench data get {row.name}")


def kind(row: DataSet) -> str:
    """What to call this set in a message."""
    return "text domain" if row.name in DOMAINS else "data set"
