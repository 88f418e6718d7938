"""Does a router with a memory over depth beat routers that decide alone, at equal router parameters? (2408.06793)

A byte model on Python sources; every arm has the same experts, attention and initial weights of these for one seed, and
the same data in the same order, so differences are paired.
"""

from operator import itemgetter

import torch
from torch import Tensor, nn

from workbench.beds.python_text import decoder, python_text
from workbench.lib.core.budget import count_params
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.observe import observing
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.measures.routing import load_stats
from workbench.lib.measures.transition import cross_layer_information
from workbench.lib.routing.rmoe import METHOD, matched_width, recurrent_routers, router_state_flow
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, all_above, any_below, decide

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

COMMON = {"d_model": 64, "d_hidden": 64, "n_heads": 4, "n_experts": 8, "top_k": 2, "d_router": 16}
COMMON |= {"balance": 0.01, "lr": 3e-3}
ARMS = (*BASELINES, "gru", "gru-detach", "gru-shuffle")
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "steps": 8, "batch_size": 4, "seq_len": 16, "cap": 65_536, "arms": ARMS}
    | {"d_model": 16, "d_hidden": 16, "d_router": 4, "n_layers": 3, "test_batches": 1},
    "small": COMMON
    | {"seeds": 13, "steps": 300, "batch_size": 8, "seq_len": 64, "cap": 1_500_000, "arms": ARMS}
    | {"n_layers": 4, "test_batches": 8},
    "full": COMMON
    | {"seeds": 3, "steps": 500, "batch_size": 16, "seq_len": 128, "cap": 1_500_000}
    | {"arms": (*BASELINES, *RECURRENT), "n_layers": 6, "test_batches": None},
}


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
    shape = (settings["n_experts"], settings["d_model"], settings["d_hidden"])
    banks = [GLUExperts(*shape) for _ in range(settings["n_layers"])]
    model = decoder(settings)
    for block, router, bank in zip(model.blocks, routers(arm, settings), banks, strict=True):
        block.ffn = MoELayer(router, bank)
    return model


def run(arm: str, seed: int, settings: Settings) -> Row:
    task = python_text(settings)
    torch.manual_seed(seed)
    model = build(arm, settings)
    steps, size = settings["steps"], settings["batch_size"]
    config = TrainConfig(steps, size, settings["lr"], seed=seed, eval_every=steps // 4, eval_batches=1)
    budget = training_budget(model, task, size, seed)
    curve = [[step, metrics["bits_per_byte"]] for step, metrics in train(model, task, config).history]
    torch.manual_seed(seed)  # states are shuffled at random in evaluation too
    bits, experts = held_out(model, task, settings)
    if arm == "gru-shuffle":  # whether its layers agree is asked of another shuffle than the loss
        _, experts = held_out(model, task, settings)
    loads = torch.stack([torch.bincount(layer.flatten(), minlength=settings["n_experts"]) for layer in experts])
    information = cross_layer_information(pair_counts(experts[..., 0], settings["n_experts"])).corrected
    layers = [block.ffn for block in model.blocks]
    extra = {
        "router_params": count_params(nn.ModuleList(layer.router for layer in layers)),
        "curve": curve,
        "expert_similarity": [expert_similarity(layer.experts) for layer in layers],
        "information": information.tolist(),
        "consecutive_information": float(information.diagonal(1).mean()),
        "load_cv": load_stats(loads, settings["top_k"]).cv.tolist(),
    }
    if arm in RECURRENT:
        extra["state_flow"] = router_state_flow(model, next(iter(task.batches("test", 2))).inputs).tolist()
    return trained_row(arm, seed, budget, steps, bits, **extra)


def held_out(model: nn.Module, task: LanguageModelling, settings: Settings) -> tuple[float, Tensor]:
    """Bits per byte of test text, and the experts (L, N, K) of its tokens, the likeliest first."""
    with observing(moe_layers(model).values(), lambda routing, _: routing.indices) as seen:
        bits = task.evaluate(model, "test", settings["test_batches"])["bits_per_byte"]
    return bits, torch.stack([torch.cat(indices) for indices in seen.values()])


def pair_counts(experts: Tensor, n_experts: int) -> Tensor:
    """(L, L, E, E) tokens with expert i in one layer and j in another, from the top-1 experts (L, N)."""
    one_hot = nn.functional.one_hot(experts, n_experts).double()
    return torch.einsum("lni,mnj->lmij", one_hot, one_hot)


def expert_similarity(bank: GLUExperts) -> float:
    """Mean cosine between the weights of different experts."""
    weights = nn.functional.normalize(torch.cat([p.detach().flatten(1) for p in bank.parameters()], 1), dim=-1)
    return float((weights.sum(0).square().sum() - bank.n_experts) / (bank.n_experts * (bank.n_experts - 1)))


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    gains = {arm: rows.minus("gru", arm) for arm in (*BASELINES, "gru-shuffle")}
    rises = {arm: rows.minus("gru", arm, "consecutive_information") for arm in BASELINES}
    claimed = [*(-gain for gain in gains.values()), *rises.values()]
    verdict = decide((REPRODUCED, all_above(claimed)), (NOT_REPRODUCED, any_below(claimed)))
    equal = rows.tost("gru", "mlp", MARGIN)
    reason = (
        "Bits per byte, gru minus "
        + ", ".join(f"{arm} {interval}" for arm, interval in gains.items())
        + "; information between consecutive layers, gru minus "
        + ", ".join(f"{arm} {interval}" for arm, interval in rises.items())
        + f"; gru and mlp are {'' if equal.equivalent else 'not '}shown to be equivalent within {MARGIN}. "
        "The effect is gru minus mlp."
    )
    details = {
        "bits_per_byte": gains,
        "detach_minus_gru": rows.minus("gru-detach", "gru"),
        "consecutive_information": rows.means("consecutive_information"),
        "information_rise": rises,
        "tost_gru_mlp": {"margin": MARGIN, "p": equal.p, "ci90": equal.ci90, "equivalent": equal.equivalent},
    }
    return Judgement.on(gains["mlp"], verdict, reason, details)


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
    tested="Handing each router the state of the router below gives a better language model than routers of as many "
    "parameters that decide alone, because of what the state knows, and makes consecutive layers agree more.",
    power=Power(BASELINES, effect=MARGIN, deviation={"small": (0.0115, 12)}),
    main="gru",
)
