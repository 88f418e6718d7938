"""Does one tunable network do what a network for each compromise does, and other ways of control do not? (2023)

Grey crops of photographs with Gaussian noise of 15, 25 or 50 of 255 (`beds/restoration.py`), split by photograph. The
axis between two objectives, w = (u, 1 - u):

    faithful   the mean square error
    sharp      the square error of local contrast (the mean size of the gradient within 5 x 5 pixels) and, so that there
               is one image that is best, of the means within 5 x 5

both in units of what the noisy image has, on the training crops. The network that is best at the mean square error is
smooth; one that is sharp has to invent detail. An arm is judged by the objective on held-out photographs at five points
of the axis, over that of the noisy image.

All networks are the same residual convolutions of one width and see as many batches; what they cost in use is the same,
but for "film-wide", which has as many parameters as the tunable network has in training. "dedicated" is a network for
each of the five points. The two ends of "dni" were trained from a common start, half of the steps at the middle of the
axis and half at their end: together one and a half times the steps of any other network. "blending" mixes the outputs
of the same two. "fixed" is trained at the middle and asked at all points. Parameters are those of one network as it is
trained; operations are counted with one setting of the knobs for a batch (torch's counter takes the gradients of the
kernels of a grouped convolution for many times what they are).
"""

import copy
import math
import statistics
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds import restoration
from workbench.beds.baseline import seeded
from workbench.lib.core.modes import evaluating
from workbench.lib.core.routing import Context
from workbench.lib.core.task import EVALUATION_BATCH, Batch, Restoration, device_of, psnr
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.imaging.tunable_conv import METHOD, MultiLoss, Tuned, make_tunable, sample_knobs, scales_of
from workbench.studies.core import Power, Settings, Study
from workbench.studies.imaging.tunable_rivals import MIDDLE, Blended, FiLM, Plain, interpolated
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
"""u of the points at which all are judged; the inner three are the middle."""
ARMS = ["tunable", "dedicated", "dni", "film", "film-wide", "fixed"]
BLENDING = "blending"  # measured on the networks of "dni"
FEW, LEAST = 0.05, 0.01
"""A few per cent of the objective, and what a rival has to be worse by to be no equal."""

RULE = (
    "The objective at each point of the axis, as a logarithm, so that differences are relative. Reproduced if the "
    f"tunable network is within {FEW:.0%} of the dedicated network at all five points (the upper end of the 90% "
    "interval), below interpolated weights in the middle of the axis and below FiLM over the whole of it (95% "
    "intervals below 0), and both losses follow their knob from point to point (rank correlation -1 in the mean over "
    f"the seeds). Not reproduced if it is worse than a dedicated network by more than {FEW:.0%} at a point (the lower "
    f"end of the 95% interval), or not better by {LEAST:.0%} than interpolated weights in the middle or than FiLM (the "
    f"90% interval lies above -{LEAST:.0%}). Not resolved otherwise. The effect is the tunable network minus FiLM. "
    "Blended outputs, the wider FiLM and the fixed network are reported and not judged."
)

COMMON = {"batch_size": 16, "rate": 4e-3, "depth": 5}
PRESETS = {
    "smoke": COMMON | {"crops": 16, "size": 24, "width": 8, "steps": 4, "seeds": 2},
    "small": COMMON | {"crops": 800, "size": 24, "width": 16, "steps": 200, "seeds": 18},
    "full": COMMON | {"crops": 8000, "size": 48, "width": 48, "depth": 8, "steps": 20_000, "seeds": 12},
}


# -- the objectives


def contrast(images: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 1 h w"]:
    """The mean size of the gradient within 5 x 5 pixels; its square root has a floor, so that it has a slope at 0."""
    down, across = images[..., 1:, :-1] - images[..., :-1, :-1], images[..., :-1, 1:] - images[..., :-1, :-1]
    return F.avg_pool2d((down.square() + across.square() + 1e-6).sqrt(), 5, 1)


def _square(a: Tensor, b: Tensor) -> Float[Tensor, " B"]:
    return (a - b).square().flatten(1).mean(1)


def faithful(pred: Tensor, target: Tensor, x: Tensor) -> Float[Tensor, " B"]:
    return _square(pred, target)


def sharp(pred: Tensor, target: Tensor, x: Tensor) -> Float[Tensor, " B"]:
    means = _square(F.avg_pool2d(pred, 5, 1), F.avg_pool2d(target, 5, 1))
    return _square(contrast(pred), contrast(target)) + means


OBJECTIVES = {"faithful": faithful, "sharp": sharp}


class Axis(Restoration):
    """Denoising at knobs that are drawn for every image, or that are always the same.

    Args:
        at: u of the knobs (u, 1 - u); None draws them.
    """

    def __init__(self, task: Restoration, at: float | None = None):
        super().__init__(task.name, task.splits, task.manifest)
        self.at = at
        spoiled, clean = (torch.cat(parts) for parts in zip(*self._split("train"), strict=True))
        losses = list(OBJECTIVES.values())
        self.objective = MultiLoss(losses, scales_of(losses, [(spoiled, clean, spoiled)]))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        batch, context = batch.to(device_of(model)), Context()
        if self.at is None:
            w = sample_knobs(len(batch), 2, "axis").to(batch.inputs)
        else:
            w = torch.tensor([self.at, 1 - self.at]).to(batch.inputs)
        return self.objective(model(batch.inputs, context, w=w), batch.targets, batch.inputs, w)[0], context


# -- training and measuring


def run(arm: str, seed: int, settings: Settings) -> Row:
    noisy = restoration.make(settings["crops"], settings["size"], ways=("noise",))
    steps, size = settings["steps"], settings["batch_size"]

    def trained(model: nn.Module, at: float | None, steps: int = steps, first: int = 0) -> nn.Module:
        train(model, Axis(noisy, at), TrainConfig(steps, size, settings["rate"], weight_decay=0.0, seed=seed + first))
        return model

    model = seeded(seed, lambda: network(arm, settings))
    budget = training_budget(model, Axis(noisy, MIDDLE[0]), size)
    extra = {}
    if arm == "dedicated":
        nets = [trained(seeded(seed, lambda: network(arm, settings)), u) for u in GRID]
        points, steps = [(net, u) for net, u in zip(nets, GRID, strict=True)], steps * len(GRID)
    elif arm == "dni":
        half = steps // 2
        other = copy.deepcopy(trained(model, MIDDLE[0], half))
        first = trained(model, 1.0, steps - half, 1_000_000)
        second = trained(other, 0.0, steps - half, 1_000_000)
        points = [(interpolated(first, second, (u, 1 - u)), u) for u in GRID]
        extra[BLENDING] = measured(noisy, [(Blended(first, second), u) for u in GRID])
        steps = half + 2 * (steps - half)
    else:
        trained(model, MIDDLE[0] if arm == "fixed" else None)
        points = [(model, u) for u in GRID]
    found = measured(noisy, points)
    return trained_row(arm, seed, budget, steps, statistics.fmean(found["log_ratio"]), **found, **extra)


def network(arm: str, settings: Settings) -> nn.Module:
    """The untrained network of an arm."""
    width, depth = settings["width"], settings["depth"]
    if arm == "tunable":
        net = make_tunable(restoration.ResidualCNN(1, width, depth), 2)
        with torch.no_grad():  # says at first that nothing is to be changed, as all the others do
            net.layers[-1].weight.zero_()
            net.layers[-1].bias.zero_()
        return Tuned(net, MIDDLE)
    if arm.startswith("film"):
        return FiLM(round(width * math.sqrt(2)) if arm == "film-wide" else width, depth)
    return Plain(width, depth)


def measured(noisy: Restoration, points: list[tuple[nn.Module, float]]) -> dict[str, list]:
    """At each point of the axis: the logarithm of the objective over that of the noisy images, the two losses, PSNR."""
    axis = Axis(noisy)
    batches = list(noisy.batches("test", EVALUATION_BATCH))
    found: dict[str, list] = {"log_ratio": [], "parts": [], "psnr": []}
    for net, u in points:
        w = torch.tensor([u, 1 - u])
        with evaluating(net):
            outputs = [net(batch.inputs, w=w) for batch in batches]
        loss, parts = _over(axis.objective, outputs, batches, w)
        untouched, _ = _over(axis.objective, [batch.inputs for batch in batches], batches, w)
        found["log_ratio"].append(math.log(loss / untouched))
        found["parts"].append(parts)
        values = torch.cat([psnr(out, batch.targets) for out, batch in zip(outputs, batches, strict=True)])
        found["psnr"].append(values.mean().item())
    return found


def _over(objective: MultiLoss, outputs: list[Tensor], batches: list[Batch], w: Tensor) -> tuple[float, list[float]]:
    """The objective and its parts over all images."""
    out, truth, x = (
        torch.cat(part) for part in (outputs, [batch.targets for batch in batches], [batch.inputs for batch in batches])
    )
    loss, parts = objective(out.double(), truth.double(), x.double(), w)
    return loss.item(), parts.tolist()


# -- the verdict


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    middle = [i for i, u in enumerate(GRID) if 0 < u < 1]

    def over(points: list[int]) -> Callable[[Row], float]:
        return lambda row: statistics.fmean(row.extra["log_ratio"][i] for i in points)

    def beyond(level: float) -> Iterator:
        """Tunable minus dedicated at each point."""
        return (rows.minus("tunable", "dedicated", over([i]), level) for i in range(len(GRID)))

    against = {
        "dni in the middle": lambda level: rows.minus("tunable", "dni", over(middle), level),
        "film": lambda level: rows.minus("tunable", "film", level=level),
    }
    follows = _follows([row.extra["parts"] for row in rows.arm("tunable")])
    verdict = decide(
        (
            NOT_REPRODUCED,
            any(gap.low > math.log1p(FEW) for gap in beyond(0.95))
            or any(gap(0.9).low > -LEAST for gap in against.values()),
        ),
        (
            REPRODUCED,
            all(gap.high < math.log1p(FEW) for gap in beyond(0.9))
            and all(gap(0.95).high < 0 for gap in against.values())
            and all(value < -0.999 for value in follows),
        ),
    )
    effect = rows.minus("tunable", "film")
    gaps = {f"dedicated at {u:g}": gap for u, gap in zip(GRID, beyond(0.95), strict=True)}
    gaps |= {name: gap(0.95) for name, gap in against.items()}
    gaps |= {"film-wide": rows.minus("tunable", "film-wide"), "fixed": rows.minus("tunable", "fixed")}
    blended = [row.extra[BLENDING]["log_ratio"] for row in rows.arm("dni")]
    ours = [row.extra["log_ratio"] for row in rows.arm("tunable")]
    gaps["blending in the middle"] = rows.interval(
        [statistics.fmean(a[i] - b[i] for i in middle) for a, b in zip(ours, blended, strict=True)]
    )
    said = ", ".join(
        f"{name} {_percent(gap.estimate)} [{_percent(gap.low)}, {_percent(gap.high)}]" for name, gap in gaps.items()
    )
    reason = (
        f"The tunable network's objective against: {said}. Rank correlation of each loss with its knob: "
        f"{', '.join(f'{name} {value:+.2f}' for name, value in zip(OBJECTIVES, follows, strict=True))}."
    )
    details = {"minus": gaps, "follows": follows, "grid": list(GRID)} | {
        name: {arm: _mean([row.extra[name] for row in rows.arm(arm)]) for arm in ARMS}
        | {BLENDING: _mean([row.extra[BLENDING][name] for row in rows.arm("dni")])}
        for name in ("log_ratio", "parts", "psnr")
    }
    details["params"] = rows.means(lambda row: row.params)
    return Judgement.on(effect, verdict, reason, details, claimed=(float("-inf"), -LEAST))


def _follows(parts: list[list[list[float]]]) -> list[float]:
    """Rank correlation along the axis of each loss, in the mean over the seeds, with its own knob."""
    curves = torch.tensor(parts).mean(0)  # (points, losses)
    knob = [list(GRID), [1 - u for u in GRID]]
    return [float(spearmanr(knob[p], curves[:, p]).statistic) for p in range(2)]


def _mean(values: list) -> list:
    return torch.tensor(values, dtype=torch.float64).mean(0).tolist()


def _percent(log_ratio: float) -> str:
    return f"{math.expm1(log_ratio):+.1%}" if math.isfinite(log_ratio) else f"{log_ratio}"


STUDY = Study(
    METHOD,
    metric="objective",
    unit="nats of the noisy image's",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    main="tunable",
    tested="One small network that removes noise, as faithful or as sharp as wanted, is within 5 % of a network for "
    "each compromise, and better than interpolated weights and than FiLM at the same steps.",
    power=Power(("film", "dni"), effect=0.03, deviation={"small": (0.04244, 12)}),
    trainings=lambda arm: 2 if arm == "dni" else 1,
)
