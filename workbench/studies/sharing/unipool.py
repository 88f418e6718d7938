"""Does one pool of experts for all layers beat experts for each layer, and may it be smaller? (2605.06665)

A byte model on Python sources. All arms activate one expert of the same size a layer, so they compute alike; every arm
has the same attention, embedding and data in the same order for one seed, so differences are paired.
"""

import math
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from workbench.beds.python_text import decoder, python_text
from workbench.lib.core.budget import count_params
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import moe_layers
from workbench.lib.core.observe import observing
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import Hook, State, TrainConfig, train
from workbench.lib.sharing.unipool import METHOD, NormRouter, pool_diagnostics, pooled_layers, randomize_router
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

MARGIN = 0.01 / math.log(2)  # bits per byte: 0.01 nats, what a smaller pool may lose
BASELINES = ("vanilla", "tied")

#: Arm -> its router, its losses, and its pool: the share of all experts that it has, or "layer" for a bank a layer.
ARMS: Mapping[str, tuple[str, str, float | str]] = {
    "vanilla": ("softmax", "layer", "layer"),
    "vanilla-norm": ("norm", "pool", "layer"),
    "tied": ("softmax", "layer", 1),
    "unipool": ("norm", "pool", 1),
    "unipool-2/3": ("norm", "pool", 2 / 3),
    "unipool-5/12": ("norm", "pool", 5 / 12),
    "softmax-pool": ("softmax", "pool", 1),
    "norm-layer": ("norm", "layer", 1),
    "unbalanced": ("norm", "none", 1),
}
SMALL_ARMS = ("vanilla", "vanilla-norm", "tied", "unipool", "unipool-2/3")

RULE = (
    "The metric is bits per byte on the test split; intervals are paired over seeds. (a) Gain: unipool, a pool of as "
    "many experts as all layers of vanilla have together, minus vanilla: the 95% interval lies below 0. (b) Fewer: "
    "unipool-2/3, a pool of two thirds of these, minus vanilla: the 90% interval lies below the margin of "
    f"{MARGIN:.4f} bits (0.01 nats), fixed before the runs (a one-sided test of non-inferiority at 5%). "
    "Reproduced if both hold. Not reproduced if (a) lies above 0 or (b) above the margin. Not resolved otherwise. "
    "Beside it, without a part in the verdict: unipool minus tied, the same pool with softmax routers and a balance "
    "loss for each layer, and vanilla-norm minus vanilla, the router and its loss without a pool."
)

COMMON = {"d_model": 64, "d_hidden": 64, "n_heads": 4, "top_k": 1, "balance": 0.01, "lr": 3e-3}
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "steps": 8, "batch_size": 4, "seq_len": 16, "cap": 65_536, "arms": SMALL_ARMS}
    | {"d_model": 16, "d_hidden": 16, "n_layers": 2, "n_experts": 3, "test_batches": 1, "probe_batches": 1},
    "small": COMMON
    | {"seeds": 13, "steps": 300, "batch_size": 8, "seq_len": 64, "cap": 1_500_000, "arms": SMALL_ARMS}
    | {"n_layers": 4, "n_experts": 6, "test_batches": 8, "probe_batches": 2},
    "full": COMMON
    | {"seeds": 12, "steps": 1000, "batch_size": 16, "seq_len": 128, "cap": 1_500_000, "arms": tuple(ARMS)}
    | {"n_layers": 6, "n_experts": 4, "test_batches": None, "probe_batches": 8},
}


def build(arm: str, settings: Settings) -> DecoderLM:
    """The model of one arm; what the arms have in common is drawn first, and so starts from the same weights."""
    model = decoder(settings)
    router, balance, share = ARMS[arm]
    n_layers, per_layer, weight = settings["n_layers"], settings["n_experts"], settings["balance"]
    n_experts = per_layer if share == "layer" else round(share * per_layer * n_layers)
    layers = pooled_layers(
        n_layers,
        settings["d_model"],
        n_experts,
        settings["top_k"],
        settings["d_hidden"],
        group=1 if share == "layer" else None,
        router=router,
        coefficient=weight if balance == "pool" else None,
        coefficients={"lbl": weight} if balance == "layer" else None,
    )
    for block, layer in zip(model.blocks, layers, strict=True):
        block.ffn = layer
    return model


class _Scales(Hook):
    """gamma of every layer, a few times in a training."""

    def __init__(self, every: int):
        self.every, self.seen = every, []

    def after_step(self, state: State) -> None:
        if (state.step + 1) % self.every == 0:
            self.seen.append([m.gamma.item() for m in state.model.modules() if isinstance(m, NormRouter)])


def run(arm: str, seed: int, settings: Settings) -> Row:
    task = python_text(settings)
    torch.manual_seed(seed)
    model = build(arm, settings)
    steps, size = settings["steps"], settings["batch_size"]
    scales = _Scales(max(1, steps // 10))
    config = TrainConfig(steps, size, settings["lr"], seed=seed, eval_every=steps // 4, eval_batches=1)
    curve = [[step, metrics["bits_per_byte"]] for step, metrics in train(model, task, config, [scales]).history]
    bits, counts = held_out(model, task, settings)
    extra: dict[str, Any] = {
        "expert_params": count_params(nn.ModuleList({layer.experts for layer in moe_layers(model).values()})),
        "curve": curve,
        "traffic": counts.tolist(),
        "randomised": probe(model, task, settings["probe_batches"], seed),
    }
    if ARMS[arm][2] != "layer":
        extra |= pool_diagnostics(counts, top=settings["n_experts"])
    if ARMS[arm][0] == "norm":
        extra["gamma"] = scales.seen
    budget = training_budget(model, task, size, seed)
    return trained_row(arm, seed, budget, steps, bits, **extra)


def held_out(model: nn.Module, task: LanguageModelling, settings: Settings) -> tuple[float, Tensor]:
    """Bits per byte of test text, and the assignments (L, M) of its tokens."""
    with observing(moe_layers(model).values(), lambda routing, _: routing.counts) as seen:
        bits = task.evaluate(model, "test", settings["test_batches"])["bits_per_byte"]
    return bits, torch.stack([sum(counts) for counts in seen.values()])


def probe(model: nn.Module, task: LanguageModelling, batches: int, seed: int) -> list[float]:
    """What it costs to make the router of one layer random, for each layer; bits per byte of a little test text."""

    def bits() -> float:
        return task.evaluate(model, "test", batches)["bits_per_byte"]

    learned, costs = bits(), []
    for layer in moe_layers(model).values():
        with randomize_router(layer, seed):
            costs.append(bits() - learned)
    return costs


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    gain = rows.minus("unipool", "vanilla")
    fewer = rows.minus("unipool-2/3", "vanilla", level=0.9)
    tied, router = rows.minus("unipool", "tied"), rows.minus("vanilla-norm", "vanilla")
    verdict = decide(
        (REPRODUCED, gain.high < 0 and fewer.high < MARGIN), (NOT_REPRODUCED, gain.low > 0 or fewer.low > MARGIN)
    )
    reason = (
        f"Bits per byte: unipool minus vanilla {gain}; unipool-2/3 minus vanilla {fewer} (90%; the margin is "
        f"{MARGIN:.4f}); unipool minus tied {tied}; vanilla-norm minus vanilla {router}. The effect is unipool minus "
        "vanilla."
    )
    pooled = [arm for arm in rows.arms if ARMS[arm][2] != "layer"]
    details = {
        "unipool_minus_vanilla": gain,
        "two_thirds_minus_vanilla": fewer,
        "unipool_minus_tied": tied,
        "vanilla_norm_minus_vanilla": router,
        "unipool_minus_vanilla_norm": rows.minus("unipool", "vanilla-norm"),
        "expert_params": {arm: int(mean) for arm, mean in rows.means("expert_params").items()},
        "randomised_router_costs": {
            arm: torch.tensor(rows.of(arm, "randomised"), dtype=torch.float64).mean(0).tolist() for arm in rows.arms
        },
        "jaccard": rows.means("jaccard", pooled),
        "dead": rows.means("dead", pooled),
    }
    return Judgement.on(gain, verdict, reason, details)


STUDY = Study(
    METHOD,
    metric="bits_per_byte",
    unit="bits/byte",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=itemgetter("arms"),
    run=run,
    judge=judge,
    tested="At one active expert a layer, a pool of all experts gives a better language model than the same experts "
    "divided among the layers, and a pool of two thirds of them no worse a one.",
    power=Power(BASELINES, effect=MARGIN, deviation={"small": (0.0163, 12)}),
    main="unipool",
)
