"""The bench of shared weights: equal results, and the rows it promises."""

import torch

from workbench import bench
from workbench.bench import shared
from workbench.bench.core import BOTH


def test_contestants_compute_the_same():
    problem = shared.Problem(3, 20, 40)
    y, of_x, of_memory = problem.call(*problem.ours(), BOTH)
    for pair in (problem.expanded(), problem.index()):
        for ours, theirs in zip((y, of_x, of_memory), problem.call(*pair, BOTH), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip((y, of_x), problem.call(*problem.linear(), BOTH), strict=False):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert of_memory.shape == (80,)


def test_a_quick_run_gives_the_rows(home):
    rows = bench.run("shared", threads=(1,), repeats=1, quick=True)["rows"]
    names = ["workbench", "torch/linear", "torch/expanded", "torch/index"]
    wanted = [("N=3 40x20 at 0.1", direction, name) for direction in ("forward", "forward+backward") for name in names]
    assert [(row["case"], row["direction"], row["implementation"]) for row in rows] == wanted
    assert all(row["median_s"] > 0 and row["ratio_to_limit"] > 0 for row in rows)
