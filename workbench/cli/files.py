"""Files that commands write: new ones, refused before the work begins and whole when it is done."""

import os
from pathlib import Path

from workbench.errors import InputError
from workbench.sealed import sealed_file


def check_new(option: str, path: Path, ending: str) -> None:
    """Refuse what is no new file in a folder that can be written, with this ending."""
    if path.suffix != ending or os.path.lexists(path) or not path.absolute().parent.is_dir():
        raise InputError(f"--{option} is {str(path)!r} but must be a new file in a folder, ending in {ending}")
    try:  # now, and not when the work is done
        with sealed_file(path) as unfinished:
            unfinished.touch()
            raise _Writable
    except _Writable:
        pass
    except OSError as error:
        raise InputError(f"--{option} is {str(path)!r} but cannot be written: {error.strerror}") from None


class _Writable(Exception):
    pass


def write_new(path: Path, text: str) -> None:
    """Write a file that was not there when it was checked."""
    try:
        if os.path.lexists(path):  # another command may have come first
            raise InputError(f"{path} is there by now, and is left as it is; the same command with a new name is quick")
        with sealed_file(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
