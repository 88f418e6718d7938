"""Few images of a class: which, and that they leave room above a plain model."""

import pytest
import torch

from workbench.beds import images
from workbench.errors import InputError
from workbench.lib import data


def members(task, split):
    return {row.numpy().tobytes() for row in task.data.splits[split][0]}


@pytest.mark.parametrize("name", ["digits", "mnist-1d"])
def test_a_regime_thins_training_alone_and_evenly(name):
    few, small, whole = (images.make(name, regime) for regime in images.REGIMES)
    for task, shots in ((few, 5), (small, 25)):
        assert task.data.splits["train"][1].bincount().tolist() == [shots] * 10
        for split in ("validation", "test"):
            assert torch.equal(task.data.splits[split][0], whole.data.splits[split][0])
    assert members(few, "train") < members(small, "train") < members(whole, "train")
    assert members(whole, "train") == {row.numpy().tobytes() for row in data.load(name).splits["train"][0]}
    assert members(whole, "train").isdisjoint(members(whole, "test"))
    assert few.manifest[name]["splits"]["train"] == 50 and few.manifest[name]["regime"] == "few"


def test_folds_and_repeats():
    first, again, other = (images.make("digits", "few", fold).data.splits["train"][0] for fold in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_plain_model_is_above_chance_and_below_the_ceiling(fetched):
    fetched("mnist-5k")
    rows = {row.case: row.reached for row in images.measure({"steps": 60, "folds": 1})}
    assert 0.5 < rows["mnist-5k, few"] < 0.8 < rows["mnist-5k, whole"] < 0.95
    assert 0.5 < rows["digits, few"] < 0.85
    assert 0.1 < rows["mnist-1d, few"] < rows["mnist-1d, whole"] < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"), [(("digit",), "image set 'digit' is unknown"), (("digits", "tiny"), "regime 'tiny' is")]
)
def test_unknown_names(arguments, message):
    with pytest.raises(InputError, match=message):
        images.make(*arguments)
