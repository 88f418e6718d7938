"""The bench of the Walsh-Hadamard transform: equal results from every contestant, and the rows it promises."""

import pytest
import torch

from workbench import bench
from workbench.bench import hadamard


@pytest.mark.parametrize("shape", [*hadamard.QUICK, (3, 2**9), (2, 2**13)])
def test_contestants_compute_the_same(shape):
    calls = hadamard._contestants(shape, "forward")
    assert list(calls) == ["limit", "workbench", "torch/factors", "torch/butterflies"]
    ours = calls["workbench"]()
    assert torch.equal(ours, calls["torch/butterflies"]())
    assert torch.allclose(ours, calls["torch/factors"](), atol=1e-3)


def test_a_quick_run_gives_the_rows(home):
    rows = bench.run("hadamard", threads=(1,), repeats=1, quick=True)["rows"]
    assert [row["implementation"] for row in rows] == ["workbench", "torch/factors", "torch/butterflies"]
    assert all(row["case"] == "N=4 L=64" and row["median_s"] > 0 and row["ratio_to_limit"] > 0 for row in rows)
