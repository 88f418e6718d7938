"""Nine men say the vowels "ae": 640 utterances as frames of twelve cepstra, read from the release's text files."""

from collections.abc import Iterable
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from workbench.lib.data import store
from workbench.lib.data.cache import Parsed, cached
from workbench.lib.data.sets import SETS
from workbench.lib.data.splits import SPLITS, digest
from workbench.lib.data.types import Series

FOLDER = "aeon/datasets/data/JapaneseVowels/JapaneseVowels"
SPEAKERS = tuple(str(number) for number in range(1, 10))
VALIDATION = 10
"""Percent of the training utterances, by digest, that are held out to choose by."""


def load() -> Series:
    """270 / 370 utterances of 7 to 29 frames, 12 LPC cepstra each, by nine speakers; the official test split.

    A tenth of the training utterances is "validation". All speakers are in all splits.

    Source: Kudo, Toyama and Shimbo, Multidimensional curve classification (1999), as in aeon.
    """
    row = SETS["speech"]
    store.require(row)

    def build() -> Parsed:
        raw = store.files(row)
        tensors = {}
        for split, part in (("train", "TRAIN"), ("test", "TEST")):
            frames, speakers = parse(raw[f"{FOLDER}_{part}.ts"].decode())
            tensors[f"{split}/frames"] = torch.from_numpy(np.concatenate(frames))
            tensors[f"{split}/lengths"] = torch.tensor([len(x) for x in frames])
            tensors[f"{split}/y"] = torch.tensor([SPEAKERS.index(speaker) for speaker in speakers])
        value = sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()
        return tensors, {"sha256": value}

    tensors, manifest = cached("speech", row.source.sha256, build)
    read = {split: _cut(*(tensors[f"{split}/{part}"] for part in ("frames", "lengths", "y"))) for split in SPLITS[::2]}
    held = [digest(f"speech/{number}") % 100 < VALIDATION for number in range(len(read["train"]))]
    splits = {
        "train": [pair for pair, out in zip(read["train"], held, strict=True) if not out],
        "validation": [pair for pair, out in zip(read["train"], held, strict=True) if out],
        "test": read["test"],
    }
    sizes = {split: len(pairs) for split, pairs in splits.items()}
    manifest = store.origin(row) | {"licence": row.licence} | manifest | {"rows": sum(sizes.values()), "splits": sizes}
    return Series("speech", splits, SPEAKERS, {"speech": manifest})


def parse(text: str) -> tuple[list[np.ndarray], list[str]]:
    """Series float32 (points, channels) and their classes, of a file in the `.ts` format of the UEA archive.

    After "@data" a line is a series: its channels, then its class, between colons; commas between the points.
    """
    frames, classes = [], []
    for line in _data(text.splitlines()):
        *channels, label = line.split(":")
        frames.append(np.array([channel.split(",") for channel in channels], np.float32).T.copy())
        classes.append(label)
    return frames, classes


def _data(lines: Iterable[str]) -> list[str]:
    stripped = [line.strip() for line in lines]
    return [line for line in stripped[[line.lower() for line in stripped].index("@data") + 1 :] if line]


def _cut(frames: Tensor, lengths: Tensor, y: Tensor) -> list[tuple[Tensor, int]]:
    return list(zip(frames.split(lengths.tolist()), y.tolist(), strict=True))
