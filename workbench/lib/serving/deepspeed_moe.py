"""DeepSpeed-MoE: more experts in deeper layers beside a fixed MLP (PR-MoE), and a distilled student (MoS).

2022, "DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI Scale"
(arXiv:2201.05596). Three ways to make a top-1 MoE smaller at the quality that it has:

    pyramid    E_l experts in layer l, few in most and more in the last: ten layers of 32 and two of 64, not 12 of 128
    residual   y = c_0 MoE(x) + c_1 MLP(x),  (c_0, c_1) = softmax(x W_c + b_c): what top-2 computes, sent like top-1
    students   the same model with an eighth fewer layers, trained anew; to its loss comes
               beta tau^2 KL(teacher_tau || student_tau) at every token, until `stop_step` and not a step longer

The gate is that of the release: softmax over the experts in float32, places for C = max(4, ceil(N / E)) tokens of each,
given at random where too few (see `lib.core.capacity`), and the loss E <mean gate, share> of what was chosen, before
anything was dropped. At evaluation the places are as many as in training unless `Capacity` says otherwise. The release
makes all experts of a layer copies of one block; here each starts from a draw of its own.

How such a model is served on many ranks is in `inference_plan` and `all_to_all`.

Tensor letters: N tokens, D model width, H hidden width, E experts, C places of each, B batch, T time, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.lib.core.capacity import Capacity
from workbench.lib.core.experts import GLU, GLUExperts
from workbench.lib.core.models import ResidualStack
from workbench.lib.core.modes import evaluating
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context, Experts, Router
from workbench.lib.core.task import Batch, LanguageModelling
from workbench.lib.core.train import Hook, State

METHOD = Method(
    slug="deepspeed-moe",
    title="DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI Scale",
    family="serving",
    year=2022,
    paper="arXiv:2201.05596",
    claim="More experts in deeper layers beside a fixed MLP, and a distilled student, keep the quality of a far larger "
    "MoE.",
    objects=("feed_forward", "ResidualMoE", "pyramid_experts", "block_params", "StagedDistillation", "FloatGate"),
)

PLACES = Capacity(1.0, "random", minimum=4)
"""As released: places for as many tokens as there are, at least four, and random token selection."""


def example() -> nn.Module:
    """A pyramid of two layers, of two and of four experts, each beside a fixed MLP."""
    return ResidualStack(feed_forward(pyramid_experts(2, 2, 4, 1), d_model=32, d_hidden=32))


class FloatGate(LinearRouter):
    """The usual router, whose logits are float32 (or wider) whatever the hidden states are.

    Its weights start as those of any `nn.Linear`, as in the release. A gate of E equal probabilities lets 1 / E of a
    layer through; one that has favourites from the start lets through more.
    """

    def __init__(self, d_model: int, n_experts: int, top_k: int, **options: Any):
        super().__init__(d_model, n_experts, top_k, **options)
        self.projection.reset_parameters()

    def scores(self, x: Float[Tensor, "tokens dim"], context: Context) -> Float[Tensor, "tokens experts"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(self.jittered(x.to(wide)), self.projection.weight.to(wide))


class ResidualMoE(MoELayer):
    """y = c_0 MoE(x) + c_1 MLP(x) with (c_0, c_1) = softmax(x W_c + b_c), W_c (D, 2), learned.

    Args:
        router: with one active expert, so that every token is sent once.
        experts: see `Experts`.
        mlp: the block that every token passes.
        d_model: D.
        capacity_factor: see `MoELayer`.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        mlp: nn.Module,
        d_model: int,
        capacity_factor: float | Capacity | None = PLACES,
    ):
        super().__init__(router, experts, mlp, capacity_factor)
        self.coefficient = nn.Linear(d_model, 2)

    def joined(
        self, tokens: Float[Tensor, "tokens dim"], routed: Float[Tensor, "tokens dim"]
    ) -> Float[Tensor, "tokens dim"]:
        c = torch.softmax(self.coefficient(tokens), dim=-1)
        return c[:, :1] * routed + c[:, 1:] * self.shared(tokens)


def pyramid_experts(n_moe_layers: int, base: int, last: int, n_last: int) -> list[int]:
    """Experts of each MoE layer: `base`, and in the `n_last` deepest `last`."""
    if min(n_moe_layers, base, last) < 1:
        raise InputError(f"n_moe_layers, base, last are {n_moe_layers}, {base}, {last} but must all be at least 1")
    if not 0 <= n_last <= n_moe_layers:
        raise InputError(f"n_last is {n_last} but must be from 0 to n_moe_layers = {n_moe_layers}")
    return [base] * (n_moe_layers - n_last) + [last] * n_last


def every_other(experts: Sequence[int]) -> list[int]:
    """Experts of each layer where every second one is an MoE layer, the first dense (0), the last not."""
    return [n for moe in experts for n in (0, moe)]


def feed_forward(
    experts: Sequence[int],
    d_model: int,
    d_hidden: int,
    *,
    residual: bool = True,
    top_k: int = 1,
    capacity: Capacity | None = PLACES,
    balance: float = 0.01,
) -> list[nn.Module]:
    """The feed-forward blocks of a model.

    >>> blocks = feed_forward(every_other(pyramid_experts(4, 4, 8, 1)), d_model=64, d_hidden=128)
    >>> model = DecoderLM(256, 64, 8, 4, lambda layer: blocks[layer], seq_len=64)

    Args:
        experts: of each layer; 0 for a dense block.
        residual: a fixed MLP beside the experts; False for the usual MoE layer.
        top_k: experts a token is sent to.
        capacity: places of an expert; None for no limit.
        balance: weight of the load-balancing loss.
    """
    if any(n < 0 for n in experts):
        raise InputError(f"experts is {list(experts)} but must be 0, for a dense block, or the number of each layer")
    blocks: list[nn.Module] = []
    for n in experts:
        if n == 0:
            blocks.append(GLU(d_model, d_hidden))
            continue
        router = FloatGate(d_model, n, top_k, coefficients={"lbl": balance})
        bank = GLUExperts(n, d_model, d_hidden)
        made = (
            ResidualMoE(router, bank, GLU(d_model, d_hidden), d_model, capacity)
            if residual
            else MoELayer(router, bank, capacity_factor=capacity)
        )
        blocks.append(made)
    return blocks


def block_params(experts: Sequence[int], d_model: int, d_hidden: int, residual: bool = True) -> int:
    """Parameters of `feed_forward`: with P = 3 D H those of one block, P in a dense layer, E P + D E in an MoE layer,
    and P + 2 D + 2 more in a residual one, for the fixed MLP and the coefficients."""
    block = 3 * d_model * d_hidden
    beside = block + 2 * d_model + 2 if residual else 0
    return sum(block if n == 0 else n * (block + d_model) + beside for n in experts)


def distillation_loss(
    student: Float[Tensor, "*tokens vocab"], teacher: Float[Tensor, "*theirs words"], tau: float = 1.0
) -> Float[Tensor, ""]:
    """tau^2 KL(teacher_tau || student_tau) of logits, mean over the tokens; exactly 0 where the two are the same."""
    if student.shape != teacher.shape:
        raise InputError(
            f"teacher has logits {tuple(teacher.shape)} but must have {tuple(student.shape)}, as the student has"
        )
    said, wanted = (F.log_softmax(logits.flatten(0, -2) / tau, dim=-1) for logits in (student, teacher))
    return tau**2 * F.kl_div(said, wanted, reduction="batchmean", log_target=True)


class StagedDistillation(LanguageModelling, Hook):
    """A language-modelling task with a teacher for the first steps of a training: both its task and its hook.

    >>> staged = StagedDistillation(task, teacher, stop_step=600)
    >>> train(student, staged, TrainConfig(1000), [staged])

    The loss is that of the task; what the teacher adds is in the context's `aux`, so that the losses of students with
    and without one are the same thing. From `stop_step` on, and in evaluation mode, there is none, and no teacher runs.

    Args:
        task: what is learned.
        teacher: a model of the same vocabulary. It runs in evaluation mode, without gradients.
        stop_step: steps with the teacher; of all steps for distillation to the end.
        beta, tau: weight and temperature of the distillation loss.
    """

    def __init__(
        self, task: LanguageModelling, teacher: nn.Module, stop_step: int, beta: float = 1.0, tau: float = 1.0
    ):
        super().__init__(task.data, task.seq_len)
        if stop_step < 0:
            raise InputError(f"stop_step is {stop_step} but must be at least 0")
        for name, value in (("beta", beta), ("tau", tau)):
            if not value > 0:
                raise InputError(f"{name} is {value} but must be above 0")
        self.teacher, self.stop_step, self.beta, self.tau = teacher, stop_step, beta, tau
        self.step: int | None = None

    def before_step(self, state: State) -> None:
        self.step = state.step

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        if not model.training:
            return super().loss(model, batch)
        if self.step is None:
            raise InputError("step is None: a StagedDistillation is given to the training as its task and as a hook")
        if self.step >= self.stop_step:
            return super().loss(model, batch)
        said: list[Tensor] = []
        with model.register_forward_hook(lambda module, given, logits: said.append(logits)):
            loss, context = super().loss(model, batch)
        with evaluating(self.teacher):
            wanted = self.teacher(batch.inputs.to(said[0].device))
        context.aux = context.aux + self.beta * distillation_loss(said[0], wanted, self.tau)
        return loss, context
