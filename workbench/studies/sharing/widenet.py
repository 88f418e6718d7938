"""Do experts, and norms of their own, make up for sharing all depths? (2107.11817)

MNIST-1D, signals of ten classes as ten patches of four. The arms that the verdict is about have the same number of
parameters. They do not compute alike, which the budgets say: one wide feed-forward block of as many parameters as four
experts runs all of them at every depth, WideNet half.
"""

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.lib import data
from workbench.lib.core.budget import count_params
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Classification
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.measures.pools import chance_agreement
from workbench.lib.sharing.widenet import METHOD, WideNetEncoder, depth_routing_agreement, routings_by_depth
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, all_above, any_below, decide

EFFECT = 0.045  # accuracy: three fifths of what vit-moe has before albert, the least that twelve seeds show
BASELINES = ("albert", "vit-moe")

#: Arm -> options of its encoder; "hidden" is how often the hidden width of one expert its feed-forward part has.
ARMS: Mapping[str, dict[str, Any]] = {
    "widenet": {},
    "tied-norms": {"share_norms": True},
    "routers": {"share_router": False},
    "albert": {"n_experts": 1, "top_k": 1, "hidden": "experts"},
    "albert-narrow": {"n_experts": 1, "top_k": 1, "hidden": "active"},
    "vit-moe": {"group": 1},
    "vit": {"n_experts": 1, "top_k": 1, "hidden": "active", "group": 1},
}
SMALL_ARMS = ("widenet", "tied-norms", "routers", "albert", "vit-moe")

RULE = (
    "The metric is accuracy on the test split; intervals are 95% paired intervals over seeds. (a) Experts: widenet "
    "minus albert, one dense feed-forward block of the same number of parameters shared by all depths, lies above 0. "
    "(b) Norms: widenet minus tied-norms lies above 0. (c) The norms let the router choose anew: agreement between "
    "depths (share of test tokens with the same first expert, above what the loads give by chance, mean over pairs of "
    "depths), tied-norms minus widenet, lies above 0. Reproduced if all hold. Not reproduced if one lies below 0. Not "
    "resolved otherwise. Beside it, without a part in the verdict: widenet minus routers, a router for each depth, and "
    "minus vit-moe, which shares nothing and has six times the parameters."
)

COMMON = {"d_model": 32, "n_heads": 4, "depth": 6, "d_hidden": 64, "n_experts": 4, "top_k": 2, "patch": 4, "lr": 3e-3}
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "steps": 6, "batch_size": 16, "d_model": 16, "depth": 3, "d_hidden": 16, "arms": SMALL_ARMS},
    "small": COMMON | {"seeds": 12, "steps": 200, "batch_size": 64, "arms": SMALL_ARMS},
    "full": COMMON | {"seeds": 12, "steps": 3000, "batch_size": 128, "arms": tuple(ARMS)},
}
FOLDS = 5


class Classifier(nn.Module):
    """Patches of a signal, embedded with their position, through the encoder; a linear head on their mean."""

    def __init__(self, task: Classification, encoder: WideNetEncoder, d_model: int, patch: int):
        super().__init__()
        length = task.data.splits["train"][0].shape[1]
        self.patch = patch
        self.embedding = nn.Linear(patch, d_model)
        self.position = nn.Parameter(0.02 * torch.randn(length // patch, d_model))
        self.head = nn.Linear(d_model, task.n_classes)
        self.encoder = encoder

    def forward(
        self, x: Float[Tensor, "batch length"], context: Context | None = None
    ) -> Float[Tensor, "batch classes"]:
        patches = x.unflatten(1, (-1, self.patch))
        return self.head(self.encoder(self.embedding(patches) + self.position, context).mean(1))


def build(arm: str, task: Classification, settings: Settings) -> Classifier:
    """The model of one arm."""
    options = dict(ARMS[arm])
    experts, active = settings["n_experts"], settings["top_k"]
    width = {"experts": experts, "active": active, "one": 1}[options.pop("hidden", "one")] * settings["d_hidden"]
    options = {"n_experts": experts, "top_k": active} | options
    if options["n_experts"] == 1:  # a dense block has no loss and no limit
        options |= {"coefficients": {}, "capacity_factor": None, "noise_std": 0.0}
    encoder = WideNetEncoder(settings["d_model"], settings["depth"], settings["n_heads"], width, **options)
    return Classifier(task, encoder, settings["d_model"], settings["patch"])


def run(arm: str, seed: int, settings: Settings) -> Row:
    task = Classification(data.load("mnist-1d", fold=seed % FOLDS))
    torch.manual_seed(seed)
    model = build(arm, task, settings)
    steps, size = settings["steps"], settings["batch_size"]
    train(model, task, TrainConfig(steps, size, settings["lr"], seed=seed, eval_every=None))
    accuracy = task.evaluate(model, "test")["accuracy"]
    extra: dict[str, Any] = {"encoder_params": count_params(model.encoder)}
    if ARMS[arm].get("n_experts") != 1:
        extra |= held_out(model, task)
    return trained_row(arm, seed, training_budget(model, task, size, seed), steps, accuracy, **extra)


def held_out(model: nn.Module, task: Classification) -> dict[str, Any]:
    """How the test signals, one batch, are routed: the places they lack, and the first experts of all depths."""
    routings = routings_by_depth(model, task.data.splits["test"][0])
    n_experts, first = routings[0].n_experts, torch.stack([routing.first for routing in routings])
    agreement, chance = depth_routing_agreement(routings), chance_agreement(first, n_experts)
    distinct = torch.zeros(first.shape[1], n_experts).scatter_(1, first.T, 1.0).sum(1).long()
    return {
        "agreement": agreement.tolist(),
        "above_chance": off_diagonal(agreement - chance),
        "distinct": torch.bincount(distinct, minlength=n_experts + 1)[1:].tolist(),
        "dropped": 1 - float(torch.stack([routing.kept.float().mean() for routing in routings]).mean()),
    }


def off_diagonal(matrix: Float[Tensor, "n n"]) -> float:
    """Mean of what is not on the diagonal."""
    n = len(matrix)
    return float((matrix.sum() - matrix.trace()) / (n * (n - 1)))


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    experts, norms = rows.minus("widenet", "albert"), rows.minus("widenet", "tied-norms")
    anew = rows.minus("tied-norms", "widenet", "above_chance")
    claimed = [experts, norms, anew]
    verdict = decide((REPRODUCED, all_above(claimed)), (NOT_REPRODUCED, any_below(claimed)))
    others = {arm: rows.minus("widenet", arm) for arm in ("routers", "vit-moe")}
    reason = (
        f"Accuracy: widenet minus albert {experts}, tied-norms {norms}, "
        + ", ".join(f"{arm} {interval}" for arm, interval in others.items())
        + f"; agreement between depths above chance, tied-norms minus widenet {anew}. The effect is widenet minus "
        "albert, at the same parameters."
    )
    routed = [arm for arm in rows.arms if ARMS[arm].get("n_experts") != 1]
    shared = [arm for arm in routed if "group" not in ARMS[arm]]  # else expert 0 is another one at every depth
    details = {
        "minus_albert": experts,
        "minus_tied_norms": norms,
        "agreement_rise_of_tied_norms": anew,
        "minus_others": others,
        "parameters": {arm: int(rows.mean(arm, lambda row: row.params)) for arm in rows.arms},
        "flops": {arm: int(rows.mean(arm, lambda row: row.flops)) for arm in rows.arms},
        "above_chance": rows.means("above_chance", shared),
        "dropped": rows.means("dropped", routed),
    }
    return Judgement.on(experts, verdict, reason, details)


STUDY = Study(
    METHOD,
    metric="accuracy",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=itemgetter("arms"),
    run=run,
    judge=judge,
    tested="At the same number of parameters, one mixture of experts at every depth is better than one dense block at "
    "every depth, and better with norms of each depth than with tied ones, by which the router chooses other experts.",
    power=Power(BASELINES, effect=EFFECT, deviation={"small": (0.0484, 12)}),
)
