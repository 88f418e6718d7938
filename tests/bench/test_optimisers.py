"""The bench of optimisers: the rows it promises, the bytes by their formulas, and the peer's mean step."""

import pytest
import torch

from workbench import bench
from workbench.bench import optimisers
from workbench.bench.optimisers import ADAMW, BETWEEN, EVERY, FED, MUON, OURS, TRION, galore_torch


def test_a_quick_run_gives_the_rows(home):
    result = bench.run("optimisers", threads=(1,), repeats=1, quick=True)
    peers = [EVERY, BETWEEN] if galore_torch() else []
    assert [row["implementation"] for row in result["rows"]] == [OURS, FED, TRION, ADAMW, MUON, *peers, OURS, MUON]
    assert {row["case"] for row in result["rows"]} == {"64x64 r=16", "Muon 64x64"}
    assert all(row["median_s"] > 0 and row["ratio_to_limit"] > 0 for row in result["rows"])
    assert [row["case"] for row in result["amortised"]] == ["64x64 r=16"] * bool(peers)
    n, r = 64, 16
    assert {row["implementation"]: row["bytes"] for row in result["state_bytes"]} == {
        OURS: 4 * (2 * n * r + r),
        FED: 4 * (2 * n * r + r) + n * n + 8 * n,
        TRION: 4 * (n * n + r),
        ADAMW: 8 * n * n,
        MUON: 4 * n * n,
        "workbench/GaLoreAdamW": 4 * (2 * n * r + n * r),
    }


def test_the_mean_step_of_the_peer():
    rows = [
        {"case": "c", "threads": 2, "implementation": name, "median_s": seconds}
        for name, seconds in ((OURS, 1.5), (BETWEEN, 1.0), (EVERY, 101.0))
    ]
    (row,) = optimisers.summary(rows)["amortised"]
    assert row == {"case": "c", "threads": 2, "ours_s": 1.5, "peer_s": pytest.approx(1.5), "ratio": pytest.approx(1.0)}
    assert optimisers.summary(rows[:1]) == {"amortised": []}


def test_the_peer_makes_an_svd_when_it_is_said_to(monkeypatch):
    if galore_torch() is None:
        pytest.skip("galore-torch is not installed")
    calls, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: calls.append(1) or svd(*args, **kwargs))
    made = optimisers._contestants(16, "forward")
    calls.clear()
    made[BETWEEN]()
    assert calls == []
    made[EVERY]()
    made[EVERY]()
    made[OURS]()
    assert calls == [1, 1]
