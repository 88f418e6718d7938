"""Restoring photographs: crops that were blurred, drowned in noise, shrunk, compressed or masked.

For systems with several experts or outputs for several ways of spoiling an image. A row is a crop of a photograph
(`workbench data get photos`; CC0 or no known restriction, CC-BY-2.0) and its spoiled version; the domains are the ways:

    noise        Gaussian, of deviation 15, 25 or 50 of 255
    blur         Gaussian of deviation 1 to 2 pixels, or motion of 5 to 9 pixels at any angle; then noise of 2 of 255
    resolution   shrunk by 2 or 4 (bicubic) and enlarged again
    jpeg         quality 10 to 40
    mask         half of the pixels are 0

Which photograph, where, and how it is spoiled comes from the digest of the crop's number, and is in the manifest's
sha256. Splits are by PHOTOGRAPH: 13 to train, 2 to validate, 5 to test, among them a face and printed text.

Judged by PSNR, whose ceiling is not known. One small network for all ways gains 11 dB on masks and 4 on noise in 400
steps, and half a dB or less on the others, some of which it spoils further: it has to see first what is wrong.

Tensor letters: B batch, C channels, H height, W width.
"""

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds.baseline import Measured, seeded
from workbench.errors import InputError, unknown
from workbench.lib import data
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Restoration
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.cache import Parsed, cached
from workbench.lib.data.splits import digest

NEEDS = ("photos",)
BLACK_AND_WHITE = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
DULL = 4.0  # of 255: a crop of a lesser deviation shows nothing

SMOKE = {"crops": 16, "size": 32, "steps": 10, "batch": 8}
SMALL = {"crops": 400, "size": 32, "steps": 400, "batch": 16}
FULL = {"crops": 4000, "size": 64, "steps": 10_000, "batch": 32}


def noise(crop: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    return crop + random.choice((15, 25, 50)) * random.randn(*crop.shape)


def blur(crop: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    from scipy.ndimage import convolve, gaussian_filter

    if random.rand() < 0.5:
        width = 1 + random.rand()
        crop = gaussian_filter(crop, (0, width, width), mode="nearest")
    else:
        length, angle = random.randint(5, 10), np.pi * random.rand()
        along = np.linspace(-(length - 1) / 2, (length - 1) / 2, 64)
        path = [np.rint(4 + part(angle) * along).astype(int) for part in (np.sin, np.cos)]
        kernel = np.zeros((9, 9))
        np.add.at(kernel, tuple(path), 1 / 64)
        crop = convolve(crop, kernel[None], mode="nearest")
    return crop + 2 * random.randn(*crop.shape)


def resolution(crop: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    from PIL import Image

    factor = random.choice((2, 4))

    def resized(image: Image.Image) -> Image.Image:
        small = image.resize((image.width // factor, image.height // factor), Image.Resampling.BICUBIC)
        return small.resize(image.size, Image.Resampling.BICUBIC)

    return _by_pil(crop, resized)


def jpeg(crop: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    from PIL import Image

    quality = int(random.randint(10, 41))

    def compressed(image: Image.Image) -> Image.Image:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        return Image.open(stream)

    return _by_pil(crop, compressed)


def mask(crop: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    return crop * (random.rand(1, *crop.shape[1:]) < 0.5)


WAYS: dict[str, Callable[[np.ndarray, np.random.RandomState], np.ndarray]] = {
    "noise": noise,
    "blur": blur,
    "resolution": resolution,
    "jpeg": jpeg,
    "mask": mask,
}
"""Each spoils a crop, float64 (channels, height, width) of 0 to 255; what leaves that range is cut off."""


def make(crops: int, size: int = 32, channels: int = 1, ways: Sequence[str] = tuple(WAYS)) -> Restoration:
    """Spoiled crops (rows, channels, size, size) and the crops themselves, of values 0 to 1.

    Args:
        crops: of each way in the training split; an eighth of them for validation, a quarter for the test.
        size: pixels a side.
        channels: 1 (colour photographs become grey) or 3 (the grey ones are left out).
        ways: of spoiling; the domains.

    Raises:
        InputError: a way is unknown, a number is not allowed, or the photographs are not on this machine.
    """
    if crops < 8 or not 8 <= size <= 128 or channels not in (1, 3) or not ways:
        raise InputError(
            f"crops, size, channels, ways are {crops}, {size}, {channels}, {tuple(ways)} but must be at least 8, 8 to "
            "128, 1 or 3, and not empty"
        )
    for way in ways:
        if way not in WAYS:
            raise unknown("way", way, WAYS)
    photos = data.load("photos")
    counts = {"train": crops, "validation": crops // 8, "test": crops // 4}
    about = {"photos": photos.manifest["photos"]["sha256"], "crops": crops, "size": size, "channels": channels}
    splits: dict[str, dict[str, tuple[Tensor, Tensor]]] = {split: {} for split in counts}
    drawn = {}
    for way in ways:

        def build(way: str = way) -> Parsed:
            parts = {}
            for split, count in counts.items():
                images = pool(photos.splits[split], channels)
                pairs = [_pair(images, size, way, f"restoration/{split}/{way}/{number}") for number in range(count)]
                parts[f"{split}/spoiled"], parts[f"{split}/clean"] = (torch.stack(x) for x in zip(*pairs, strict=True))
            return parts, {
                "sha256": sha256(b"".join(parts[key].numpy().tobytes() for key in sorted(parts))).hexdigest()
            }

        tensors, drawn[way] = cached(f"restoration-{way}", f"{about} {_code()}", build)
        for split in counts:
            splits[split][way] = tuple(tensors[f"{split}/{part}"].float() / 255 for part in ("spoiled", "clean"))
    return Restoration("restoration", splits, photos.manifest | {"crops": about | {"splits": counts} | drawn})


def pool(photos: Mapping[str, UInt8[Tensor, "channels height width"]], channels: int) -> dict[str, np.ndarray]:
    """The photographs that have, or can be given, so many channels: float64 whole numbers (channels, height, width)."""
    pool = {}
    for name, pixels in photos.items():
        if channels == 3 and len(pixels) == 1:
            continue
        image = pixels.numpy().astype(float)
        if channels == 1 and len(image) == 3:
            image = np.rint(np.tensordot(BLACK_AND_WHITE, image, 1))[None]
        pool[name] = image
    return pool


def _pair(pool: dict[str, np.ndarray], size: int, way: str, item: str) -> tuple[Tensor, Tensor]:
    """A crop spoiled and whole, uint8 (channels, size, size) each; a dull one (sky, paper) is passed over."""
    random = np.random.RandomState(digest(item) % 2**32)  # its stream is frozen (NEP 19)
    names = sorted(pool)
    while True:
        image = pool[names[random.randint(len(names))]]
        top, left = (random.randint(side - size + 1) for side in image.shape[1:])
        crop = image[:, top : top + size, left : left + size]
        if crop.std() >= DULL:
            break
    spoiled = np.rint(WAYS[way](crop, random).clip(0, 255))
    return torch.from_numpy(spoiled.astype(np.uint8)), torch.from_numpy(crop.astype(np.uint8))


def _by_pil(crop: np.ndarray, change: Callable) -> np.ndarray:
    """What PIL makes of a crop: it takes whole numbers, and channels last."""
    from PIL import Image

    pixels = np.rint(crop).astype(np.uint8)
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    changed = np.asarray(change(image), float)
    return changed[None] if len(pixels) == 1 else changed.transpose(2, 0, 1)


def _code() -> str:
    return sha256(Path(__file__).read_bytes()).hexdigest()


class Unchanged(nn.Module):
    """Says that nothing was spoiled."""

    def forward(self, x: Float[Tensor, "batch ..."], context: Context | None = None) -> Float[Tensor, "batch ..."]:
        return x


class ResidualCNN(nn.Module):
    """Convolutions of 3 x 3 with ReLU that say what to add to the image, the last of them nothing at first."""

    def __init__(self, channels: int, width: int = 24, depth: int = 5):
        super().__init__()
        widths = [channels, *[width] * (depth - 1), channels]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], context: Context | None = None
    ) -> Float[Tensor, "batch channels height width"]:
        change = x
        for layer in self.layers[:-1]:
            change = F.relu(layer(change))
        return x + self.layers[-1](change)


def prepare(settings: Mapping[str, Any] = SMALL) -> list[Restoration]:
    return [make(settings["crops"], settings["size"])]


def measure(settings: Mapping[str, Any] = SMALL) -> list[Measured]:
    """One convolutional network of 16,000 weights for all ways; without learning, the spoiled crop itself."""
    (task,) = prepare(settings)
    model = seeded(0, lambda: ResidualCNN(1))
    train(model, task, TrainConfig(settings["steps"], settings["batch"], lr=2e-3, weight_decay=0.0))
    trivial, reached = (task.evaluate(tried, "test") for tried in (Unchanged(), model))
    count = task.manifest["crops"]["splits"]["train"]
    size = f"{count:,} crops of {settings['size']} x {settings['size']} a way"
    return [
        Measured(
            way, size, "5 convolutions of 24", "PSNR, dB", trivial[f"psnr/{way}"], reached[f"psnr/{way}"], math.nan
        )
        for way in task.domains
    ]
