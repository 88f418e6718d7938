"""Find coloured handwritten digits from texts such as "red seven", some never seen in training.

A scene is a textured canvas of 32 x 32 pixels in colour with 2 to 5 digits of 7 to 10 pixels. In training the pairs of
colour and digit have long-tailed frequencies (1 / rank) and ten of the sixty pairs never appear; in the held-out splits
all sixty are equally frequent, and the handwritings are others. `glyph_detector` has a model.

Tensor letters: B batch, Q queries, M most digits of a scene, C texts.
"""

from collections.abc import Iterator
from functools import cache
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError, unknown
from workbench.lib import data
from workbench.lib.core.modes import evaluating
from workbench.lib.core.routing import Context
from workbench.lib.core.task import EVALUATION_BATCH, Batch, device_of

SIZE, MOST = 32, 5
COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.9, 0.1),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (0.9, 0.9, 0.1),
    "purple": (0.7, 0.2, 0.9),
    "white": (1.0, 1.0, 1.0),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEXTS = tuple(f"{colour} {digit}" for colour in COLOURS for digit in DIGITS)
_ORDER = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(0)).tolist()
UNSEEN = tuple(sorted(_ORDER[-10:]))
RARE = tuple(sorted(_ORDER[33:-10]))
"""The last third of the seen pairs by their frequency in training."""
FREQUENCY = torch.zeros(len(TEXTS))
FREQUENCY[_ORDER[:-10]] = 1 / torch.arange(1, len(TEXTS) - 9)
LOSSES = {"class": 2.0, "l1": 5.0, "giou": 2.0}


def draw_scenes(split: str, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (size, 3, 32, 32), and for each place of a digit (size, M, 5): text, or -1 for none, and the box (centre,
    width and height, as shares of the canvas)."""
    x, y = data.load("digits").splits[split]
    weight = FREQUENCY if split == "train" else torch.ones(len(TEXTS))
    text = torch.multinomial(weight, size * MOST, replacement=True, generator=generator)
    pick, colours = torch.rand(size * MOST, generator=generator), torch.tensor(tuple(COLOURS.values()))
    by_digit = [x[y == digit, 0] for digit in range(10)]
    glyphs = torch.stack(
        [by_digit[t % 10][int(u * len(by_digit[t % 10]))] for t, u in zip(text.tolist(), pick.tolist(), strict=True)]
    )
    count = torch.randint(2, MOST + 1, (size, 1), generator=generator)
    place = torch.rand(size, 9, generator=generator).argsort(1)[:, :MOST]
    shape = torch.randint(7, 11, (size, MOST, 2), generator=generator) / SIZE
    centre = (torch.stack([place % 3, place // 3], -1) + 0.5) / 3
    centre = centre + (torch.rand(size, MOST, 2, generator=generator) - 0.5) * 3 / SIZE
    centre = centre.clamp(min=shape / 2, max=1 - shape / 2)
    zoom = torch.zeros(size * MOST, 2, 3)
    zoom[:, 0, 0], zoom[:, 1, 1] = (1 / shape).view(-1, 2).unbind(1)
    zoom[:, :, 2] = ((1 - 2 * centre) / shape).view(-1, 2)
    grid = F.affine_grid(zoom, [size * MOST, 1, SIZE, SIZE], align_corners=False)
    ink = F.grid_sample(glyphs[:, None], grid, align_corners=False).view(size, MOST, 1, SIZE, SIZE)
    shade = colours[text // 10].view(size, MOST, 3, 1, 1)
    shade = shade * (0.8 + 0.2 * torch.rand(size, MOST, 1, 1, 1, generator=generator))
    texture = torch.rand(size, 3, 8, 8, generator=generator) * 0.3
    images = F.interpolate(texture, SIZE, mode="bilinear", align_corners=False)
    here = torch.arange(MOST) < count
    for slot in range(MOST):
        alpha = ink[:, slot] * here[:, slot, None, None, None]
        images = images * (1 - alpha) + shade[:, slot] * alpha
    texts = torch.where(here, text.view(size, MOST), -1)
    return images, torch.cat([texts[..., None].float(), centre, shape], -1)


class GlyphDetection:
    """Detection of the sixty texts; metric: average precision at an overlap of 0.5, mean over the texts.

    `evaluate` also gives "rare", "unseen" and "common" (the other seen pairs) apart.

    Args:
        held_out: scenes in the validation and in the test split.
    """

    metric, unit, higher_is_better = "ap50", "fraction", True
    name, domains = "glyph-detection", ("scenes",)

    def __init__(self, held_out: int):
        if held_out < 1:
            raise InputError(f"held_out is {held_out} but must be at least 1")
        self.held_out = held_out
        self.manifest = {"name": self.name, "held_out": held_out, "digits": data.load("digits").manifest["digits"]}

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        return Batch(*draw_scenes(split, size, generator), torch.zeros(size, dtype=torch.int64))

    def batches(self, split: str, size: int) -> Iterator[Batch]:
        images, targets = _held_out(split, self.held_out)
        for x, y in zip(images.split(size), targets.split(size), strict=True):
            yield Batch(x, y, torch.zeros(len(x), dtype=torch.int64))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        """Sum over the stages of 2 focal + 5 L1 + 2 GIoU losses, each per digit."""
        batch, context = batch.to(device_of(model)), Context()
        stages = model(batch.inputs, context)
        return sum(stage_loss(logits, boxes, batch.targets) for logits, boxes in stages), context

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        found, truths = [], []
        with evaluating(model):
            for batch in islice(self.batches(split, EVALUATION_BATCH), max_batches):
                logits, boxes = model(batch.inputs.to(device_of(model)))[-1]
                found.append((logits.cpu(), boxes.cpu()))
                truths.append(batch.targets)
        precisions = average_precisions(*(torch.cat(part) for part in zip(*found, strict=True)), torch.cat(truths))
        parts = {"rare": RARE, "unseen": UNSEEN}
        parts["common"] = tuple(i for i in range(len(TEXTS)) if i not in RARE + UNSEEN)
        mean = float(np.nanmean(precisions))
        return {
            self.metric: mean,
            f"{self.metric}/scenes": mean,
            **{name: float(np.nanmean(precisions[list(which)])) for name, which in parts.items()},
        }


@cache
def _held_out(split: str, size: int) -> tuple[Tensor, Tensor]:
    if split not in ("validation", "test"):
        raise unknown("split", split, ("validation", "test"))
    return draw_scenes(split, size, torch.Generator().manual_seed({"validation": 1, "test": 2}[split]))


def corners(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """Left, top, right and bottom of boxes given by centre, width and height."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def overlap(
    a: Float[Tensor, "*#batch 4"], b: Float[Tensor, "*#batch 4"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Intersection over union, and the generalised one (Rezatofighi et al. 2019), of boxes by their corners."""
    area_a, area_b = ((box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (a, b))
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = area_a + area_b - shared
    ratio = shared / union.clamp(min=1e-9)
    return ratio, ratio - (hull - union) / hull.clamp(min=1e-9)


def focal_terms(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The focal loss (Lin et al. 2017, alpha 0.25, gamma 2) of each logit if its text is there, and if it is not."""
    p = logits.sigmoid()
    return -0.25 * (1 - p).square() * F.logsigmoid(logits), -0.75 * p.square() * F.logsigmoid(-logits)


@torch.no_grad()
def match(
    logits: Float[Tensor, "batch queries texts"], boxes: Float[Tensor, "batch queries 4"], targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, queries and places of the cheapest one-to-one assignment of digits to queries in each scene."""
    yes, no = focal_terms(logits)
    text, truth = targets[..., 0].long(), targets[..., 1:]
    cost = LOSSES["class"] * (yes - no).gather(2, text.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1))
    cost = cost + LOSSES["l1"] * torch.cdist(boxes, truth, p=1)
    cost = (cost - LOSSES["giou"] * overlap(corners(boxes)[:, :, None], corners(truth)[:, None])[1]).cpu().numpy()
    rows, queries, places = [], [], []
    for row, count in enumerate((text >= 0).sum(1).tolist()):
        chosen, place = linear_sum_assignment(cost[row, :, :count])
        rows.append(np.full(len(chosen), row)), queries.append(chosen), places.append(place)
    return tuple(torch.from_numpy(np.concatenate(part)).to(logits.device) for part in (rows, queries, places))


def stage_loss(logits: Tensor, boxes: Tensor, targets: Tensor) -> Float[Tensor, ""]:
    """The loss after one stage, per digit."""
    row, query, place = match(logits, boxes, targets)
    text, truth = targets[row, place, 0].long(), targets[row, place, 1:]
    yes, no = focal_terms(logits)
    classes = no.sum() + (yes - no)[row, query, text].sum()
    l1 = (boxes[row, query] - truth).abs().sum()
    giou = (1 - overlap(corners(boxes[row, query]), corners(truth))[1]).sum()
    return (LOSSES["class"] * classes + LOSSES["l1"] * l1 + LOSSES["giou"] * giou) / max(1, len(row))


def average_precisions(logits: Tensor, boxes: Tensor, targets: Tensor, best: int = 20) -> np.ndarray:
    """(C,) area under the precision envelope over recall, at an overlap of 0.5; NaN for a text in no scene.

    Args:
        best: detections counted in each scene, those of highest score.
    """
    scores, index = logits.flatten(1).topk(best, dim=1)
    text, query = index % logits.shape[2], index // logits.shape[2]
    chosen = boxes.gather(1, query[..., None].expand(-1, -1, 4))
    shared = overlap(corners(chosen)[:, :, None], corners(targets[..., 1:])[:, None])[0]
    shared = torch.where(text[..., None] == targets[:, None, :, 0], shared, 0.0).numpy()  # (scenes, best, M)
    hits = np.zeros(text.shape, dtype=bool)
    for row in range(len(shared)):
        taken = np.zeros(shared.shape[2], dtype=bool)
        for i in range(best):  # in the order of the scores
            place = int(np.argmax(np.where(taken, 0.0, shared[row, i])))
            if not taken[place] and shared[row, i, place] >= 0.5:
                hits[row, i] = taken[place] = True
    order = scores.flatten().argsort(descending=True, stable=True).numpy()
    text, hits = text.flatten().numpy()[order], hits.flatten()[order]
    truths = np.bincount(targets[..., 0][targets[..., 0] >= 0].long().numpy(), minlength=logits.shape[2])
    result = np.full(logits.shape[2], np.nan)
    for c in np.flatnonzero(truths):
        hit = hits[text == c]
        precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        result[c] = envelope[hit].sum() / truths[c]
    return result
