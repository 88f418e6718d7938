"""AsCAN: convolutions early, attention late, plain cells of both, and nothing between (Kag et al. 2024).

A layout has a string for each stage, C a convolution and T a transformer cell: ("CC", "CC", "CT", "TT"). In a stage C
comes before T, and later stages have no fewer T. Every stage but the first halves the map, so what a layout costs is
where its T are: a map of N places costs a T of width d

    12 N d^2 + 2 N^2 d        and a C        40 N d^2

multiply-accumulates, and N falls by four from stage to stage. A T at the head pays for N^2, at the end for d^2.

There is no public code, and the depths and widths of the published models were not at hand: layouts here are the
user's, widths are found for a number of parameters (`match_params`), and stage 1 keeps the map of the stem. The
controls are layouts of as many parameters: symmetric ones (the same share of T everywhere), reversed ones, pure ones.

`ascan_unet` has the form for images that are made.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement, product

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.budget import count_params
from workbench.lib.core.cells import CELLS, TransformerCell
from workbench.lib.core.cells.attention import HEAD
from workbench.lib.core.routing import Context
from workbench.lib.search.ascan_unet import HybridUNet

__all__ = ["LAYOUTS", "HybridNet", "HybridUNet", "layouts", "macs", "match_params"]

METHOD = Method(
    slug="ascan",
    title="AsCAN: Asymmetric Convolution-Attention Networks for Efficient Recognition and Generation",
    family="search",
    year=2024,
    paper="NeurIPS 2024",
    claim="Convolutions early and attention late give a better trade of accuracy against latency than symmetric "
    "hybrids.",
    objects=("HybridNet", "LAYOUTS", "layouts", "match_params", "macs", "HybridUNet"),
    kind="images",
)

LETTERS = {"C": "fused_mb", "T": "transformer"}
LAYOUTS: dict[str, tuple[str, ...]] = {
    "asymmetric": ("CC", "CC", "CT", "TT"),
    "reversed": ("TT", "CT", "CC", "CC"),
    "symmetric": ("CT", "CT", "CT", "CT"),
    "blocks": ("CC", "CC", "TT", "TT"),
    "convolutions": ("CC", "CC", "CC", "CC"),
    "attention": ("TT", "TT", "TT", "TT"),
}
"""Eight cells each: the first is of the paper's kind, and so is "blocks", which has no mixed stage (CoAtNet's)."""
KINDS = ("asymmetric", "symmetric", "reversed", "all")
RATIO = (1.0, 1.5, 2.0, 2.5)
WIDEST = 160


def example() -> nn.Module:
    """Six cells on images of 16 x 16."""
    return HybridNet(("C", "CC", "CT", "T"), (8, 8, 16, 16), 10, channels=3, size=16, stem_stride=1)


class HybridNet(nn.Module):
    """Stem, stages, the mean over places, a norm and a linear head.

    Args:
        stages: a string of C and T for each stage, see the module's docstring.
        dims: widths of the stages; a multiple of `cells.attention.HEAD` where a stage has a T.
        n_out: values of the head.
        channels: of an image.
        size: height and width of an image, which the strides divide.
        stem_stride: 1 or 2.
        cells: letter -> name in `cells.CELLS`.
    """

    def __init__(
        self,
        stages: Sequence[str],
        dims: Sequence[int],
        n_out: int,
        channels: int = 3,
        size: int = 32,
        stem_stride: int = 2,
        cells: dict[str, str] | None = None,
    ):
        super().__init__()
        self.cells = LETTERS if cells is None else cells
        self.sides = sides(stages, dims, size, stem_stride)
        self.size, self.strings = size, tuple(stages)
        first = dims[0]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, first, 3, stem_stride, 1, bias=False), nn.BatchNorm2d(first), nn.GELU(),
            nn.Conv2d(first, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.GELU(),
        )  # fmt: skip
        self.stages = nn.ModuleList(
            nn.Sequential(*(self._cell(*cell) for cell in plan)) for plan in planned(self.strings, dims, self.sides)
        )
        self.head = nn.Sequential(nn.LayerNorm(dims[-1]), nn.Linear(dims[-1], n_out))

    def _cell(self, letter: str, d_in: int, d_out: int, stride: int, side: int) -> nn.Module:
        if letter == "T":
            return TransformerCell(d_in, d_out, stride, side=side)
        return CELLS[self.cells[letter]].build(d_in, d_out, stride)

    def features(self, x: Float[Tensor, "batch channels h w"]) -> list[Tensor]:
        """The map after each stage."""
        if x.shape[2:] != (self.size, self.size):
            raise InputError(f"images are {tuple(x.shape[2:])} but must be {self.size} x {self.size}")
        found, x = [], self.stem(x)
        for stage in self.stages:
            found.append(x := stage(x))
        return found

    def forward(
        self, x: Float[Tensor, "batch channels h w"], context: Context | None = None
    ) -> Float[Tensor, "batch out"]:
        return self.head(self.features(x)[-1].mean((2, 3)))


def sides(stages: Sequence[str], dims: Sequence[int], size: int, stem_stride: int) -> list[int]:
    """Height and width of the map in each stage.

    Raises:
        InputError: stages or dims are no layout, or the strides do not divide the size.
    """
    for stage in stages:
        if not stage or set(stage) - {"C", "T"}:
            raise InputError(f"stages has {stage!r} but a stage must be a string of C and T, at least one")
    if not stages or len(dims) != len(stages):
        raise InputError(f"dims is {tuple(dims)} but must have one width for each of the {len(stages)} stages")
    if stem_stride not in (1, 2):
        raise InputError(f"stem_stride is {stem_stride} but must be 1 or 2")
    least = stem_stride * 2 ** (len(stages) - 1)
    if size < least or size % least:
        raise InputError(
            f"size is {size} but must be a multiple of {least}, by which the stem and the stages divide it"
        )
    return [size // stem_stride // 2**level for level in range(len(stages))]


def planned(stages: Sequence[str], dims: Sequence[int], sizes: Sequence[int]) -> list[list[tuple]]:
    """For each stage its cells in order: (letter, channels in, channels out, stride, side of what comes out)."""
    found, width = [], dims[0]
    for level, (stage, dim, side) in enumerate(zip(stages, dims, sizes, strict=True)):
        plan = []
        for place, letter in enumerate(stage):
            plan.append((letter, width, dim, 2 if level and not place else 1, side))
            width = dim
        found.append(plan)
    return found


def macs(model: HybridNet) -> int:
    """Multiply-accumulates of one image: stem, cells by their formulas, head."""
    side, total = model.sides[0], 0
    for layer in (layer for layer in model.stem if isinstance(layer, nn.Conv2d)):
        total += side**2 * layer.weight.numel()
    dims = [stage_width(stage) for stage in model.stages]
    for plan in planned(model.strings, dims, model.sides):
        for letter, d_in, d_out, stride, here in plan:
            found = CELLS[model.cells[letter]].macs(d_in, d_out, here, here)
            if letter == "T" and stride == 2 and d_in == d_out:  # what leads to it is there for the stride
                found += here**2 * 9 * d_in * d_out
            total += found
    return total + model.head[-1].weight.numel()


def stage_width(stage: nn.Sequential) -> int:
    """The channels that leave a stage."""
    last = stage[-1]
    return last.out.out_features if isinstance(last, TransformerCell) else last.body[-1].num_features


def layouts(blocks: Sequence[int], kind: str = "asymmetric") -> Iterator[tuple[str, ...]]:
    """All layouts of so many cells a stage in which C comes before T.

    Args:
        blocks: cells of each stage.
        kind: "asymmetric": the share of T never falls from stage to stage, and rises somewhere; "reversed": it never
            rises, and falls somewhere; "symmetric": it is the same in all; "all": whatever it is.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    if not blocks or min(blocks) < 1:
        raise InputError(f"blocks is {tuple(blocks)} but must have at least one cell for each stage")
    for late in product(*(range(count + 1) for count in blocks)):
        shares = [t / count for t, count in zip(late, blocks, strict=True)]
        level = len(set(shares)) == 1
        fits = {
            "all": True,
            "symmetric": level,
            "asymmetric": not level and shares == sorted(shares),
            "reversed": not level and shares == sorted(shares, reverse=True),
        }
        if fits[kind]:
            yield tuple("C" * (count - t) + "T" * t for t, count in zip(late, blocks, strict=True))


def match_params(
    stages: Sequence[str],
    budget: int,
    n_out: int,
    channels: int = 3,
    size: int = 32,
    stem_stride: int = 2,
    ratio: Sequence[float] = RATIO,
    within: float = 0.05,
) -> tuple[int, ...]:
    """The widths at which a layout has `budget` parameters, as near to the ratio as there are.

    Args:
        budget: parameters of the network.
        ratio: of the widths of the stages to that of the first.
        within: share of the budget by which it may be missed.

    Raises:
        InputError: no widths up to `WIDEST`, in steps of a head and not falling, meet it.
    """
    if len(ratio) < len(stages):
        raise InputError(f"ratio is {tuple(ratio)} but must have one number for each of the {len(stages)} stages")
    steps = range(HEAD, WIDEST + 1, HEAD)
    wanted = [math.log(part) for part in ratio[: len(stages)]]

    def strays(dims: tuple[int, ...]) -> float:
        logs = [math.log(dim) for dim in dims]
        centre = sum(a - b for a, b in zip(logs, wanted, strict=True)) / len(dims)
        return sum((a - b - centre) ** 2 for a, b in zip(logs, wanted, strict=True))

    for dims in sorted(combinations_with_replacement(steps, len(stages)), key=strays):
        if strays(dims) > 1.0:
            break
        if abs(rough(stages, dims, n_out, channels) / budget - 1) > within + 0.1:
            continue
        with torch.device("meta"):
            found = count_params(HybridNet(stages, dims, n_out, channels, size, stem_stride))
        if abs(found / budget - 1) <= within:
            return dims
    raise InputError(
        f"budget is {budget} but no widths up to {WIDEST} bring {'-'.join(stages)} within {within:.0%} of it"
    )


def rough(stages: Sequence[str], dims: Sequence[int], n_out: int, channels: int) -> int:
    """Weights of the products, without norms, biases and position codes."""
    total = 9 * dims[0] * (channels + dims[0]) + dims[-1] * n_out
    for plan in planned(stages, dims, [1] * len(stages)):
        for letter, d_in, d_out, stride, _ in plan:
            lead = 9 * d_in * d_out if letter == "T" and (stride == 2 or d_in != d_out) else 0
            total += 36 * d_in**2 + 4 * d_in * d_out if letter == "C" else 12 * d_out**2 + lead
    return total
