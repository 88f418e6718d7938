"""The bench of the selective scan: equal results from every contestant, and the rows it promises."""

import pytest
import torch

from workbench import bench
from workbench.bench import scan


@pytest.mark.parametrize("shape", [*scan.QUICK, (1, 3, 2, 70)])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_contestants_compute_the_same(shape, direction):
    pytest.importorskip("transformers")
    calls = scan._contestants(shape, direction)
    assert list(calls) == ["workbench", "transformers", "torch/doubling"]
    ours = calls["workbench"]()
    for name in ("transformers", "torch/doubling"):
        for a, b in zip(ours, calls[name](), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(ours) == (2 if direction == "forward" else 9)


def test_a_quick_run_gives_the_rows(home):
    result = bench.run("scan", threads=(1,), repeats=1, quick=True)
    names = ["workbench", "transformers", "torch/doubling"]
    for rows in (result["rows"], result["memory"]):
        assert {row["case"] for row in rows} == {"B=2 I=5 N=3 L=9"}
        assert [row["implementation"] for row in rows if row["direction"] == "forward"] in (names, names[::2])
    assert all(row["median_s"] > 0 for row in result["rows"])
    assert all(row["ratio_to_data"] >= 0 for row in result["memory"])


def test_who_takes_too_long_is_left_out_with_the_reason():
    pytest.importorskip("transformers")
    assert scan.absent("transformers", (1, 1, 1, scan.MOST), "forward+backward") is None
    assert "square of the 4096 steps" in scan.absent("transformers", (1, 512, 16, 4096), "forward+backward")
    assert scan.absent("transformers", (1, 512, 16, 4096), "forward") is None
