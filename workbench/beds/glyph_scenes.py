"""Scenes with a "face" and a "hand" that are digits, to be drawn by a denoiser (`glyph_denoiser` has one).

A scene is a textured canvas of 24 x 24 with a bar for a body, a digit 0..4 of 8 x 8 pixels on top (the face) and a
digit 5..9 at its side (the hand), both at jittered places. The condition says which digits they are, or that one is
missing. Digits are handwritten ones, and no handwriting of the validation or test split is ever trained on.

    pretraining   few handwritings, blurred: what the denoiser starts from, so that it lacks the details of the parts
    scenes        the same few handwritings, sharp: the curated scenes that everything after is trained on
    faces, hands  close-ups: many handwritings, sharp, one digit over two thirds of the canvas or all of it
    closeups      both

Judged on scenes with sharp handwritings of the held-out splits: the error of the predicted noise inside the two boxes
and outside; `glyph_drawing` judges the digits that are drawn.

Tensor letters: B batch, C channels, T = 200 noise levels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError, unknown
from workbench.lib import data
from workbench.lib.core.modes import evaluating
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Batch, device_of

SIZE, GLYPH = 24, 8
LEVELS = 200
CLASSES, MISSING = 10, 10
PARTS = ("face", "hand")
REGIONS = (*PARTS, "background")
KINDS = ("pretraining", "scenes", "faces", "hands", "closeups")
FEW = 4  # handwritings of each class in the scenes
DROPPED = 0.1  # share of the scenes without a face, and without a hand
JUDGED_LEVELS = (20, 60, 100, 140, 180)


@dataclass(frozen=True)
class Noisy(Batch):
    """inputs: noisy images (B, 1, 24, 24); targets: their noise; time: levels (B,) from 1 to T; condition: (B, 2)."""

    time: Tensor
    condition: Tensor

    def to(self, device: torch.device) -> "Noisy":
        parts = (self.inputs, self.targets, self.domain, self.time, self.condition)
        return Noisy(*(part.to(device) for part in parts))


@dataclass(frozen=True)
class Scenes:
    """images (B, 1, 24, 24) of about -1 to 1; condition (B, 2): face and hand, 10 where missing; corners (B, 2, 2): row
    and column of the two boxes."""

    images: Tensor
    condition: Tensor
    corners: Tensor

    def boxes(self) -> Tensor:
        """(B, 2, 24, 24) True inside the face's and inside the hand's box."""
        at = torch.arange(SIZE)
        inside = (at >= self.corners[..., None]) & (at < self.corners[..., None] + GLYPH)  # (B, 2, row or column, 24)
        return inside[:, :, 0, :, None] & inside[:, :, 1, None, :]

    def regions(self) -> Tensor:
        """(B, 3, 24, 24) True inside face, hand and background."""
        boxes = self.boxes()
        return torch.cat([boxes, ~boxes.any(1, keepdim=True)], 1)

    def crops(self, images: Tensor | None = None) -> Tensor:
        """(B, 2, 8, 8) what is in the two boxes, of these images or of others of the same scenes."""
        images = self.images if images is None else images
        return images.expand(-1, 2, -1, -1)[self.boxes()].view(-1, 2, GLYPH, GLYPH)


@cache
def handwritings(split: str, few: bool) -> tuple[Tensor, ...]:
    """Of each digit its images (rows, 8, 8) in a split; `few`: the first four of them."""
    x, y = data.load("digits").splits[split]
    return tuple(x[y == digit, 0][: FEW if few else None] for digit in range(CLASSES))


def draw_scenes(
    kind: str,
    split: str,
    size: int,
    generator: torch.Generator,
    dropped: tuple[float, float] = (DROPPED, DROPPED),
    few: bool | None = None,
) -> Scenes:
    """Random scenes of a kind.

    Args:
        kind: "pretraining" or "scenes", or a kind of close-ups.
        split: "train"; of any other split all its handwritings are used.
        dropped: chance that the face, and that the hand, is missing.
        few: take the first handwritings of each digit alone; default: in the training split, of whole scenes.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    if size < 1:
        raise InputError(f"size is {size} but must be at least 1")

    def uniform(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (size,), generator=generator)

    texture = torch.randn(size, 1, 6, 6, generator=generator) * 0.25
    texture = F.interpolate(texture, SIZE, mode="bilinear") - 0.5
    digits = torch.stack([uniform(0, 4), uniform(5, 9)], 1)
    pick = torch.rand(size, 2, generator=generator)
    pools = handwritings(split, split == "train" and kind in KINDS[:2] if few is None else few)
    glyphs = torch.stack(
        [
            torch.stack([pools[d][int(u * len(pools[d]))] for d, u in zip(row, at, strict=True)])
            for row, at in zip(digits.tolist(), pick.tolist(), strict=True)
        ]
    )  # (B, 2, 8, 8)
    if kind not in KINDS[:2]:
        return _closeups(kind, texture, digits, glyphs, uniform)
    if kind == "pretraining":
        glyphs = F.avg_pool2d(glyphs, 3, 1, 1)
    present = torch.rand(size, 2, generator=generator) >= torch.tensor(dropped)
    column, side = 8 + uniform(-2, 2), uniform(0, 1)
    corners = torch.stack(
        [torch.stack([uniform(0, 2), column], 1), torch.stack([uniform(11, 15), uniform(0, 1) + 15 * side], 1)], 1
    )
    rows = torch.arange(SIZE)
    body = (rows[:, None] >= 10) & ((rows - column[:, None, None] - 3.5).abs() < 2)
    texture[:, 0] += 0.4 * body
    ink = torch.zeros(size, SIZE, SIZE)
    scenes = Scenes(texture, torch.where(present, digits, MISSING), corners)
    for part in range(2):
        ink[scenes.boxes()[:, part]] = (glyphs[:, part] * present[:, part, None, None]).flatten()
    return Scenes(_inked(texture, ink[:, None]), scenes.condition, corners)


def _closeups(kind: str, texture: Tensor, digits: Tensor, glyphs: Tensor, uniform) -> Scenes:
    """One digit of 16 to 24 pixels, somewhere on the canvas; the condition says that the other part is missing."""
    size = len(digits)
    part = {"faces": torch.zeros(size).long(), "hands": torch.ones(size).long()}.get(kind)
    part = uniform(0, 1) if part is None else part
    width = uniform(16, SIZE).float()
    shift = torch.stack([uniform(-100, 100), uniform(-100, 100)], 1) / 100 * (1 - width / SIZE)[:, None]
    zoom = torch.zeros(size, 2, 3)
    zoom[:, 0, 0] = zoom[:, 1, 1] = SIZE / width
    zoom[:, :, 2] = -shift * (SIZE / width)[:, None]
    chosen = glyphs[torch.arange(size), part][:, None]
    grid = F.affine_grid(zoom, [size, 1, SIZE, SIZE], align_corners=False)
    ink = F.grid_sample(chosen, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    shown = torch.arange(2) == part[:, None]
    return Scenes(_inked(texture, ink), torch.where(shown, digits, MISSING), torch.zeros(size, 2, 2).long())


def _inked(canvas: Tensor, ink: Tensor) -> Tensor:
    return canvas * (1 - ink) + ink


def signal(time: Tensor) -> Tensor:
    """Share of the image in the variance at a level, the cosine schedule (Nichol and Dhariwal 2021, 2102.09672)."""
    level = ((time / LEVELS + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (level / math.cos(0.008 / 1.008 * math.pi / 2) ** 2).clamp(1e-4, 1)


def add_noise(images: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    share = signal(time).view(-1, 1, 1, 1)
    return share.sqrt() * images + (1 - share).sqrt() * noise


class GlyphScenes:
    """Denoising scenes of one kind; metric: error of the noise inside the boxes of held-out scenes, both alike.

    Args:
        kind: of the training images, see the module. Evaluation is on sharp scenes with other handwritings in any case.
        held_out: scenes in the validation and in the test split.
    """

    metric, unit, higher_is_better = "part_error", "mean square", False
    domains = ("scene",)

    def __init__(self, kind: str, held_out: int = 64):
        if kind not in KINDS:
            raise unknown("kind", kind, KINDS)
        self.kind, self.held_out, self.name = kind, held_out, f"glyph-{kind}"
        self.manifest = {"name": self.name, "held_out": held_out, "digits": data.load("digits").manifest["digits"]}

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Noisy:
        scenes = draw_scenes(self.kind, split, size, generator)
        return noisy(scenes, torch.randint(1, LEVELS + 1, (size,), generator=generator), generator)

    def batches(self, split: str, size: int) -> Iterator[Noisy]:
        """Every held-out scene at every judged level."""
        scenes, noise = self.fixed(split)
        for level in JUDGED_LEVELS:
            for start in range(0, self.held_out, size):
                at = slice(start, start + size)
                part = Scenes(scenes.images[at], scenes.condition[at], scenes.corners[at])
                yield noisy(part, torch.full((len(part.images),), level), noise=noise[at])

    def fixed(self, split: str, missing: str | None = None) -> tuple[Scenes, Tensor]:
        """The held-out scenes of a split, and their noise; whole scenes, or the same ones without a part."""
        generator = torch.Generator().manual_seed({"validation": 1, "test": 2}[split])
        dropped = tuple(float(part == missing) for part in PARTS)
        scenes = draw_scenes("scenes", split, self.held_out, generator, dropped)
        return scenes, torch.randn(scenes.images.shape, generator=generator)

    def loss(self, model: nn.Module, batch: Noisy) -> tuple[Tensor, Context]:
        batch, context = batch.to(device_of(model)), Context()
        predicted = model(batch.inputs, batch.time, batch.condition, context)
        return F.mse_loss(predicted, batch.targets), context

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        """The error by region, mean over the levels, and by region and level as "face@20"."""
        regions = self.fixed(split)[0].regions()
        found: dict[str, float] = {}
        with evaluating(model):
            for level, batch in zip(JUDGED_LEVELS, self.batches(split, self.held_out), strict=True):
                batch = batch.to(device_of(model))
                square = (model(batch.inputs, batch.time, batch.condition) - batch.targets).square().cpu()
                for i, region in enumerate(REGIONS):
                    found[f"{region}@{level}"] = float(square[:, 0][regions[:, i]].double().mean())
        for region in REGIONS:
            found[region] = sum(found[f"{region}@{level}"] for level in JUDGED_LEVELS) / len(JUDGED_LEVELS)
        found[self.metric] = (found["face"] + found["hand"]) / 2
        return found | {f"{self.metric}/scene": found[self.metric]}


def noisy(scenes: Scenes, time: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Noisy:
    """Scenes at given levels, with given noise or noise drawn now."""
    noise = torch.randn(scenes.images.shape, generator=generator) if noise is None else noise
    domain = torch.zeros(len(time), dtype=torch.long)
    return Noisy(add_noise(scenes.images, noise, time), noise, domain, time, scenes.condition)
