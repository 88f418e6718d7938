"""ScaleZero: a mixture of experts in a world model of many tasks, and capacity that is added in stages.

Pu et al. 2025, "One Model for All Tasks: Leveraging Efficient World Models in Multi-Task Planning" (arXiv:2509.07945);
public code: opendilab/LightZero. Two parts of it, apart from the planning:

    mixture    y = sum over the top K of w_e expert_e(x) + shared(x)     SwiGLU experts, a shared GELU perceptron; the
                                                                         gate is linear in the token, without a balance
    stages     W_eff = a_0 W_0 + sum over j <= s of a_j (alpha / r) B_j A_j      in stage s, of attention and experts

The released gate takes the softmax over the selected logits. With K = 1 that is the constant 1: the gate has no
gradient, and tokens are sent by a random projection that is never trained. `gate_norm="selected"` is that gate, and
"full", the softmax over all experts first, one that learns.

In stage 0 W_0 and the biases train. Stage s trains A_s, B_s and the scales a_j of what was there before, a_j = 1 + 0.2
tanh(.); everything else in the transformer is frozen, for good. (In the released code a helper that runs after the
switch trains every adapter again, by the pattern of its name, until the next one; here it is as in the text.) B is 0 at
first and a is 1, so a switch changes no output.

A task whose return reaches its target is solved. It is neither collected nor trained any more, and of those that are
left each stage has its share to solve before the next one begins: `DPSController`.

Tensor letters: N tokens, D model width, E experts, K active, r rank, I and O widths of a linear layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.adapt.adapted import replace_module
from workbench.lib.core.experts import GLU
from workbench.lib.core.low_rank import check_rank
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context, Routing

METHOD = Method(
    slug="scalezero",
    title="ScaleZero: One Model for All Tasks: Leveraging Efficient World Models in Multi-Task Planning",
    family="subspaces",
    year=2025,
    paper="arXiv:2509.07945",
    claim="Experts in the world model and capacity added in stages lower gradient conflict, so one model matches "
    "single-task agents with fewer interactions.",
    objects=("SharedRoutedMoE", "StagedLoRALinear", "add_stages", "enter_stage", "DPSController"),
)

GATE_NORMS = ("full", "selected")


def example() -> nn.Module:
    """Four experts of which a token passes one, and one that all pass."""
    return SharedRoutedMoE(32, 4, d_hidden=48)


class Gate(LinearRouter):
    """logits = x W, the top K, and weights of the softmax over all logits or over the selected ones.

    Args:
        gate_norm: "full" or "selected", see the module.
        n_tasks: tasks that have a vector, which is added to the token at the gate; 0 for the released gate, which sees
            the token alone. `context.domain` says which.
    """

    def __init__(self, d_model: int, n_experts: int, top_k: int, gate_norm: str = "full", n_tasks: int = 0):
        if gate_norm not in GATE_NORMS:
            raise unknown("gate_norm", gate_norm, GATE_NORMS)
        if n_tasks < 0:
            raise InputError(f"n_tasks is {n_tasks} but must be at least 0")
        super().__init__(d_model, n_experts, top_k, renormalize=False)
        self.gate_norm = gate_norm
        self.tasks = nn.Embedding(n_tasks, d_model) if n_tasks else None

    def scores(self, x: Float[Tensor, "tokens dim"], context: Context) -> Float[Tensor, "tokens experts"]:
        if self.tasks is None:
            return super().scores(x, context)
        task, n_tasks = context.domain, self.tasks.num_embeddings
        if task is None or task.shape != x.shape[:1] or not bool(((task >= 0) & (task < n_tasks)).all()):
            raise InputError(f"context.domain must hold a task from 0 to {n_tasks - 1} for each of {len(x)} tokens")
        return super().scores(x + self.tasks(task), context)

    def route(self, logits: Float[Tensor, "tokens experts"], mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        routing = super().route(logits, mask)
        if self.gate_norm == "selected":
            routing.weight = routing.logits.gather(1, routing.indices).softmax(-1).flatten()
        return routing


class SeparateExperts(nn.ModuleList):
    """A bank of SwiGLU experts each of which is a module of its own, so that its linear layers may be replaced."""

    def __init__(self, n_experts: int, d_model: int, d_hidden: int):
        super().__init__(GLU(d_model, d_hidden) for _ in range(n_experts))
        self.n_experts = n_experts

    def forward(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Float[Tensor, "tokens dim"]:
        order = routing.expert.argsort(stable=True)
        token, weight = routing.token[order], routing.weight.index_select(0, order)
        rows = x.index_select(0, token).split(routing.counts.tolist())
        y = torch.cat([expert(row) for expert, row in zip(self, rows, strict=True) if len(row)])
        return torch.zeros_like(x).index_add(0, token, (y * weight[:, None]).to(x.dtype))


class SharedRoutedMoE(MoELayer):
    """The mixture. (..., D) -> (..., D).

    Args:
        n_experts: E, routed.
        n_shared: the shared expert is as wide as this many; 0 for none.
        gate_norm, n_tasks: see `Gate`.
        d_hidden: of an expert; default 4 D.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int = 1,
        n_shared: int = 1,
        gate_norm: str = "full",
        n_tasks: int = 0,
        d_hidden: int | None = None,
    ):
        hidden = 4 * d_model if d_hidden is None else d_hidden
        if hidden < 1 or n_shared < 0:
            raise InputError(f"d_hidden and n_shared are {hidden} and {n_shared} but must be at least 1 and 0")
        router = Gate(d_model, n_experts, top_k, gate_norm, n_tasks)
        width = n_shared * hidden
        shared = nn.Sequential(nn.Linear(d_model, width), nn.GELU(), nn.Linear(width, d_model)) if n_shared else None
        super().__init__(router, SeparateExperts(n_experts, d_model, hidden), shared)


# -- capacity in stages


class StagedLoRALinear(nn.Module):
    """A linear layer with one adapter for each stage after the first, and a scale for everything.

    Attributes:
        stage: s. `set_stage` enters it, and a state dict from another stage does.
        a, b: the factors A_j (r, I), from N(0, 0.01^2), and B_j (O, r), zero, of stages 1 .. n.
        logits: () each; a_j = 1 + scale_range tanh(logits_j), a_0 that of W_0.

    Args:
        linear: W_0 and its bias, which is not scaled. Its parameters are kept, not copied.
        rank, alpha: of an adapter.
        n_adapters: n, stages after stage 0.
        scale_range: how far a scale may leave 1.
        dropout: of the adapters' input.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float,
        n_adapters: int,
        scale_range: float = 0.2,
        dropout: float = 0.0,
    ):
        super().__init__()
        if type(linear) is not nn.Linear:
            raise InputError(f"linear is a {type(linear).__name__} but must be an nn.Linear")
        check_rank(rank, linear.in_features, linear.out_features)
        if n_adapters < 1 or not 0 < scale_range < 1:
            raise InputError(f"n_adapters is {n_adapters}, scale_range {scale_range} but must be >= 1, between 0 and 1")
        self.linear, self.rank, self.scale_range = linear, rank, scale_range
        self.factor, self.dropout = alpha / rank, nn.Dropout(dropout)
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        stages = range(n_adapters)
        self.a = nn.ParameterList(0.01 * torch.randn(rank, linear.in_features, **like) for _ in stages)
        self.b = nn.ParameterList(torch.zeros(linear.out_features, rank, **like) for _ in stages)
        self.logits = nn.ParameterList(torch.zeros((), **like) for _ in range(n_adapters + 1))
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))
        self.set_stage(0)

    @property
    def n_adapters(self) -> int:
        return len(self.a)

    def set_stage(self, stage: int) -> None:
        """Enter a stage: what it trains is trained, everything else of this layer is frozen and loses its gradient."""
        if not 0 <= stage <= self.n_adapters:
            raise InputError(f"stage is {stage} but must be between 0 and {self.n_adapters}")
        self.stage.fill_(stage)
        for parameter in self.parameters():
            freeze(parameter)
        new = self.linear.parameters() if stage == 0 else (self.a[stage - 1], self.b[stage - 1], *self.logits[:stage])
        for parameter in new:
            parameter.requires_grad_(True)

    def _load_from_state_dict(self, *given: Any) -> None:
        before = int(self.stage)
        super()._load_from_state_dict(*given)
        if (stage := int(self.stage)) != before:
            self.set_stage(stage)

    def scales(self) -> Float[Tensor, " parts"]:
        """(n + 1,) a_j."""
        return 1 + self.scale_range * torch.tanh(torch.stack(list(self.logits)))

    def effective_weight(self) -> Float[Tensor, "d_out d_in"]:
        """W_eff of this stage, without dropout."""
        scales = self.scales()
        parts = zip(self.a, self.b, scales[1:], strict=True)
        updates = [scale * self.factor * (b @ a) for a, b, scale in list(parts)[: int(self.stage)]]
        return sum(updates, scales[0] * self.linear.weight)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        if not self.dropout.p or not self.training or not int(self.stage):
            return F.linear(x, self.effective_weight(), self.linear.bias)
        scales, y = self.scales(), F.linear(x, self.scales()[0] * self.linear.weight, self.linear.bias)
        dropped = self.dropout(x)
        for j in range(int(self.stage)):
            y = y + scales[j + 1] * self.factor * F.linear(F.linear(dropped, self.a[j]), self.b[j])
        return y

    def form_now(self) -> dict[str, float | Tensor]:
        """What a live view shows over time."""
        return {"stage": float(self.stage), "scales less 1": self.scales().detach() - 1}


def add_stages(
    model: nn.Module, targets: str | Sequence[str], rank: int, alpha: float, n_adapters: int, **options: float
) -> list[str]:
    """Put `StagedLoRALinear` in the place of the linear layers whose names match, and return these names.

    Args:
        targets: patterns of names, such as "*.attention.*".
        options: `scale_range` and `dropout`.

    Raises:
        InputError: nothing matches, or something that does is no `nn.Linear`. What has stages already does not match.
    """
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    staged = {module.linear for module in model.modules() if isinstance(module, StagedLoRALinear)}
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module not in staged
        and name
        and any(fnmatch(name, pattern) for pattern in patterns)
    ]
    if not found:
        raise InputError(f"targets is {list(patterns)} but no linear layer of the model has a name that matches")
    layers = {name: StagedLoRALinear(model.get_submodule(name), rank, alpha, n_adapters, **options) for name in found}
    for layer in layers.values():
        replace_module(model, layer.linear, layer)
    return found


def enter_stage(transformer: nn.Module, stage: int) -> None:
    """Every staged layer of a transformer enters the stage; after the first, all its other parameters are frozen.

    What lies outside, such as encoders and heads, is left alone. After a state dict is loaded this has to be called
    too: it says of staged layers what they train, and of no others. An optimizer may hold all parameters from the
    beginning: what is frozen has no gradient, so that torch's optimizers neither move nor decay it.

    Raises:
        InputError: no layer of it is staged, or the stage is none of theirs.
    """
    staged = [module for module in transformer.modules() if isinstance(module, StagedLoRALinear)]
    if not staged:
        raise InputError(f"transformer is a {type(transformer).__name__} without a StagedLoRALinear: see add_stages")
    for layer in staged:
        layer.set_stage(stage)
    if stage:
        own = {id(parameter) for layer in staged for parameter in layer.parameters()}
        for parameter in transformer.parameters():
            if id(parameter) not in own:
                freeze(parameter)


def freeze(parameter: nn.Parameter) -> None:
    """No gradient from now on, and none that is left from before."""
    parameter.requires_grad_(False)
    parameter.grad = None


@dataclass(frozen=True)
class StageEvent:
    """A stage that begins.

    Attributes:
        stage: its number.
        step: when.
        solved: tasks that were solved in the stage before, in the order of their numbers.
        why: "solved", its share of the tasks was, or "time", the stage before had lasted as long as it may.
    """

    stage: int
    step: int
    solved: tuple[int, ...]
    why: str


class DPSController:
    """When tasks are over and stages begin. It draws nothing: the same updates give the same events.

    Args:
        n_tasks: how many there are.
        n_stages: S in all, stage 0 with them: S - 1 adapters.
        min_stage0: steps that stage 0 lasts at least.
        max_stage: steps after which the next one begins, whatever is solved (but never within `min_stage0`).

    Attributes:
        stage: now.
        events: all that was returned.
        solved_at: task -> the step at which it was solved.
    """

    def __init__(self, n_tasks: int, n_stages: int, min_stage0: int, max_stage: int):
        for name, value, low in (
            ("n_tasks", n_tasks, 1),
            ("n_stages", n_stages, 1),
            ("min_stage0", min_stage0, 0),
            ("max_stage", max_stage, 1),
        ):
            if value < low:
                raise InputError(f"{name} is {value} but must be at least {low}")
        self.n_tasks, self.n_stages, self.min_stage0, self.max_stage = n_tasks, n_stages, min_stage0, max_stage
        self.stage, self.began, self._last = 0, 0, 0
        self.events: list[StageEvent] = []
        self.solved_at: dict[int, int] = {}
        self._before: set[int] = set()  # solved when this stage began

    @property
    def active_tasks(self) -> list[int]:
        """Those that are not solved."""
        return [task for task in range(self.n_tasks) if task not in self.solved_at]

    @property
    def quota(self) -> int | None:
        """Tasks to be solved in this stage before the next one: its share of those that were left; None in the last."""
        left = self.n_stages - 1 - self.stage
        return max(1, math.ceil((self.n_tasks - len(self._before)) / left)) if left else None

    def update(self, returns: Sequence[float], targets: Sequence[float], step: int) -> StageEvent | None:
        """Take an evaluation of all tasks; of those that are solved the values are not looked at.

        Args:
            returns: higher is better.
            step: steps made, no fewer than at the update before.
        """
        if len(returns) != self.n_tasks or len(targets) != self.n_tasks:
            raise InputError(f"returns and targets have {len(returns)} and {len(targets)} values, not {self.n_tasks}")
        if step < self._last:
            raise InputError(f"step is {step} but must be at least {self._last}, that of the update before")
        for task in self.active_tasks:
            if math.isnan(returns[task]) or math.isnan(targets[task]):
                raise InputError(f"returns or targets of task {task} is not a number")
        self._last = step
        self.solved_at |= {task: step for task in self.active_tasks if returns[task] >= targets[task]}
        newly, lasted = set(self.solved_at) - self._before, step - self.began
        if self.quota is None or not self.active_tasks or (self.stage == 0 and lasted < self.min_stage0):
            return None
        if len(newly) < self.quota and lasted < self.max_stage:
            return None
        why = "solved" if len(newly) >= self.quota else "time"
        self.stage, self.began, self._before = self.stage + 1, step, set(self.solved_at)
        self.events.append(StageEvent(self.stage, step, tuple(sorted(newly)), why))
        return self.events[-1]
