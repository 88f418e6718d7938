"""Photographs blurred by motion: the mean of the frames of a moving window, and the frame that is called sharp.

For systems that deblur with several answers. A window moves over a photograph (`workbench data get photos`) in a
straight line of any direction, a pixel a frame, `REACH` frames to either side of the middle. The blurred image is the
mean of its frames, rounded to whole grey levels, with noise of 1 of 255. Which frame is the label is a draw among those
at most `ambiguity` away from the middle: 0 is the middle always, as in the sets of blurred video; `REACH` is any of
them, and then the best single answer is nearly the blurred image itself, since that is the mean of the labels.

Everything is drawn from the digest of a crop's number, so a crop has the same frames at every ambiguity. Splits are by
PHOTOGRAPH, as in `beds/restoration.py`.
"""

import math
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workbench.beds.restoration import DULL, pool
from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.core.task import Restoration
from workbench.lib.data.cache import Parsed, cached
from workbench.lib.data.splits import digest

NEEDS = ("photos",)
REACH = 3
"""Frames on either side of the middle one."""
SMOKE = {"crops": 16, "size": 16}
SMALL = {"crops": 1600, "size": 16}
FULL = {"crops": 8000, "size": 64}


def make(crops: int, size: int, ambiguity: int) -> Restoration:
    """Blurred grey crops (rows, 1, size, size) and the frames that are their labels, of values 0 to 1.

    Args:
        crops: in the training split; a quarter of them for validation, and as many for the test.
        size: pixels a side.
        ambiguity: frames from the middle one that the label may be away, 0 to `REACH`.

    Raises:
        InputError: a number is not allowed, or the photographs are not on this machine.
    """
    if crops < 8 or not 8 <= size <= 128 or not 0 <= ambiguity <= REACH:
        raise InputError(
            f"crops, size, ambiguity are {crops}, {size}, {ambiguity} but must be at least 8, 8 to 128, 0 to {REACH}"
        )
    photos = data.load("photos")
    counts = {"train": crops, "validation": crops // 4, "test": crops // 4}
    about = {"photos": photos.manifest["photos"]["sha256"], "crops": crops, "size": size}

    def build() -> Parsed:
        parts: dict[str, Tensor] = {}
        for split, count in counts.items():
            images = pool(photos.splits[split], 1)
            drawn = [_moving(images, size, f"moving/{split}/{number}") for number in range(count)]
            for part, tensors in zip(("blurred", "frames", "luck"), zip(*drawn, strict=True), strict=True):
                parts[f"{split}/{part}"] = torch.stack(tensors)
        digests = sha256(b"".join(parts[key].numpy().tobytes() for key in sorted(parts))).hexdigest()
        return parts, {"sha256": digests}

    code = sha256(Path(__file__).read_bytes()).hexdigest()
    tensors, drawn = cached("moving-crops", f"{about} {code}", build)
    splits = {}
    for split in counts:
        frames, luck = tensors[f"{split}/frames"], tensors[f"{split}/luck"]
        offset = (luck * (2 * ambiguity + 1)).long() - ambiguity
        label = frames[torch.arange(len(frames)), REACH + offset]
        splits[split] = {"moving": (tensors[f"{split}/blurred"].float() / 255, label.float() / 255)}
    about |= {"ambiguity": ambiguity, "splits": counts} | drawn
    return Restoration("moving-crops", splits, photos.manifest | {"crops": about})


def _moving(images: dict[str, np.ndarray], size: int, item: str) -> tuple[Tensor, Tensor, Tensor]:
    """Blurred uint8 (1, size, size), frames uint8 (2 REACH + 1, 1, size, size), and a draw in [0, 1) for the label."""
    random = np.random.RandomState(digest(item) % 2**32)  # its stream is frozen (NEP 19)
    names = sorted(images)
    while True:
        image = images[names[random.randint(len(names))]]
        top, left = (random.randint(REACH, side - size - REACH + 1) for side in image.shape[1:])
        angle = 2 * math.pi * random.rand()
        steps = np.arange(-REACH, REACH + 1)
        path = zip(top + np.rint(steps * math.sin(angle)), left + np.rint(steps * math.cos(angle)), strict=True)
        frames = np.stack([image[:, int(y) : int(y) + size, int(x) : int(x) + size] for y, x in path])
        if frames[REACH].std() >= DULL:
            break
    blurred = np.rint(frames.mean(0) + random.randn(*frames[0].shape)).clip(0, 255)
    whole = (torch.from_numpy(part.astype(np.uint8)) for part in (blurred, frames))
    return *whole, torch.tensor(random.rand())
