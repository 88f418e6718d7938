"""Text domains as byte streams: documents in a fixed pseudo-random order, split by document, cut at a cap."""

import platform
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from hashlib import sha256

import torch

from workbench.errors import InputError, unknown
from workbench.lib.data import documents, store
from workbench.lib.data.cache import Parsed, cached
from workbench.lib.data.documents import Documents
from workbench.lib.data.sets import DOMAINS, SETS, DataSet
from workbench.lib.data.splits import SPLITS, TEXT_SHARES, digest, split_of
from workbench.lib.data.types import TextDomains

CAP = 262_144
SMALLEST_CAP = 1024
PIECES = 64
"""At least so many pieces of documents fill a cap, unless these would be shorter than `SMALLEST_CAP`."""


def load(domains: Sequence[str] = ("python", "docs", "names"), cap: int = CAP) -> TextDomains:
    """Byte streams of text domains, with splits by document (90 / 5 / 5 percent of the documents, by digest).

    A stream is made of documents, each closed by one newline, in the order of their digests: pseudo-random, and the
    same on every machine. Documents longer than a sixty-fourth of the cap are cut into pieces of that size, which are
    ordered alike, so that a cap takes a fair sample of the domain and not its few longest files.

    Args:
        domains: their names, or "available" for all that are on this machine.
        cap: at most this many bytes of each domain; an eighth of them for validation, an eighth for the test split.

    Raises:
        InputError: a domain is unknown, twice, or not on this machine; `cap` is no integer or below 1,024.
    """
    if domains == "available":
        domains = tuple(name for name in DOMAINS if store.present(SETS[name]))
    check(domains, cap)
    parsed = {name: _domain(SETS[name], cap) for name in domains}
    return TextDomains(
        name="text-domains",
        domains=tuple(domains),
        splits={split: {name: tensors[split] for name, (tensors, _) in parsed.items()} for split in SPLITS},
        manifest={name: manifest for name, (_, manifest) in parsed.items()},
    )


def check(domains: object, cap: object) -> None:
    """An `InputError` for what `load` cannot use."""
    if not isinstance(domains, (tuple, list)) or not domains:
        raise InputError(f"domains is {domains!r} but must be a tuple of names or 'available'")
    for name in domains:
        if name not in DOMAINS:
            raise unknown("text domain", name, DOMAINS)
        store.require(SETS[name])
    if len(set(domains)) < len(domains):
        raise InputError(f"domains is {tuple(domains)} but must name each domain once")
    if not isinstance(cap, int) or cap < SMALLEST_CAP:
        raise InputError(f"cap is {cap!r} but must be a number of bytes, at least {SMALLEST_CAP}")


def streams(found: Documents, cap: int) -> tuple[dict[str, bytes], int]:
    """The byte stream of each split, at most `cap` bytes together, and the number of documents that are in them.

    A document is in one split with all of its pieces; the pieces of all documents are in the order of their digests.
    """
    room = {"validation": cap // 8, "test": cap // 8}
    room["train"] = cap - sum(room.values())
    order = []
    for item, text in found.items():
        number = digest(item)
        for index, piece in enumerate(pieces(text.rstrip(), max(cap // PIECES, SMALLEST_CAP))):
            order.append((digest(f"{item}#{index}") if index else number, split_of(number, TEXT_SHARES), item, piece))
    taken: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    used = set()
    for _, split, item, piece in sorted(order):
        if room[split]:
            taken[split].append((piece.rstrip() + b"\n")[: room[split]])
            room[split] -= len(taken[split][-1])
            used.add(item)
    return {split: b"".join(texts) for split, texts in taken.items()}, len(used)


def pieces(text: bytes, size: int) -> Iterator[bytes]:
    """A text in pieces of at most `size` bytes that end at a line's end, where there is one."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = text.rfind(b"\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _domain(row: DataSet, cap: int) -> Parsed:
    """Tensors of one domain (split -> uint8 (bytes,)) and its row of the manifest."""

    def build() -> Parsed:
        texts, count = streams(_documents(row), cap)
        for split, text in texts.items():
            if not text:
                raise InputError(f"text domain {row.name!r} has no {split} text on this machine")
        tensors = {split: torch.frombuffer(bytearray(text), dtype=torch.uint8) for split, text in texts.items()}
        manifest = {
            **_origin(row),
            "licence": row.licence,
            "sha256": sha256(b"".join(texts[split] for split in SPLITS)).hexdigest(),
            "bytes": sum(map(len, texts.values())),
            "documents": count,
            "splits": {split: len(texts[split]) for split in SPLITS},
        }
        return tensors, manifest

    return cached(f"{row.name}-{cap}", _raw(row), build)


def _documents(row: DataSet) -> Documents:
    return documents.FETCHED[row.name](store.files(row)) if row.source else documents.STANDARD[row.name]()


def _origin(row: DataSet) -> dict[str, str]:
    """Where the text comes from, as the manifest says it."""
    if row.source:
        return store.origin(row)
    name, version = {
        "python": (f"standard library of {platform.python_implementation()}", platform.python_version()),
        "docs": ("pydoc_data.topics", platform.python_version()),
        "names": ("unicodedata", unicodedata.unidata_version),
    }[row.name]
    return {"source": name, "version": version}


def _raw(row: DataSet) -> str:
    """Identifies the raw text of a domain without reading it."""
    if row.source:
        return row.source.sha256
    if row.name == "python":  # distributions change files within a version
        return repr(
            sorted((item, p.stat().st_size, p.stat().st_mtime_ns) for item, p in documents.standard_library().items())
        )
    return sys.version
