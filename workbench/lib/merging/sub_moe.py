"""Sub-MoE: the experts of a trained layer are grouped by their outputs, and each group becomes one, without training.

Li et al. 2025, "Sub-MoE: Efficient Mixture-of-Expert LLMs Compression via Subspace Expert Merging" (arXiv:2506.23266).
The announced code is not public; read beside the paper were two that others wrote, CerebrasResearch/reap and
zhy617/SMoE. From calibration tokens x, which ALL experts see, routed or not:

    S_ij = mean over x of cos(o_i(x), o_j(x)),  o_e the output of expert e;  f_e how often a token was routed to e
    clusters: K-means of the rows of 1 - S
    of a cluster with matrices W_1 .. W_g, for gate, up and down each, w_i = f_i / sum f:
    [W_1 .. W_g] = U diag(s) [V_1^T .. V_g^T],  V^T = sum_i w_i V_i^T,  merged: U_r diag(s_r) V_r^T

**At full rank this is the weighted average and nothing else**, for U diag(s) V_i^T = W_i. Cut to rank r it is
U_r U_r^T sum_i w_i W_i, the average projected on the r strongest directions of the cluster's outputs. So the shared
basis does something only where it is cut; both public re-implementations do not cut. The paper's default of r is not
known.

The router is either kept, with the id of an expert read as that of its cluster ("map": the weights of a token's slots
in one cluster are added), or its rows are averaged with the same w_i ("mean"). Left out: ranks inside experts by
whitened SVD (the paper's extension), and numbers of clusters that differ between layers, which are the caller's to
choose.

Tensor letters: N tokens, D model width, H expert hidden width, E experts, K clusters, g experts of a cluster.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.experts import GLUExperts, expert_outputs
from workbench.lib.core.modes import evaluating
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context, Router, Routing

METHOD = Method(
    slug="sub-moe",
    title="Sub-MoE: Efficient Mixture-of-Expert LLMs Compression via Subspace Expert Merging",
    family="merging",
    year=2025,
    paper="arXiv:2506.23266",
    claim="Merging experts of similar outputs in a shared singular basis keeps more quality than pruning or averaging "
    "experts, without retraining.",
    objects=("compress_moe", "ExpertStats", "cluster_experts", "merge_cluster", "merge_experts", "MappedRouter"),
)

ROUTERS = ("map", "mean")
MATRICES = ("gate", "up", "down")


def example() -> nn.Module:
    """A layer of six experts whose outputs on some tokens put them into three."""
    layer = MoELayer(LinearRouter(32, n_experts=6, top_k=2), GLUExperts(6, 32, 48))
    stats = ExpertStats(layer)
    stats.update(torch.randn(64, 32))
    return compress_moe(layer, stats, 3, rank=0.95).layer


class ExpertStats:
    """What calibration tokens say of a layer's experts, added up call by call; no outputs are kept.

    Attributes:
        tokens: N so far.
        frequency: (E,) f_e, (token, slot) pairs routed to each expert.
        total_output: (E, D) sum of outputs; over `tokens` it is the mean, by which HC-SMoE groups.

    Raises:
        InputError: the layer's experts are not `GLUExperts`.
    """

    def __init__(self, layer: MoELayer):
        bank = _bank(layer)
        experts, device = bank.n_experts, bank.down.device
        self.layer, self.tokens = layer, 0
        self.frequency = torch.zeros(experts, dtype=torch.int64, device=device)
        self.total_output = torch.zeros(experts, bank.down.shape[1], dtype=torch.float64, device=device)
        self._cosines = torch.zeros(experts, experts, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, x: Float[Tensor, "*batch dim"], routing: Routing | None = None) -> None:
        """Count these tokens: hidden states as the layer gets them. `routing` is the layer's decision on them; by
        default its router is asked. An expert whose output is 0 has cosine 0 with all others."""
        x = x.reshape(-1, x.shape[-1])
        if routing is None:
            with evaluating(self.layer):
                routing = self.layer.router(x, Context())
        outputs = expert_outputs(self.layer.experts, x)
        if not outputs.isfinite().all():
            raise InputError("x gives outputs that are NaN or infinite, which nothing can be said of")
        units = F.normalize(outputs.double(), dim=-1).flatten(1)
        self._cosines += units @ units.T  # of unit vectors: the sum of cosines over tokens
        self.total_output += outputs.double().sum(1)
        self.frequency += routing.counts
        self.tokens += len(x)

    @property
    def similarity(self) -> Float[Tensor, "experts experts"]:
        """S (E, E): symmetric, -1 .. 1, diagonal 1."""
        if not self.tokens:
            raise InputError("the statistics have seen no tokens: give them some with update(x)")
        mean = (self._cosines / self.tokens).clamp(-1, 1)
        return ((mean + mean.T) / 2).fill_diagonal_(1.0)

    @property
    def mean_output(self) -> Float[Tensor, "experts dim"]:
        """(E, D)."""
        if not self.tokens:
            raise InputError("the statistics have seen no tokens: give them some with update(x)")
        return self.total_output / self.tokens


def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, ExpertStats]:
    """The statistics of every `MoELayer` of a model by its name; `model(batch)` is run on each batch, in eval mode."""
    found = {name: ExpertStats(layer) for name, layer in moe_layers(model).items()}
    inputs, handles = {}, []
    for stats in found.values():
        layer = stats.layer
        handles += [
            layer.register_forward_pre_hook(lambda layer, args: inputs.__setitem__(layer, args[0])),
            layer.observe(lambda layer, routing, _, stats=stats: stats.update(inputs.pop(layer), routing)),
        ]
    try:
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def cluster_experts(
    similarity: Float[Tensor, "experts experts"], clusters: int, seed: int = 0
) -> Int64[Tensor, " experts"]:
    """(E,) the cluster of each expert, 0 .. K - 1, by the first expert of each; none of them is empty.

    K-means (k-means++, the best of ten starts) of the rows of 1 - S: an expert is known by its distances to all. The
    experts are put in an order of their own before, so another order of the same experts makes the same groups.
    """
    n = len(similarity)
    if not isinstance(clusters, int) or isinstance(clusters, bool) or not 1 <= clusters <= n:
        raise InputError(f"clusters is {clusters!r} but must be a whole number from 1 to the {n} experts")
    if clusters == n:  # nothing to group; and duplicates, which K-means cannot part, stay as they are
        return torch.arange(n)
    from sklearn.cluster import KMeans  # heavy

    distance = 1 - similarity.double().cpu()
    order = distance.sum(1).argsort(stable=True)
    rows = distance[order][:, order]
    # as many starts as there are different rows to start from: with fewer than K, the rest is parted below
    different = len(rows.round(decimals=12).unique(dim=0))
    means = KMeans(min(clusters, different), n_init=10, random_state=seed).fit(rows.numpy())
    labels = torch.empty(n, dtype=torch.int64)
    labels[order] = torch.from_numpy(means.labels_).long()
    for empty in range(clusters):
        if not (labels == empty).any():  # experts too alike to be K: the largest cluster gives one
            labels[(labels == labels.bincount().argmax()).nonzero()[-1]] = empty
    return numbered(labels)


def numbered(labels: Int64[Tensor, " experts"]) -> Int64[Tensor, " experts"]:
    """The same clusters, numbered in the order in which they first occur."""
    names: dict[int, int] = {}
    return torch.tensor([names.setdefault(label, len(names)) for label in labels.tolist()])


def cluster_weights(frequency: Tensor, members: Int64[Tensor, " g"]) -> Float[Tensor, " g"]:
    """(g,) w_i = f_i / sum f of a cluster's experts, float64; all alike where no token went to any of them."""
    own = frequency[members].double()
    return own / own.sum() if own.sum() > 0 else torch.full_like(own, 1 / len(own))


def merge_cluster(
    weights: Float[Tensor, "g m n"], w: Float[Tensor, " g"], rank: int | float | None = None
) -> Float[Tensor, "m n"]:
    """One matrix of g: U_r diag(s_r) sum_i w_i V_i^T, with the SVD of all of them side by side (m, g n).

    Args:
        weights: rows are outputs, which U spans. A single matrix is given back as it is.
        w: of sum 1.
        rank: r, at most min(m, g n); or, a float above 0 and at most 1, the share of sum s^2 that the least r keeps;
            None for all, which is sum_i w_i W_i.
    """
    return _merged(weights, w, rank)[0]


def _merged(weights: Tensor, w: Tensor, rank: int | float | None) -> tuple[Tensor, int]:
    """The matrix, and r."""
    g, m, n = weights.shape
    if g == 1:
        return weights[0], min(m, n)
    joint = weights.double().transpose(0, 1).reshape(m, g * n)
    u, s, vt = torch.linalg.svd(joint, full_matrices=False)
    r = rank_for(s, rank)
    shared = torch.einsum("g,qgn->qn", w.to(vt), vt.view(-1, g, n))
    return ((u[:, :r] * s[:r]) @ shared[:r]).to(weights.dtype), r


def rank_for(s: Float[Tensor, " q"], rank: int | float | None) -> int:
    """The number of singular values that `rank` (see `merge_cluster`) keeps of these."""
    if rank is None:
        return len(s)
    if isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= len(s):
        return rank
    if isinstance(rank, float) and 0 < rank <= 1:
        energy = s.square().cumsum(0)
        return min(int((energy < rank * energy[-1]).sum()) + 1, len(s))
    raise InputError(
        f"rank is {rank!r} but must be a whole number from 1 to {len(s)}, a share of the energy above 0 and at most "
        "1.0, or None for all"
    )


class MappedRouter(nn.Module):
    """The router of E experts as one of K clusters: a token goes where its experts went.

    Weights of slots that fall into one cluster are added, so a token has up to top-k clusters. The losses are those of
    the router of E.
    """

    top_k = None

    def __init__(self, router: Router, labels: Int64[Tensor, " experts"]):
        super().__init__()
        self.router, self.n_experts = router, int(labels.max()) + 1
        self.register_buffer("members", F.one_hot(labels, self.n_experts).float())

    @property
    def coefficients(self) -> dict[str, float]:
        return self.router.coefficients

    def forward(self, x: Float[Tensor, "tokens dim"], context: Context) -> Routing:
        """The cluster of each pair and the sum of its weights, token by token."""
        routing = self.router(x, context)
        members = self.members.to(routing.weight.dtype)
        mask = (routing.mask().to(members.dtype) @ members) > 0
        probs = None if routing.probs is None else routing.probs @ members
        return Routing.ragged(mask, routing.dense() @ members, probs=probs, losses=routing.losses, state=routing.state)


@dataclass(frozen=True)
class Merged:
    """A layer of K experts, and how it came to be.

    Attributes:
        layer: the new layer; what it was made of is unchanged and shares nothing with it but a shared expert.
        labels: (E,) the cluster of each expert.
        weights: (E,) w_i, of sum 1 in each cluster.
        ranks: of each cluster that of gate, up and down.
        errors: the same of |merged - average| / |average|, Frobenius: what the cut costs.
        before, after: parameters of experts and router; `after` of factors where they are fewer numbers than their
            product, which the layer itself keeps.
    """

    layer: MoELayer
    labels: Int64[Tensor, " experts"]
    weights: Float[Tensor, " experts"]
    ranks: list[dict[str, int]]
    errors: list[dict[str, float]]
    before: int
    after: int


def compress_moe(
    layer: MoELayer,
    stats: ExpertStats,
    num_experts: int,
    rank: int | float | None = None,
    router: str = "map",
    seed: int = 0,
) -> Merged:
    """Sub-MoE of one layer: `cluster_experts` by output, then `merge_experts`. `rank` as in `merge_cluster`."""
    return merge_experts(layer, cluster_experts(stats.similarity, num_experts, seed), stats.frequency, rank, router)


@torch.no_grad()
def merge_experts(
    layer: MoELayer,
    labels: Int64[Tensor, " experts"],
    frequency: Tensor,
    rank: int | float | None = None,
    router: str = "map",
) -> Merged:
    """The layer with each cluster of its experts merged into one.

    Args:
        labels: (E,) clusters 0 .. K - 1, each with an expert at least.
        frequency: (E,) f_e.
        rank: of gate, up and down each, see `merge_cluster`. Experts alone in their cluster stay whole.
        router: "map" for a `MappedRouter`; "mean" for one of K whose rows are the experts' with the same w_i.

    Raises:
        InputError: the experts are not `GLUExperts`, labels or frequencies are not of these experts, or the rows of
            another router than a `LinearRouter` without a bias are to be averaged.
    """
    bank = _bank(layer)
    if router not in ROUTERS:
        raise unknown("router", router, ROUTERS)
    n, clusters = bank.n_experts, int(labels.max()) + 1 if labels.numel() else 0
    if labels.shape != (n,) or sorted(set(labels.tolist())) != list(range(clusters)):
        raise InputError(f"labels are {labels.tolist()} but must be {n} of the clusters 0 .. K - 1, each used")
    if frequency.shape != (n,) or not (frequency >= 0).all():
        raise InputError(f"frequency is {frequency.tolist()} but must be {n} numbers that are not negative")
    experts = GLUExperts(clusters, bank.down.shape[1], bank.down.shape[2]).to(bank.down)
    weights, ranks, errors, numbers = torch.empty(n, dtype=torch.float64), [], [], 0
    for cluster in range(clusters):
        members = (labels == cluster).nonzero().flatten().to(bank.down.device)
        w = cluster_weights(frequency.to(bank.down.device), members)
        weights[members.cpu()] = w.cpu()
        merged, kept, off = {}, {}, {}
        for name, matrices in zip(MATRICES, (*bank.gate_up[members].chunk(2, dim=1), bank.down[members]), strict=True):
            merged[name], kept[name] = _merged(matrices, w, rank)
            average = torch.einsum("g,gmn->mn", w, matrices.double())
            off[name] = float((merged[name] - average).norm() / average.norm().clamp(min=1e-300))
            whole, (rows, columns) = matrices[0].numel(), matrices.shape[1:]
            factors = kept[name] * (rows + columns)
            numbers += min(whole, factors) if rank is not None and len(members) > 1 else whole
        experts.gate_up[cluster] = torch.cat([merged["gate"], merged["up"]])
        experts.down[cluster] = merged["down"]
        ranks.append(kept)
        errors.append(off)
    routes = MappedRouter(deepcopy(layer.router), labels) if router == "map" else _mean(layer.router, labels, weights)
    made = MoELayer(routes, experts, layer.shared, layer.capacity_factor).train(layer.training)
    before = sum(p.numel() for part in (bank, layer.router) for p in part.parameters())
    return Merged(
        made, labels, weights, ranks, errors, before, numbers + sum(p.numel() for p in made.router.parameters())
    )


def compress_model(
    model: nn.Module, stats: dict[str, ExpertStats], num_experts: int, rank: int | float | None = None, **options
) -> dict[str, Merged]:
    """`compress_moe` of every `MoELayer` of a model, in place; `stats` as `calibrate(model, ...)` gives them."""
    found = {
        name: compress_moe(layer, stats[name], num_experts, rank, **options)
        for name, layer in moe_layers(model).items()
    }
    for name, merged in found.items():
        model.set_submodule(name, merged.layer)
    return found


def _mean(router: nn.Module, labels: Tensor, weights: Tensor) -> LinearRouter:
    """A router of the clusters: row c is sum_i w_i times the rows of its experts, top-k at most K."""
    if type(router) is not LinearRouter or router.bias is not None:
        raise InputError(
            f"router is 'mean', but a {type(router).__name__} has no rows to average: it must be a LinearRouter "
            "without a bias, or router must be 'map'"
        )
    rows = router.projection.weight
    clusters = int(labels.max()) + 1
    top_k = min(router.top_k, clusters)
    options = {"renormalize": router.renormalize, "coefficients": router.coefficients, "jitter": router.jitter}
    made = LinearRouter(rows.shape[1], clusters, top_k, **options).to(rows)
    mixing = torch.zeros(clusters, len(labels), dtype=torch.float64).scatter_(0, labels[None], weights[None])
    made.projection.weight.copy_(mixing.to(rows.device) @ rows.double())
    return made


def _bank(layer: MoELayer) -> GLUExperts:
    if not isinstance(layer.experts, GLUExperts):
        raise InputError(f"layer.experts is a {type(layer.experts).__name__} but must be GLUExperts")
    return layer.experts
