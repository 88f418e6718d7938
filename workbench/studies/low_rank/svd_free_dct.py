"""Do columns of a fixed cosine transform keep the quality of a subspace that is found by SVD? (2505.17967)

A byte model learns Python sources from nothing. All arms start from the same weights and see the same data in the same
order, so differences are paired. Vectors, positions and embeddings have AdamW at one rate in every arm; the matrices
have the arm's own optimiser at the arm's own rate, the best of `RATES` on the validation split, `on_validation`, for
seeds that are none of the study's.
"""

import math
import statistics
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from workbench.beds.python_text import decoder, python_text
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.optim import GaLoreAdamW, MatrixOptimizer, matrix_shape, parameter_groups
from workbench.lib.core.optim.matrix import COUNTERS
from workbench.lib.core.optim.projectors import tall
from workbench.lib.core.train import Hook, State, TrainConfig, train
from workbench.lib.low_rank.svd_free_dct import METHOD, DCTAdamW, Trion
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

ADAMW, GALORE, RANDOM, DCT, FED = "adamw", "galore", "random subspace", "dct", "dct, error kept"
RANDOM_FED, TRION, MUON = "random columns, error kept", "trion", "trion, whole width"

#: Arm -> optimiser of the matrices and its options; the rank is the settings' where none is here.
ARMS = {
    ADAMW: (torch.optim.AdamW, {"betas": (0.9, 0.95)}),
    GALORE: (GaLoreAdamW, {"betas": (0.9, 0.95), "scale": 1.0}),
    RANDOM: (GaLoreAdamW, {"betas": (0.9, 0.95), "scale": 1.0, "projector": "random"}),
    DCT: (DCTAdamW, {"betas": (0.9, 0.95)}),
    FED: (DCTAdamW, {"betas": (0.9, 0.95), "error_feedback": True, "ef_bits": 8}),
    RANDOM_FED: (DCTAdamW, {"betas": (0.9, 0.95), "error_feedback": True, "ef_bits": 8, "basis": "random"}),
    TRION: (Trion, {}),
    MUON: (Trion, {"rank": "width"}),
}
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BEST = {arm: 3e-2 if arm in (FED, RANDOM_FED, TRION, MUON) else 1e-2 for arm in ARMS}
MARGIN = 0.02  # bits per byte

RULE = (
    "The metric is bits per byte on the test split; intervals are paired, over seeds, at 95%. (a) DCT-AdamW, which "
    f"keeps less than GaLore of the same rank, loses less than {MARGIN} bits per byte to it: the interval of dct minus "
    f"galore lies below {MARGIN}. (b) It is the choice of the columns: dct minus a random subspace, drawn as often as "
    "GaLore's is found, lies below 0. Reproduced if both hold. Not reproduced if the interval of (a) lies above "
    f"{MARGIN}, or that of (b) above 0. Not resolved otherwise. The effect is that of (a). Error feedback, random "
    "columns in place of cosines, and Trion are reported and not judged."
)

COMMON = {"d_model": 64, "n_layers": 2, "n_heads": 4, "rank": 16, "lr": 3e-3, "weight_decay": 0.1, "rates": BEST}
PRESETS = {
    "smoke": COMMON
    | {"d_model": 16, "n_layers": 1, "rank": 4, "steps": 8, "batch_size": 4, "seq_len": 16, "cap": 65_536}
    | {"update_gap": 3, "look": 4, "test_batches": 1, "seeds": 2},
    "small": COMMON
    | {"steps": 250, "batch_size": 8, "seq_len": 64, "cap": 1_500_000}
    | {"update_gap": 50, "look": 20, "test_batches": 16, "seeds": 12},
    "full": COMMON
    | {"d_model": 256, "n_layers": 6, "rank": 64, "steps": 10_000, "batch_size": 32, "seq_len": 256, "cap": 1_500_000}
    | {"update_gap": 200, "look": 200, "test_batches": None, "seeds": 12},
}


class Kept(Hook):
    """How much of every gradient the subspaces of an optimiser hold, and how much the best ones of that rank would."""

    def __init__(self, every: int):
        self.every, self.steps, self.kept, self.best = every, [], [], []

    def after_step(self, state: State) -> None:
        optimizer = state.optimizer
        if state.step % self.every or not hasattr(optimizer, "projector"):
            return
        shares = list(shares_kept(optimizer))
        self.steps.append(state.step)
        self.kept.append(statistics.fmean(kept for kept, _ in shares))
        self.best.append(statistics.fmean(best for _, best in shares))


def shares_kept(optimizer: MatrixOptimizer) -> Iterator[tuple[float, float]]:
    """Of each matrix the share of its squared gradient in the subspace of the step, and in the best one of the rank."""
    for group in optimizer.param_groups:
        projector = optimizer.projector(group)
        for p in group["params"]:
            if matrix_shape(p, group) is not None and p.grad.any():
                grad = tall(p.grad)
                energy = torch.linalg.svdvals(grad).square()
                kept = projector.project(grad, optimizer.state[p]).square().sum() / energy.sum()
                yield float(kept), float(energy[: group["rank"]].sum() / energy.sum())


def groups(model: nn.Module, settings: Settings, rate: float) -> list[dict]:
    """The matrices at `rate`; all else at the settings' own, beside it."""
    found = parameter_groups(model, settings["weight_decay"], heads=["position"])
    for group in found:
        others = group.pop("matrix", True) is False
        group["lr_scale"] = settings["lr"] / rate if others else 1.0
        group["matrix"] = not others
    return found


def make_optimizer(arm: str, model: nn.Module, settings: Settings, rate: float) -> torch.optim.Optimizer:
    kind, options = ARMS[arm]
    if issubclass(kind, MatrixOptimizer):
        options = {"rank": settings["rank"]} | options
        options["rank"] = settings["d_model"] if options["rank"] == "width" else options["rank"]
    if kind is GaLoreAdamW:
        options = options | {"update_gap": settings["update_gap"]}
    return kind(groups(model, settings, rate), lr=rate, **options)


def build(settings: Settings) -> DecoderLM:
    width = settings["d_model"]
    return decoder(settings, lambda _: GLU(width, 2 * width))


def trained(arm: str, seed: int, settings: Settings, rate: float, *hooks: Hook) -> State:
    """The training of an arm, with the metric on the first of the validation split at its end."""
    task = python_text(settings)
    torch.manual_seed(seed)
    model = build(settings)
    config = TrainConfig(settings["steps"], settings["batch_size"], rate, seed=seed, eval_batches=4)
    return train(model, task, config, hooks, optimizer=make_optimizer(arm, model, settings, rate))


def on_validation(arm: str, seed: int, settings: Settings, rates: Iterable[float] = RATES) -> dict[float, float]:
    """What the rates of `BEST` were chosen by: bits per byte of the validation split at each rate."""
    return {rate: trained(arm, seed, settings, rate).metrics["bits_per_byte"] for rate in rates}


def run(arm: str, seed: int, settings: Settings) -> Row:
    seen = Kept(settings["look"])
    state = trained(arm, seed, settings, settings["rates"][arm], seen)
    budget = training_budget(state.model, state.task, settings["batch_size"], seed)
    metric = state.task.evaluate(state.model, "test", settings["test_batches"])["bits_per_byte"]
    extra = {
        "state_bytes": matrix_state_bytes(state.optimizer),
        "validation": state.metrics["bits_per_byte"],
        "looks": seen.steps,
        "kept": seen.kept,
        "best": seen.best,
    }
    return trained_row(arm, seed, budget, settings["steps"], metric, **extra)


def matrix_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what is kept of the matrices alone."""
    matrices = [p for group in optimizer.param_groups if group["matrix"] for p in group["params"]]
    return sum(t.nbytes for p in matrices for key, t in optimizer.state[p].items() if key not in COUNTERS)


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    loss, choice = rows.minus(DCT, GALORE), rows.minus(DCT, RANDOM)
    verdict = decide(
        (NOT_REPRODUCED, loss.low > MARGIN or choice.low > 0), (REPRODUCED, loss.high < MARGIN and choice.high < 0)
    )
    kept = {arm: rows.interval([statistics.fmean(k) for k in rows.of(arm, "kept")]) for arm in ARMS if arm != ADAMW}
    reason = (
        f"Bits per byte of dct minus galore {loss}, which is the effect, and minus a random subspace {choice}. With "
        f"its error kept, dct minus galore is {rows.minus(FED, GALORE)}; cosines minus random columns, both with it, "
        f"{rows.minus(FED, RANDOM_FED)}. Of the squared gradients dct holds {kept[DCT].estimate:.0%}, galore "
        f"{kept[GALORE].estimate:.0%}, a random subspace {kept[RANDOM].estimate:.0%}."
    )
    details = {
        "bits_per_byte": rows.means(),
        "over_adamw": {arm: rows.minus(arm, ADAMW) for arm in ARMS if arm != ADAMW},
        "kept": kept,
        "state_bytes": rows.means("state_bytes"),
        "rates": dict(settings["rates"]),
    }
    return Judgement.on(loss, verdict, reason, details, claimed=(-math.inf, MARGIN))


STUDY = Study(
    METHOD,
    metric="bits per byte",
    unit="bits/byte",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    main=DCT,
    power=Power((ADAMW, GALORE), effect=MARGIN, deviation={"small": (0.02204, 12)}),
)
