"""What a data set is once it is loaded: byte streams of several domains, or arrays with labels."""

from dataclasses import dataclass

from jaxtyping import Float, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class TextDomains:
    """Byte streams of several text domains.

    Attributes:
        name: of the data set.
        domains: their names, in a fixed order.
        splits: split ("train", "validation", "test") -> domain -> bytes, uint8 (bytes,).
        manifest: domain -> source, version, licence, sha256 (of the bytes used), bytes, documents, splits (bytes each).
    """

    name: str
    domains: tuple[str, ...]
    splits: dict[str, dict[str, UInt8[Tensor, " bytes"]]]
    manifest: dict[str, dict]

    def __repr__(self) -> str:
        sizes = "; ".join(f"{domain} {_sizes(self.manifest[domain])}" for domain in self.domains)
        return f"TextDomains({self.name!r}: {sizes} bytes)"


@dataclass(frozen=True, eq=False, repr=False)
class Arrays:
    """Arrays with labels.

    Attributes:
        name: of the data set.
        splits: split ("train", "validation", "test") -> (x float32 (rows, ...), y int64 (rows,)).
        classes: name of each label.
        manifest: set -> source, version, licence, sha256 (of the rows before a task changes them), rows, splits (rows
            each), and the options they were loaded with.
    """

    name: str
    splits: dict[str, tuple[Float[Tensor, "rows ..."], Int64[Tensor, " rows"]]]
    classes: tuple[str, ...]
    manifest: dict[str, dict]

    def __repr__(self) -> str:
        sizes = "; ".join(_sizes(row) for row in self.manifest.values())
        shape = tuple(self.splits["train"][0].shape[1:])
        return f"Arrays({self.name!r}: {sizes} rows of {shape}, {len(self.classes)} classes)"


def _sizes(row: dict) -> str:
    return " + ".join(f"{size:,} {split}" for split, size in row["splits"].items())
