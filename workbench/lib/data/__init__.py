"""Real data that works offline: `load` it, see what there is (`available`, `describe`), `get` what is not there yet.

Light to import: torch comes with the first `load`.
"""

from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING

from workbench.errors import unknown
from workbench.lib.data import store
from workbench.lib.data.fetch import get
from workbench.lib.data.sets import DOMAINS, LOADERS, SETS, parts, row

if TYPE_CHECKING:
    from workbench.lib.data.types import Arrays, Glyphs, Photos, Series, Table, TextDomains, Trajectories

TYPES = ("Arrays", "Glyphs", "Photos", "Series", "Table", "TextDomains", "Trajectories")
"""What `load` returns; they come with torch when they are first asked for."""

__all__ = ["Entry", "available", "describe", "get", "load", *TYPES]


@dataclass(frozen=True)
class Entry:
    """What the list of data sets says of one.

    Attributes:
        name: what `load` and `get` take.
        what: its content in one line.
        licence: of the data.
        needs: "nothing", or the command that brings it.
        present: whether it can be loaded now; of a set of parts, whether all of them can.
        bytes: size of its raw files here; None where there are none, because nothing is fetched or not yet.
        download: size of the archive it is fetched in; None where nothing is fetched.
    """

    name: str
    what: str
    licence: str
    needs: str
    present: bool
    bytes: int | None
    download: int | None


def load(name: str, **options) -> "TextDomains | Arrays | Glyphs | Photos | Series | Table | Trajectories":
    """A data set by its name, with splits "train", "validation" and "test" and a manifest of its origin.

    >>> load("text-domains", domains=("python", "docs"), cap=65_536).domains
    ('python', 'docs')

    A text domain can also be loaded by its own name. Options: text domains take `domains` and `cap`; "digits" and
    "mnist-5k" take `task` and `fold`; "mnist-1d" takes `fold`; "glyph-names" takes `faces`; "movielens-100k" and
    "flights" take `by`; "dynamics" takes `families`; see the loaders in `sets.LOADERS`.

    Raises:
        InputError: the name or an option is unknown, a value is not allowed, or the set is not on this machine; then
            the message names the command that gets it.
    """
    found = row(name)
    if name in DOMAINS:
        if "domains" in options:
            raise unknown(f"option of data set {name!r}", "domains", ["cap"])
        return load("text-domains", domains=(name,), **options)
    module, function = LOADERS[found.name].split(":")
    loader = getattr(import_module(module), function)
    for option in options:
        if option not in signature(loader).parameters:
            raise unknown(f"option of data set {name!r}", option, signature(loader).parameters)
    return loader(**options)


def available() -> list[Entry]:
    """Every data set, in the order in which they are shown."""
    return [_entry(name) for name in SETS]


def describe(name: str, **options) -> dict:
    """Name, content and, part by part, the manifest (source, version, licence, sha256, sizes) of a set as loaded.

    Of "text-domains" the domains that are on this machine, unless `domains` says otherwise. Errors as for `load`.
    """
    if row(name).parts:
        options = {"domains": "available"} | options
    return {"name": name, "what": row(name).what, "parts": load(name, **options).manifest}


def _entry(name: str) -> Entry:
    rows = parts(name)
    fetched = [part for part in rows if part.source]
    sizes = [found["bytes"] for part in fetched if (found := store.manifest(part))]
    return Entry(
        name=name,
        what=SETS[name].what,
        licence=SETS[name].licence,
        needs=f"workbench data get {name}" if fetched else "nothing",
        present=all(store.present(part) for part in rows),
        bytes=sum(sizes) if sizes else None,
        download=sum(source.bytes for source in {part.source for part in fetched}) if fetched else None,
    )


def __getattr__(name: str):
    if name in TYPES:
        return getattr(import_module("workbench.lib.data.types"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
