"""The bench of the bank's RK4: equal results from every contestant, and the rows it promises."""

import pytest
import torch

from workbench import bench
from workbench.bench import dynamics


@pytest.mark.parametrize("shape", [*dynamics.QUICK, (3, 1, 1, 2)])
def test_contestants_compute_the_same(shape):
    calls = dynamics._contestants(shape, "forward")
    experts, environments, starts, points = shape
    ours = calls.pop("workbench")()
    assert ours.shape == (points, experts, environments, starts, 2)
    for name, call in calls.items():
        tolerance = 1e-3 if "torchdiffeq" in name else 1e-5  # another rule of the same order
        torch.testing.assert_close(call(), ours, rtol=0, atol=tolerance)


def test_a_quick_run_gives_the_rows(home):
    pytest.importorskip("torchdiffeq")
    result = bench.run("dynamics", threads=(1,), repeats=1, quick=True)
    names = ["workbench", dynamics.EXPERTS, dynamics.PAIRS, dynamics.PEER, dynamics.PEER_BANK]
    assert [row["implementation"] for row in result["rows"]] == names and result["left_out"] == []
    assert all(row["median_s"] > 0 for row in result["rows"])


def test_a_peer_that_is_not_there_is_left_out(monkeypatch):
    monkeypatch.setattr(dynamics, "torchdiffeq", lambda: None)
    assert [row["implementation"] for row in dynamics.tables()["left_out"]] == [dynamics.PEER, dynamics.PEER_BANK]
    assert len(dynamics._contestants(dynamics.QUICK[0], "forward")) == 3
