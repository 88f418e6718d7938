"""Is one hashed table for all fields better than one for each? (NeurIPS 2023)

Likes of films (`beds.tables`), eight fields of 3,556 values, in tables of a half, a tenth and a thirtieth as many rows,
behind DCN-V2. An arm is how rows are shared and their share of the values; "none" has a row for each. In the control
all fields have the same weights behind their embeddings, which then are added: what makes collisions of two fields
harmless is gone.
"""

from typing import Any

import torch
from torch import nn

from workbench.beds import tables
from workbench.lib.core.budget import count_params
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.features.dcn_v2 import DCNV2
from workbench.lib.features.unified_embedding import (
    METHOD,
    HashedEmbeddings,
    SharedBehind,
    click_model,
    collision_report,
    weight_angles,
)
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, all_above, any_below, decide

SHARES = (0.5, 0.1, 0.03)
"""Rows of all tables together, of the values."""
OURS, THEIRS = "multiplexed", "per_feature"
SMALL_ARMS = ("none", *(f"{sharing}@{share:g}" for share in SHARES for sharing in (OURS, THEIRS)))
CONTROLS = (f"{OURS}@0.1, added", f"{THEIRS}@0.1, added")

RULE = (
    "The metric is the area under the ROC curve on the test split; intervals are 95% paired intervals over seeds. (a) "
    f"At each of {', '.join(f'{share:g}' for share in SHARES)} rows a value, multiplexed minus per_feature lies above "
    f"0. (b) The gain grows as the table shrinks: multiplexed minus per_feature at {SHARES[-1]:g} minus the same at "
    f"{SHARES[0]:g} lies above 0. Reproduced if all hold. Not reproduced if one lies below 0. Not resolved otherwise. "
    "Beside it, without a part in the verdict: what multiplexing loses to a row for each value, and the same gain "
    "where embeddings are added and fields have no weights of their own."
)

COMMON = {"width": 16, "deep": (64, 32), "batch_size": 256, "lr": 1e-3}
PRESETS = {
    "smoke": COMMON | {"seeds": 2, "steps": 3, "width": 4, "deep": (8,), "arms": SMALL_ARMS + CONTROLS},
    "small": COMMON | {"seeds": 12, "steps": 500, "arms": SMALL_ARMS + CONTROLS},
    "full": COMMON
    | {"seeds": 12, "steps": 4000, "arms": SMALL_ARMS + CONTROLS + tuple(f"even@{share:g}" for share in SHARES)},
}


def build(arm: str, sizes: tuple[int, ...], seed: int, settings: Settings) -> DCNV2:
    """The model of one arm; a seed has hashes of its own."""
    sharing, _, share = arm.removesuffix(", added").partition("@")
    rows = round(float(share or 1) * sum(sizes))
    embedding: nn.Module = HashedEmbeddings(sizes, rows, settings["width"], sharing, seed)
    if arm.endswith(", added"):
        embedding = SharedBehind(embedding)
    return click_model(embedding, settings["deep"])


def run(arm: str, seed: int, settings: Settings) -> Row:
    task = tables.ratings()
    torch.manual_seed(seed)
    model = build(arm, task.table.sizes, seed, settings)
    hashed = model.embedding.embedding if isinstance(model.embedding, SharedBehind) else model.embedding
    steps, size = settings["steps"], settings["batch_size"]
    train(model, task, TrainConfig(steps, size, settings["lr"], weight_decay=0.0, seed=seed, eval_every=None))
    found = task.evaluate(model, "test")
    extra: dict[str, Any] = {"log_loss": found["log_loss"], "table_bytes": 4 * hashed.table.numel()}
    extra |= {"collisions": collision_report(hashed), "row_norm": float(hashed.table.detach().square().sum(1).mean())}
    if not isinstance(model.embedding, SharedBehind):
        angles = weight_angles(model.cross.layers[0].matrix().detach(), model.embedding.widths)
        apart = ~torch.eye(len(angles), dtype=torch.bool)
        extra["angle"] = float(angles[apart].mean())
    extra["beside"] = count_params(model) - hashed.table.numel()
    return trained_row(arm, seed, training_budget(model, task, size, seed), steps, found["auc"], **extra)


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    gains = {share: rows.minus(f"{OURS}@{share:g}", f"{THEIRS}@{share:g}") for share in SHARES}

    def each(share: float) -> list[float]:
        return [a - b for a, b in zip(rows.of(f"{OURS}@{share:g}"), rows.of(f"{THEIRS}@{share:g}"), strict=True)]

    grows = rows.interval([a - b for a, b in zip(each(SHARES[-1]), each(SHARES[0]), strict=True)])
    judged = [*gains.values(), grows]
    verdict = decide((NOT_REPRODUCED, any_below(judged)), (REPRODUCED, all_above(judged)))
    loses = {share: rows.minus(f"{OURS}@{share:g}", "none") for share in SHARES}
    control = rows.minus(*CONTROLS)
    reason = (
        "AUC, one table minus one for each field: "
        + ", ".join(f"at {share:g} rows a value {gain}" for share, gain in gains.items())
        + f"; from {SHARES[0]:g} to {SHARES[-1]:g} it rises by {grows}. Beside a row for each value: "
        + ", ".join(f"{gap}" for gap in loses.values())
        + f". Where embeddings are added: {control}, at 0.1. The effect is that at 0.1."
    )
    details = {
        "auc": rows.means(),
        "gains": {f"{share:g}": gain for share, gain in gains.items()},
        "grows": grows,
        "loses": {f"{share:g}": gap for share, gap in loses.items()},
        "control": control,
        "table_bytes": {arm: int(rows.mean(arm, "table_bytes")) for arm in rows.arms},
        "intra": rows.means(lambda row: row.extra["collisions"]["intra"]),
        "inter": rows.means(lambda row: row.extra["collisions"]["inter"]),
        "row_norm": rows.means("row_norm"),
        "angle": rows.means("angle", [arm for arm in rows.arms if not arm.endswith("added")]),
    }
    return Judgement.on(gains[0.1], verdict, reason, details, claimed=(0.0, float("inf")))


STUDY = Study(
    METHOD,
    metric="auc",
    unit="of 1",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=lambda settings: settings["arms"],
    run=run,
    judge=judge,
    tested="On likes of films, at a half, a tenth and a thirtieth as many rows as values, one hashed table for all "
    "fields is better than one for each in proportion to its values, the more the smaller the table.",
    power=Power(("none", f"{THEIRS}@0.5"), effect=0.005),
    main=f"{OURS}@0.1",
)
