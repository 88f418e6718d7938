"""HyTra, the space of BossNAS in which convolutions, attention and down-sampling are searched together.

Scales are numbered from the smallest maps: 0 and 1 hold an attention and a convolution each, 2 and 3 (large maps) a
convolution alone. Operators are numbered likewise: 0 attention and 1 convolution at scale 0, 2 and 3 at scale 1, 4 at
scale 2, 5 at scale 3. From layer to layer maps stay as they are or halve once, so a path is legal where its scales
never rise and fall by at most one.

The cells are those of the registry, `residual` and `transformer`, one that keeps the size and one of stride 2 for each
operator, as wide as its scale says; the paper's have a depthwise position code in both.
"""

import itertools
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import InputError, unknown
from workbench.lib.core.cells import CELLS
from workbench.lib.core.cells.inverted_residual import convolution
from workbench.lib.search.bossnas import BlockSupernet, Path
from workbench.lib.search.bossnas_search import BlockRatings, Blockwise, BlockwiseConfig
from workbench.lib.search.bossnas_views import TwoViews

SCALE_OF = (0, 0, 1, 1, 2, 3)
"""Of each operator."""
CELL_OF = ("transformer", "residual", "transformer", "residual", "residual", "residual")
SCALES = 4


def legal_paths(n_scales: int, layers: int = 4, kind: str = "all") -> list[Path]:
    """The legal paths of a block of so many layers, in order.

    Args:
        n_scales: scales 0 to n_scales - 1 are allowed, and maps come in at the largest one, or one above.
        kind: "all", or "restricted": the first layer is at scale n_scales - 1 or one below it, so that it can be
            reached from maps of that scale.
    """
    if not 1 <= n_scales <= SCALES:
        raise InputError(f"n_scales is {n_scales} but must be from 1 to {SCALES}")
    if layers < 1:
        raise InputError(f"layers is {layers} but must be at least 1")
    if kind not in ("all", "restricted"):
        raise unknown("kind", kind, ("all", "restricted"))
    ops = [op for op, scale in enumerate(SCALE_OF) if scale < n_scales]
    found = [
        path
        for path in itertools.product(ops, repeat=layers)
        if all(SCALE_OF[a] - SCALE_OF[b] in (0, 1) for a, b in itertools.pairwise(path))
    ]
    return found if kind == "all" else [path for path in found if SCALE_OF[path[0]] >= n_scales - 2]


def scales_left(path: Path) -> int:
    """How many scales the block behind a path may use."""
    return SCALE_OF[path[-1]] + 1


class FabricLayer(nn.Module):
    """All operators of the first scales; each takes maps of its own scale or of the one above it.

    Args:
        widths: channels at each scale, from scale 0 on; maps of the scale above are told by their width, so widths
            differ.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        if not 1 <= len(widths) <= SCALES or len({*widths}) < len(widths):
            raise InputError(f"widths is {tuple(widths)} but must be 1 to {SCALES} different numbers, one a scale")
        self.widths, self.dims = tuple(widths), 2
        self.n_ops = sum(scale < len(widths) for scale in SCALE_OF)
        self.same, self.down = nn.ModuleDict(), nn.ModuleDict()
        for op in range(self.n_ops):
            scale, cell = SCALE_OF[op], CELLS[CELL_OF[op]]
            self.same[str(op)] = cell.build(widths[scale], widths[scale], 1)
            if scale + 1 < len(widths):
                self.down[str(op)] = cell.build(widths[scale + 1], widths[scale], 2)

    def d_out(self, op: int) -> int:
        return self.widths[SCALE_OF[op]]

    def forward(self, x: Float[Tensor, "batch dim h w"], op: int) -> Float[Tensor, "batch out h2 w2"]:
        kept = x.shape[1] == self.d_out(op)
        return (self.same if kept else self.down)[str(op)](x)


def fabric_block(widths: Sequence[int], layers: int = 4, channels: int | None = None) -> BlockSupernet:
    """A block of the fabric whose maps come in at the largest of its scales: its legal, restricted paths.

    Args:
        channels: of images that come in as they are; a 3 x 3 convolution brings them to the largest scale. None where
            another block comes before.
    """
    stem = None if channels is None else nn.Sequential(*convolution(channels, widths[-1], 3, dims=2), nn.ReLU())
    made = [FabricLayer(widths) for _ in range(layers)]
    return BlockSupernet(made, legal_paths(len(widths), layers, "restricted"), stem)


def search_fabric(
    task: TwoViews, config: BlockwiseConfig, widths: Sequence[int], layers: Sequence[int]
) -> tuple[BlockRatings, list[BlockSupernet]]:
    """HyTra, searched block after block: each may use the scales that the best path before it has left.

    Args:
        task: of images; their sides are those of the largest scale.
        widths: channels at each scale, from scale 0 on.
        layers: of each block.
    """
    search, blocks, left = Blockwise(task, config), [], len(widths)
    channels = task.data.splits["train"][0].shape[1]
    for place, depth in enumerate(layers):
        blocks.append(fabric_block(widths[:left], depth, channels if place == 0 else None))
        left = scales_left(search.add(blocks[-1]))
    return search.ratings, blocks
