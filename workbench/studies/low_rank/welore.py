"""Does one threshold on all spectra lose less than the same share of every rank, and are its few tuned? (2407.11239)

A decoder of bytes is trained anew at every seed (`beds.byte_model`), with as much weight decay as makes its spectra
fall, and then cut, without data, to 30, 50, 60 and 70 % less rank in all: by WeLore's threshold on its matrices (query,
key and value taken apart, as they are in the paper's models), by the same share of each, and by the same share of each
one's energy. Cut to half of the ranks, WeLore's low-rank components alone, the others alone, or both are tuned on the
text it was trained on, each at the best of the same rates.
"""

import statistics
from collections.abc import Mapping

import torch
from torch import nn

from workbench.beds import byte_model as bed
from workbench.lib.core.adapt.adapted import replace_module
from workbench.lib.core.budget import count_params
from workbench.lib.core.factored import LowRankLinear, factorise
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.low_rank.welore import METHOD, apply_welore, by_energy, solve_threshold, spectra, uniform_ranks
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.sweep import Scores, edges, sweep
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

TARGETS = "blocks.*"
REDUCTIONS = (0.3, 0.5, 0.6, 0.7)
TUNED_AT = 0.5
UNIFORM, ENERGY, WELORE = "uniform", "energy", "welore"
LRC, NLRC, ALL = "lrc-tuned", "nlrc-tuned", "all-tuned"

#: Arm -> the ranks it cuts to.
CUTS = {
    UNIFORM: uniform_ranks,
    ENERGY: lambda found, reduction: solve_threshold(found, reduction, by_energy).ranks,
    WELORE: lambda found, reduction: solve_threshold(found, reduction).ranks,
}
#: Arm -> what of WeLore's result it tunes.
TUNES = {LRC: "lrc", NLRC: "nlrc", ALL: "all"}
MARGIN, SHARE, FEW = 0.02, 0.9, 0.6

RULE = (
    "The metric is bits per byte on test with half of the ranks; intervals are paired, over seeds, at 95%. (a) Cut "
    "without data, WeLore's ranks lose less than uniform ones: the interval of the difference lies below 0 at two or "
    "more of the four reductions. (b) Of what tuning all of WeLore's matrices gains, tuning its LRCs alone, less than "
    f"{FEW:.0%} of the numbers, gains at least {SHARE:.0%}: the interval of the difference of the gains lies above 0. "
    "Reproduced if both hold. Not reproduced if WeLore's ranks lose more at two reductions, or with half of the ranks "
    f"lower the loss by less than {MARGIN} (the interval lies above -{MARGIN}), or if the interval of (b) lies below "
    "0, or the LRCs are not so few. Not resolved otherwise. The effect is the difference with half of the ranks."
)

#: Rates: two decades around 3e-3, near the rate that the decoder is trained at.
SMALL = {"cap": 65_536, "width": 64, "layers": 3, "length": 32, "steps": 1000, "batch": 16, "decay": 0.5}
PRESETS = {
    "smoke": bed.SMOKE | {"layers": 2, "tune_steps": 5, "rates": (3e-4, 3e-2), "seeds": 2},
    # Seeds 0 to 11 had been run before the study was as it is.
    "small": SMALL | {"tune_steps": 80, "rates": (3e-4, 3e-3, 3e-2), "seeds": 24, "first_seed": 12},
    "full": bed.FULL | {"decay": 0.5, "tune_steps": 1000, "rates": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "seeds": 12},
}


def run(arm: str, seed: int, settings: Settings) -> Row:
    task = bed.make_task(settings)
    return cut_row(arm, seed, settings, task) if arm in CUTS else tuned_row(arm, seed, settings, task)


class Apart(nn.ModuleList):
    """A linear layer without bias as three, one beside the other: query, key and value."""

    def __init__(self, layer: nn.Linear):
        parts = layer.weight.detach().chunk(3)
        super().__init__(nn.Linear(part.shape[1], part.shape[0], bias=False) for part in parts)
        for linear, part in zip(self, parts, strict=True):
            linear.weight.data = part.clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([linear(x) for linear in self], dim=-1)


def trained(seed: int, settings: Settings) -> nn.Module:
    """The decoder of a seed, from its file or trained now, with query, key and value taken apart."""
    model = bed.base({key: settings[key] for key in bed.SMALL}, seed)
    for block in model.blocks:
        block.attention.qkv = Apart(block.attention.qkv)
    return model.eval()


def cut_row(arm: str, seed: int, settings: Settings, task: LanguageModelling) -> Row:
    """The decoder cut at every reduction; every matrix as two where that has fewer numbers."""
    cut, params, found = [], [], {}
    for reduction in REDUCTIONS:
        model = trained(seed, settings)
        found = spectra(model, TARGETS)
        factorise(model, CUTS[arm](found, reduction), TARGETS)
        cut.append(bits(task, model))
        params.append(count_params(cheapest(model)))
    ranks = CUTS[arm](found, TUNED_AT)
    extra = {"cut": cut, "params": params, "ranks": [*ranks.values()], "whole": bits(task, trained(seed, settings))}
    at = REDUCTIONS.index(TUNED_AT)
    return Row(arm, seed, params[at], params[at], 0, 0, cut[at], extra)


def tuned_row(arm: str, seed: int, settings: Settings, task: LanguageModelling) -> Row:
    """WeLore's result with half of the ranks, a part of it tuned at each rate."""

    def made() -> tuple[nn.Module, int]:
        model = trained(seed, settings)
        report = apply_welore(model, solve_threshold(spectra(model, TARGETS), TUNED_AT).ranks, targets=TARGETS)
        return model, report.tune(TUNES[arm])

    def learn(rate: float) -> Scores:
        model, _ = made()
        config = TrainConfig(
            settings["tune_steps"],
            settings["batch"],
            lr=rate,
            warmup=settings["tune_steps"] // 20,
            weight_decay=0.0,
            seed=seed,
            eval_every=None,
        )
        train(model, task, config)
        return bits(task, model, "validation"), bits(task, model)

    swept = sweep(learn, settings["rates"], worst=8.0, lower_is_better=True)
    model, numbers = made()
    budget, steps = training_budget(model, task, settings["batch"]), settings["tune_steps"] * len(swept.rates)
    extra = swept.extra() | {"before": bits(task, model), "trained": numbers}
    return Row(arm, seed, budget.params, budget.active_params, budget.flops * steps, steps, swept.metric, extra)


def bits(task: LanguageModelling, model: nn.Module, split: str = "test") -> float:
    return task.evaluate(model, split)["bits_per_byte"]


@torch.no_grad()
def cheapest(model: nn.Module) -> nn.Module:
    """With those factored layers dense again that have more numbers than that."""
    for layer in list(model.modules()):
        if isinstance(layer, LowRankLinear) and count_params(layer) > layer.in_features * layer.out_features:
            replace_module(model, layer, layer.dense())
    return model


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    at = {reduction: rows.minus(WELORE, UNIFORM, lambda row, i=i: row.extra["cut"][i])
          for i, reduction in enumerate(REDUCTIONS)}  # fmt: skip
    gains = {arm: [row.extra["before"] - row.metric for row in rows.arm(arm)] for arm in TUNES}
    less = rows.interval([lrc - SHARE * every for lrc, every in zip(gains[LRC], gains[ALL], strict=True)])
    few = max(lrc / every for lrc, every in zip(rows.of(LRC, "trained"), rows.of(ALL, "trained"), strict=True))
    better, worse = sum(one.high < 0 for one in at.values()), sum(one.low > 0 for one in at.values())
    effect = at[TUNED_AT]
    verdict = decide(
        (NOT_REPRODUCED, few >= FEW or less.high < 0 or worse >= 2),
        (REPRODUCED, better >= 2 and less.low > 0),
        (NOT_REPRODUCED, effect.low > -MARGIN),
    )
    reason = (
        f"Bits per byte of WeLore's ranks beside uniform ones, with half of them {effect}, which is the effect; lower "
        f"at {better} of {len(REDUCTIONS)} reductions, higher at {worse}; beside equal energy "
        f"{rows.minus(WELORE, ENERGY)}. Tuning gains {means(gains)}; the LRCs', {few:.0%} of the numbers, beside "
        f"{SHARE:.0%} of all {less}. {edges(rows)}"
    ).rstrip()
    details = {
        "difference": {f"{reduction:.0%}": interval for reduction, interval in at.items()},
        "cut": {arm: [statistics.fmean(of) for of in zip(*rows.of(arm, "cut"), strict=True)] for arm in CUTS},
        "params": {arm: [statistics.fmean(of) for of in zip(*rows.of(arm, "params"), strict=True)] for arm in CUTS},
        "whole": rows.mean(UNIFORM, "whole"),
        "before tuning": rows.mean(LRC, "before"),
        "gain": {arm: statistics.fmean(gain) for arm, gain in gains.items()},
        "trained": rows.means("trained", TUNES),
        "best_rate": rows.means("best_rate", TUNES),
    }
    return Judgement.on(effect, verdict, reason, details)


def means(gains: Mapping[str, list[float]]) -> str:
    return ", ".join(f"{statistics.fmean(gain):.3f} ({arm})" for arm, gain in gains.items())


STUDY = Study(
    METHOD,
    metric="bits/byte",
    unit="bits/byte",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=(*CUTS, *TUNES),
    run=run,
    judge=judge,
    main=LRC,
    power=Power((UNIFORM, ENERGY), effect=MARGIN, deviation={"small": (0.0104, 12)}),
    trainings=lambda arm: "it cuts the ranks of a trained model, and trains nothing" if arm in CUTS else 1,
)
