"""BossNAS: the blocks of a supernet trained one after another, without labels, against the mean of sampled paths.

Li et al. 2021, "BossNAS: Exploring Hybrid CNN-transformers with Block-wisely Self-supervised Neural Architecture
Search" (ICCV 2021). A supernet is cut into blocks. Of each block P paths are drawn at a step, and there are two views
v_1, v_2 of every input. Net and neck exist twice: trained, and as a moving average of that (the target).

    t_v  = mean_p normalise(target(v; a_p))                         one target for all paths: the ensemble
    l_p  = l(predict(online(v_1; a_p)), t_2) + l(predict(online(v_2; a_p)), t_1),    l(q, t) = -2 mean cos(q, t)
    xi  <- m xi + (1 - m) theta                                     m from m_0 to 1 by a cosine

After that every path of the block is rated (`bossnas_search`), the best one is frozen and feeds the next block. A whole
architecture's rating is the sum of those of its blocks, so blocks are searched apart: sums of ratings, not products.

The space here is one of widths, as the paper's on NATS-Bench: every layer is a convolution of which a path uses the
first so many channels. `bossnas_hytra` has the fabric of convolutions and attention.

Not the paper's: AdamW in the place of LARS; one pair of views for all paths of a step (HyTra draws a pair for each);
the frozen prefix is detached (the released code lets the online one adapt on); the target's adapters follow as
everything else does (there they stay as they began).

Tensor letters: B batch, P paths, L layers of a block.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.lib.core.cells.inverted_residual import CONVOLUTIONS, NORMS, check_dims, pooled, smaller
from workbench.lib.core.observe import Announcing
from workbench.lib.core.routing import Context, Routing

METHOD = Method(
    slug="bossnas",
    title="BossNAS: Exploring Hybrid CNN-transformers with Block-wisely Self-supervised Neural Architecture Search",
    family="search",
    year=2021,
    paper="ICCV 2021",
    claim="Blocks trained without labels against the ensemble of sampled paths rank architectures close to their true "
    "accuracy.",
    objects=("EnsembleBootstrap", "BlockSupernet", "WidthSpace", "WidthNet", "fair_paths"),
    kind="images",
)
Path = tuple[int, ...]
DRAWN = 4
"""Paths of a step of a block that has a list of legal ones."""


def example() -> nn.Module:
    """One architecture of a space of widths, for images of 16 x 16."""
    return WidthNet((0, 2, 1), WidthSpace(3, 16, 10, (4, 8, 12), (2, 1, 2), (2, 1), kernel=3, dims=2))


@dataclass(frozen=True)
class WidthSpace:
    """Networks of L convolutions, each as wide as one of `widths`: an architecture is L numbers of widths.

    Attributes:
        channels, size: of an input (channels, size) or (channels, size, size).
        widths: that a layer may have, ascending.
        strides: of the L layers.
        blocks: layers of each block, L in all.
        dims: 1 for signals, 2 for images.
    """

    channels: int
    size: int
    n_classes: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    blocks: tuple[int, ...]
    kernel: int = 5
    dims: int = 1

    def __post_init__(self):
        check_dims(self.dims)
        if not self.widths or list(self.widths) != sorted({*self.widths}) or self.widths[0] < 1:
            raise InputError(f"widths is {self.widths} but must be ascending numbers, at least 1")
        if min(self.blocks, default=0) < 1 or sum(self.blocks) != len(self.strides):
            raise InputError(f"blocks is {self.blocks} but must be layers, {len(self.strides)} in all, as strides has")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError(f"kernel is {self.kernel} but must be odd and at least 1")
        if self.size < math.prod(self.strides):
            raise InputError(f"size is {self.size} but must be at least {math.prod(self.strides)}, the whole stride")

    @property
    def n_layers(self) -> int:
        return len(self.strides)

    def every(self) -> list[Path]:
        """All architectures, in order."""
        return list(itertools.product(range(len(self.widths)), repeat=self.n_layers))

    def validate(self, arch: Path) -> None:
        """Raise `InputError` unless it is an architecture of the space."""
        if len(arch) != self.n_layers or any(not 0 <= op < len(self.widths) for op in arch):
            raise InputError(f"arch is {arch} but must be {self.n_layers} numbers from 0 to {len(self.widths) - 1}")

    def split(self, arch: Path) -> list[Path]:
        """Its path through each block."""
        self.validate(arch)
        ends = list(itertools.accumulate(self.blocks))
        return [tuple(arch[end - layers : end]) for end, layers in zip(ends, self.blocks, strict=True)]

    def shapes(self, arch: Path) -> list[tuple[int, int, int]]:
        """Width before and behind each layer, and the side behind it."""
        self.validate(arch)
        widths, side, found = [self.channels, *(self.widths[op] for op in arch)], self.size, []
        for before, behind, stride in zip(widths, widths[1:], self.strides, strict=False):
            side = smaller(side, stride)
            found.append((before, behind, side))
        return found

    def macs(self, arch: Path) -> int:
        """Multiplications of the convolutions and the classifier for one input."""
        taps, shapes = self.kernel**self.dims, self.shapes(arch)
        return sum(a * b * taps * side**self.dims for a, b, side in shapes) + shapes[-1][1] * self.n_classes

    def params(self, arch: Path) -> int:
        """Of the network when it is trained alone, norms and classifier included."""
        taps, shapes = self.kernel**self.dims, self.shapes(arch)
        return sum(a * b * taps + 2 * b for a, b, _ in shapes) + (shapes[-1][1] + 1) * self.n_classes


class WidthNet(nn.Module):
    """One architecture with weights of its own: convolutions, norms and ReLUs, the mean over all places, a classifier.

    (B, ...) -> (B, classes); signals and images of one channel may come without its axis.
    """

    def __init__(self, arch: Path, space: WidthSpace):
        super().__init__()
        self.dims, layers = space.dims, []
        for (before, behind, _), stride in zip(space.shapes(arch), space.strides, strict=True):
            conv = CONVOLUTIONS[space.dims](before, behind, space.kernel, stride, space.kernel // 2, bias=False)
            layers += [conv, NORMS[space.dims](behind), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(space.widths[arch[-1]], space.n_classes)

    def forward(self, x: Float[Tensor, "batch ..."], context: Context | None = None) -> Float[Tensor, "batch classes"]:
        x = x.unsqueeze(1) if x.ndim == self.dims + 1 else x
        return self.classifier(pooled(self.layers(x)))


class WidthChoice(nn.Module):
    """A convolution of which an operator uses the first so many channels, each operator with a norm of its own.

    What comes in may have any width up to `d_in`: the weights of its channels are used.
    """

    def __init__(self, d_in: int, widths: Sequence[int], kernel: int, stride: int = 1, dims: int = 1):
        super().__init__()
        self.widths, self.stride, self.dims = tuple(widths), stride, dims
        made = CONVOLUTIONS[dims](d_in, max(widths), kernel, padding=kernel // 2, bias=False)
        self.weight, self.padding = made.weight, kernel // 2
        self.norms = nn.ModuleList(NORMS[dims](width) for width in widths)

    @property
    def n_ops(self) -> int:
        return len(self.widths)

    def d_out(self, op: int) -> int:
        return self.widths[op]

    def forward(self, x: Float[Tensor, "batch dim *size"], op: int) -> Float[Tensor, "batch out *smaller"]:
        weight = self.weight[: self.widths[op], : x.shape[1]]
        convolve = F.conv1d if self.dims == 1 else F.conv2d
        return self.norms[op](convolve(x, weight, None, self.stride, self.padding)).relu()


class BlockSupernet(nn.Module):
    """All operators of the layers of one block: `forward(x, path)` takes one in each layer.

    Args:
        layers: modules with `n_ops`, `d_out(op)`, the channels behind an operator, `dims` and `forward(x, op)`.
        paths: the legal ones; by default every choice in every layer.
        stem: what all paths go through first.
    """

    def __init__(self, layers: Sequence[nn.Module], paths: Sequence[Path] | None = None, stem: nn.Module | None = None):
        super().__init__()
        self.stem, self.layers, self.dims = stem or nn.Identity(), nn.ModuleList(layers), layers[0].dims
        every = list(itertools.product(*(range(layer.n_ops) for layer in layers)))
        self.free = paths is None
        self.paths: list[Path] = every if paths is None else list(paths)
        if unknown := set(self.paths) - set(every):
            raise InputError(
                f"paths holds {min(unknown)} but operators are {[layer.n_ops for layer in layers]} a layer"
            )

    def forward(self, x: Float[Tensor, "batch dim *size"], path: Path) -> Float[Tensor, "batch out *smaller"]:
        if path not in self.paths:
            raise InputError(f"path is {path} but must be one of the {len(self.paths)} legal ones of this block")
        x = self.stem(x)
        for layer, op in zip(self.layers, path, strict=True):
            x = layer(x, op)
        return x

    @property
    def n_paths(self) -> int:
        """Paths of a step: as many as a layer has operators where every choice is legal, else 4 (or all)."""
        return self.layers[0].n_ops if self.free else min(DRAWN, len(self.paths))

    def d_outs(self) -> list[int]:
        """The channels that may come out."""
        last = self.layers[-1]
        return sorted({last.d_out(path[-1]) for path in self.paths})

    def draw(self, n_paths: int, generator: torch.Generator | None = None) -> list[Path]:
        """Paths for a step: fair ones where every choice is legal, else `n_paths` different ones of the legal list."""
        sizes = {layer.n_ops for layer in self.layers}
        if self.free and sizes == {n_paths}:
            return [tuple(row) for row in fair_paths(n_paths, len(self.layers), generator).tolist()]
        order = torch.randperm(len(self.paths), generator=generator)
        return [self.paths[index] for index in order[:n_paths].tolist()]


def width_blocks(space: WidthSpace) -> list[BlockSupernet]:
    """The blocks of a space of widths, with fresh weights."""
    d_in, strides, blocks = space.channels, iter(space.strides), []
    for layers in space.blocks:
        made = []
        for _ in range(layers):
            made.append(WidthChoice(d_in, space.widths, space.kernel, next(strides), space.dims))
            d_in = max(space.widths)
        blocks.append(BlockSupernet(made))
    return blocks


def fair_paths(n_ops: int, layers: int, generator: torch.Generator | None = None) -> Int64[Tensor, "ops layers"]:
    """As many paths as there are operators, which use each operator of each layer once: a permutation a layer."""
    if n_ops < 1 or layers < 1:
        raise InputError(f"n_ops is {n_ops} and layers {layers} but both must be at least 1")
    return torch.stack([torch.randperm(n_ops, generator=generator) for _ in range(layers)], 1)


class PathTower(nn.Module):
    """A frozen prefix, the block that is trained, and its neck: inputs (B, C, ...) -> projections (B, out).

    The neck leads from each width that the block may have to one (1 x 1 and a norm), takes the mean over all places,
    and projects by linear, norm, ReLU, linear.

    Args:
        prefix: earlier blocks, each with its path.
        neck: widths of the adapter, inside, and of the projection.
    """

    def __init__(self, prefix: Sequence[tuple[BlockSupernet, Path]], block: BlockSupernet, neck: tuple[int, int, int]):
        super().__init__()
        (adapted, hidden, out), dims = neck, block.dims
        self.prefix, self.prefix_paths = nn.ModuleList(block for block, _ in prefix), [path for _, path in prefix]
        self.block, self.dims = block, dims
        self.adapters = nn.ModuleDict(
            {
                str(d): nn.Sequential(CONVOLUTIONS[dims](d, adapted, 1, bias=False), NORMS[dims](adapted))
                for d in block.d_outs()
            }
        )
        self.project = mlp(adapted, hidden, out)
        self.prefix.requires_grad_(False)

    def forward(self, x: Float[Tensor, "batch ..."], path: Path) -> Float[Tensor, "batch out"]:
        x = x.unsqueeze(1) if x.ndim == self.dims + 1 else x
        for block, chosen in zip(self.prefix, self.prefix_paths, strict=True):
            x = block(x, chosen)
        x = self.block(x.detach(), path)
        return self.project(pooled(self.adapters[str(x.shape[1])](x)))


def mlp(d_in: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


def alignment(q: Float[Tensor, "batch out"], t: Float[Tensor, "batch out"]) -> Float[Tensor, ""]:
    """-2 mean cos(q, t): from -2, where they point the same way, to 2."""
    return -2 * F.cosine_similarity(q, t, dim=-1).mean()


class PathsTaken(Announcing):
    """Tells observers which operators the paths of a step take, as a router's experts: a path is a token.

    The operators of the first layer come first, then those of the second.
    """

    def __init__(self, block: BlockSupernet):
        super().__init__()
        ops = [layer.n_ops for layer in block.layers]
        self.starts = [0, *itertools.accumulate(ops)][:-1]
        self.n_experts, self.top_k = sum(ops), len(ops)

    def forward(self, paths: Sequence[Path], context: Context) -> None:
        if self.observed:
            taken = torch.tensor(paths) + torch.tensor(self.starts)
            weights = torch.full(taken.shape, 1 / self.top_k)
            self.announce(Routing.fixed(taken, weights, self.n_experts), context)


class EnsembleBootstrap(nn.Module):
    """One block in training: views (B, 2, ...) of a batch -> the loss of each path (P,).

    In training the paths are drawn from torch's global generator; in evaluation they are those of a generator of seed
    0. `follow` moves the target; a hook of the training calls it after each step (`bossnas_search.Following`).

    Args:
        online: what is trained. The target starts as a copy of it.
        target_prefix: the target's own earlier blocks; those of `online` by default.
        predictor: width inside it.
        n_paths: P.
        ensemble: whether all paths have one target, or each that of its own path, which is BYOL path by path.
    """

    def __init__(
        self,
        online: PathTower,
        n_paths: int,
        predictor: int,
        target_prefix: Sequence[BlockSupernet] | None = None,
        ensemble: bool = True,
    ):
        super().__init__()
        if not 1 <= n_paths <= len(online.block.paths):
            raise InputError(f"n_paths is {n_paths} but must be from 1 to the {len(online.block.paths)} of the block")
        out = online.project[-1].out_features
        self.online, self.target = online, copy.deepcopy(online)
        if target_prefix is not None:
            self.target.prefix = nn.ModuleList(target_prefix)
        self.target.requires_grad_(False)
        self.predict, self.taken = mlp(out, predictor, out), PathsTaken(online.block)
        self.n_paths, self.ensemble = n_paths, ensemble

    def forward(
        self, views: Float[Tensor, "batch 2 ..."], context: Context | None = None, paths: Sequence[Path] | None = None
    ) -> Float[Tensor, " paths"]:
        if paths is None:
            fixed = None if self.training else torch.Generator().manual_seed(0)
            paths = self.online.block.draw(self.n_paths, fixed)
        first, second = views.unbind(1)
        self.taken(paths, context if context is not None else Context())
        towards_first, towards_second = (self.targets(view, paths) for view in (first, second))
        losses = [
            alignment(self.predict(self.online(first, path)), towards_second[place])
            + alignment(self.predict(self.online(second, path)), towards_first[place])
            for place, path in enumerate(paths)
        ]
        return torch.stack(losses)

    @torch.no_grad()
    def targets(self, view: Float[Tensor, "batch ..."], paths: Sequence[Path]) -> Float[Tensor, "paths batch out"]:
        """What each path is trained towards: the mean of all normalised projections, or its own one."""
        own = torch.stack([F.normalize(self.target(view, path), dim=-1) for path in paths])
        return own.mean(0).expand_as(own) if self.ensemble else own

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """target <- momentum target + (1 - momentum) online, of the block and its neck; the prefix is frozen in both.

        Statistics of norms are those that the target sees itself.
        """
        for name in ("block", "adapters", "project"):
            pairs = zip(getattr(self.target, name).parameters(), getattr(self.online, name).parameters(), strict=True)
            for mean, now in pairs:
                mean.lerp_(now, 1 - momentum)


def momentum_at(step: int, steps: int, first: float) -> float:
    """m of a step (0-based): from `first` at the first one to 1 at the last, by a cosine."""
    if not 0 <= first <= 1:
        raise InputError(f"first is {first} but must be from 0 to 1")
    return 1 - (1 - first) * (1 + math.cos(math.pi * step / max(1, steps - 1))) / 2
