"""Spoiled crops: which photographs, how they are spoiled, and that a plain network mends them a little."""

import numpy as np
import pytest
import torch

from workbench.beds import restoration
from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.core.task import psnr


@pytest.fixture(scope="module", autouse=True)
def photos(fetched):
    fetched("photos")


@pytest.fixture(scope="module")
def task():
    return restoration.make(32)


def test_crops_are_of_photographs_of_their_split_alone(task):
    photos = data.load("photos").splits
    for split, parts in task.splits.items():
        own, others = (photos[at] for at in (split, "test" if split == "train" else "train"))
        for crop in (parts["noise"][1][:6, 0] * 255).round().numpy():
            assert any(holds(image[0], crop) for image in restoration.pool(own, 1).values())
            assert not any(holds(image[0], crop) for image in restoration.pool(others, 1).values())


def holds(image, crop):
    """Whether this crop is a part of the image."""
    rows, columns = (side - 31 for side in image.shape)
    first = np.argwhere((image[:rows, :columns] == crop[0, 0]) & (image[31:, 31:] == crop[31, 31]))
    return any((image[r : r + 32, c : c + 32] == crop).all() for r, c in first)


def test_they_are_spoiled_as_said_and_the_same_each_time(task, home):
    assert {split: len(parts["jpeg"][0]) for split, parts in task.splits.items()} == {
        "train": 32,
        "validation": 4,
        "test": 8,
    }
    spoiled, clean = task.splits["train"]["mask"]
    kept = spoiled != 0
    assert torch.equal(spoiled[kept], clean[kept]) and 0.4 < kept.double().mean() < 0.55
    spoiled, clean = task.splits["train"]["noise"]
    deviation = ((spoiled - clean) * 255).flatten(1).std(1)
    assert deviation.min() > 8 and deviation.max() < 55 and deviation.max() > 2 * deviation.min()
    for way in ("blur", "resolution"):  # what is sharp is lost
        spoiled, clean = (x.diff(dim=3).square().mean() for x in task.splits["train"][way])
        assert spoiled < 0.8 * clean
    assert 25 < psnr(*task.splits["train"]["jpeg"]).mean() < 40
    assert all(x.min() >= 0 and x.max() <= 1 for parts in task.splits.values() for pair in parts.values() for x in pair)


def test_seeds_are_of_the_crop_and_not_of_the_number_of_crops(task):
    fewer = restoration.make(16, ways=("jpeg",))
    assert torch.equal(fewer.splits["train"]["jpeg"][0], task.splits["train"]["jpeg"][0][:16])
    assert fewer.manifest["crops"]["jpeg"]["sha256"] != task.manifest["crops"]["jpeg"]["sha256"]
    colour = restoration.make(8, size=48, channels=3, ways=("resolution", "jpeg", "blur"))
    assert colour.splits["test"]["blur"][0].shape == (2, 3, 48, 48)


def test_a_plain_network_mends_what_is_spoiled_most():
    rows = restoration.measure({"crops": 48, "size": 32, "steps": 80, "batch": 12})
    gains = {row.case: row.reached - row.trivial for row in rows}
    assert gains["noise"] > 1 and gains["mask"] > 0.5
    assert all(row.reached < 36 for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crops": 4}, "crops, size, channels, ways are 4, 32, 1"),
        ({"crops": 8, "channels": 2}, "must be at least 8, 8 to 128, 1 or 3"),
        ({"crops": 8, "ways": ("jpg",)}, "way 'jpg' is unknown; did you mean 'jpeg'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        restoration.make(**options)
