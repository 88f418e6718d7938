"""Two textured discs: which is above is in the class, and no two drawings are the same."""

import numpy as np
import torch

from workbench.beds import textured_pairs
from workbench.beds.textured_pairs import CLASSES, PAIRS, draw, make


def test_the_same_seed_draws_the_same_and_splits_and_folds_share_nothing():
    few = {"train": 30, "validation": 20, "test": 20}
    one, again, other = make(0, few), make(0, few), make(1, few)
    seen = set()
    for task in (one, other):
        for split in few:
            x, y = task.data.splits[split]
            assert x.shape == (few[split], 1, 32, 32) and y.min() >= 0 and y.max() < len(CLASSES) == 9
            seen |= {row.numpy().tobytes() for row in x}
    assert len(seen) == 2 * sum(few.values())
    assert all(torch.equal(one.data.splits[s][0], again.data.splits[s][0]) for s in few)


def test_a_class_says_which_texture_is_above(monkeypatch):
    monkeypatch.setattr(textured_pairs, "NOISE", 0.0)
    images, labels = draw(200, 5)
    for image, label in zip(images[:, 0].numpy(), labels.tolist(), strict=True):
        rows = np.flatnonzero(np.abs(image).sum(1))
        for texture, around in zip(PAIRS[label], (rows[:11], rows[-11:]), strict=True):
            part = image[around[0] : around[0] + 11]
            across, down = np.abs(np.diff(part, axis=1)).sum(), np.abs(np.diff(part, axis=0)).sum()
            # stripes along change downwards alone, but for the edge of the disc
            found = 0 if down > 2 * across else 1 if across > 2 * down else 2
            assert found == texture
