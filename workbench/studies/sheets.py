"""JSON files that know whether they are as they were written: `{"content": ..., "sha256": ...}`, one line a row.

Plain JSON: a number that is none (NaN, an infinity) is `{"number": "nan"}`.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from workbench.sealed import sealed_file


class Damaged(ValueError):
    """A file that is not as it was written, or not what its place says. The message names it and says why."""


class NotUsed(UserWarning):
    """A kept result was there and is not used; the message names it."""


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all; see `workbench.sealed`. An OSError leaves what was there."""
    with sealed_file(path) as unfinished:
        unfinished.write_text(_text({"content": content, "sha256": digest(content)}), encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """The content of a file.

    Raises:
        FileNotFoundError: there is none.
        Damaged: it is cut off, was changed since it was written, or may not be read.
    """
    try:
        sheet = json.loads(path.read_text(encoding="utf-8"), object_hook=_number)
        content, sealed = sheet["content"], sheet["sha256"]
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{path} cannot be read: it is cut off or no file of the workbench's") from None
    if not isinstance(content, dict) or sealed != digest(content):
        raise Damaged(f"{path} was changed after it was written")
    return content


def plain(value: Any) -> Any:
    """The value as a file gives it back: tuples are lists, keys are text."""
    return json.loads(json.dumps(_numbered(value), allow_nan=False), object_hook=_number)


def digest(content: Any) -> str:
    """sha256 of a value as JSON."""
    return hashlib.sha256(json.dumps(_numbered(content), allow_nan=False).encode()).hexdigest()


def _text(sheet: dict[str, Any]) -> str:
    """As JSON, each entry of the content on a line of its own, and each row, so that changes can be read."""
    entries = []
    for key, value in sheet["content"].items():
        dumps = [json.dumps(_numbered(part), allow_nan=False) for part in (value if key == "rows" else [value])]
        entries.append(f"{json.dumps(key)}: " + ("[\n" + ",\n".join(dumps) + "\n]" if key == "rows" else dumps[0]))
    return '{"content": {\n' + ",\n".join(entries) + f'\n}},\n"sha256": "{sheet["sha256"]}"}}\n'


def _numbered(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(value)}
    if isinstance(value, dict):
        return {str(key): _numbered(part) for key, part in value.items()}
    return [_numbered(part) for part in value] if isinstance(value, list | tuple) else value


def _number(value: dict[str, Any]) -> Any:
    return float(value["number"]) if value.keys() == {"number"} and isinstance(value["number"], str) else value
