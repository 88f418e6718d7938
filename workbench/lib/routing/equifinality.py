"""Many tiny experts, cosine routing, one or several hops: does the topology of the routing matter?

Ternovtsii 2026, "Equifinality in Mixture of Experts: Routing Topology Does Not Determine Language Modeling Quality"
(arXiv:2604.14419). The model, which the paper calls ST-MoE, is named `GeometricMoE` here: it has nothing to do with the
ST-MoE of Zoph et al. (2022). A token h (N, D) is projected to a small routing space and meets E learned centroids:

    q = h W_q                                         W_q (D, m)
    s = |tau| * cos(q, C)                             C (E, m), tau one scalar                    `CosineRouter`
    p = softmax(s) over all E, then the top K
    MoE(h) = sum_{i in top K} w_i v_i gelu(u_i . h)   u_i, v_i (D,): experts of rank one          `RankOneExperts`
    D_a = MoE(h_a),  h_{a+1} = h_a + D_a,  a = 0..H-1                                             `GeometricMoE`
    y = x + D_0 + ... + D_{H-1},  h_0 = norm(x)

All H hops share u, v and C. Variants with equal K * H use equally many active parameters. The paper's result: they end
at the same perplexity. Its reason: the hops are collinear, cos(D_0, D_1) is about 0.8, so a second hop mostly amplifies
the first, and one learned scalar on a single hop (`alpha`) does as well. Its use: at inference a token may skip its
later hops where ||D_a|| / ||h_a|| is below a threshold (`calibrate_halting`).

Cosine routing in few dimensions is that of X-MoE (Chi et al. 2022, 2204.09179).

Tensor letters: N tokens, D model width, E experts, K active experts per token and hop, H hops, m routing width.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.modes import evaluating
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.observe import observing
from workbench.lib.core.routers import TopKRouter, check_top_k
from workbench.lib.core.routing import Context, Experts, Router, Routing

METHOD = Method(
    slug="equifinality",
    title="Equifinality in Mixture of Experts: Routing Topology Does Not Determine Language Modeling Quality",
    family="routing",
    year=2026,
    paper="arXiv:2604.14419",
    claim="Cosine-routed models with one to four hops reach equivalent perplexity at equal active parameters: the "
    "topology of the routing does not decide the quality.",
    objects=("GeometricMoE", "CosineRouter", "RankOneExperts", "calibrate_halting"),
)

CENTROID_INITS = ("orthogonal", "batch")


def example() -> nn.Module:
    """Two hops of four out of sixteen rank-one experts."""
    router = CosineRouter(32, n_experts=16, top_k=4, d_space=8)
    return GeometricMoE(router, RankOneExperts(16, 32, top_k=4), hops=2)


class CosineRouter(TopKRouter):
    """Scores are |tau| times the cosine between the projected token and each expert's centroid.

    m (D + E) + 1 parameters, where a linear router has D E. The norm of the token plays no part.

    Args:
        d_space: m.
        tau_init: of the scalar tau.
        centroid_init: "orthogonal": orthonormal rows if E <= m, else Gaussian rows of unit norm; "batch": as
            "orthogonal" until the first forward in training mode, which copies the projected directions of E of its
            tokens.
        trained: False freezes W_q and C as they were drawn: the control for "does learning to route matter".
        options: as in `TopKRouter`.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        d_space: int = 64,
        *,
        tau_init: float = 10.0,
        centroid_init: str = "orthogonal",
        trained: bool = True,
        **options,
    ):
        super().__init__(n_experts, top_k, **options)
        if d_space < 1:
            raise InputError(f"d_space is {d_space} but must be at least 1")
        if centroid_init not in CENTROID_INITS:
            raise unknown("centroid_init", centroid_init, CENTROID_INITS)
        self.projection = nn.Linear(d_model, d_space, bias=False)
        nn.init.normal_(self.projection.weight, std=d_model**-0.5)
        self.centroids = nn.Parameter(torch.randn(n_experts, d_space))
        if n_experts <= d_space:
            nn.init.orthogonal_(self.centroids)
        with torch.no_grad():
            self.centroids.copy_(F.normalize(self.centroids, dim=-1))
        self.tau = nn.Parameter(torch.tensor(float(tau_init)))
        self.register_buffer("seeded", torch.tensor(centroid_init != "batch"))
        self.projection.weight.requires_grad_(trained)
        self.centroids.requires_grad_(trained)

    def scores(self, x: Float[Tensor, "tokens dim"], context: Context) -> Float[Tensor, "tokens experts"]:
        q = F.normalize(self.projection(x), dim=-1)
        if self.training and not self.seeded:
            self._seed(q)
        return self.tau.abs() * (q @ F.normalize(self.centroids, dim=-1).T)

    def twin(self) -> "CosineRouter":
        """A router with a projection of its own and this one's centroids and tau: that of another hop."""
        twin = copy.deepcopy(self)
        twin.centroids, twin.tau = self.centroids, self.tau
        nn.init.normal_(twin.projection.weight, std=twin.projection.in_features**-0.5)
        return twin

    @torch.no_grad()
    def _seed(self, q: Float[Tensor, "tokens m"]) -> None:
        if q.shape[0] < self.n_experts:
            raise InputError(
                f'x has {q.shape[0]} tokens but centroid_init="batch" takes its {self.n_experts} centroids from the '
                "tokens of the first forward"
            )
        self.centroids.copy_(q[torch.randperm(q.shape[0])[: self.n_experts]])
        self.seeded.fill_(True)


def iso_space(d_model: int, n_experts: int) -> int:
    """The m at which a cosine router has as many parameters as a linear one: round(D E / (D + E))."""
    return round(d_model * n_experts / (d_model + n_experts))


class RankOneExperts(nn.Module):
    """E experts e_i(x) = v_i gelu(u_i . x), all in two matrix products: ((x U^T) through gelu, times the gates) V.

    With all gates 1 this is a two-layer perceptron of hidden width E. 2 E D parameters.

    Args:
        top_k: K of the router in front, for the scale of v: entries of variance 1 / (K D).
    """

    def __init__(self, n_experts: int, d_model: int, top_k: int):
        super().__init__()
        check_top_k(top_k, n_experts)
        self.n_experts = n_experts
        self.u = nn.Parameter(torch.randn(n_experts, d_model) * d_model**-0.5)
        self.v = nn.Parameter(torch.randn(n_experts, d_model) * (top_k * d_model) ** -0.5)

    def forward(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Float[Tensor, "tokens dim"]:
        activation = F.gelu(x @ self.u.T)
        return (routing.dense().to(activation.dtype) * activation) @ self.v


@dataclass(frozen=True)
class HopStats:
    """What the hops of one layer did to N tokens; NaN where a token skipped the hop or a norm is 0.

    Attributes:
        update_norms: (H, N) ||D_a||.
        hidden_norms: (H, N) ||h_a||, the norm of what the hop was given.
        cosines: (H - 1, N) cos(D_a, D_{a+1}).
        used: (N,) hops made, 1..H.
    """

    update_norms: Float[Tensor, "hops tokens"]
    hidden_norms: Float[Tensor, "hops tokens"]
    cosines: Float[Tensor, "hops_less_1 tokens"]
    used: Int64[Tensor, " tokens"]

    @property
    def relative_norms(self) -> Float[Tensor, "hops tokens"]:
        """||D_a|| / ||h_a||: what halting compares with its threshold."""
        return self.update_norms / self.hidden_norms

    @property
    def decay(self) -> Float[Tensor, "hops tokens"]:
        """||D_a|| / ||D_0||, 1 for the first hop."""
        return self.update_norms / self.update_norms[:1]


HopObserver = Callable[["GeometricMoE", HopStats], None]


class GeometricMoE(nn.Module):
    """The update D_0 + ... + D_{H-1} of one layer, whose input is h_0; the caller adds the residual stream.

    Each hop is a `MoELayer` of its own in `hops`, so whoever observes a model's MoE layers sees the routing of every
    hop; all of them hold the one bank, and the one router unless `share_projection` is False. Balance losses are the
    mean over the hops, so that variants feel the same pressure.

    Args:
        hops: H.
        share_projection: False gives each later hop a projection W_q of its own (needs a `CosineRouter`).
        decoupled: all hops use the gates computed from h_0.
        alpha: initial value of a learned scalar on the update of a single hop; None for none.
        halt_threshold: in eval mode, tokens with ||D_a|| / ||h_a|| below it skip the layer's later hops; None: never.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        hops: int = 1,
        *,
        share_projection: bool = True,
        decoupled: bool = False,
        alpha: float | None = None,
        halt_threshold: float | None = None,
    ):
        super().__init__()
        if hops < 1:
            raise InputError(f"hops is {hops} but must be at least 1")
        if alpha is not None and hops != 1:
            raise InputError(f"alpha is {alpha} with hops = {hops} but scales a single hop: use hops=1, or alpha=None")
        if decoupled and not share_projection:
            raise InputError("decoupled=True routes once, so share_projection must be True")
        routers = [router] + [router if share_projection else router.twin() for _ in range(hops - 1)]
        self.hops = nn.ModuleList(MoELayer(r, experts) for r in routers)
        self.decoupled = decoupled
        self.alpha = nn.Parameter(torch.tensor(float(alpha))) if alpha is not None else None
        self.halt_threshold = halt_threshold
        self._observers: OrderedDict[int, HopObserver] = OrderedDict()

    def observe(self, observer: HopObserver) -> RemovableHandle:
        """Call `observer(self, stats)` after each forward, until the returned handle's `remove()`."""
        handle = RemovableHandle(self._observers)
        self._observers[handle.id] = observer
        return handle

    def forward(self, x: Float[Tensor, "*batch dim"], context: Context | None = None) -> Float[Tensor, "*batch dim"]:
        context = context if context is not None else Context()
        h = x.reshape(-1, x.shape[-1])
        y = torch.zeros_like(h)
        rows = torch.arange(h.shape[0], device=h.device)  # the tokens still hopping
        inner, aux, routing, steps = context, context.aux, None, []  # inner: the context of those tokens
        for hop in self.hops:
            if routing is None or not self.decoupled:
                routing = hop.router(h, inner)
            update = hop.serve(h, routing, inner)
            if inner is context:
                y = y + update
            else:
                y = y.index_add(0, rows, update)
                if inner.state is not None:
                    context.state = context.state.index_copy(0, rows, inner.state)
            if self._observers:
                steps.append((rows, h, update))
            halts = self.halt_threshold is not None and not self.training and hop is not self.hops[-1]
            going = self._going(h, update) if halts else None
            h = h + update
            if going is not None and not going.all():
                if not going.any():
                    break
                rows, h = rows[going], h[going]
                inner, routing = _context_of(inner, going), _routing_of(routing, going)
        context.aux = aux + (inner.aux - aux) / len(self.hops)
        if self._observers:
            stats = _hop_stats(steps, len(self.hops), y)
            for observer in tuple(self._observers.values()):
                observer(self, stats)
        return (y if self.alpha is None else self.alpha * y).view_as(x)

    def _going(self, h: Tensor, update: Tensor) -> Tensor:
        """(n,) True for the tokens that make the next hop."""
        tiny = torch.finfo(h.dtype).tiny  # no update of no token is small, not undefined
        return ~(update.norm(dim=-1) / (h.norm(dim=-1) + tiny) < self.halt_threshold)


def _context_of(context: Context, rows: Tensor) -> Context:
    """The context of some of the tokens."""
    per_token = ("token_ids", "domain", "modality", "state")
    parts = {name: getattr(context, name) for name in per_token}
    return replace(context, **{name: part[rows] for name, part in parts.items() if part is not None})


def _routing_of(routing: Routing, rows: Tensor) -> Routing:
    """The routing of some of the tokens."""
    probs, logits = (part if part is None else part[rows] for part in (routing.probs, routing.logits))
    parts = {"probs": probs, "logits": logits, "losses": routing.losses}
    if routing.top_k is None:
        return Routing.ragged(routing.mask()[rows], routing.dense()[rows], **parts)
    return Routing.fixed(routing.indices[rows], routing.weights[rows], routing.n_experts, **parts)


@torch.no_grad()
def _hop_stats(steps: list[tuple[Tensor, Tensor, Tensor]], n_hops: int, like: Tensor) -> HopStats:
    """From (tokens, h_a, D_a) of each hop made."""
    hidden, update = like.new_full((2, n_hops, *like.shape), torch.nan)
    for a, (rows, h, d) in enumerate(steps):
        hidden[a, rows], update[a, rows] = h, d
    norms = update.norm(dim=-1)
    cosines = (update[1:] * update[:-1]).sum(-1) / (norms[1:] * norms[:-1])
    used = (~update[..., 0].isnan()).sum(0)
    return HopStats(norms, hidden.norm(dim=-1), cosines, used)


@contextmanager
def halting(model: nn.Module, threshold: float | None) -> Iterator[None]:
    """Within it, the `GeometricMoE` layers of `model` halt at `threshold` (None: never)."""
    layers = _layers(model)
    before = [layer.halt_threshold for layer in layers]
    try:
        for layer in layers:
            layer.halt_threshold = threshold
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.halt_threshold = value


@contextmanager
def observed_hops(model: nn.Module) -> Iterator[list[HopStats]]:
    """Within it, whatever runs the model is watched; afterwards the list holds the statistics of each layer."""
    found: list[HopStats] = []
    with observing(_layers(model), lambda stats: stats) as seen:
        yield found
    names = ("update_norms", "hidden_norms", "cosines", "used")
    found += [HopStats(*(torch.cat([getattr(s, n) for s in stats], -1) for n in names)) for stats in seen.values()]


def hop_stats(model: nn.Module, inputs: Iterable[Tensor]) -> list[HopStats]:
    """The statistics of every `GeometricMoE` layer of `model`, in eval mode, over all the given model inputs."""
    with observed_hops(model) as stats, evaluating(model):
        for batch in inputs:
            model(batch, Context())
    return stats


def calibrate_halting(model: nn.Module, inputs: Iterable[Tensor], target_saving: float) -> float:
    """The smallest threshold, to 1/256 of the observed ratios, that skips `target_saving` of the expert evaluations.

    Args:
        inputs: model inputs to calibrate on; judge the model on others.
        target_saving: share of the (layer, token, hop) evaluations, above 0 and below (H - 1) / H.

    The saving is measured on the halting model, because a skipped hop changes what the layers above it see.
    """
    inputs, most = list(inputs), 1 - 1 / max(len(layer.hops) for layer in _layers(model))
    if not 0 < target_saving < most:
        raise InputError(f"target_saving is {target_saving} but must be above 0 and below (H - 1) / H = {most:.3g}")
    with halting(model, None):
        ratios = torch.cat([stats.relative_norms[:-1].flatten() for stats in hop_stats(model, inputs)])
    levels = torch.linspace(0, 1, 257, dtype=torch.float64)
    candidates = [*ratios.double().nanquantile(levels).tolist(), float("inf")]
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        with halting(model, candidates[middle]):
            saving = mean_saving(hop_stats(model, inputs))
        low, high = (low, middle) if saving >= target_saving else (middle + 1, high)
    return candidates[low]


def mean_saving(stats: Iterable[HopStats]) -> float:
    """Share of the (layer, token, hop) expert evaluations that were skipped; the router's part is not counted."""
    stats = list(stats)
    return 1 - sum(int(s.used.sum()) for s in stats) / sum(s.update_norms.numel() for s in stats)


def _layers(model: nn.Module) -> list[GeometricMoE]:
    layers = [module for module in model.modules() if isinstance(module, GeometricMoE)]
    if not layers:
        raise InputError(f"model is a {type(model).__name__} without a GeometricMoE layer, so nothing hops")
    return layers
