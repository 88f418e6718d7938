"""Crops blurred by motion: the mean of frames of their own split, and a label that is as ambiguous as asked for."""

import pytest
import torch

from workbench.beds import moving_crops
from workbench.beds.moving_crops import REACH
from workbench.errors import InputError


@pytest.fixture(scope="module", autouse=True)
def photos(fetched):
    fetched("photos")


def test_the_blurred_image_is_the_mean_of_the_labels_that_it_may_have():
    """A label is the middle frame, or any: over many crops the label at full ambiguity is about the blurred image."""
    sure, any_ = (moving_crops.make(200, 16, ambiguity).splits["train"]["moving"] for ambiguity in (0, REACH))
    assert torch.equal(sure[0], any_[0]) and sure[0].shape == (200, 1, 16, 16)
    same = (sure[1] == any_[1]).flatten(1).all(1).float().mean()
    assert 0.07 < same < 0.25  # one label of seven is the middle
    gap, bias = any_[1] - any_[0], (any_[1] - any_[0]).mean()
    assert abs(bias) < 0.1 * gap.std()
    again = moving_crops.make(200, 16, 0).splits["train"]["moving"]
    assert all(torch.equal(a, b) for a, b in zip(sure, again, strict=True))


def test_the_more_ambiguous_the_label_the_farther_from_the_blurred_image():
    errors = []
    for ambiguity in range(REACH + 1):
        blurred, label = moving_crops.make(200, 16, ambiguity).splits["train"]["moving"]
        errors.append((blurred - label).square().mean().item())
    assert errors == sorted(errors)


@pytest.mark.parametrize("given", [(7, 16, 0), (16, 7, 0), (16, 16, -1), (16, 16, REACH + 1)])
def test_what_cannot_be_made_is_named(given):
    with pytest.raises(InputError, match="crops, size, ambiguity are"):
        moving_crops.make(*given)
