"""Do learned weights collapse to one LoRA, and do equal weights with a learned choice of LoRAs do better? (2603.10160)

Twelve symbol maps on the frozen decoder of the shared test-bed. Every mixture has 8 LoRAs of rank 1 on each linear
layer, 4 of them active, whose weights sum to 4, so that an active rank has scale 1 on average, as in the LoRAs. ReMix
and its control select for a whole sequence, by the part of it that is not to be predicted; the softmax mixtures decide
for each token, as they usually do.
"""

import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds import symbol_maps as bed
from workbench.beds.symbol_maps import SymbolMaps
from workbench.lib.core.adapt import Adapted, Adapter, RoutedLinear
from workbench.lib.core.adapt.put import match_targets
from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.task import Batch
from workbench.lib.core.train import Hook, State, TrainConfig, train
from workbench.lib.lora_experts.remix import ReMixTrainer
from workbench.lib.measures.routing import effective_support_size
from workbench.lib.measures.statistics import mean_interval, paired_interval
from workbench.studies.core import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Judgement, Row, Settings, Study

EXPERTS, RANK, TOP_K = 8, 1, 4
LR = 3e-3
PROMPT = bed.LENGTH + 2  # the task, the symbols to map, and the sign behind them
COLLAPSED = (1 + TOP_K) / 2

LORAS = {"lora-active": TOP_K * RANK, "lora-total": EXPERTS * RANK}
SOFTMAX = {"softmax": {}, "softmax-balance": {"balance": 0.01}, "softmax-all": {"top_k": EXPERTS}}
SAMPLES = {"remix-2": 2, "remix-4": 4}  # M
ARMS = (*LORAS, *SOFTMAX, "random", *SAMPLES, "remix-4, equal compute", "remix-4, task token")

RULE = (
    "The metric is the share of right symbols on the validation split, the mean over twelve tasks; all intervals are "
    f"95% paired intervals over seeds. (a) Collapse: the effective support size of the top-{TOP_K} softmax weights, "
    "mean over layers, over the last tenth of training minus at the first step lies below 0, and the last tenth lies "
    f"below {COLLAPSED}, half way from {TOP_K} to 1. (b) Gain: ReMix with M = 4 minus that softmax mixture, at equal "
    "steps, lies above 0. (c) The choice is learned: ReMix minus constant weights with random choices, tested with the "
    "better of drawn and likeliest choices, lies above 0. Reproduced if all hold. Not reproduced if an interval lies "
    f"on the other side: in (a) the fall above 0 or the last tenth above {COLLAPSED}, in (b) or (c) below 0. Not "
    "resolved otherwise. At equal compute, M forwards for one, and with selections by the "
    "task's token alone, ReMix is reported beside."
)

PRESETS = {
    "smoke": bed.SMOKE | {"record_every": 2},
    "small": bed.SMALL | {"record_every": 10},
    "full": bed.FULL | {"record_every": 10},
}


def arms(settings: Settings) -> list[str]:
    return list(ARMS)


class SoftmaxMixture(Adapter):
    """The usual mixture of LoRAs on a linear layer: top K of a softmax, renormalised, times K.

    Args:
        balance: coefficient of the Switch loss of each layer; 0 for none.
    """

    slug = "softmax mixture"

    def __init__(self, top_k: int = TOP_K, balance: float = 0.0):
        self.top_k, self.coefficients = top_k, {"lbl": balance} if balance else None

    def linear(self, layer: nn.Linear, name: str) -> RoutedLinear:
        router = LinearRouter(layer.in_features, EXPERTS, self.top_k, renormalize=True, coefficients=self.coefficients)
        bank = LowRankExperts(EXPERTS, layer.in_features, layer.out_features, RANK, RANK * TOP_K)
        return RoutedLinear(layer, router, bank)


class Support(Hook):
    """The effective support sizes of weights and of probabilities, mean over tokens and layers, every few steps.

    Attributes:
        steps, weights, probabilities: what was recorded.
    """

    def __init__(self, adapted: Adapted, every: int):
        self.every, self.seen = every, []
        self.steps: list[int] = []
        self.weights: list[float] = []
        self.probabilities: list[float] = []
        for layer in adapted.layers.values():
            layer.observe(self._see)

    @torch.no_grad()
    def _see(self, layer: RoutedLinear, routing: Routing, context: Context) -> None:
        if layer.training:
            sizes = (effective_support_size(part).mean().item() for part in (routing.weights, routing.probs))
            self.seen.append(tuple(sizes))

    def before_step(self, state: State) -> None:
        self.seen = []

    def after_step(self, state: State) -> None:
        if state.step % self.every == 0 or state.step == state.config.steps - 1:
            weights, probabilities = zip(*self.seen, strict=True)
            self.steps.append(state.step)
            self.weights.append(statistics.fmean(weights))
            self.probabilities.append(statistics.fmean(probabilities))


def put(arm: str, model: nn.Module) -> Adapted:
    """The adapters of an arm."""
    if arm in SOFTMAX:
        adapter = SoftmaxMixture(**SOFTMAX[arm])
        adapted = Adapted(model, adapter, (bed.TARGETS,), {})
        for name, layer in match_targets(model, (bed.TARGETS,)).items():
            adapted.put(name, layer, adapter.linear(layer, name))
        return adapted
    if arm in LORAS:
        return bed.adapt(model, "lora", bed.TARGETS, rank=LORAS[arm])
    options = {"experts": EXPERTS, "rank": RANK, "top_k": TOP_K, "weight": 1.0}
    options["prompt"] = 1 if "task token" in arm else PROMPT
    return bed.adapt(model, "remix", bed.TARGETS, **options)


def run(arm: str, seed: int, settings: Settings) -> Row:
    task, model = bed.new_maps(), bed.base(settings)
    torch.manual_seed(seed)
    adapted = put(arm, model)
    samples = SAMPLES.get(arm.partition(",")[0], 1)
    steps = max(1, settings["steps"] // samples) if "compute" in arm else settings["steps"]
    config = TrainConfig(steps, bed.BATCH, lr=LR, weight_decay=0.0, seed=seed)
    learned = ReMixTrainer(task, samples, rows=row_losses) if samples > 1 else task
    support = [] if arm in LORAS else [Support(adapted, settings["record_every"])]
    state = train(model, learned, config, support, optimizer=adapted.optimizer(LR))
    state.task = task
    extra = {}
    if support:
        extra["support"] = {
            "steps": support[0].steps,
            "weights": support[0].weights,
            "probabilities": support[0].probabilities,
        }
    if arm not in SOFTMAX and arm not in LORAS:
        extra["likeliest"], extra["drawn"] = state.metrics[task.metric], drawn(adapted, task)
        extra["subsets"] = subsets(adapted, task)
        if arm == "random":  # a policy that never learned is judged by the better of the two
            state.metrics[task.metric] = max(extra["likeliest"], extra["drawn"])
    row = bed.row(arm, seed, adapted, state, **extra)
    return Row(**{**vars(row), "flops": row.flops * samples})


def row_losses(model: nn.Module, batch: Batch) -> Tensor:
    """(B,) the loss of each row; all rows have as many symbols, so that the mean over rows is the task's loss."""
    context = Context(domain=batch.domain.repeat_interleave(batch.inputs.shape[1]))
    logits = model(batch.inputs, context)[:, -batch.targets.shape[1] :]
    return F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none").mean(1)


def drawn(adapted: Adapted, task: SymbolMaps) -> float:
    """The metric with drawn in place of likeliest selections."""
    for layer in adapted.layers.values():
        layer.router.always_sample = True
    torch.manual_seed(0)
    try:
        return task.evaluate(adapted.model)[task.metric]
    finally:
        for layer in adapted.layers.values():
            layer.router.always_sample = False


@torch.no_grad()
def subsets(adapted: Adapted, task: SymbolMaps) -> float:
    """How many different selections a layer has in use on the validation split, the mean over layers."""
    seen: dict[nn.Module, list] = {layer: [] for layer in adapted.layers.values()}
    handles = [layer.observe(lambda layer, routing, _: seen[layer].append(routing.mask())) for layer in seen]
    task.evaluate(adapted.model)
    for handle in handles:
        handle.remove()
    return statistics.fmean(len(torch.cat(masks).unique(dim=0)) for masks in seen.values())


def judge(rows: list[Row], settings: Settings) -> Judgement:
    """Apply `RULE`."""
    of = {arm: [row.metric for row in rows if row.arm == arm] for arm in ARMS}
    curves = {arm: [row.extra["support"] for row in rows if row.arm == arm] for arm in ARMS if arm not in LORAS}
    first = {arm: [curve["weights"][0] for curve in found] for arm, found in curves.items()}
    last = {arm: [_end(curve["weights"]) for curve in found] for arm, found in curves.items()}
    fall = paired_interval(last["softmax"], first["softmax"])
    end = mean_interval(last["softmax"])
    gain, learned = paired_interval(of["remix-4"], of["softmax"]), paired_interval(of["remix-4"], of["random"])
    if fall.high < 0 and end.high < COLLAPSED and gain.low > 0 and learned.low > 0:
        verdict = REPRODUCED
    elif fall.low > 0 or end.low > COLLAPSED or gain.high < 0 or learned.high < 0:
        verdict = NOT_REPRODUCED
    else:
        verdict = NOT_RESOLVED
    compute = paired_interval(of["remix-4, equal compute"], of["softmax"])
    reason = (
        f"Effective support of the top-{TOP_K} softmax weights at the end {end}, minus at the start {fall}; accuracy, "
        f"ReMix with M = 4 minus softmax {gain}, minus random choices {learned}; at equal compute, minus softmax "
        f"{compute}. The effect is ReMix minus softmax at equal steps."
    )
    details = {
        "accuracy": {arm: statistics.fmean(values) for arm, values in of.items()},
        "minus": {arm: paired_interval(of["remix-4"], of[arm]).as_dict() for arm in ARMS if arm != "remix-4"},
        "equal_compute_minus_softmax": compute.as_dict(),
        "task_token_minus_softmax": paired_interval(of["remix-4, task token"], of["softmax"]).as_dict(),
        "support_end": {arm: statistics.fmean(values) for arm, values in last.items()},
        "probability_support_end": {
            arm: statistics.fmean(_end(curve["probabilities"]) for curve in found) for arm, found in curves.items()
        },
        "subsets": {
            arm: statistics.fmean(row.extra["subsets"] for row in rows if row.arm == arm)
            for arm in ("random", *SAMPLES, "remix-4, task token")
        },
    }
    return Judgement(verdict, gain.estimate, (gain.low, gain.high), reason, details)


def _end(values: list[float]) -> float:
    """The mean over the last tenth of the records, one at least."""
    return statistics.fmean(values[-max(1, len(values) // 10) :])


STUDY = Study(
    slug="remix",
    title="ReMix: Reinforcement Routing for Mixtures of LoRAs in LLM Finetuning",
    claim="Learned softmax weights collapse to one LoRA; equal weights with a selection trained by leave-one-out "
    "policy gradients keep all k useful.",
    metric="accuracy",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=arms,
    run=run,
    judge=judge,
)
