"""Does a mixture of meta-learners behind a refitted gate learn several families of systems? (MixER, 2502.05335)

Four families of planar systems, five environments each (`beds.dynamics.forecasts`), and as a control one family alone,
where the paper says that a mixture has nothing to gain. All arms take their turns alike (`Alternation`), at the same
rate, steps and batches, and have as many parameters, to 5 %. The plain mixture multiplies by its gate, so that the
gradient reaches it, and has a balance loss; the single learner is wider; the oracle is told the families.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from workbench.beds.dynamics import MIXED, Forecasts, forecasts
from workbench.lib.core.budget import count_params
from workbench.lib.core.integrate import rk4
from workbench.lib.core.train import Hook, State, TrainConfig, train
from workbench.lib.dynamics.mixer import (
    METHOD,
    Alternation,
    ContextGate,
    GEPSBank,
    MetaLearner,
    MixERField,
    OracleGate,
    SoftmaxGate,
    adapt,
    width_for,
)
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

ARMS = ("mixer", "naive", "single", "oracle", "mixer-one", "single-one")
RIVALS = ("naive", "single")
ONE = ("van-der-pol",)
FOUND, GAIN = 0.9, 0.1

RULE = (
    "The metric is the decimal logarithm of the mean square error of forecasts from held-out starts, in units of the "
    "family's variance, mean over the families; intervals are 95% paired intervals over seeds. Reproduced if on four "
    "families MixER minus the plain mixture and MixER minus the single learner both lie below 0, the adjusted Rand "
    f"index of its gate and the families at the end of training lies above {FOUND}, and on one family MixER minus the "
    f"single learner lies above -{GAIN}: it gains nothing there. Not reproduced if one of the two differences on four "
    f"families lies above 0, the index lies below {FOUND}, or the difference on one family lies below 0. Not resolved "
    "otherwise."
)

COMMON = {"experts": 4, "context": 2, "depth": 2, "starts": 8, "lr": 2e-2, "beta": 0.1, "turn": 5, "refit_every": 5}
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "steps": 20, "width": 8, "environments": 4, "points": 4, "new": 1, "adapt_steps": 3, "curve": 2},
    "small": COMMON
    | {
        "seeds": 12,
        "steps": 600,
        "width": 32,
        "environments": 5,
        "points": 6,
        "new": 2,
        "adapt_steps": 60,
        "curve": 10,
    },
    "full": COMMON
    | {"seeds": 12, "steps": 6000, "width": 64, "environments": 9, "points": 20, "new": 4, "adapt_steps": 500}
    | {"curve": 100},
}


def bed(arm: str, settings: Settings) -> Forecasts:
    families = ONE if arm.endswith("-one") else MIXED
    return forecasts(families, settings["environments"], settings["starts"], settings["points"], settings["new"])


def build(arm: str, task: Forecasts, settings: Settings) -> MetaLearner:
    experts, context, shape = settings["experts"], settings["context"], (2, settings["width"], settings["depth"])
    names = [f"{task.domains[family]} {number}" for number, family in enumerate(task.family.tolist())]
    if arm.startswith("single"):
        wanted = experts * count_params(GEPSBank(1, *shape, context))
        width = width_for(wanted, 2, settings["depth"], experts * context)
        field = MixERField(GEPSBank(1, 2, width, settings["depth"], experts * context))
        return MetaLearner(field, len(task.family), names=names)
    bank = GEPSBank(experts, *shape, context)
    if arm == "naive":
        field = MixERField(bank, SoftmaxGate(experts * context, experts), gated=True)
    elif arm == "oracle":
        field = MixERField(bank, OracleGate(task.family, experts))
    else:
        field = MixERField(bank, ContextGate(experts * context, experts))
    return MetaLearner(field, len(task.family), names=names)


class Curve(Hook):
    """Where the gate sends the environments, and how that agrees with their families, every few steps."""

    def __init__(self, task: Forecasts, every: int):
        self.task, self.every = task, every
        self.points: dict[str, list] = {"step": [], "rand": [], "loss": []}

    def after_step(self, state: State) -> None:
        if (state.step + 1) % self.every == 0:
            self.points["step"].append(state.step + 1)
            self.points["rand"].append(round(rand(self.task.family, experts_of(state.model)), 6))
            self.points["loss"].append(round(math.log10(state.loss), 6))


@torch.no_grad()
def experts_of(model: MetaLearner) -> Tensor:
    """The expert of each environment."""
    environment = torch.arange(len(model.contexts))
    gate = model.field.gate
    return torch.zeros_like(environment) if gate is None else gate(model.contexts, environment).expert


def rand(family: Tensor, expert: Tensor) -> float:
    """The adjusted Rand index: 1 where the parts are the same, 0 on the mean of random ones."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(family.numpy(), expert.numpy()))


def run(arm: str, seed: int, settings: Settings) -> Row:
    task = bed(arm, settings)
    torch.manual_seed(seed)
    model = build(arm, task, settings)
    turn, steps, size = settings["turn"], settings["steps"], len(task.family)
    hook = Alternation(
        task.trajectories, task.times[task.family], turn, turn, settings["beta"], settings["refit_every"]
    )
    curve = Curve(task, settings["curve"])
    config = TrainConfig(steps, size, settings["lr"], weight_decay=0.0, seed=seed, eval_every=None)
    train(model, task, config, [hook, curve])
    errors = task.evaluate(model, "test")
    by_family = {name: round(math.log10(errors[f"mse/{name}"]), 6) for name in task.domains}
    extra = {
        "by_family": by_family,
        "curve": curve.points,
        "rand": curve.points["rand"][-1],
        "adapted": adaptation(arm, model, task, settings),
    }
    if isinstance(gate := model.field.gate, ContextGate):
        fits, skipped, masked = gate.counts.tolist()
        losses = model.expert_losses(task.trajectories, task.times[task.family])
        extra |= {"fits": fits, "skipped": skipped, "masked": masked, "used": len(experts_of(model).unique())}
        extra |= {"losses": numbers(losses.clamp(1e-9, 1e9).log10()), "contexts": numbers(model.contexts)}
    metric = sum(by_family.values()) / len(by_family)
    return trained_row(arm, seed, training_budget(model, task, size, seed), steps, metric, **extra)


def adaptation(arm: str, model: MetaLearner, task: Forecasts, settings: Settings) -> float:
    """The metric in environments that nothing was trained on, by contexts that a few of their trajectories teach."""
    field, times = model.field, task.times[task.new_family]
    if arm == "oracle":
        field = MixERField(field.experts, OracleGate(task.new_family, field.n_experts))
    xi = adapt(field, task.new["adapt"], times, settings["adapt_steps"], 2 * settings["lr"])
    truth = task.new["adapted"]
    with torch.no_grad():
        rates = field.rates(xi, torch.arange(len(xi)))
        found = rk4(lambda _, x: rates(x), truth[:, :, 0], times[:, None]).movedim(0, 2)
    errors = (found - truth)[:, :, 1:].double().square().flatten(1).mean(1)
    means = [errors[task.new_family == family].mean() for family in range(len(task.domains))]
    return round(float(torch.stack(means).log10().mean()), 6)


def numbers(values: Tensor) -> list:
    """As nested lists, rounded to what a figure can show."""
    return (values.detach().double() * 1e4).round().div(1e4).tolist()


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    minus = {arm: rows.minus("mixer", arm) for arm in RIVALS}
    one = rows.minus("mixer-one", "single-one")
    found = rows.interval(rows.of("mixer", "rand"))
    verdict = decide(
        (NOT_REPRODUCED, any(gap.low > 0 for gap in minus.values()) or found.high < FOUND or one.high < 0),
        (REPRODUCED, all(gap.high < 0 for gap in minus.values()) and found.low > FOUND and one.low > -GAIN),
    )
    reason = (
        f"log10 of the error on four families, MixER minus: plain mixture {minus['naive']}, single learner "
        f"{minus['single']}. Adjusted Rand index of its gate {found}. On one family, MixER minus single {one}. "
        "The effect is MixER minus single on four families."
    )
    details: Mapping[str, object] = {
        "log_mse": rows.means(),
        "minus": minus | {"oracle": rows.minus("mixer", "oracle")},
        "one family": one,
        "rand": found,
        "adapted": rows.means("adapted"),
        "skipped": rows.mean("mixer", "skipped") / rows.mean("mixer", "fits"),
        "masked": rows.mean("mixer", "masked") / rows.mean("mixer", "fits"),
        "parameters": {arm: int(rows.mean(arm, lambda row: row.params)) for arm in rows.arms},
        "flops": {arm: int(rows.mean(arm, lambda row: row.flops)) for arm in rows.arms},
    }
    return Judgement.on(minus["single"], verdict, reason, dict(details), claimed=(float("-inf"), 0.0))


STUDY = Study(
    METHOD,
    metric="log_mse",
    unit="decades",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    tested="On four families the refitted gate finds them, and the error is below that of a mixture that learns its "
    "gate and of one learner of as many parameters; on one family it is not.",
    power=Power(RIVALS, effect=0.2, deviation={"small": (0.1466, 12)}),
    main="mixer",
)
