"""Tasks on arrays: several domains, errors in units of the variance, images by PSNR."""

import math

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.routing import Context
from workbench.lib.core.task import ArrayTask, Classification, Regression, Restoration, Task, psnr
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.types import Arrays


class Says(nn.Module):
    """Whatever it is told to say, for each row."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, context):
        self.context = context
        return self.value(x) if callable(self.value) else self.value.expand(len(x), *self.value.shape)


def regression(rows=200):
    """Two domains of 3 x 2 -> 2 x 4 numbers; in "wide" the targets are ten times as far apart."""
    generator = torch.Generator().manual_seed(0)
    splits = {}
    for split in ("train", "validation", "test"):
        x = torch.randn(rows, 3, 2, generator=generator)
        y = torch.stack([x[:, 0], x[:, 1]], 1).repeat(1, 1, 2)
        splits[split] = {"narrow": (x, y), "wide": (x, 10 * y + 5)}
    return Regression("lines", splits, {"lines": {}})


def images(rows=12):
    truth = torch.rand(rows, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Restoration("noise", {split: {"noise": (truth + 0.1, truth)} for split in ("train", "validation")}, {})


def toy():
    x, y = torch.arange(40.0)[:, None], torch.arange(40) % 4
    return Classification(Arrays("toy", {split: (x, y) for split in ("train", "validation")}, tuple("abcd"), {}))


@pytest.mark.parametrize("make", [regression, images, toy])
def test_they_are_tasks_that_repeat(make):
    task = make()
    assert isinstance(task, Task) and isinstance(task, ArrayTask)
    first, again, other = (task.batch("train", 9, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.inputs, again.inputs) and not torch.equal(first.inputs, other.inputs)
    assert len(first) == len(first.targets) == len(first.domain) == 9
    passed = list(task.batches("validation", 5))
    assert sum(map(len, passed)) == sum(len(x) for x, _ in task.splits["validation"].values())
    assert all(len(set(batch.domain.tolist())) == 1 for batch in passed)
    with pytest.raises(InputError, match="split 'tests' is unknown"):
        task.batch("tests", 1, torch.Generator())
    with pytest.raises(InputError, match="size is 0 but must be at least 1"):
        task.batch("train", 0, torch.Generator())


def test_rows_are_those_of_their_domain():
    task = regression()
    batch = task.batch("train", 64, torch.Generator().manual_seed(0))
    scale = torch.where(batch.domain == 1, 10.0, 1.0)[:, None]
    torch.testing.assert_close(batch.targets[:, 0, :2], batch.inputs[:, 0] * scale + 5 * batch.domain[:, None])
    assert 20 < batch.domain.sum() < 44
    assert (task.batch("train", 8, torch.Generator(), domain=1).domain == 1).all()


def test_one_is_the_error_of_the_mean_and_zero_of_the_truth():
    task = regression()
    for index, domain in enumerate(task.domains):
        mean = Says(task.splits["train"][domain][1].mean(0))
        assert task.evaluate(mean, "train")[f"nmse/{domain}"] == pytest.approx(1, abs=1e-5)
        right = Says(lambda x, k=index: torch.stack([x[:, 0], x[:, 1]], 1).repeat(1, 1, 2) * (10 if k else 1) + 5 * k)
        assert task.evaluate(right)[f"nmse/{domain}"] == pytest.approx(0, abs=1e-9)
    found = task.evaluate(mean)
    assert found["nmse"] == pytest.approx((found["nmse/narrow"] + found["nmse/wide"]) / 2)
    loss, context = task.loss(mean, batch := next(task.batches("train", 200)))
    squares = (mean.value - batch.targets).square().mean()
    assert float(loss) == pytest.approx(float(squares / task.variance[0]), rel=1e-5)
    assert torch.equal(context.domain, batch.domain) and mean.context is context


def test_psnr_is_a_mean_over_images_of_what_can_be_shown():
    truth = torch.full((2, 1, 4, 4), 0.5)
    assert psnr(torch.stack([truth[0] + 0.1, truth[0] + 0.01]), truth).tolist() == pytest.approx([20, 40], abs=1e-3)
    white = torch.ones(1, 1, 4, 4)
    assert psnr(white * 3, white).item() == math.inf  # what is whiter than white is shown white
    task = images()
    x, y = task.splits["validation"]["noise"]
    expected = [-10 * math.log10(((a.clamp(0, 1) - b) ** 2).mean()) for a, b in zip(x.double(), y, strict=True)]
    assert task.evaluate(Says(lambda x: x)) == pytest.approx(dict.fromkeys(("psnr", "psnr/noise"), sum(expected) / 12))
    loss, _ = task.loss(Says(lambda x: x), next(task.batches("train", 12)))
    assert float(loss) == pytest.approx(math.log(0.01), abs=1e-3)  # not held within 0 and 1


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, x, context: Context):
        return self.layer(x.flatten(1)).view(-1, 2, 4)


def test_training_lowers_the_error():
    splits = {split: {"narrow": parts["narrow"]} for split, parts in regression().splits.items()}
    task = Regression("line", splits, {})
    torch.manual_seed(0)
    model = Linear()
    before = task.evaluate(model, "test")["nmse"]
    assert train(model, task, TrainConfig(200, 32, lr=3e-2)).metrics["nmse"] < 0.05 * before
    assert model.training


def test_what_cannot_be_a_task_is_named():
    x = torch.zeros(4, 2)
    with pytest.raises(InputError, match="not one target a row, of 'a' in 'validation'"):
        Regression("bad", {"train": {"a": (x, x)}, "validation": {"a": (x, x[:3])}}, {})
    with pytest.raises(InputError, match="all the same"):
        Regression("flat", {"train": {"a": (x, x)}}, {})
