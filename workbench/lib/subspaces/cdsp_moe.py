"""CDSP-MoE: experts that are choices of units in one shared feed-forward, parted where their gradients conflict.

"Mixture-of-Experts with Gradient Conflict-Driven Subspace Topology Pruning for Emergent Modularity" (arXiv:2512.20291);
public code: konodiodaaaaa1/Conflict-Driven-Subspace-Pruning-Mixture-of-Experts. There is one feed-forward, whose hidden
units are cut into one territory for each of N experts. A matrix A (N, N) says how strongly expert i may use that of j:

    I_i = sigma(A_i) over the units, constant on a territory       S_i = the r units of largest I_i, ties by number
    expert_i(x) = V[:, S_i] silu(U[S_i] x) s_i                     s_i = mean of I_i over S_i
    y = sum over the top K of softmax(router) times expert_i(x)    router: linear in LN(x) and a vector for the task

With r = D_b / sqrt(N) and N a square, S_i is the sqrt(N) whole territories that i is most strongly linked with. s_i is
the only way from the task's loss to A. The other is a game with a lag of one step. In a backward pass each expert's
gradient of U[S_i] is kept, and in the next forward

    c_ij = cosine of G_i and G_j on the units of both, 0 if they share none        conflict_ij = relu(-c_ij)
    L = sum over i != j of sigma(A_ij) conflict_ij                                  i and j in use now and then

so that experts that pulled what they share in opposite directions are linked less. It is no balance loss, and there is
none. The vector of the task is left out for some samples, so that tokens are routed by what they are.

The paper's page and its code differ, and both are here, see `VARIANTS`. The code keeps the gradient of an expert's last
top-K slot only, draws one mask of tasks for a batch, and normalises over a whole sample in the router: here gradients
are added up, the mask is drawn for each sample, and tokens are normalised one by one, in every variant.

Tensor letters: N tokens, D model width, D_b units of the shared feed-forward, E experts, r units of an expert.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.balance import BALANCE_LOSSES
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.recompute import recomputing
from workbench.lib.core.routers import TopKRouter
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.train import TrainConfig, make_optimizer
from workbench.lib.measures.conflict import overlap_cosine

METHOD = Method(
    slug="cdsp-moe",
    title="CDSP-MoE: Gradient Conflict-Driven Subspace Topology Pruning for Emergent Modularity",
    family="subspaces",
    year=2025,
    paper="arXiv:2512.20291",
    claim="Cutting the overlap of experts whose gradients conflict makes modular, content-driven routing emerge "
    "without task labels or a balance loss.",
    objects=("CDSPMoELayer", "SharedSubspaceBackbone", "SubspaceTopology", "GradientBuffer"),
)

VARIANTS = ("readme", "code", "ours")
"""What is penalised.

readme: sigma(A_ij) by the conflict. code: A_ij itself, from 0.001 up, so that a link once cut stays at half strength.
Both regularise the mean of |A|, which pulls sigma(A) to 1/2. ours: as readme, with the mean of sigma(A) regularised.
"""
CUT_OFF = 1e-3
UNKNOWN = -1
"""The task of a token of which it is not known, or not said."""


def example() -> nn.Module:
    """Nine experts of 36 units each in a shared feed-forward of 108."""
    return CDSPMoELayer(32, 108, 9)


class SharedSubspaceBackbone(nn.Module):
    """The feed-forward V silu(U x) that all experts are in; both matrices start orthogonal. (..., D) -> (..., D).

    Unit n is row n of `up.weight` (D_b, D) and column n of `down.weight` (D, D_b).
    """

    def __init__(self, d_model: int, d_base: int):
        super().__init__()
        if min(d_model, d_base) < 1:
            raise InputError(f"d_model and d_base are {d_model} and {d_base} but must be at least 1")
        self.up = nn.Linear(d_model, d_base, bias=False)
        self.down = nn.Linear(d_base, d_model, bias=False)
        nn.init.orthogonal_(self.up.weight)
        nn.init.orthogonal_(self.down.weight)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.down(F.silu(self.up(x)))


class SubspaceTopology(nn.Module):
    """Which units each expert has, by the matrix A (E, E) of the links between experts, `logits`.

    Args:
        rank: r, the units of an expert; default D_b / sqrt(E), rounded down.
    """

    def __init__(self, n_experts: int, d_base: int, rank: int | None = None):
        super().__init__()
        if n_experts < 1 or d_base % n_experts:
            raise InputError(
                f"d_base is {d_base} but must be divisible by n_experts = {n_experts}, which is at least 1"
            )
        rank = int(d_base / n_experts**0.5 + 1e-9) if rank is None else rank
        if not 1 <= rank <= d_base:
            raise InputError(f"rank is {rank} but must be between 1 and d_base = {d_base}")
        self.n_experts, self.d_base, self.rank = n_experts, d_base, rank
        links = 0.1 + 0.02 * torch.randn(n_experts, n_experts)
        self.logits = nn.Parameter(links.fill_diagonal_(1.0))

    def strengths(self) -> Float[Tensor, "experts experts"]:
        """sigma(A): how strongly expert i is linked with the territory of expert j; 0 .. 1."""
        return self.logits.sigmoid()

    def influence(self) -> Float[Tensor, "experts units"]:
        """I: the strength of every expert at every unit."""
        return self.strengths().repeat_interleave(self.d_base // self.n_experts, 1)

    def select(self) -> tuple[Int64[Tensor, "experts rank"], Float[Tensor, " experts"]]:
        """S and s: the units of each expert, the most strongly linked first, and their mean strength."""
        influence = self.influence()
        units = influence.detach().sort(dim=1, descending=True, stable=True).indices[:, : self.rank]
        return units, influence.gather(1, units).mean(1)

    def overlap(self) -> Float[Tensor, "experts experts"]:
        """The share of an expert's units that another one has as well; 1 on the diagonal."""
        own = owned(self.select()[0], self.d_base).to(self.logits.dtype)
        return own @ own.T / self.rank

    def regularisation(self, variant: str) -> Float[Tensor, ""]:
        """1e-4 mean |A| + 1e-3 mean sigma(A) (1 - sigma(A)); of "ours" the mean of sigma(A) in place of that of |A|."""
        strengths = self.strengths()
        size = strengths if variant == "ours" else self.logits.abs()
        return 1e-4 * size.mean() + 1e-3 * (strengths * (1 - strengths)).mean()


class GradientBuffer(nn.Module):
    """The gradient of each expert's rows of U in the last backward pass, and those of the one before it, to be read.

    What is captured is saved with the model: a run that goes on from a checkpoint plays the same game.
    """

    def __init__(self, n_experts: int, rank: int, d_model: int):
        super().__init__()
        self.register_buffer("gradient", torch.zeros(n_experts, rank, d_model))
        self.register_buffer("units", torch.zeros(n_experts, rank, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(n_experts, dtype=torch.bool))
        self.register_buffer("last_gradient", torch.zeros(n_experts, rank, d_model), persistent=False)
        self.register_buffer("last_units", torch.zeros(n_experts, rank, dtype=torch.int64), persistent=False)
        self.register_buffer("last_seen", torch.zeros(n_experts, dtype=torch.bool), persistent=False)

    def hook(
        self,
        parts: Float[Tensor, "experts rank dim"],
        units: Int64[Tensor, "experts rank"],
        used: Bool[Tensor, " experts"],
    ) -> None:
        """Add to what is captured the gradient that `parts` will have, for each expert in use its rows `units` of U."""

        def capture(gradient: Tensor) -> None:
            self.gradient += gradient.detach()
            self.units[used] = units[used]
            self.seen |= used

        parts.register_hook(capture)

    def turn(self, shuffle: bool = False) -> None:
        """Before a forward in training: what was captured since the last one is what is read from now on.

        Forwards without a backward in between read the same, and add up.

        Args:
            shuffle: each expert in use is given what another one of them had, drawn from torch's global generator.
        """
        used = self.seen.nonzero()[:, 0]
        if not len(used):
            return
        taken = used
        if shuffle:
            used = used[torch.randperm(len(used), device=used.device)]
            taken = used.roll(1)
        pairs = ((self.last_gradient, self.gradient), (self.last_units, self.units), (self.last_seen, self.seen))
        for last, now in pairs:
            last.zero_()
            last[used] = now[taken]
        self.clear()

    def read(self) -> dict[int, tuple[Float[Tensor, "rank dim"], Int64[Tensor, " rank"]]]:
        """Expert -> its gradient of the step before and the units that it is of, for the experts that were in use."""
        return {i: (self.last_gradient[i], self.last_units[i]) for i in self.last_seen.nonzero()[:, 0].tolist()}

    def clear(self) -> None:
        """Forget what was captured."""
        for now in (self.gradient, self.units, self.seen):
            now.zero_()

    def cosines(self, d_base: int) -> Float64[Tensor, "experts experts"]:
        """c_ij of what is read; NaN where two experts share no unit or one was not in use."""
        shared = owned(self.last_units, d_base) & self.last_seen[:, None]
        whole = self.last_gradient.new_zeros(*shared.shape, self.last_gradient.shape[-1])
        whole.scatter_(1, self.last_units[..., None].expand_as(self.last_gradient), self.last_gradient)
        return overlap_cosine(whole.flatten(1), shared.repeat_interleave(whole.shape[-1], 1))


def owned(units: Int64[Tensor, "experts rank"], d_base: int) -> Bool[Tensor, "experts units"]:
    """(E, D_b) True where the unit is one of the expert's."""
    return torch.zeros(len(units), d_base, dtype=torch.bool, device=units.device).scatter_(1, units, True)


def aligned_cosine(
    ga: Float[Tensor, "rank_a dim"],
    ia: Int64[Tensor, " rank_a"],
    gb: Float[Tensor, "rank_b dim"],
    ib: Int64[Tensor, " rank_b"],
) -> Float64[Tensor, ""]:
    """c of two experts' gradients, a row for each of their units, over the units of both.

    As in the paper's penalty it is 0 where they share none, or one has no gradient there.
    """
    mine, theirs = (ia[:, None] == ib).nonzero(as_tuple=True)
    a, b = ga[mine].double().flatten(), gb[theirs].double().flatten()
    return ((a @ b) / (a.norm() * b.norm())).nan_to_num(0.0)


def conflict_loss(
    topology: SubspaceTopology, buffer: GradientBuffer, active: Bool[Tensor, " experts"], variant: str = "readme"
) -> Float[Tensor, ""]:
    """L: what the links of experts in conflict cost, by the gradients of the step before. Its gradient reaches A alone.

    Args:
        active: experts that are in use now.
        variant: one of `VARIANTS`.
    """
    conflict = (-buffer.cosines(topology.d_base)).clamp(min=0).nan_to_num(0.0) * (active[:, None] & active)
    conflict.fill_diagonal_(0.0)
    links = topology.strengths()
    if variant == "code":
        links = topology.logits * (topology.logits >= CUT_OFF)
    return (links * conflict.to(links.dtype)).sum()


@dataclass(frozen=True)
class CDSPStats:
    """What stands in a layer now.

    Attributes:
        cosine: (E, E) c_ij of the step before; NaN where two experts share no unit or one was not in use.
        strength: (E, E) sigma(A).
        overlap: (E, E) share of an expert's units that the other one has, too.
    """

    cosine: Float64[Tensor, "experts experts"]
    strength: Float[Tensor, "experts experts"]
    overlap: Float[Tensor, "experts experts"]

    def summary(self) -> dict[str, Tensor]:
        """Means over ordered pairs of experts; NaN without a pair.

        The rate of conflict and the mean cosine, of the pairs that have one; the link and the overlap of those in
        conflict, and of those that agree. If the game parts what conflicts, the first of the two are the smaller ones.
        """
        against, agree = self.cosine < 0, (self.cosine >= 0).fill_diagonal_(False)
        pairs = against | agree
        return {
            "conflict rate": against[pairs].double().mean(),
            "mean cosine": self.cosine[pairs].mean(),
            "link in conflict": self.strength[against].mean(),
            "link in agreement": self.strength[agree].mean(),
            "overlap in conflict": self.overlap[against].mean(),
            "overlap in agreement": self.overlap[agree].mean(),
        }


class TaskRouter(TopKRouter):
    """Logits linear in LN(x) and a vector of the token's task, `context.domain`; without one the vector is zero.

    Args:
        n_tasks: tasks that have a vector; 0 for a router that knows of none.
        d_task: its width.
        options: of `TopKRouter`.
    """

    def __init__(self, d_model: int, n_experts: int, top_k: int, n_tasks: int = 0, d_task: int = 16, **options):
        super().__init__(n_experts, top_k, **options)
        if n_tasks < 0 or d_task < 1:
            raise InputError(f"n_tasks and d_task are {n_tasks} and {d_task} but must be at least 0 and 1")
        self.norm = nn.LayerNorm(d_model)
        self.tasks = nn.Embedding(n_tasks, d_task) if n_tasks else None
        self.projection = nn.Linear(d_model + (d_task if n_tasks else 0), n_experts)

    def scores(self, x: Float[Tensor, "tokens dim"], context: Context) -> Float[Tensor, "tokens experts"]:
        x = self.norm(x)
        if self.tasks is not None:
            x = torch.cat([x, self._vector(x, context.domain)], 1)
        return self.projection(x)

    def route(self, logits: Float[Tensor, "tokens experts"], mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        """As in `TopKRouter`, whose losses are those of balance; the layer makes the others in `coefficients`."""
        every = self.coefficients
        self.coefficients = {name: value for name, value in every.items() if name in BALANCE_LOSSES}
        try:
            return super().route(logits, mask)
        finally:
            self.coefficients = every

    def _vector(self, x: Tensor, task: Tensor | None) -> Float[Tensor, "tokens d_task"]:
        if task is None:
            return x.new_zeros(len(x), self.tasks.embedding_dim)
        n_tasks = self.tasks.num_embeddings
        if task.shape != x.shape[:1] or not bool(((task >= UNKNOWN) & (task < n_tasks)).all()):
            raise InputError(
                f"context.domain has shape {tuple(task.shape)} and values from {task.tolist()[:4]}... but must hold a "
                f"task from 0 to {n_tasks - 1}, or {UNKNOWN} for unknown, for each of {len(x)} tokens"
            )
        return self.tasks(task.clamp(min=0)) * (task > UNKNOWN)[:, None]


class CDSPMoELayer(MoELayer):
    """The mixture, with its two losses as `routing.losses`, "conflict" and "topology". (..., D) -> (..., D).

    Args:
        d_base: D_b, a multiple of `n_experts`.
        n_experts: E; a square, so that experts have whole territories.
        n_tasks: tasks that have a vector in the router; 0 for none. `context.domain` says which.
        rank: r; default D_b / sqrt(E).
        p_task_drop: in training, the probability that the task of a sample, a row of the first axis, is not told.
        variant: one of `VARIANTS`.
        conflict, regularisation: coefficients of the losses; the paper's are both 10.
        shuffle_lag: give each expert the gradients of another one: as much conflict, between the wrong experts.
        balance: coefficients of balance losses, as in `TopKRouter`; the paper has none.
    """

    def __init__(
        self,
        d_model: int,
        d_base: int,
        n_experts: int,
        n_tasks: int = 0,
        top_k: int = 2,
        rank: int | None = None,
        p_task_drop: float = 0.1,
        variant: str = "readme",
        conflict: float = 10.0,
        regularisation: float = 10.0,
        shuffle_lag: bool = False,
        balance: dict[str, float] | None = None,
    ):
        if variant not in VARIANTS:
            raise unknown("variant", variant, VARIANTS)
        for name, value in (("conflict", conflict), ("regularisation", regularisation)):
            if not value >= 0:
                raise InputError(f"{name} is {value} but must be at least 0")
        if not 0 <= p_task_drop <= 1:
            raise InputError(f"p_task_drop is {p_task_drop} but must be between 0 and 1")
        backbone, topology = SharedSubspaceBackbone(d_model, d_base), SubspaceTopology(n_experts, d_base, rank)
        buffer = GradientBuffer(n_experts, topology.rank, d_model)
        router = TaskRouter(d_model, n_experts, top_k, n_tasks, coefficients=balance)
        router.coefficients |= {"conflict": conflict, "topology": regularisation}
        super().__init__(router, _Experts(backbone, topology, buffer))
        self.backbone, self.topology, self.buffer = backbone, topology, buffer
        self.p_task_drop, self.variant, self.shuffle_lag = p_task_drop, variant, shuffle_lag

    def forward(self, x: Float[Tensor, "*batch dim"], context: Context | None = None) -> Float[Tensor, "*batch dim"]:
        context = context if context is not None else Context()
        tokens = x.reshape(-1, x.shape[-1])
        if self.training and not recomputing():
            self.buffer.turn(self.shuffle_lag)
        told = self.told(tokens, context)
        routing = self.router(tokens, replace(told, domain=self._dropped(tokens, len(x), told.domain)))
        active = routing.counts > 0
        routing.losses["conflict"] = conflict_loss(self.topology, self.buffer, active, self.variant)
        routing.losses["topology"] = self.topology.regularisation(self.variant)
        return self.serve(tokens, routing, context).view_as(x)

    def _dropped(self, tokens: Tensor, samples: int, task: Tensor | None) -> Tensor | None:
        """The tasks (N,) that the router is told."""
        if task is None or task.shape != tokens.shape[:1] or not self.training or not self.p_task_drop:
            return task
        drop = torch.rand(samples, device=tokens.device) < self.p_task_drop
        return task.masked_fill(drop.repeat_interleave(len(tokens) // samples), UNKNOWN)

    @torch.no_grad()
    def stats(self) -> CDSPStats:
        """Conflict, links and overlap as they stand."""
        return CDSPStats(self.buffer.cosines(self.topology.d_base), self.topology.strengths(), self.topology.overlap())

    def form_now(self) -> dict[str, float | Tensor]:
        """What a live view shows over time: whether what conflicts is what is parted."""
        stats = self.stats()
        numbers = {name: float(value) for name, value in stats.summary().items()}
        return numbers | {"cosine": stats.cosine, "overlap": stats.overlap, "links": stats.strength}


class _Experts:
    """The bank that a `MoELayer` calls. No module: the parameters are the layer's, and every token may use all."""

    def __init__(self, backbone: SharedSubspaceBackbone, topology: SubspaceTopology, buffer: GradientBuffer):
        self.backbone, self.topology, self.buffer = backbone, topology, buffer
        self.n_experts = topology.n_experts

    def __call__(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Float[Tensor, "tokens dim"]:
        units, strength = self.topology.select()
        ups = self.backbone.up.weight.index_select(0, units.flatten()).unflatten(0, units.shape)  # (E, r, D)
        downs = self.backbone.down.weight.index_select(1, units.flatten()).unflatten(1, units.shape)  # (D, E, r)
        if self.buffer.training and ups.requires_grad:
            self.buffer.hook(ups, units, routing.counts > 0)
        order = routing.expert.argsort(stable=True)
        token, expert = routing.token[order], routing.expert[order]
        rows = x.index_select(0, token).split(routing.counts.tolist())
        hidden = zip(rows, ups.unbind(), downs.unbind(1), strict=True)
        y = torch.cat([F.linear(F.silu(F.linear(row, up)), down) for row, up, down in hidden if len(row)])
        weight = routing.weight.index_select(0, order) * strength.index_select(0, expert)
        return torch.zeros_like(x).index_add(0, token, (y * weight[:, None]).to(x.dtype))


def two_speeds(model: nn.Module, config: TrainConfig, scale: float = 10.0) -> torch.optim.AdamW:
    """The optimizer of `lib.core.train` with the topologies apart: `scale` times the learning rate, and no decay."""
    found = {id(m.logits): m.logits for m in model.modules() if isinstance(m, SubspaceTopology)}
    optimizer = make_optimizer(model, config)
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in found]
    links = [p for p in found.values() if p.requires_grad]
    if links:
        optimizer.add_param_group({"params": links, "weight_decay": 0.0, "lr_scale": scale})
    return optimizer


def cdsp_layers(model: nn.Module) -> dict[str, CDSPMoELayer]:
    """The layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CDSPMoELayer)}
