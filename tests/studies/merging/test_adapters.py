"""Rules for stacks of adapters, against loops of their formula; grids of one size."""

import pytest
import torch

from workbench.beds import digit_experts as digits
from workbench.lib import data
from workbench.studies.merging import adapters
from workbench.studies.merging.adapters import SCALES, dare, load, mean, reverted_kept, ties

SETTINGS = digits.SMOKE | {"stride": 8}


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_ties_is_trim_elect_and_the_mean_of_what_agrees():
    stack = drawn(4, 30)
    kept = torch.zeros_like(stack)
    for row, out in zip(stack, kept, strict=True):
        for i in row.abs().argsort(descending=True)[:12]:
            out[i] = row[i]
    expected = []
    for column in kept.T:
        sign = 1 if column.sum() >= 0 else -1
        agreeing = [x for x in column.tolist() if x * sign > 0]
        expected.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    torch.testing.assert_close(ties(0.4)(stack), torch.tensor(expected))


def test_dare_is_unbiased_and_keeps_its_share():
    stack = drawn(3, 40)
    found = torch.stack([dare(0.25, seed)(stack) for seed in range(2000)])
    error = found.std(0) / 2000**0.5
    assert ((found.mean(0) - mean(stack)).abs() < 4.5 * error).all()
    one = torch.ones(1, 20_000)
    assert (dare(0.25, 1)(one) > 0).float().mean() == pytest.approx(0.25, abs=0.02)


def test_one_is_among_the_scales():
    assert 1.0 in SCALES and min(SCALES) < 0.5 and max(SCALES) > 8


@pytest.mark.study
def test_an_adapter_by_itself_keeps_all_of_its_task_and_knots_of_everything_is_the_mean():
    data.get("mnist-5k")
    bed = load(SETTINGS, 0, "shared")
    for split in ("validation", "test"):
        assert reverted_kept(bed.suite, bed.suite.deltas, split) == [1.0] * 8
    assert len(adapters.load(SETTINGS, 0, "shared").loras) == 8
    stacked = bed.stacked("blocks.0.1")
    whole = bed.suite.split(bed.suite.deltas[2])["blocks.0.1.weight"]
    torch.testing.assert_close(stacked[2], whole)
    knots = adapters.knots(bed)(1.0)
    assert knots.isfinite().all() and knots.any()
    assert not bed.suite.split(knots)["embedding.bias"].any()
