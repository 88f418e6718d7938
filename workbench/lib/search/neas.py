"""NEAS: one-shot search for several small networks that share their first layers and are good together.

Chen et al. 2021, "One-Shot Neural Ensemble Architecture Search by Diversity-Guided Search Space Shrinking" (CVPR 2021).
A candidate is K paths through a space of L layers, whose first s genes are the same: the trunk, computed once. s is
searched as well.

    z        = trunk(x)
    logits_k = head_k(branch_k(gate(z)))        the gate divides the gradient by K: the trunk sees the branches' mean
    loss     = sum_k CE(logits_k, y)            each path by itself, so that none leans on the others
    answer   = mean_k logits_k

All candidates are paths of one supernet, which holds every operator of every layer once. Each step draws K paths. Now
and then operators that come off badly are dropped (`neas_shrink`). K-path evolution under a limit of multiplications
then looks for the best ensemble by the supernet's weights, with the statistics of its batch norms set anew for each
candidate. What is found is trained from scratch.

Not the paper's: its cells have squeeze-and-excitation and its last convolution and classifier two stages; here the head
is one convolution and a classifier. The formula of diversity was not published with code; see `neas_shrink`.

Tensor letters: B batch, K paths, L layers, D width.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.lib.core.cells.inverted_residual import convolution, pooled
from workbench.lib.core.observe import Announcing
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.search.genomes import SKIP, EnsembleGenome, Kept, PathSpace, sample_genome
from workbench.lib.core.task import Batch, Classification

METHOD = Method(
    slug="neas",
    title="NEAS: One-Shot Neural Ensemble Architecture Search by Diversity-Guided Search Space Shrinking",
    family="search",
    year=2021,
    paper="CVPR 2021",
    claim="Searching small networks together, with a shared trunk and diversity, beats one network and independent "
    "ensembles at equal cost.",
    objects=("KPathSupernet", "EnsembleGenome", "PathSpace", "EnsembleNet", "build_standalone", "sample_genome"),
    kind="images",
)


def example() -> nn.Module:
    """Two paths of three layers that share the first, for images of 16 x 16."""
    space = PathSpace(3, 16, 10, widths=(8, 8, 8), strides=(2, 1, 1), dims=2)
    return build_standalone(EnsembleGenome(1, ((0, 2, 1), (0, 5, SKIP))), space)


class GradScale(torch.autograd.Function):
    """`GradScale.apply(x, scale)` is x, and its gradient is multiplied by `scale`."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


class Head(nn.Module):
    """A 1 x 1 convolution, the mean over all places, a classifier."""

    def __init__(self, space: PathSpace):
        super().__init__()
        self.conv = nn.Sequential(*convolution(space.widths[-1], space.head, 1, dims=space.dims), nn.SiLU())
        self.classifier = nn.Linear(space.head, space.n_classes)

    def forward(self, x: Float[Tensor, "batch dim *size"]) -> Float[Tensor, "batch classes"]:
        return self.classifier(pooled(self.conv(x)))


class Choice(Announcing):
    """All operators of a layer. It announces which ones the paths of an ensemble take, as a router its experts.

    Every input of the batch is a token that all paths take the same way; the skip is the last expert.
    """

    def __init__(self, space: PathSpace, layer: int):
        super().__init__()
        self.n_experts, self.top_k = space.n_ops + 1, None
        self.ops = nn.ModuleList(space.build(layer, op) for op in range(space.n_ops))

    def forward(self, x: list[Tensor], genes: Sequence[int], context: Context) -> list[Tensor]:
        """`x` behind the operators, one for each gene: one of the trunk, K of the branches."""
        if self.observed:
            mask = torch.zeros(self.n_experts, dtype=torch.bool)
            mask[[gene % self.n_experts for gene in genes]] = True
            rows = mask.expand(len(x[0]), -1).to(x[0].device)
            self.announce(Routing.ragged(rows, rows / mask.sum()), context)
        return [one if op == SKIP else self.ops[op](one) for one, op in zip(x, genes, strict=True)]


class KPathSupernet(nn.Module):
    """Every operator of every layer once, and K heads: an ensemble is K paths through it, (B, ...) -> (B, K, classes).

    Without a genome, training draws one from torch's global generator over the operators `kept`, and evaluation takes
    the genome that a generator of seed 0 draws. Paths that take one operator in one layer share its weights, and the
    statistics of its batch norms, also behind the split.

    Args:
        splits: where the paths may part; None for 0 to L.
    """

    kept_mask: Bool[Tensor, "layers ops"]

    def __init__(self, space: PathSpace, k: int = 2, splits: Sequence[int] | None = None):
        super().__init__()
        self.space, self.k, self.splits = space, k, splits
        self.stem = space.build_stem()
        self.layers = nn.ModuleList(Choice(space, layer) for layer in range(space.n_layers))
        self.heads = nn.ModuleList(Head(space) for _ in range(k))
        self.register_buffer("kept_mask", torch.zeros(space.n_layers, space.n_ops + 1, dtype=torch.bool))
        self.kept = space.everything

    @property
    def kept(self) -> Kept:
        """The operators that are drawn."""
        last = self.space.n_ops
        rows = (row.nonzero().flatten().tolist() for row in self.kept_mask)
        return tuple(tuple(sorted(SKIP if op == last else op for op in row)) for row in rows)

    @kept.setter
    def kept(self, kept: Kept) -> None:
        self.kept_mask.zero_()
        for layer, ops in enumerate(kept):
            self.kept_mask[layer, list(ops)] = True  # -1 is the last column

    def form_now(self) -> dict[str, Tensor]:
        """Which operators are kept: what the live page shows of the space."""
        return {"kept operators": self.kept_mask.float()}

    def forward(
        self,
        x: Float[Tensor, "batch ..."],
        context: Context | None = None,
        genome: EnsembleGenome | None = None,
        features: list[Tensor] | None = None,
    ) -> Float[Tensor, "batch paths classes"]:
        """Logits of every path; `features` is given the pooled output of each layer, (K, B, D), and of the trunk."""
        if genome is None:
            fixed = None if self.training else torch.Generator().manual_seed(0)
            genome = sample_genome(self.kept, self.k, fixed, self.splits)
        context = context if context is not None else Context()
        last, paths = len(self.layers), genome.paths
        flow = [self.stem(channelled(x, self.space))]
        for index, layer in enumerate(self.layers):
            if index == genome.split:
                flow = [GradScale.apply(flow[0], 1 / genome.k)] * genome.k
            genes = [path[index] for path in paths]
            flow = layer(flow, genes[: len(flow)], context)
            if features is not None:
                features.append(torch.stack([pooled(one) for one in flow]).expand(genome.k, -1, -1))
        if genome.split == last:
            flow = [GradScale.apply(flow[0], 1 / genome.k)] * genome.k
        return torch.stack([head(one) for head, one in zip(self.heads, flow, strict=False)], 1)


class EnsembleNet(nn.Module):
    """One ensemble with weights of its own, (B, ...) -> (B, K, classes); `build_standalone` makes it."""

    def __init__(self, genome: EnsembleGenome, space: PathSpace):
        super().__init__()
        genome.validate(space)
        self.genome, self.space = genome, space
        self.stem = space.build_stem()
        self.trunk = nn.ModuleList(space.build(layer, op) for layer, op in enumerate(genome.paths[0][: genome.split]))
        self.branches = nn.ModuleList(
            nn.ModuleList(space.build(layer, path[layer]) for layer in range(genome.split, len(path)))
            for path in genome.paths
        )
        self.heads = nn.ModuleList(Head(space) for _ in genome.paths)

    def forward(
        self, x: Float[Tensor, "batch ..."], context: Context | None = None
    ) -> Float[Tensor, "batch paths classes"]:
        z = self.stem(channelled(x, self.space))
        for layer in self.trunk:
            z = layer(z)
        z, logits = GradScale.apply(z, 1 / self.genome.k), []
        for branch, head in zip(self.branches, self.heads, strict=True):
            y = z
            for layer in branch:
                y = layer(y)
            logits.append(head(y))
        return torch.stack(logits, 1)


def build_standalone(genome: EnsembleGenome, space: PathSpace, supernet: KPathSupernet | None = None) -> EnsembleNet:
    """The network of a genome, of fresh weights, or with those (and the statistics) that it has in a supernet."""
    net = EnsembleNet(genome, space)
    if supernet is None:
        return net
    net.stem.load_state_dict(supernet.stem.state_dict())
    for head, other in zip(net.heads, supernet.heads, strict=False):
        head.load_state_dict(other.state_dict())
    for path, branch in zip(genome.paths, net.branches, strict=True):
        for layer, (op, module) in enumerate(zip(path, [*net.trunk, *branch], strict=True)):
            if op != SKIP:
                module.load_state_dict(supernet.layers[layer].ops[op].state_dict())
    return net


def channelled(x: Tensor, space: PathSpace) -> Tensor:
    """Inputs with an axis of channels, which sets of one channel do not have; `InputError` for other shapes."""
    x = x.unsqueeze(1) if x.ndim == space.dims + 1 else x
    if x.shape[1:] != (space.channels, *[space.size] * space.dims):
        raise InputError(
            f"x has shape {tuple(x.shape)} but the space is of {space.channels} channels, {space.size} wide"
        )
    return x


class EnsembleClassification(Classification):
    """Classification by several logits (B, K, classes): each is trained for itself, and their mean is the answer."""

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return sum(F.cross_entropy(logits, batch.targets) for logits in outputs.unbind(1))

    def value(self, outputs: Tensor, batch: Batch) -> Tensor:
        return super().value(outputs.mean(1), batch)
