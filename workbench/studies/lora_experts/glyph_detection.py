"""The detection test-bed: find coloured handwritten digits from texts such as "red seven", some never seen in training.

A scene is a textured canvas of 32 x 32 pixels in colour with 2 to 5 digits of 7 to 10 pixels. In training the pairs of
colour and digit have long-tailed frequencies (1 / rank) and ten of the sixty pairs never appear; in the held-out splits
all sixty are equally frequent, and the handwritings are others.

The detector has the parts of Grounding DINO 1.5 Edge at a small size: convolutions, a text encoder over characters,
image features that attend to the texts (the enhancer), a text-guided choice of queries, decoder layers of
self-attention, cross-attention and a feed-forward block, each with a box correction; one-to-one matching after each.

Tensor letters: B batch, Q queries, M most digits of a scene, C texts, D model width.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError, unknown
from workbench.lib import data
from workbench.lib.core.attention import Attention
from workbench.lib.core.pretrained import pretrained
from workbench.lib.core.routing import Context
from workbench.lib.core.task import EVALUATION_BATCH, Batch, device_of
from workbench.lib.core.train import TrainConfig, train

SIZE, MOST = 32, 5
CELLS = SIZE // 4
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
TARGETS = ("layers.*.ffn.*", "enhancer.*", "class_head", "box_head")
"""What is tuned: the decoder's blocks, the enhancer's cross-attention, the heads."""


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

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        training = model.training
        model.eval()
        found, truths = [], []
        for i, batch in enumerate(self.batches(split, EVALUATION_BATCH)):
            if max_batches is not None and i >= max_batches:
                break
            logits, boxes = model(batch.inputs.to(device_of(model)))[-1]
            found.append((logits.cpu(), boxes.cpu()))
            truths.append(batch.targets)
        model.train(training)
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


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, T, D) to another sequence (B, S, D)."""

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.q, self.kv, self.out = (nn.Linear(d_model, n * d_model) for n in (1, 2, 1))

    def forward(self, x: Float[Tensor, "batch time dim"], other: Float[Tensor, "batch source dim"]) -> Tensor:
        q = self.q(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        k, v = self.kv(other).unflatten(-1, (2, self.n_heads, -1)).movedim(-3, 0).transpose(2, 3)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class DecoderLayer(nn.Module):
    """Self-attention of the queries, cross-attention to the image, a feed-forward block; pre-norm."""

    def __init__(self, d_model: int, d_hidden: int, n_heads: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(3))
        self.attention, self.cross = Attention(d_model, n_heads, causal=False), CrossAttention(d_model, n_heads)
        self.ffn = nn.Sequential(nn.Linear(d_model, d_hidden), nn.ReLU(), nn.Linear(d_hidden, d_model))

    def forward(self, x: Tensor, place: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x) + place)
        x = x + self.cross(self.norms[1](x) + place, memory)
        return x + self.ffn(self.norms[2](x))


class GlyphDetector(nn.Module):
    """Images (B, 3, 32, 32) -> after the choice of queries and after each layer, logits (., C) and boxes (., 4).

    The first stage has all 64 cells of the image as its queries, the others the chosen ones.
    """

    def __init__(self, d_model: int = 64, d_hidden: int = 128, n_layers: int = 3, n_heads: int = 4, queries: int = 20):
        super().__init__()
        self.queries = queries
        self.backbone = nn.Sequential(
            *(nn.Conv2d(3, d_model // 2, 3, 2, 1), nn.GroupNorm(4, d_model // 2), nn.ReLU()),
            *(nn.Conv2d(d_model // 2, d_model, 3, 2, 1), nn.GroupNorm(4, d_model), nn.ReLU()),
            *(nn.Conv2d(d_model, d_model, 3, padding=1), nn.GroupNorm(4, d_model), nn.ReLU()),
            nn.Conv2d(d_model, d_model, 3, padding=1),
        )
        self.cell = nn.Parameter(torch.randn(CELLS * CELLS, d_model) * 0.1)
        self.letters = nn.Embedding(27, d_model)
        self.text = nn.Sequential(
            *(nn.Conv1d(d_model, d_model, 3, padding=1), nn.ReLU(), nn.Conv1d(d_model, d_model, 3, padding=1))
        )
        self.text_norm = nn.LayerNorm(d_model)
        self.enhancer, self.norm = CrossAttention(d_model, n_heads), nn.LayerNorm(d_model)
        self.query, self.place = nn.Linear(d_model, d_model), nn.Linear(4, d_model)
        self.layers = nn.ModuleList(DecoderLayer(d_model, d_hidden, n_heads) for _ in range(n_layers))
        self.head_norm = nn.LayerNorm(d_model)
        self.class_head, self.box_head = nn.Linear(d_model, d_model), nn.Linear(d_model, 4)
        self.prior = nn.Parameter(torch.tensor(-4.0))
        nn.init.zeros_(self.box_head.weight), nn.init.zeros_(self.box_head.bias)
        width = max(map(len, TEXTS))
        letters = [[0 if a == " " else ord(a) - 96 for a in text.ljust(width)] for text in TEXTS]
        self.register_buffer("spelling", torch.tensor(letters))
        at = (torch.arange(CELLS) + 0.5) / CELLS
        centres = torch.stack([at.repeat(CELLS), at.repeat_interleave(CELLS)], 1)
        self.register_buffer("anchors", torch.cat([centres, torch.full_like(centres, 8.5 / SIZE)], 1))

    def forward(self, images: Tensor, context: Context | None = None) -> list[tuple[Tensor, Tensor]]:
        texts = self.text_norm(self.text(self.letters(self.spelling).transpose(1, 2)).amax(2))  # (C, D)
        memory = self.backbone(images).flatten(2).transpose(1, 2) + self.cell
        memory = memory + self.enhancer(self.norm(memory), texts.expand(len(images), -1, -1))
        logits, boxes = self.heads(memory, texts, self.anchors)
        stages = [(logits, boxes)]
        chosen = logits.amax(2).topk(self.queries, dim=1).indices[..., None]
        x = self.query(memory.gather(1, chosen.expand(-1, -1, memory.shape[2])))
        boxes = boxes.gather(1, chosen.expand(-1, -1, 4))
        for layer in self.layers:
            boxes = boxes.detach()
            x = layer(x, self.place(boxes), memory)
            logits, boxes = self.heads(x, texts, boxes)
            stages.append((logits, boxes))
        return stages

    def heads(self, x: Tensor, texts: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the texts, and the boxes corrected."""
        x = self.head_norm(x)
        logits = self.class_head(x) @ texts.T / math.sqrt(x.shape[2]) + self.prior
        return logits, (torch.logit(boxes, eps=1e-4) + self.box_head(x)).sigmoid()


def base(settings: Mapping[str, Any]) -> GlyphDetector:
    """The dense detector all arms start from: trained once, then from the cache."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return GlyphDetector(n_layers=settings["layers"])

    task = GlyphDetection(settings["held_out"])

    def teach(model: nn.Module) -> None:
        config = TrainConfig(settings["base_steps"], settings["batch_size"], lr=2e-3, weight_decay=1e-4, eval_batches=1)
        train(model, task, config)

    recipe = {name: settings[name] for name in ("base_steps", "batch_size", "layers")}
    recipe["data"] = {key: value for key, value in task.manifest.items() if key != "held_out"}
    return pretrained("glyph-detector", recipe, build, teach, [sys.modules[__name__]])
