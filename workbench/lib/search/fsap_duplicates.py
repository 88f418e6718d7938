"""Whether a program is there already: the hash without whitespace, and what it is held against.

    ws_hash(code) = md5 of the code with every whitespace character removed

It is the same for all layouts of one text. It sees a comment and a renamed variable, which a comparison of syntax trees
(`tree_key`) sees in part: not the comment. And it does not see what whitespace means: two programs that differ in the
level of an indentation, or in the spaces of a string, have one hash. `Dedup(strict=True)` confirms a hit by the tokens
(`token_key`), which know of both. What a program is called inside matters to neither network nor `name_key`.
"""

import ast
import hashlib
import io
import json
import tokenize
from collections.abc import Callable, Iterable
from pathlib import Path

from workbench.errors import InputError
from workbench.sealed import sealed_file

_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)


def ws_hash(code: str) -> str:
    """md5 of the code without whitespace, in hexadecimal digits; no matter of security."""
    return hashlib.md5("".join(code.split()).encode(), usedforsecurity=False).hexdigest()


def token_key(code: str) -> str:
    """A digest of the tokens with indents and dedents, comments among them: equal for all layouts of one program.

    Raises:
        InputError: it has no tokens, for it is no Python.
    """
    try:
        tokens = [*tokenize.generate_tokens(io.StringIO(code).readline)]
    except (tokenize.TokenError, SyntaxError) as error:
        raise InputError(f"code cannot be split into tokens: {error}") from None
    said = [
        (token.type, "" if token.type in (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE) else token.string)
        for token in tokens
        if token.type == tokenize.COMMENT or token.type not in _LAYOUT
    ]
    return hashlib.md5(repr(said).encode(), usedforsecurity=False).hexdigest()


def tree_key(code: str) -> str:
    """A digest of the syntax tree: equal for all layouts and comments of one program.

    Raises:
        InputError: it does not parse.
    """
    try:
        dumped = ast.dump(ast.parse(code))
    except (SyntaxError, ValueError) as error:
        raise InputError(f"code does not parse: {error}") from None
    return hashlib.md5(dumped.encode(), usedforsecurity=False).hexdigest()


def name_key(code: str) -> str:
    """A digest of the syntax tree in which names are numbers, by first appearance: equal for renamed copies too.

    Raises:
        InputError: it does not parse.
    """
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError) as error:
        raise InputError(f"code does not parse: {error}") from None
    numbers: dict[str, str] = {}
    for node in ast.walk(tree):
        for field in ("id", "arg", "name", "attr"):
            if isinstance(name := getattr(node, field, None), str):
                setattr(node, field, numbers.setdefault(name, str(len(numbers))))
    return hashlib.md5(ast.dump(tree).encode(), usedforsecurity=False).hexdigest()


def text_key(code: str) -> str:
    """md5 of the text as it is."""
    return hashlib.md5(code.encode(), usedforsecurity=False).hexdigest()


KEYS: dict[str, Callable[[str], str]] = {
    "text": text_key, "whitespace": ws_hash, "tokens": token_key, "tree": tree_key, "names": name_key,
}  # fmt: skip
"""What two programs can be compared by; "whitespace" is the method's."""


class Dedup:
    """The programs that are there, by their hash.

    Args:
        codes: that are there at first, such as the examples.
        path: a file of JSON that the hashes are kept in, read if it is there; None for no file.
        strict: confirm a hit by the tokens; a text that has none is its own hash.

    Attributes:
        false_merges: how many hits the tokens did not confirm; always 0 without `strict`.
    """

    def __init__(self, codes: Iterable[str] = (), path: Path | None = None, strict: bool = False):
        self.path, self.strict, self.false_merges = path, strict, 0
        self._seen: dict[str, set[str]] = {}
        if path is not None and path.exists():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                was, self._seen = kept["strict"], {hashed: set(keys) for hashed, keys in kept["seen"].items()}
            except (ValueError, AttributeError, TypeError, KeyError):
                raise InputError(f"path is {path} but is no file of hashes") from None
            if was != strict:
                raise InputError(f"strict is {strict} but the hashes of {path} were kept with strict={was}")
        for code in codes:
            self._add(code)

    def __len__(self) -> int:
        return sum(map(len, self._seen.values())) if self.strict else len(self._seen)

    def add(self, code: str) -> bool:
        """Whether the program is new; it is there from now on."""
        new = self._add(code)
        if new and self.path is not None:
            with sealed_file(self.path) as unfinished:
                seen = {hashed: sorted(keys) for hashed, keys in self._seen.items()}
                unfinished.write_text(json.dumps({"strict": self.strict, "seen": seen}), encoding="utf-8")
        return new

    def _add(self, code: str) -> bool:
        hashed = ws_hash(code)
        keys = self._seen.get(hashed)
        if not self.strict:
            self._seen.setdefault(hashed, set())
            return keys is None
        try:
            key = token_key(code)
        except InputError:
            key = ""
        if keys is None:
            self._seen[hashed] = {key}
            return True
        if key in keys:
            return False
        self.false_merges += 1
        keys.add(key)
        return True
