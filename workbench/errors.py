"""The one error for wrong input from a person, the sentence for an unknown name, and a worker that is lost."""

from collections.abc import Iterable


class InputError(ValueError):
    """Input that cannot be used as given. The message names the argument, its value and what is allowed.

    The shell prints it as one line and exits with status 2; in Python it is a plain ``ValueError``.
    """


class WorkerLostError(RuntimeError):
    """A worker died of a call, each time that the call was made. The shell prints it as one line, with status 1."""


def unknown(what: str, value: object, allowed: Iterable[str], most: int = 12) -> InputError:
    """An ``InputError`` for a name that is not in ``allowed``, with the nearest names that are, and ``most`` of all.

    >>> str(unknown("preset", "smal", ["smoke", "small", "full"]))
    "preset 'smal' is unknown; did you mean 'small'? Allowed: smoke, small, full"
    """
    from difflib import get_close_matches  # only wanted once something is wrong

    allowed = [str(name) for name in allowed]
    near = get_close_matches(str(value), allowed, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else "."
    shown = ", ".join(allowed[:most]) + (f" and {len(allowed) - most} more" if len(allowed) > most else "")
    return InputError(f"{what} {value!r} is unknown{hint} Allowed: {shown or 'none yet'}")
