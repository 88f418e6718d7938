"""Two textured discs on a noisy ground: which texture each has, and which of them is above the other.

For networks that mix convolution and attention: a texture is seen from a few pixels around; which disc is above needs
both at once, as they lie anywhere. Nine classes: the texture of the upper disc and that of the lower one, of stripes
along, stripes across and a chequer.

Drawn by seeds: images (1, 32, 32), no two alike; 4,000 / 500 / 1,000 in training, validation and test, other ones for
each fold.
"""

from collections.abc import Mapping
from itertools import product

import numpy as np
import torch
from torch import Tensor

from workbench.lib.core.task import Classification
from workbench.lib.data.types import Arrays

SIZE, SIDE, NOISE = 32, 11, 1.3
TEXTURES = ("along", "across", "chequer")
PAIRS = tuple(product(range(len(TEXTURES)), repeat=2))
CLASSES = tuple(f"{TEXTURES[a]} above {TEXTURES[b]}" for a, b in PAIRS)
ROWS = {"train": 4000, "validation": 500, "test": 1000}


def make(fold: int = 0, rows: Mapping[str, int] = ROWS) -> Classification:
    """The classes of two discs; `rows` images in each split."""
    splits = {split: draw(count, 1000 * fold + number) for number, (split, count) in enumerate(rows.items())}
    manifest = {"textured-pairs": {"fold": fold, "splits": dict(rows), "noise": NOISE, "licence": "made here"}}
    return Classification(Arrays("textured-pairs", splits, CLASSES, manifest))


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 32, 32), and their classes (count,)."""
    random = np.random.default_rng(seed)
    images = NOISE * random.standard_normal((count, SIZE, SIZE))
    labels = random.integers(len(CLASSES), size=count)
    rows, columns = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    disc = np.hypot(rows, columns) <= SIDE / 2
    for image, label in zip(images, labels, strict=True):
        upper = random.integers(SIZE - 2 * SIDE + 1)
        lower = random.integers(upper + SIDE, SIZE - SIDE + 1)
        for texture, row in zip(PAIRS[label], (upper, lower), strict=True):
            column = random.integers(SIZE - SIDE + 1)
            image[row : row + SIDE, column : column + SIDE][disc] += _texture(TEXTURES[texture], random)[disc]
    return torch.from_numpy(images).float()[:, None], torch.from_numpy(labels)


def _texture(texture: str, random: np.random.Generator) -> np.ndarray:
    """Of values -1 and 1 with a period of four pixels, at a random phase."""
    rows, columns = np.mgrid[:SIDE, :SIDE] + random.integers(4, size=(2, 1, 1))
    along, across = (rows // 2) % 2, (columns // 2) % 2
    return 2.0 * {"along": along, "across": across, "chequer": along ^ across}[texture] - 1
