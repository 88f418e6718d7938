"""Every layout makes the steps of one process on the whole batch, on real processes."""

import pytest
import torch

from tests.lib.core.distributed import layouts
from workbench.lib.core.distributed.layouts import LAYOUTS
from workbench.lib.core.distributed.processes import run_processes


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    try:
        found = {name: layouts.trained(None, **values) for name, values in layouts.ROUTED.items()}
        return found | {"float32": layouts.trained(None, double=False)}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("world", "names"), [(2, [*layouts.ROUTED, "float32"]), (4, ["linear"])])
def test_the_trajectory_is_that_of_one_process(alone: dict[str, dict], world: int, names: list[str]):
    first, *others = run_processes(layouts.all_layouts, world, names, timeout=300)
    assert len(first) == len(names) * len(LAYOUTS)
    for (name, layout), found in first.items():
        expected, close = alone[name], 1e-6 if name == "float32" else 1e-12
        for mine, its in zip(expected["steps"], found["steps"], strict=True):
            assert its[:3] == pytest.approx(mine[:3], rel=close, abs=close), (name, layout)
            assert its[3] == pytest.approx(mine[3], rel=close), (name, layout)
        assert found["weights"].keys() == expected["weights"].keys()
        for weight, value in expected["weights"].items():
            if name != "float32":  # where a gradient is nearly zero AdamW makes a step of its rounding
                difference = (found["weights"][weight].double() - value.double()).abs().max()
                assert difference <= 1e-12, (name, layout, weight, difference)
        assert all(other[name, layout] == found["steps"] for other in others), (name, layout)


def test_each_layout_sends_what_it_has_to_and_waits(alone: dict[str, dict]):
    for own in run_processes(layouts.traffic, 2):
        dense, experts = (own["data"][what] for what in ("all", "experts"))
        small = 200  # losses, loads, norms
        assert dense + experts <= own["data"]["all_reduce"] < dense + experts + small  # 2 b (n - 1) / n is b
        assert dense <= own["experts"]["all_reduce"] < dense + small
        rows = 2 * 64 * 2 * 16 * 4 / 2  # of 2 layers: 64 tokens, K = 2, D = 16; of a random router half go elsewhere
        assert 0.5 * 4 * rows < own["experts"]["all_to_all"] < 2 * 4 * rows  # to and fro, forward and back
        gathered, scattered = own["sharded"]["all_gather"], own["sharded"]["reduce_scatter"]
        assert scattered >= (dense + experts) / 2 and gathered >= (dense + experts) / 2
        assert all(own[layout]["waited"] > 0 for layout in LAYOUTS)


def test_what_cannot_be_shared_out_is_refused_and_what_can_is_named():
    found, _ = run_processes(layouts.refused, 2)
    assert "blocks.0.ffn has a capacity" in found["capacity"]
    assert "a ExpertChoiceRouter, which does not choose token by token" in found["expert choice"]
    assert "3 experts do not divide evenly over 2 ranks" in found["experts"]
    assert "layout 'pipeline' is unknown" in found["layout"]
    assert found["batch"] == "2 processes cannot share batch_size = 3 evenly: 1, 3 can"
