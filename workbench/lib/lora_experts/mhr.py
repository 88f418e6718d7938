"""MHR: each task mixes an inventory of LoRAs in their parameters, block by block.

Caccia et al. 2023, "Multi-Head Adapter Routing for Cross-Task Generalization" (arXiv:2211.03831); public code:
microsoft/mttl, tag mhr-camera-ready; `tuners/poly` of Hugging Face's peft has the layer. For a linear layer W (O, I),
S skills (A_s (r, I), B_s (O, r)) and the task t:

    zeta = sigmoid(Z_t), Z (T, H S);   a_hs = zeta_hs / (sum_s zeta_hs + 1e-12)
    A = [sum_s a_1s A_s1 | ... | sum_s a_Hs A_sH],  A_sh (r, I / H) the h-th block of inputs of A_s
    B = sum_s a_hs B_sh, one block of O / H outputs below the other
    y = W x + (alpha / r) B A x

The inputs and the outputs are split in H heads, not the rank, so the number of parameters in A and B does not depend on
H: S r (I + O), and T H S in the router. One head is Poly (Ponti et al. 2022, 2202.13914). Parameters are mixed, not
outputs: the update has rank r at most, and cross terms B_s A_u. In training zeta is a relaxed Bernoulli sample at
temperature 1, drawn for each row of the batch and in each layer; in evaluation it is the sigmoid, so that the mixture
evaluated is not the mean of those trained. The logits start in U(-0.001, 0.001), nearly uniform, and would stay there
at the learning rate of the skills: the paper's is 0.1 for them and 0.001 for the skills.

A model trained on many tasks is taken to new ones by `to_new_tasks`: everything trained from fresh logits ("all"), the
fresh logits alone, H S numbers a layer (MHR-z, "router"), or the skills under the constant mixture 1 / S (MHR-mu,
"skills"), which is one LoRA and can be merged back.

Of the released code's variants these are here: a selector for each linear layer, heads 1 to H, relaxed or not. Not
here: selectors shared by layers, straight-through rounding, other normalisations, a skill that is always on, and the
annealing towards 1 / S, which task dropout takes the place of.

Tensor letters: N tokens, G groups of consecutive tokens that share a task, I inputs, O outputs, S skills, H heads,
T tasks, r rank.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.adapt import Adapted, Adapter, RoutedLayer, adapt
from workbench.lib.core.adapt.layer import plain
from workbench.lib.core.low_rank import LowRankExperts, fitting_rank
from workbench.lib.core.modes import evaluating
from workbench.lib.core.routing import Context, Routing

METHOD = Method(
    slug="mhr",
    title="MHR: Multi-Head Adapter Routing for Cross-Task Generalization",
    family="lora_experts",
    year=2022,
    paper="arXiv:2211.03831",
    claim="Routing blocks of an adapter per task adapts to new tasks from few examples better than routing whole "
    "adapters or sharing one.",
    objects=("MHR", "TaskRouter", "MultiHeadLinear", "to_new_tasks", "allocations", "monitors"),
)

TUNE = ("all", "router", "skills")
"""What is trained: skills and router; the router alone (MHR-z); the skills under a uniform mixture (MHR-mu)."""

EPS = 1e-12


class Told(nn.Sequential):
    """A model whose rows belong to the tasks 0, 1, ..., T - 1, 0, ... in turn, and that is told so."""

    def forward(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        layer = self[0]
        layer.side.given["task"] = torch.arange(len(x)) % layer.router.n_tasks
        return super().forward(x)


def example() -> nn.Module:
    """A linear layer with four skills in eight heads, for rows of three tasks."""
    return adapt(Told(nn.Linear(32, 32)), "mhr", experts=4, heads=8, tasks=3).model


class TaskRouter(nn.Module):
    """Which mixture of the skills each head takes for a task. A `Router` of the core: the task is `context.domain`.

    Attributes:
        logits: (T, H S) Z.
        average: the mixture is 1 / S for every task, whatever the logits.

    Args:
        relaxed: sample in training, see the module's docstring.
        task_dropout: share of the rows, in training, whose task is withheld: they get the mixture 1 / S.
    """

    def __init__(
        self, n_tasks: int, n_skills: int, n_heads: int = 1, *, relaxed: bool = True, task_dropout: float = 0.0
    ):
        super().__init__()
        if min(n_tasks, n_skills, n_heads) < 1:
            raise InputError(f"tasks, experts, heads are {n_tasks}, {n_skills}, {n_heads} but must all be at least 1")
        if not 0 <= task_dropout < 1:
            raise InputError(f"task_dropout is {task_dropout} but must be at least 0 and below 1")
        self.n_experts, self.top_k, self.n_heads = n_skills, n_skills, n_heads
        self.coefficients: dict[str, float] = {}
        self.relaxed, self.task_dropout, self.average = relaxed, task_dropout, False
        self.renew(n_tasks)

    @property
    def n_tasks(self) -> int:
        return self.logits.shape[0]

    @property
    def draws(self) -> bool:
        """Whether rows of one task get mixtures of their own."""
        return self.training and not self.average and (self.relaxed or self.task_dropout > 0)

    def renew(self, n_tasks: int) -> None:
        """Forget the tasks; new ones start from fresh logits, never from those of a trained task."""
        like = self.logits if hasattr(self, "logits") else torch.empty(0)
        fresh = torch.empty(n_tasks, self.n_heads * self.n_experts, dtype=like.dtype, device=like.device)
        self.logits = nn.Parameter(fresh.uniform_(-1e-3, 1e-3))

    def mixing(self, tasks: Int64[Tensor, " groups"] | None) -> Float[Tensor, "groups heads skills"]:
        """a, rows sum to 1; without a task, 1 / S for one group.

        Raises:
            InputError: a task is not one of 0 .. T - 1.
        """
        if tasks is not None and ((tasks < 0) | (tasks >= self.n_tasks)).any():
            raise InputError(
                f"task holds {int(tasks.min())} to {int(tasks.max())} but must be from 0 to tasks - 1 = "
                f"{self.n_tasks - 1}"
            )
        wide = torch.promote_types(self.logits.dtype, torch.float32)
        if tasks is None or self.average:
            groups = 1 if tasks is None else len(tasks)
            return self.logits.new_full((groups, self.n_heads, self.n_experts), 1 / self.n_experts, dtype=wide)
        logits = self.logits.to(wide)[tasks]
        logits = logits.unflatten(1, (self.n_heads, self.n_experts))
        if self.training and self.relaxed:
            tiny = torch.finfo(logits.dtype).eps
            u = torch.rand_like(logits).clamp(tiny, 1 - tiny)
            logits = logits + u.log() - (-u).log1p()
        zeta = torch.sigmoid(logits)
        mixing = zeta / (zeta.sum(-1, keepdim=True) + EPS)
        if self.training and self.task_dropout:
            told = torch.rand(len(tasks), 1, 1, device=mixing.device) >= self.task_dropout
            mixing = torch.where(told, mixing, 1 / self.n_experts)
        return mixing

    def allocation(self, mixing: Float[Tensor, "groups heads skills"], n_tokens: int) -> Routing:
        """A mixture as a `Routing`: every token goes to all skills, with the mean over the heads as weights."""
        share = mixing.mean(1).repeat_interleave(n_tokens // len(mixing), 0)
        indices = torch.arange(self.n_experts, device=share.device).expand(n_tokens, -1)
        return Routing.fixed(indices, share, self.n_experts, probs=share)

    def forward(self, x: Float[Tensor, "tokens dim"], context: Context | None = None) -> Routing:
        task = None if context is None else context.domain
        return self.allocation(self.mixing(task), x.shape[0])


class MultiHeadLinear(RoutedLayer):
    """y = W x + B A x, A and B mixed for the task of each row; see the module's docstring.

    Attributes:
        router: a `TaskRouter`.
        experts: the skills; the heads are blocks of their inputs and outputs.
    """

    def __init__(self, base: nn.Linear, router: TaskRouter, experts: LowRankExperts, dropout: float = 0.0):
        super().__init__(base)
        if experts.d_in % router.n_heads or experts.d_out % router.n_heads:
            raise InputError(
                f"heads is {router.n_heads} but must divide the widths of the layer, {experts.d_in} and {experts.d_out}"
            )
        self.router, self.experts, self.dropout = router, experts, nn.Dropout(dropout)

    @property
    def n_experts(self) -> int:
        return self.router.n_experts

    @property
    def top_k(self) -> int:
        return self.router.top_k

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        call = self.begin(x)
        mixing = self.router.mixing(self.groups(x, call.context.domain))
        if self.observed:
            self.tell(call, self.router.allocation(mixing, x.shape[:-1].numel()), self.router.coefficients)
        rows = self.dropout(plain(x)).reshape(len(mixing), -1, x.shape[-1])
        y = self.by_token(rows[:, 0], mixing) if rows.shape[1] == 1 and len(mixing) > 1 else self.by_group(rows, mixing)
        return self.base(x) + y.view(*x.shape[:-1], -1)

    def groups(
        self, x: Float[Tensor, "*batch d_in"], tasks: Int64[Tensor, " tokens"] | None
    ) -> Int64[Tensor, " groups"] | None:
        """(G,) the task of each of G equal runs of rows: of all, of each row of the batch, or of each token."""
        if tasks is None:
            return None
        by_row = tasks.view(x.shape[0], -1)
        if x.ndim > 2 and (by_row == by_row[:, :1]).all():
            tasks = by_row[:, 0]
        return tasks[:1] if not self.router.draws and (tasks == tasks[0]).all() else tasks

    def merged(
        self, mixing: Float[Tensor, "groups heads skills"]
    ) -> tuple[Float[Tensor, "groups rank d_in"], Float[Tensor, "groups d_out rank"]]:
        """A and (alpha / r) B of each group."""
        bank, heads = self.experts, self.router.n_heads
        scaled = mixing * bank.scale.to(mixing.dtype)
        a = torch.einsum("ghs,srhi->grhi", mixing, bank.a.unflatten(2, (heads, -1))).flatten(2)
        b = torch.einsum("ghs,shor->ghor", scaled, bank.b.unflatten(1, (heads, -1))).flatten(1, 2)
        return a, b

    def by_group(
        self, x: Float[Tensor, "groups rows d_in"], mixing: Float[Tensor, "groups heads skills"]
    ) -> Float[Tensor, "groups rows d_out"]:
        """The update by way of A and B of each group."""
        a, b = self.merged(mixing)
        return x @ a.to(x.dtype).transpose(1, 2) @ b.to(x.dtype).transpose(1, 2)

    def by_token(
        self, x: Float[Tensor, "tokens d_in"], mixing: Float[Tensor, "tokens heads skills"]
    ) -> Float[Tensor, "tokens d_out"]:
        """The same where each token is a group: N H S r numbers in place of N matrices."""
        bank, heads = self.experts, self.router.n_heads
        scaled, mixing = (mixing * bank.scale.to(mixing.dtype)).to(x.dtype), mixing.to(x.dtype)
        a, b = bank.a.to(x.dtype).unflatten(2, (heads, -1)), bank.b.to(x.dtype).unflatten(1, (heads, -1))
        codes = torch.einsum("nhi,srhi->nhsr", x.unflatten(1, (heads, -1)), a)
        code = torch.einsum("nhs,nhsr->nr", mixing, codes)
        spread = torch.einsum("nhs,nr->nhsr", scaled, code)
        return torch.einsum("nhsr,shor->nho", spread, b).flatten(1)

    def fixed_update(self) -> Tensor | None:
        if not self.router.average and self.n_experts > 1:
            return None
        mixing = self.experts.a.new_full((1, self.router.n_heads, self.n_experts), 1 / self.n_experts)
        a, b = self.merged(mixing)
        return b[0] @ a[0]


class MHR(Adapter):
    """Skills and a router over tasks on every wanted linear layer. Told: the task, 0 .. T - 1.

    Rows whose task nobody says get the uniform mixture 1 / S, the average of the skills; the router then has no
    gradient. In a model of the workbench the task is the domain of the batch.

    Trained: of a layer S r (I + O) of the skills and T H S of the router.

    Args:
        experts: S, the skills.
        rank: r; default 8, or a layer's smaller width where that is less.
        heads: H; must divide the inputs and the outputs of every layer. Default: the largest of 8, 4, 2, 1 that does.
        tasks: T.
        alpha: numerator of the scale alpha / r.
        dropout: of the update's input.
        relaxed, task_dropout: see `TaskRouter`.
        tune: of `TUNE`.
        router_lr: learning rate of the logits as a multiple of that of the skills.
    """

    slug = "mhr"
    facts = ("task",)

    def __init__(
        self,
        experts: int = 8,
        rank: int | None = None,
        heads: int | None = None,
        tasks: int = 32,
        alpha: float = 1.0,
        dropout: float = 0.0,
        relaxed: bool = True,
        task_dropout: float = 0.0,
        tune: str = "all",
        router_lr: float = 100.0,
    ):
        self.experts, self.rank, self.heads, self.tasks, self.alpha = experts, rank, heads, tasks, alpha
        self.dropout, self.relaxed, self.task_dropout = dropout, relaxed, task_dropout
        self.tune, self.router_lr = tune, router_lr
        if tune not in TUNE:
            raise unknown("tune", tune, TUNE)

    def linear(self, layer: nn.Linear, name: str) -> MultiHeadLinear:
        heads = math.gcd(8, layer.in_features, layer.out_features) if self.heads is None else self.heads
        router = TaskRouter(self.tasks, self.experts, heads, relaxed=self.relaxed, task_dropout=self.task_dropout)
        bank = LowRankExperts(
            self.experts, layer.in_features, layer.out_features, fitting_rank(self.rank, layer), self.alpha
        )
        with torch.no_grad():
            bank.a *= 3**-0.5  # the bound of the public code, 1 / sqrt(3 I)
        return MultiHeadLinear(layer, router, bank, self.dropout)

    def finish(self, adapted: Adapted) -> None:
        for layer in adapted.layers.values():
            layer.router.average = self.tune == "skills"
            layer.router.logits.requires_grad_(self.tune != "skills")
            for p in layer.experts.parameters():
                p.requires_grad_(self.tune != "router")


def to_new_tasks(adapted: Adapted, tune: str = "all", tasks: int = 1) -> Adapted:
    """Take a trained adaptation to other tasks, numbered from 0 again: fresh logits, and of `TUNE` what is trained.

    With "router" the layers train H S numbers a task and nothing else; make a new optimizer.
    """
    if not isinstance(adapted.adapter, MHR):
        raise InputError(f"adapted is an adaptation with {adapted.adapter.slug!r} but must be one with 'mhr'")
    if tune not in TUNE:
        raise unknown("tune", tune, TUNE)
    if tasks < 1:
        raise InputError(f"tasks is {tasks} but must be at least 1")
    adapted.adapter.tune, adapted.adapter.tasks = tune, tasks
    adapted.options |= {"tune": tune, "tasks": tasks}
    for layer in adapted.layers.values():
        layer.router.renew(tasks)
    adapted.adapter.finish(adapted)
    return adapted


def allocations(adapted: Adapted) -> dict[str, Float[Tensor, "tasks heads skills"]]:
    """a of every task, by layer, as in evaluation."""
    routers = {name: layer.router for name, layer in adapted.layers.items()}
    with evaluating(adapted.model):
        return {name: r.mixing(torch.arange(r.n_tasks, device=r.logits.device)) for name, r in routers.items()}


@torch.no_grad()
def monitors(router: TaskRouter) -> dict[str, float]:
    """What the logits have learned, as the public code watches it.

    Returns:
        sparsity: the share of sigmoids of 1/2 or more; discreteness: the mean entropy of the Bernoulli variables in
        bits, 1 for undecided ones; efficiency: the entropy of the mean sigmoids of the H S places over the tasks, as
        shares of their sum, divided by log H S: 1 if all are used alike. With one place it is 1.
    """
    zeta = torch.sigmoid(router.logits.double())
    used = zeta.mean(0) / zeta.mean(0).sum()
    bits = -(torch.xlogy(zeta, zeta) + torch.xlogy(1 - zeta, 1 - zeta)) / math.log(2)
    entropy = -torch.xlogy(used, used).sum()
    return {
        "sparsity": float((zeta >= 0.5).double().mean()),
        "discreteness": float(bits.mean()),
        "efficiency": float(entropy / math.log(len(used))) if len(used) > 1 else 1.0,
    }


ADAPTER = MHR
