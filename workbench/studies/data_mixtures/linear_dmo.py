"""Do merged experts of three domains rank mixtures of them as training on each mixture does? (2602.04937)

A small decoder goes on from one base on windows of three domains, drawn by a mixture: once for each of 22 mixtures,
which is the truth, and once for each domain, which are the experts. A proxy ranks the mixtures by losses on validation
text; the truth is on test text. Targets are means over texts of different kinds, so that none is served best by the
most of one domain (seen in true runs before the rule was written).

Experts and truth draw other windows. Regressions are fitted on true runs of the next seed, which are also the ceiling:
how true runs rank those of other draws.
"""

from statistics import fmean

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from workbench.beds import stdlib_domains as bed
from workbench.beds.stdlib_domains import DOMAINS, JUDGED
from workbench.lib.core.merge.calibration import fisher_diagonal
from workbench.lib.core.models import DecoderLM
from workbench.lib.data_mixtures.linear_dmo import METHOD, MergeProxy, by_fisher, candidates, evaluate_mixtures
from workbench.lib.measures.statistics import spearman
from workbench.studies.core import Power, Settings, Study
from workbench.studies.data_mixtures.runs import expert, truth
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED, Judgement, decide

TARGETS = {"even": ("code", "prose", "names"), "unseen": ("tables", "docstrings"), "listings": ("tables", "names")}
"""Target -> the texts it is the mean of."""

BUDGETS = {"merge": 1, "merge-half": 2, "merge-eighth": 8, "fisher": 1, "loss-average": 1}
"""Arm -> the part of a true run's steps that its experts are trained for."""
REGRESSIONS = ("linear", "trees")
RUNS = (3, 6, 12)
"""True runs that a regression is fitted on; the metric is of the first, as many as there are experts."""
ARMS = (*BUDGETS, *REGRESSIONS, "random", "ceiling")
CURVATURE = 32  # windows of a domain that its Fisher information is measured on
FAITHFUL = 0.5

RULE = (
    "The metric is Spearman's rank correlation over 22 mixtures between a proxy's losses on validation text and the "
    "losses of models trained on the mixtures, on test text: the mean over three targets. Intervals are 95% intervals "
    f"over seeds. (a) The correlation of merge is above {FAITHFUL} on the mean and its interval above 0. (b) Merge "
    "minus loss-average, which ranks by the weighted mean of the experts' own losses: the interval lies above 0. (c) "
    "Merge minus merge-eighth, whose experts have seen an eighth as much: the interval lies above 0. Not testable if "
    f"true runs of other draws, the ceiling, have a mean of less than {FAITHFUL}. Reproduced if all three hold. Not "
    f"reproduced if the interval of (a) lies below {FAITHFUL}, or that of (b) or (c) below 0. Not resolved otherwise."
)

COMMON = {"n_heads": 4, "batch_size": 8, "lr": 1e-3}
PRESETS = {
    "smoke": COMMON
    | {"d_model": 16, "d_hidden": 32, "n_layers": 1, "seq_len": 16, "cap": 65_536, "base_steps": 20, "base_batch": 8}
    | {"batch_size": 4, "steps": 8, "batches": 1, "seeds": 1},
    "small": COMMON
    | {"d_model": 48, "d_hidden": 96, "n_layers": 2, "seq_len": 64, "cap": 262_144, "base_steps": 800}
    | {"base_batch": 16, "steps": 64, "batches": 1, "seeds": 12},
    "full": COMMON
    | {"d_model": 96, "d_hidden": 192, "n_layers": 3, "seq_len": 128, "cap": 1_048_576, "base_steps": 4000}
    | {"base_batch": 32, "batch_size": 16, "steps": 160, "batches": None, "seeds": 12},
}


def merged_losses(arm: str, experts: list[DecoderLM], settings: Settings) -> Tensor:
    """Validation losses of the merged model of every mixture, (M, texts)."""
    rule = None
    if arm == "fisher":
        windows = [batch(domain, settings) for domain in range(len(DOMAINS))]
        with sdpa_kernel(SDPBackend.MATH):  # the others cannot be batched over samples
            fishers = [fisher_diagonal(own, [seen], "sampled") for own, seen in zip(experts, windows, strict=True)]
        rule = by_fisher(fishers)
    proxy, model = MergeProxy(bed.base(settings), experts, DOMAINS, rule=rule), bed.base(settings)

    def evaluate(state: dict[str, Tensor]) -> list[float]:
        model.load_state_dict(state)
        return bed.bits(model, settings, "validation")

    return evaluate_mixtures(proxy, candidates(len(DOMAINS)), evaluate)


def batch(domain: int, settings: Settings) -> Tensor:
    """Windows of a domain's training text, (CURVATURE, T)."""
    task = bed.task(settings)
    return task.batch("train", CURVATURE, torch.Generator().manual_seed(0), domain).inputs


def regressed(arm: str, runs: int, seed: int, measured: Tensor) -> Tensor:
    """Losses of every mixture as a regression says them that has seen some of the measured ones, (M, texts)."""
    from sklearn.ensemble import GradientBoostingRegressor
    from sklearn.linear_model import LinearRegression

    tried = candidates(len(DOMAINS)).numpy()
    seen = np.random.default_rng(seed).permutation(len(tried))[:runs]  # of one seed the smaller choice is in the larger
    make = LinearRegression if arm == "linear" else lambda: GradientBoostingRegressor(max_depth=2, random_state=0)
    columns = [make().fit(tried[seen], own[seen]).predict(tried) for own in measured.numpy().T]
    return torch.from_numpy(np.stack(columns, 1))


def of_targets(losses: Tensor) -> dict[str, np.ndarray]:
    """Target -> the loss of every mixture, of losses on the texts (M, texts)."""
    return {name: losses[:, [JUDGED.index(text) for text in texts]].mean(1).numpy() for name, texts in TARGETS.items()}


def ranked(losses: Tensor, true: Tensor) -> dict:
    """How well losses (M, texts) rank the mixtures by the true ones: by target, and what choosing by them costs.

    Losses that are the same for all mixtures rank none: they have 0 here, as chance has on the mean.
    """
    said, real = of_targets(losses), of_targets(true)
    correlations = {name: _correlation(said[name], real[name]) for name in TARGETS}
    mean, truly = (np.mean(list(each.values()), axis=0) for each in (said, real))
    chosen = float(truly[mean == mean.min()].mean())
    return {
        "by_target": correlations,
        "of_mean": _correlation(mean, truly),
        "regret": chosen - float(truly.min()),
        "gain_on_even": float(truly[-1]) - chosen,  # the even mixture is the last candidate
        "mean": [round(value, 4) for value in mean.tolist()],
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    value = spearman(a, b).estimate
    return 0.0 if np.isnan(value) else value


def run(arm: str, seed: int, settings: Settings) -> Row:
    part, steps = BUDGETS.get(arm), settings["steps"]
    experts = [expert(i, seed, part, settings) for i in range(len(DOMAINS))] if part else []
    tried = candidates(len(DOMAINS))
    true, extra, trained = truth(seed, tried, settings).test, {}, 0.0
    if arm == "loss-average":
        own = [bed.bits(model, settings, "validation") for model in experts]
        losses = tried @ torch.tensor(own, dtype=torch.float64)
    elif part:
        losses = merged_losses(arm, experts, settings)
    elif arm == "random":
        losses = torch.rand(len(tried), len(JUDGED), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    else:
        other = truth(seed + 1, tried, settings)
        losses, trained = other.test, len(tried)
        if arm in REGRESSIONS:
            by_runs = {n: ranked(regressed(arm, n, seed, other.validation), true) for n in RUNS}
            extra["by_runs"] = {str(n): fmean(found["by_target"].values()) for n, found in by_runs.items()}
            losses, trained = regressed(arm, RUNS[0], seed, other.validation), RUNS[0]
    found = ranked(losses, true)
    if arm == "ceiling":
        found["true"] = [round(v, 4) for v in np.mean(list(of_targets(true).values()), axis=0).tolist()]
    budget = training_budget(bed.base(settings), bed.task(settings), settings["batch_size"])
    trained = len(DOMAINS) * (steps // part) / steps if part else trained
    metric = fmean(found["by_target"].values())
    flops = round(trained * steps * budget.flops)
    return Row(arm, seed, budget.params, budget.active_params, flops, round(trained * steps), metric, found | extra)


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    level, ceiling = rows.interval(rows.of("merge")), rows.mean("ceiling")
    gain, decay = rows.minus("merge", "loss-average"), rows.minus("merge", "merge-eighth")
    verdict = decide(
        (NOT_TESTABLE, ceiling < FAITHFUL),
        (REPRODUCED, level.estimate > FAITHFUL and min(level.low, gain.low, decay.low) > 0),
        (NOT_REPRODUCED, level.high < FAITHFUL or gain.high < 0 or decay.high < 0),
    )
    reason = (
        f"Rank correlation of merged experts with true runs {level}, with a ceiling of {ceiling:.2f} between true runs "
        f"of other draws; minus that of the experts' mean losses {gain}; minus that of experts with an eighth of the "
        f"examples {decay}; minus a regression on as many true runs {rows.minus('merge', 'linear')}. The mixture that "
        f"merge chooses is {rows.mean('merge', 'regret'):.4f} bits per byte worse than the best. The effect is the "
        "second of these."
    )
    details = {
        "correlation": {arm: rows.interval(rows.of(arm)) for arm in ARMS},
        "by_target": {
            arm: {name: rows.mean(arm, lambda row, name=name: row.extra["by_target"][name]) for name in TARGETS}
            for arm in ARMS
        },
        "of_mean": rows.means("of_mean"),
        "regret": rows.means("regret"),
        "gain_on_even": rows.means("gain_on_even"),
        "by_runs": {
            arm: {str(n): rows.mean(arm, lambda row, n=n: row.extra["by_runs"][str(n)]) for n in RUNS}
            for arm in REGRESSIONS
        },
        "minus_loss_average": gain,
        "minus_eighth": decay,
        "minus_half": rows.minus("merge", "merge-half"),
        "minus_linear": rows.minus("merge", "linear"),
        "fisher_minus_merge": rows.minus("fisher", "merge"),
        "mixtures": candidates(len(DOMAINS)).tolist(),
        "losses": {
            "proxy": _column_means(rows.of("merge", "mean")),
            "loss-average": _column_means(rows.of("loss-average", "mean")),
            "true": _column_means(rows.of("ceiling", "true")),
        },
    }
    return Judgement.on(gain, verdict, reason, details)


def _column_means(found: list[list[float]]) -> list[float]:
    return np.mean(found, axis=0).tolist()


STUDY = Study(
    METHOD,
    metric="rank_correlation",
    unit="of Spearman's rho",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    tested="Losses of merged experts of three domains rank mixtures as training on them does, better than the mean of "
    "the experts' own losses and better the longer the experts were trained.",
    power=Power(("loss-average", "ceiling"), effect=0.15, deviation={"small": (0.151, 12)}),
    main="merge",
    trainings=lambda arm: 1 if arm in BUDGETS else "ranks by models of the bed, or at random",  # the first expert's
)
