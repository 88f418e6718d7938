"""What a data set is once it is loaded: byte streams of domains, arrays with labels, photographs, tables and so on."""

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


@dataclass(frozen=True, eq=False, repr=False)
class Photos:
    """Photographs, whole.

    Attributes:
        splits: split -> name -> pixels, uint8 (channels, height, width) with one channel or three.
        manifest: set -> source, version, licence, sha256 (of the pixels), splits (photographs each).
    """

    name: str
    splits: dict[str, dict[str, UInt8[Tensor, "channels height width"]]]
    manifest: dict[str, dict]

    def __repr__(self) -> str:
        return f"Photos({self.name!r}: {_sizes(self.manifest[self.name])} photographs)"


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """Rows of categorical fields with a yes or no.

    Attributes:
        fields: their names.
        sizes: ids of each field: 1 + its values in the training split. Id 0 is for every other value.
        splits: split -> (ids int64 (rows, fields), y float32 (rows,) of 0 and 1).
        manifest: set -> source, version, licence, sha256 (of the raw files), rows, splits (rows each), and the options.
    """

    name: str
    fields: tuple[str, ...]
    sizes: tuple[int, ...]
    splits: dict[str, tuple[Int64[Tensor, "rows fields"], Float[Tensor, " rows"]]]
    manifest: dict[str, dict]

    def __repr__(self) -> str:
        rows = _sizes(self.manifest[self.name])
        return f"Table({self.name!r}: {rows} rows of {len(self.fields)} fields, {sum(self.sizes):,} ids)"


@dataclass(frozen=True, eq=False, repr=False)
class Glyphs:
    """Drawn characters with their names.

    Attributes:
        faces: names of the type faces.
        splits: split -> images uint8 (rows, 28, 28), codepoint int64 (rows,), face int64 (rows,); by codepoint.
        manifest: set -> source, version, licence, sha256 (of the images), rows, splits (rows each).
    """

    name: str
    faces: tuple[str, ...]
    splits: dict[str, tuple[UInt8[Tensor, "rows height width"], Int64[Tensor, " rows"], Int64[Tensor, " rows"]]]
    manifest: dict[str, dict]

    def __repr__(self) -> str:
        return f"Glyphs({self.name!r}: {_sizes(self.manifest[self.name])} rows in {len(self.faces)} faces)"


@dataclass(frozen=True, eq=False, repr=False)
class Series:
    """Series of unequal lengths with labels.

    Attributes:
        splits: split -> a list of (points float32 (length, channels), label).
        classes: name of each label.
        manifest: set -> source, version, licence, sha256 (of the points and labels), rows, splits (rows each).
    """

    name: str
    splits: dict[str, list[tuple[Float[Tensor, "_ channels"], int]]]
    classes: tuple[str, ...]
    manifest: dict[str, dict]

    def __repr__(self) -> str:
        channels = self.splits["train"][0][0].shape[1]
        rows = _sizes(self.manifest[self.name])
        return f"Series({self.name!r}: {rows} rows of {channels} channels, {len(self.classes)} classes)"


@dataclass(frozen=True, eq=False, repr=False)
class Trajectories:
    """Trajectories of families of dynamical systems.

    Attributes:
        families: their names.
        states: family -> float32 (environments, trajectories, points, dim), every environment of one value of the
            family's parameter.
        parameters: family -> the value in each environment, float32 (environments,).
        times: float32 (points,) of each family.
        manifest: family -> source, version, licence, sha256 (of the states), splits (trajectories an environment).
    """

    name: str
    families: tuple[str, ...]
    states: dict[str, Float[Tensor, "environments trajectories points dim"]]
    parameters: dict[str, Float[Tensor, " environments"]]
    times: dict[str, Float[Tensor, " points"]]
    manifest: dict[str, dict]

    def __repr__(self) -> str:
        return f"Trajectories({', '.join(f'{f} {tuple(x.shape)}' for f, x in self.states.items())})"


def _sizes(row: dict) -> str:
    return " + ".join(f"{size:,} {split}" for split, size in row["splits"].items())
