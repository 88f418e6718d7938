"""Photographs are decoded as they are, and split by name."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.data import photos


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_they_are_read_from_the_archive_and_from_scikit_learn(index):
    random = np.random.default_rng(0)
    colour, grey = random.integers(0, 256, (20, 30, 3), np.uint8), random.integers(0, 256, (9, 8), np.uint8)
    index.offer(
        "photos",
        {"skimage/data/coffee.png": png(colour), "skimage/data/moon.png": png(grey), "skimage/__init__.py": b"1/0"},
        members=("skimage/data/*.png",),
    )
    with pytest.raises(InputError, match="get it with: workbench data get photos"):
        data.load("photos")
    data.get("photos")
    found = data.load("photos")
    assert {split: list(parts) for split, parts in found.splits.items()} == {
        "train": ["china", "moon"],
        "validation": [],
        "test": ["coffee", "flower"],
    }
    assert torch.equal(found.splits["test"]["coffee"], torch.from_numpy(colour).permute(2, 0, 1))
    assert torch.equal(found.splits["train"]["moon"], torch.from_numpy(grey)[None])
    assert found.splits["train"]["china"].shape == (3, 427, 640)
    assert found.manifest["photos"]["source"] == "scikit-image"
    assert repr(found) == "Photos('photos': 2 train + 0 validation + 2 test photographs)"


def test_every_held_out_photograph_is_one_that_is_fetched():
    from workbench.lib.data.sets import COLOUR, GREY

    names = {name.split(".")[0] for name in (*COLOUR, *GREY, *photos.SKLEARN)}
    assert len(names) == 20 and set(photos.HELD_OUT) < names
