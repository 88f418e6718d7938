"""Does a router with a memory over depth beat routers that decide alone, at equal router parameters? (2408.06793)

A byte model on Python sources; every arm has the same experts, attention and initial weights of these for one seed, and
the same data in the same order, so differences are paired.
"""

import statistics

import torch
from torch import Tensor, nn

from workbench.lib import data
from workbench.lib.core.budget import count_params, measure_budget
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.measures.routing import load_stats
from workbench.lib.measures.statistics import paired_interval, tost
from workbench.lib.measures.transition import cross_layer_information
from workbench.lib.routing.rmoe import matched_width, recurrent_routers, router_state_flow
from workbench.studies.core import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Judgement, Row, Settings, Study

#: Recurrent arms -> options of their routers; the others are "linear" and "mlp".
RECURRENT = {
    "gru": {},
    "gru-detach": {"detach_state": True},
    "gru-shuffle": {"shuffle_state": True},
    "rnn": {"cell": "rnn"},
    "gru-shared": {"share_projection": True},
}
BASELINES = ("mlp", "linear")
MARGIN = 0.01  # bits per byte: the order of the effect that is expected at this size

RULE = (
    "The metric is bits per byte on the test split; all intervals are 95% paired intervals over seeds. "
    "(a) Gain: gru minus mlp, a two-layer router of as many parameters, and gru minus linear both lie below 0. "
    "(b) The memory makes it: gru minus gru-shuffle, the same router with the states of other tokens, lies below 0. "
    "(c) Consecutive layers agree more: their mutual information (top-1 experts on test text, less its value for "
    "shuffled tokens), gru minus mlp and gru minus linear both lie above 0. "
    "Reproduced if all hold. Not reproduced if one of these intervals lies on the other side of 0. Not resolved "
    f"otherwise; then the paired TOST of gru and mlp at a margin of {MARGIN} bits per byte, fixed before the runs, "
    "says whether the two are shown to be equivalent."
)

COMMON = {
    "d_model": 64,
    "d_hidden": 64,
    "n_heads": 4,
    "n_experts": 8,
    "top_k": 2,
    "d_router": 16,
    "balance": 0.01,
    "lr": 3e-3,
}
ARMS = (*BASELINES, "gru", "gru-detach", "gru-shuffle")
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "steps": 8, "batch_size": 4, "seq_len": 16, "cap": 65_536, "arms": ARMS}
    | {"d_model": 16, "d_hidden": 16, "d_router": 4, "n_layers": 3, "test_batches": 1},
    "small": COMMON
    | {"seeds": 3, "steps": 300, "batch_size": 8, "seq_len": 64, "cap": 1_500_000, "arms": ARMS}
    | {"n_layers": 4, "test_batches": 8},
    "full": COMMON
    | {"seeds": 3, "steps": 500, "batch_size": 16, "seq_len": 128, "cap": 1_500_000}
    | {"arms": (*BASELINES, *RECURRENT), "n_layers": 6, "test_batches": None},
}


def arms(settings: Settings) -> list[str]:
    return list(settings["arms"])


def routers(arm: str, settings: Settings) -> list[nn.Module]:
    """The router of each layer."""
    layers, width, n_experts, p = (settings[name] for name in ("n_layers", "d_model", "n_experts", "d_router"))
    top_k, balance = settings["top_k"], {"coefficients": {"lbl": settings["balance"]}}
    if arm == "linear":
        return [LinearRouter(width, n_experts, top_k, **balance) for _ in range(layers)]
    if arm == "mlp":
        p = matched_width(layers, width, n_experts, p)
        return recurrent_routers(layers, width, n_experts, top_k, p, cell="none", **balance)
    return recurrent_routers(layers, width, n_experts, top_k, p, **RECURRENT[arm], **balance)


def build(arm: str, settings: Settings) -> DecoderLM:
    """The model of one arm; what the arms have in common is drawn first, and so starts from the same weights."""
    width, n_layers = settings["d_model"], settings["n_layers"]
    banks = [GLUExperts(settings["n_experts"], width, settings["d_hidden"]) for _ in range(n_layers)]
    shape = (LanguageModelling.vocab, width, n_layers, settings["n_heads"])
    model = DecoderLM(*shape, lambda _: nn.Identity(), settings["seq_len"])
    for block, router, bank in zip(model.blocks, routers(arm, settings), banks, strict=True):
        block.ffn = MoELayer(router, bank)
    return model


def run(arm: str, seed: int, settings: Settings) -> Row:
    source = data.load("text-domains", domains=("python",), cap=settings["cap"])
    task = LanguageModelling(source, settings["seq_len"])
    torch.manual_seed(seed)
    model = build(arm, settings)
    config = TrainConfig(
        settings["steps"],
        settings["batch_size"],
        settings["lr"],
        seed=seed,
        eval_every=settings["steps"] // 4,
        eval_batches=1,
    )
    budget = measure_budget(model, task, task.batch("train", config.batch_size, torch.Generator().manual_seed(seed)))
    state = train(model, task, config)
    torch.manual_seed(seed)  # states are shuffled at random in evaluation too
    bits = task.evaluate(model, "test", settings["test_batches"])["bits_per_byte"]
    return Row(
        arm=arm,
        seed=seed,
        params=budget.params,
        active_params=budget.active_params,
        flops=budget.flops * config.steps,
        steps=config.steps,
        metric=bits,
        extra={
            "router_params": count_params(nn.ModuleList(block.ffn.router for block in model.blocks)),
            "curve": [[step, metrics["bits_per_byte"]] for step, metrics in state.history],
            "expert_similarity": [expert_similarity(block.ffn.experts) for block in model.blocks],
            **routing_measures(model, task, settings),
        },
    )


def routing_measures(model: nn.Module, task: LanguageModelling, settings: Settings) -> dict:
    """Load, agreement between layers and gradient paths between routers, on test text in eval mode."""
    layers, seen = moe_layers(model), {}
    handles = [
        layer.observe(lambda layer, routing, context: seen.setdefault(layer, []).append(routing.indices))
        for layer in layers.values()
    ]
    task.evaluate(model, "test", settings["test_batches"])
    for handle in handles:
        handle.remove()
    indices = torch.stack([torch.cat(seen[layer]) for layer in layers.values()])  # (L, N, K), likeliest expert first
    n_experts = settings["n_experts"]
    loads = torch.stack([torch.bincount(layer.flatten(), minlength=n_experts) for layer in indices])
    agreement = cross_layer_information(pair_counts(indices[..., 0], n_experts)).corrected
    flows = {}
    if any(getattr(layer.router, "cell", None) is not None for layer in layers.values()):
        batch = next(iter(task.batches("test", 2)))
        flows = {"state_flow": router_state_flow(model, batch.inputs).tolist()}
    return {
        "information": agreement.tolist(),
        "consecutive_information": float(agreement.diagonal(1).mean()),
        "load_cv": load_stats(loads, settings["top_k"]).cv.tolist(),
        **flows,
    }


def pair_counts(experts: Tensor, n_experts: int) -> Tensor:
    """(L, L, E, E) tokens with expert i in one layer and j in another, from the top-1 experts (L, N)."""
    one_hot = nn.functional.one_hot(experts, n_experts).double()
    return torch.einsum("lni,mnj->lmij", one_hot, one_hot)


def expert_similarity(bank: GLUExperts) -> float:
    """Mean cosine between the weights of different experts."""
    weights = nn.functional.normalize(torch.cat([p.detach().flatten(1) for p in bank.parameters()], 1), dim=-1)
    return float((weights.sum(0).square().sum() - bank.n_experts) / (bank.n_experts * (bank.n_experts - 1)))


def judge(rows: list[Row], settings: Settings) -> Judgement:
    """Apply `RULE`."""
    bits = {arm: [row.metric for row in rows if row.arm == arm] for arm in settings["arms"]}
    shared = {arm: [row.extra["consecutive_information"] for row in rows if row.arm == arm] for arm in settings["arms"]}
    gains = {arm: paired_interval(bits["gru"], bits[arm]) for arm in (*BASELINES, "gru-shuffle")}
    rises = {arm: paired_interval(shared["gru"], shared[arm]) for arm in BASELINES}
    claimed = [(-i.high, -i.low) for i in gains.values()] + [(i.low, i.high) for i in rises.values()]
    if all(low > 0 for low, _ in claimed):
        verdict = REPRODUCED
    elif any(high < 0 for _, high in claimed):
        verdict = NOT_REPRODUCED
    else:
        verdict = NOT_RESOLVED
    equal = tost(bits["gru"], bits["mlp"], MARGIN, paired=True)
    reason = (
        "Bits per byte, gru minus "
        + ", ".join(f"{arm} {interval}" for arm, interval in gains.items())
        + "; information between consecutive layers, gru minus "
        + ", ".join(f"{arm} {interval}" for arm, interval in rises.items())
        + f"; gru and mlp are {'' if equal.equivalent else 'not '}shown to be equivalent within {MARGIN}. "
        "The effect is gru minus mlp."
    )
    details = {
        "bits_per_byte": {arm: interval.as_dict() for arm, interval in gains.items()},
        "detach_minus_gru": paired_interval(bits["gru-detach"], bits["gru"]).as_dict(),
        "consecutive_information": {arm: statistics.fmean(values) for arm, values in shared.items()},
        "information_rise": {arm: interval.as_dict() for arm, interval in rises.items()},
        "tost_gru_mlp": {"margin": MARGIN, "p": equal.p, "ci90": equal.ci90, "equivalent": equal.equivalent},
    }
    return Judgement(verdict, gains["mlp"].estimate, (gains["mlp"].low, gains["mlp"].high), reason, details)


STUDY = Study(
    slug="rmoe",
    title="RMoE: Layerwise Recurrent Router for Mixture-of-Experts",
    claim="Handing each router the state of the router below gives a better language model than routers of as many "
    "parameters that decide alone, because of what the state knows, and makes consecutive layers agree more.",
    metric="bits_per_byte",
    unit="bits/byte",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=arms,
    run=run,
    judge=judge,
)
