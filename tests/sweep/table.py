"""The outcomes of a sweep as a file: a row an architecture, tab between cells, so that a change is a line of a diff."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import transformers

Row = dict[str, str]


def read(file: Path) -> tuple[str, dict[str, Row]]:
    """The version of transformers that the table is of, and its rows: outcomes by column, by architecture."""
    version, head, *lines = file.read_text().splitlines()
    columns = head.split("\t")[1:]
    rows = (line.split("\t") for line in lines)
    return version, {
        name: {column: cell for column, cell in zip(columns, cells, strict=False) if cell} for name, *cells in rows
    }


def write(file: Path, rows: Mapping[str, Row], columns: Sequence[str]) -> None:
    """Write it; a row of one cell says in it why it has no more."""
    lines = ["\t".join((name, *(row.get(column, "") for column in columns))) for name, row in sorted(rows.items())]
    lines = [line.rstrip("\t") for line in lines]
    file.write_text("\n".join([version(), "\t".join(("architecture", *columns)), *lines]) + "\n")


def version() -> str:
    return f"transformers {transformers.__version__}"


def failures(rows: Mapping[str, Row]) -> list[str]:
    """A line for every outcome that may not be."""
    return [
        f"{name} {column}: {cell}"
        for name, row in rows.items()
        for column, cell in row.items()
        if cell.startswith(("wrong: ", "error: ", "refused: unlisted: "))
    ]


def differences(found: Mapping[str, Row], kept: Mapping[str, Row]) -> list[str]:
    """A line for every outcome found that is another than the kept one."""
    return [
        f"{name} {column}: {cell!r}, and in the table {kept.get(name, {}).get(column)!r}"
        for name, row in found.items()
        for column, cell in row.items()
        if kept.get(name, {}).get(column) != cell
    ]


def counts(rows: Iterable[Row]) -> dict[str, int]:
    """How often there is each outcome, and how many architectures were not built; the most frequent first."""
    found: dict[str, int] = {}
    for row in rows:
        cells = ["not built"] if len(row) == 1 else [cell for key, cell in row.items() if key != "class"]
        for cell in cells:
            found[cell] = found.get(cell, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))
