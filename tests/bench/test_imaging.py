"""The bench of tunable convolutions: equal results, and the rows it promises."""

import pytest
import torch

from workbench import bench
from workbench.bench import imaging
from workbench.bench.core import BOTH, LIMIT


@pytest.mark.parametrize("setting", [imaging.ONE, imaging.EACH])
def test_contestants_compute_the_same(setting: str):
    calls = imaging._contestants((3, 4, 8, 2), setting, BOTH)
    ours = calls.pop("workbench")()
    assert [tensor.shape for tensor in ours[2:]] == [(2, 4, 4, 3, 3), (2, 4)]
    for name, call in calls.items():
        theirs = call()
        assert theirs[0].shape == ours[0].shape and theirs[1].shape == ours[1].shape
        if name != LIMIT:  # a plain convolution with a kernel of its own
            torch.testing.assert_close(theirs[:2], ours[:2], atol=1e-4, rtol=1e-4)
        if name not in (LIMIT, imaging.FUSED):  # of which the parameters are others
            torch.testing.assert_close(theirs[2:], ours[2:], atol=1e-4, rtol=1e-4)


def test_a_quick_run_gives_the_rows(home):
    rows = bench.run("imaging", threads=(1,), repeats=1, quick=True)["rows"]
    wanted = [
        (f"B=3 C=4 8x8 P=2, {setting}", direction, name)
        for setting, peer in ((imaging.ONE, imaging.FUSED), (imaging.EACH, imaging.LOOP))
        for direction in ("forward", "forward+backward")
        for name in ("workbench", imaging.KERNELS, peer)
    ]
    assert [(row["case"], row["direction"], row["implementation"]) for row in rows] == wanted
    assert all(row["median_s"] > 0 and row["ratio_to_limit"] > 0 for row in rows)
