"""Does a small generator beside retrieved neighbours rival larger ones, and does a swap of its database change what it
draws? (Blattmann et al., NeurIPS 2022)

Digits of 8 x 8 (`beds.retrieved_digits`): about 500 to train on, as many others in the database, an embedder fitted on
250 more. All arms but "large" are the same network to the last weight; what differs is what it is shown:

    semi-parametric   the 4 nearest of the database; one in ten images the null vector
    unconditional     the null vector alone
    class             the digit, one-hot, in the place of a neighbour; the digits are drawn as often as in training
    random            4 items of the database drawn at random, in training and after
    large             the null vector alone, five times the weights
    unseen            as "semi-parametric", but no 8 and no 9 in training or database; then the database becomes all 8s
                      and 9s that were kept back
    unseen-random     the same with neighbours drawn at random

Drawn is beside items that the proposal picks by their counts (m = 1), never beside neighbours of test images, and
without guidance: an image for each of the test split, DDIM of 50 steps. Judged by the squared MMD from the test split,
of the last two arms from its eights and nines.
Steps and rate were fixed on the unconditional and the class-conditional network.
"""

import statistics
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.beds.baseline import seeded
from workbench.beds.retrieved_digits import (
    LEVELS,
    SIDE,
    WIDTH,
    DenoisingBeside,
    Embedder,
    Part,
    database,
    mmd,
    nearest,
    parts,
    precision_recall,
    reader,
)
from workbench.lib.core.diffusion import Discrete
from workbench.lib.core.retrieval import RetrievalDatabase
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.imaging.semi_parametric import (
    METHOD,
    NeighborConditionedDenoiser,
    TopMProposal,
    neighbours,
    sample,
)
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

OURS = "semi-parametric"
ARMS = (OURS, "unconditional", "class", "random", "large", "unseen", "unseen-random")
UNSEEN = (8, 9)
MARGIN = 0.01  # of the squared MMD, by which a larger model may be better
SWAPPED, COPIED = 0.5, 0.5

RULE = (
    "The metric is the squared MMD between drawn images and held-out ones, lower is better; intervals are of 95% over "
    "seeds, paired where arms are compared. Four parts. Neighbours help: MMD, retrieved minus unconditional and "
    "retrieved minus random neighbours, at the same parameters, both lie below 0. It rivals the larger model: "
    f"retrieved minus the unconditional one of five times the parameters lies below {MARGIN:g}. A swap changes the "
    "domain: of what is drawn after the database became unseen eights and nines, the share that an independent "
    f"classifier reads as 8 or 9 lies above {SWAPPED:g}, and above that of one trained beside random neighbours. It "
    "does not paste: the mean distance of drawn images from the nearest of the database, over that of held-out images, "
    f"is above {COPIED:g}. Reproduced if all four hold. Not reproduced if retrieved minus unconditional or random "
    f"lies above 0, if retrieved minus the larger model lies above {MARGIN:g}, if the share lies below {SWAPPED:g} or "
    f"the ratio below {COPIED:g}. Not resolved otherwise. The effect is retrieved minus unconditional. The "
    "class-conditional model is reported and not judged."
)

COMMON = {"k": 4, "p_uncond": 0.1, "draw_steps": 50, "rate": 5e-3, "batch_size": 64}
PRESETS = {
    "smoke": COMMON | {"seeds": 2, "steps": 3, "draw_steps": 2, "batch_size": 8, "dim": 16, "large": (24, 3)},
    "small": COMMON | {"seeds": 12, "steps": 1000, "dim": 64, "large": (128, 3)},
    "full": COMMON | {"seeds": 12, "steps": 10_000, "dim": 128, "large": (256, 4)},
}


def build(arm: str, settings: Settings) -> NeighborConditionedDenoiser:
    """The untrained network of an arm."""
    dim, depth = settings["large"] if arm == "large" else (settings["dim"], 2)
    return NeighborConditionedDenoiser((1, SIDE, SIDE), WIDTH, dim, depth, p_uncond=settings["p_uncond"])


def run(arm: str, seed: int, settings: Settings) -> Row:
    found = parts(seed)
    if arm.startswith("unseen"):
        seen = set(range(10)) - set(UNSEEN)
        kept_back = found["database"].only(UNSEEN)
        found |= {name: found[name].only(seen) for name in ("database", "train", "validation")}
    embedder, schedule = Embedder(found["embedder"].images), Discrete("linear-sqrt", LEVELS)
    base = database(found["database"], embedder)
    ids, shown = {}, {}
    for number, split in enumerate(("train", "validation")):
        ids[split], shown[split] = look_up(arm, found[split], base, embedder, settings["k"], number)
    p_uncond = settings["p_uncond"] if ids["train"] is not None else 0.0
    task = DenoisingBeside({split: (found[split].images, shown[split]) for split in shown}, schedule, p_uncond)
    model = seeded(seed, lambda: build(arm, settings))
    steps, size = settings["steps"], settings["batch_size"]
    config = TrainConfig(steps, size, settings["rate"], weight_decay=0.0, seed=seed)
    state = train(model, task, config)
    budget = training_budget(model, task, size, seed)

    real = found["test"].images

    def draw(beside: Tensor | None, weight: float) -> Tensor:
        generator, many = torch.Generator().manual_seed(seed + 1), len(real) if beside is None else None
        return sample(model, beside, schedule, generator, weight, settings["draw_steps"], n=many)

    if arm.startswith("unseen"):
        base.swap(database(kept_back, embedder))
        items = torch.randint(len(base), (len(real),), generator=torch.Generator().manual_seed(seed))
        beside = look_like(arm, items, base, settings["k"], seed)[1]
    else:
        items = None if ids["train"] is None else TopMProposal.fit(ids["train"], len(base)).sample(
            len(real), torch.Generator().manual_seed(seed), m=1.0
        )  # fmt: skip
        near, beside = look_like(arm, items, base, settings["k"], seed) if items is not None else (None, None)
        if arm == "class":
            drawn_as = torch.randint(len(shown["train"]), (len(real),), generator=torch.Generator().manual_seed(seed))
            beside = shown["train"][drawn_as]
    drawn = draw(beside, 1.0)
    right = torch.isin(reader(together(found, "embedder", "validation", "test"))(drawn), torch.tensor(UNSEEN))
    extra: dict[str, Any] = {"noise_error": state.metrics["noise_error"], "unseen": float(right.double().mean())}
    if not arm.startswith("unseen"):
        extra |= closeness(drawn, found)
    if arm == OURS:
        extra |= {"own": float(own_distance(drawn, base.payload[near]))} | swept(model, ids, base, draw, real, settings)
    held_out = found["test"].only(UNSEEN).images if arm.startswith("unseen") else real
    return trained_row(arm, seed, budget, steps, mmd(drawn, held_out), **extra)


def together(found: dict[str, Part], *names: str) -> Part:
    """Several parts as one: here all that is neither trained on nor looked up."""
    return Part(*(torch.cat([getattr(found[name], of) for name in names]) for of in ("images", "digits")))


def look_up(
    arm: str, part: Part, base: RetrievalDatabase, embedder: Embedder, k: int, number: int
) -> tuple[Tensor | None, Tensor | None]:
    """What is shown beside each image of a part: ids of the database, where it is from there, and what is seen."""
    if arm in ("unconditional", "large"):
        return None, None
    if arm == "class":
        return None, F.one_hot(part.digits, WIDTH)[:, None].float()
    if arm.endswith("random"):
        ids = torch.randint(len(base), (len(part.images), k), generator=torch.Generator().manual_seed(number))
    else:
        ids, _ = base.search(embedder(part.images), k)
    return ids, base.embeddings(ids)


def look_like(arm: str, items: Tensor, base: RetrievalDatabase, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """What is shown where nothing is there yet: an item and what is near it, or as many items at random."""
    if arm.endswith("random"):
        ids = torch.randint(len(base), (len(items), k), generator=torch.Generator().manual_seed(seed + 2))
        return ids, base.embeddings(ids)
    return neighbours(base, items, k)


def closeness(drawn: Tensor, found: dict[str, Part]) -> dict[str, float]:
    """Mean distances to the nearest image of the database and of the training part, of drawn and of held-out images."""
    sets = {"drawn": drawn, "held_out": found["test"].images}
    distances = {
        f"{name}_to_{of}": float(nearest(images, found[of].images).mean())
        for name, images in sets.items()
        for of in ("database", "train")
    }
    precision, recall = precision_recall(drawn, found["test"].images)
    return distances | {"precision": precision, "recall": recall, "floor": mmd(found["train"].images, sets["held_out"])}


def own_distance(drawn: Tensor, shown: Tensor) -> Tensor:
    """Mean distance of each drawn image from the nearest of those that it was shown (rows, k, 1, 8, 8)."""
    return torch.cdist(drawn.flatten(1)[:, None].double(), shown.flatten(2).double()).amin((1, 2)).mean()


def swept(model, ids, base: RetrievalDatabase, draw, real: Tensor, settings: Settings) -> dict[str, Any]:
    """What a share m of the proposal, another k and guidance do to what is drawn: no training is needed for them."""
    proposal, n, k = TopMProposal.fit(ids["train"], len(base)), len(real), settings["k"]

    def measured(k: int, m: float, weight: float) -> list[float]:
        items = proposal.sample(n, torch.Generator().manual_seed(0), m=m)
        drawn = draw(neighbours(base, items, k)[1], weight)
        return [mmd(drawn, real), *precision_recall(drawn, real)]

    return {
        "m": {str(m): measured(k, m, 1.0) for m in (0.01, 0.1)},
        "k": {str(other): measured(other, 1.0, 1.0) for other in (1, 8)},
        "guided": measured(k, 1.0, 2.0),
    }


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    gains = {arm: rows.minus(OURS, arm) for arm in ("unconditional", "random", "large", "class")}
    share = rows.interval(rows.of("unseen", "unseen"))
    above = rows.minus("unseen", "unseen-random", "unseen")
    ratio = rows.interval(rows.of(OURS, lambda row: row.extra["drawn_to_database"] / row.extra["held_out_to_database"]))
    helped = [gains[arm] for arm in ("unconditional", "random")]
    holds = {
        "neighbours help": all(gain.high < 0 for gain in helped),
        "rivals the larger": gains["large"].high < MARGIN,
        "swap": share.low > SWAPPED and above.low > 0,
        "no pasting": ratio.low > COPIED,
    }
    verdict = decide(
        (
            NOT_REPRODUCED,
            any(gain.low > 0 for gain in helped)
            or gains["large"].low > MARGIN
            or share.high < SWAPPED
            or ratio.high < COPIED,
        ),
        (REPRODUCED, all(holds.values())),
    )
    shown = ", ".join(f"{arm} {gain.estimate:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]" for arm, gain in gains.items())
    reason = (
        f"Squared MMD, retrieved minus: {shown}. After the swap {share.estimate:.2f} "
        f"[{share.low:.2f}, {share.high:.2f}] are read as 8 or 9, beside random neighbours "
        f"{rows.mean('unseen-random', 'unseen'):.2f}. Drawn images are {ratio.estimate:.2f} "
        f"[{ratio.low:.2f}, {ratio.high:.2f}] times as far from the database as held-out ones. "
        f"Holds: {', '.join(name for name, held in holds.items() if held) or 'nothing'}."
    )
    drawn = [arm for arm in rows.arms if not arm.startswith("unseen")]
    swept = [row.extra for row in rows.arm(OURS)]
    details = {
        "holds": holds,
        "minus": gains,
        "swapped": {arm: rows.mean(arm, "unseen") for arm in ("unseen", "unseen-random", "unconditional")},
        "ratio": ratio,
        "own": rows.mean(OURS, "own"),
        "mmd": rows.means(arms=drawn),
        "floor": rows.mean(OURS, "floor"),
        "noise_error": rows.means("noise_error"),
        **{
            name: rows.means(name, drawn)
            for name in ("precision", "recall", "drawn_to_database", "drawn_to_train", "held_out_to_database")
        },
        "m": {m: [statistics.fmean(x) for x in zip(*(e["m"][m] for e in swept), strict=True)] for m in swept[0]["m"]},
        "k": {k: [statistics.fmean(x) for x in zip(*(e["k"][k] for e in swept), strict=True)] for k in swept[0]["k"]},
        "guided": [statistics.fmean(x) for x in zip(*(e["guided"] for e in swept), strict=True)],
        "params": rows.means(lambda row: row.params),
        "flops": rows.means(lambda row: row.flops),
    }
    return Judgement.on(gains["unconditional"], verdict, reason, details)


STUDY = Study(
    METHOD,
    metric="mmd",
    unit="squared MMD",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    main=OURS,
    tested="Beside retrieved neighbours a small denoiser draws digits nearer to held-out ones than alone or beside "
    "random ones, no worse than one of five times its size, and digits it never saw once its database holds them.",
    power=Power(("unconditional", "random"), effect=0.01, deviation={"small": (0.0107, 12)}),
)
