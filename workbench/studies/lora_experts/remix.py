"""Do learned weights collapse to one LoRA, and do equal weights with a learned choice of LoRAs do better? (2603.10160)

Twelve symbol maps on the frozen decoder of the shared test-bed. Every mixture has 8 LoRAs of rank 1 on each linear
layer, 4 of them active, whose weights sum to 4, so that an active rank has scale 1 on average, as in the LoRAs. ReMix
and its control select for a whole sequence, by the part of it that is not to be predicted; the softmax mixtures decide
for each token, as they usually do.
"""

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds import symbol_maps as bed
from workbench.beds.symbol_maps import SymbolMaps
from workbench.lib.core.adapt import Adapted, Adapter, RoutedLinear, adapt
from workbench.lib.core.adapt.put import match_targets
from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.observe import announcing, observing
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.task import Batch
from workbench.lib.core.train import Hook, State, TrainConfig, train
from workbench.lib.lora_experts.remix import METHOD, ReMixTrainer
from workbench.lib.measures.routing import effective_support_size
from workbench.studies.core import Settings, Study
from workbench.studies.power import Power
from workbench.studies.rows import Row, Rows, adapted_row
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

EXPERTS, RANK, TOP_K = 8, 1, 4
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

    Args:
        seen: the `support_sizes` of the step, by layer.
    """

    def __init__(self, seen: dict[nn.Module, list], every: int):
        self.seen, self.every = seen, every
        self.curve: dict[str, list] = {"steps": [], "weights": [], "probabilities": []}

    def after_step(self, state: State) -> None:
        weights, probabilities = zip(*(pair for pairs in self.seen.values() for pair in pairs), strict=True)
        for pairs in self.seen.values():
            pairs.clear()
        if state.step % self.every == 0 or state.step == state.config.steps - 1:
            now = state.step, fmean(weights), fmean(probabilities)
            for values, value in zip(self.curve.values(), now, strict=True):
                values.append(value)


@torch.no_grad()
def support_sizes(routing: Routing, context: Context) -> tuple[float, float]:
    return tuple(effective_support_size(part).mean().item() for part in (routing.weights, routing.probs))


def put(arm: str, model: nn.Module) -> Adapted:
    """The adapters of an arm."""
    if arm in SOFTMAX:
        adapter = SoftmaxMixture(**SOFTMAX[arm])
        adapted = Adapted(model, adapter, (bed.TARGETS,), {})
        for name, layer in match_targets(model, (bed.TARGETS,)).items():
            adapted.put(name, layer, adapter.linear(layer, name))
        adapted.listen()
        return adapted
    if arm in LORAS:
        return adapt(model, "lora", bed.TARGETS, rank=LORAS[arm])
    options = {"experts": EXPERTS, "rank": RANK, "top_k": TOP_K, "weight": 1.0}
    options["prompt"] = 1 if "task token" in arm else PROMPT
    return adapt(model, "remix", bed.TARGETS, **options)


def run(arm: str, seed: int, settings: Settings) -> Row:
    task, model = bed.new_maps(settings), bed.base(settings)
    torch.manual_seed(seed)
    adapted = put(arm, model)
    samples = SAMPLES.get(arm.partition(",")[0], 1)
    steps = max(1, settings["steps"] // samples) if "compute" in arm else settings["steps"]
    config = TrainConfig(steps, settings["batch"], lr=bed.LR, weight_decay=0.0, seed=seed, eval_every=None)
    learned = ReMixTrainer(task, samples, rows=row_losses) if samples > 1 else task
    layers = announcing(model)
    with observing(layers, support_sizes) as seen:
        support = Support(seen, settings["record_every"])
        state = train(model, learned, config, [support] if layers else [], optimizer=adapted.optimizer(bed.LR))
    state.task, extra = task, {"support": support.curve} if layers else {}
    with observing(layers, lambda routing, context: routing.mask()) as masks:
        state.metrics = task.evaluate(model)
    if arm not in SOFTMAX and arm not in LORAS:
        extra["likeliest"], extra["drawn"] = state.metrics[task.metric], drawn(adapted, task)
        # how many different selections a layer has in use on the validation split
        extra["subsets"] = fmean(len(torch.cat(found).unique(dim=0)) for found in masks.values())
        if arm == "random":  # a policy that never learned is judged by the better of the two
            state.metrics[task.metric] = max(extra["likeliest"], extra["drawn"])
    row = adapted_row(arm, seed, adapted, state, **extra)
    return replace(row, flops=row.flops * samples)


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


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    mixtures = [arm for arm in ARMS if arm not in LORAS]
    last = end_of("weights")
    fall = rows.interval(rows.of("softmax", lambda row: last(row) - row.extra["support"]["weights"][0]))
    end = rows.interval(rows.of("softmax", last))
    gain, learned = rows.minus("remix-4", "softmax"), rows.minus("remix-4", "random")
    verdict = decide(
        (REPRODUCED, fall.high < 0 and end.high < COLLAPSED and gain.low > 0 and learned.low > 0),
        (NOT_REPRODUCED, fall.low > 0 or end.low > COLLAPSED or gain.high < 0 or learned.high < 0),
    )
    compute = rows.minus("remix-4, equal compute", "softmax")
    reason = (
        f"Effective support of the top-{TOP_K} softmax weights at the end {end}, minus at the start {fall}; accuracy, "
        f"ReMix with M = 4 minus softmax {gain}, minus random choices {learned}; at equal compute, minus softmax "
        f"{compute}. The effect is ReMix minus softmax at equal steps."
    )
    details = {
        "accuracy": rows.means(),
        "minus": {arm: rows.minus("remix-4", arm) for arm in ARMS if arm != "remix-4"},
        "equal_compute_minus_softmax": compute,
        "task_token_minus_softmax": rows.minus("remix-4, task token", "softmax"),
        "support_end": rows.means(end_of("weights"), mixtures),
        "probability_support_end": rows.means(end_of("probabilities"), mixtures),
        "subsets": rows.means("subsets", ("random", *SAMPLES, "remix-4, task token")),
    }
    return Judgement.on(gain, verdict, reason, details)


def end_of(name: str) -> Callable[[Row], float]:
    """Of a row's curve of support sizes, the mean over the last tenth of the records, one at least."""

    def end(row: Row) -> float:
        values = row.extra["support"][name]
        return fmean(values[-max(1, len(values) // 10) :])

    return end


STUDY = Study(
    METHOD,
    metric="accuracy",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    power=Power(("softmax", "softmax-balance"), effect=0.1),
    main="remix-4",
)
