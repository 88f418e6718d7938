"""Rows as a table on a terminal."""

import shutil
import sys
from collections.abc import Sequence


def show(rows: Sequence[Sequence[object]], names: Sequence[str]) -> None:
    """Print rows as a table as wide as its content; on a terminal the last column ends where the terminal does."""
    texts = [[plain(str(cell)) for cell in row] for row in [names, *rows]]
    widths = [max(len(row[i]) for row in texts) for i in range(len(names))]
    limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for row in texts:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()[:limit])


def plain(text: str) -> str:
    """What a terminal shows as it is: a line break or a command to the terminal is spelled out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
