"""What a rank holds and what it sends in a step, counted: parameters, states, activations, and bytes of messages.

The counts are those of `frontier_train`, number for number; tests hold the one to the other. Activations are those that
autograd keeps of `frontier_train`'s layer, where its norms are fused: the one of the CPU, which is made of several
operators, keeps its rows once more before its weight is applied. Bytes sent are by the formula of each collective, as
`wire.counted` has it.
"""

from dataclasses import dataclass

from workbench.lib.distributed.frontier_plans import DenseConfig, ParallelPlan
from workbench.lib.distributed.frontier_schedules import in_flight


def stage_params(config: DenseConfig, plan: ParallelPlan, stage: int) -> int:
    """On a rank of a stage: its part of its layers; of the embedding on the first and on the last; positions on the
    first, the last norm on the last. What is not a product is whole on each rank of tp."""
    layer = 12 * config.dim**2 // plan.tp + 2 * config.dim
    first, last = stage == 0, stage == plan.pp - 1
    table = config.vocab * config.dim // plan.tp if first or last else 0
    return config.layers // plan.pp * layer + table + first * config.time * config.dim + last * config.dim


def shard(n: int, plan: ParallelPlan) -> int:
    """Parameters of a rank whose states it has: n, or an equal part of them, the last filled up with zeros."""
    return -(-n // plan.dp) if plan.zero else n


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank of one stage."""

    weights: int
    gradients: int
    states: int
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.states + self.activations


def memory(config: DenseConfig, plan: ParallelPlan, stage: int) -> Memory:
    """Of a stage: weights and gradients lie in one piece that dp divides, where states are split."""
    n = stage_params(config, plan, stage)
    whole = shard(n, plan) * (plan.dp if plan.zero else 1)
    weights = gradients = whole * config.width
    return Memory(weights, gradients, shard(n, plan) * config.state_bytes, activations(config, plan, stage))


def largest(config: DenseConfig, plan: ParallelPlan) -> Memory:
    """Of the stage that needs most: the first, which has most in flight, or the last, with the logits."""
    return max((memory(config, plan, stage) for stage in (0, plan.pp - 1)), key=lambda found: found.total)


def layer_activations(config: DenseConfig, plan: ParallelPlan) -> float:
    """Bytes that a layer keeps of a micro-batch for its backward pass.

    Whole on each rank of tp: two inputs of norms, and two outputs. Split: queries, keys, values and what attention
    makes of them, and the 4 D units before and after their GELU. Without flash: the scores after softmax. A norm keeps
    4 bytes a row, flash attention 4 a row and head.
    """
    rows = config.time * plan.micro_batch
    kept = config.width * rows * config.dim * (4 + 12 / plan.tp) + 8 * rows
    heads, small = config.heads / plan.tp, max(4, config.width)
    kept += 2 * rows * (small - 4)  # statistics of float64 are float64
    if plan.flash:
        return kept + small * rows * heads
    return kept + config.width * rows * heads * config.time


def activations(config: DenseConfig, plan: ParallelPlan, stage: int) -> float:
    """Bytes on a stage at its fullest: of as many chunks as are in flight, and of the logits on the last stage."""
    rows, flight = config.time * plan.micro_batch, in_flight(plan, stage)
    layers, layer = config.layers // plan.chunks, layer_activations(config, plan)
    kept = flight * layers * layer
    if plan.recompute:  # inputs alone, and one layer that is computed again
        kept = flight * layers * config.width * rows * config.dim + layer
    if stage == plan.pp - 1:
        # of one micro-batch: the last norm's input and output, and the logits and their exponentials
        kept += config.width * rows * 2 * (config.dim + config.vocab / plan.tp)
    return kept


def sent(config: DenseConfig, plan: ParallelPlan, stage: int) -> dict[str, float]:
    """Bytes that a rank of a stage sends in a step, by collective; those that it does not use are left out.

    all_reduce: over tp, two a layer forward and two backward, two more where it is computed again, of b T D numbers;
    one of as many for the embedding and one for the output; of the loss, three numbers a row; over the first and last
    stage, the gradient of the embedding. Over dp: of all gradients, or as reduce_scatter and all_gather. send: b T D
    numbers over each boundary between chunks, forward and backward.
    """
    rows = plan.micro_batch * config.time
    row, first, last = rows * config.dim, stage == 0, stage == plan.pp - 1
    numbers = plan.accum * (config.layers // plan.pp * row * (6 if plan.recompute else 4))
    numbers += plan.accum * (first * row + last * (row + 3 * rows))
    reduced = 2 * (plan.tp - 1) / plan.tp * numbers
    if plan.pp > 1 and (first or last):
        reduced += config.vocab * config.dim // plan.tp  # two ranks: 2 (2 - 1) / 2
    n = stage_params(config, plan, stage)
    whole = shard(n, plan) * plan.dp if plan.zero else n
    share = (plan.dp - 1) / plan.dp * whole
    found = {"all_reduce": reduced + (0 if plan.zero else 2 * share)}
    if plan.zero:
        found |= {"reduce_scatter": share, "all_gather": share}
    ways = sum((chunk < plan.chunks - 1) + (chunk > 0) for chunk in range(stage, plan.chunks, plan.pp))
    found["send"] = plan.accum * ways * row if plan.pp > 1 else 0
    return {kind: config.width * n for kind, n in found.items() if n}
