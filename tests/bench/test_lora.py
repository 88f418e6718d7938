"""The bench of mixed batches: equal results from every contestant, and the rows it promises."""

import pytest
import torch

from workbench import bench
from workbench.bench import lora

SHAPE = (12, 16, 4, 2)


@pytest.fixture(autouse=True, scope="module")
def _peft():
    """Only the process that runs these tests pays for the import."""
    pytest.importorskip("peft")


def test_contestants_compute_the_same():
    problem = lora.Problem(*SHAPE)
    with torch.no_grad():
        ours, theirs = problem.ours(problem.x), problem.peft()(problem.x, adapter_names=problem.names)
        assert torch.allclose(ours, theirs, atol=1e-5)
        rows = [problem.bank.delta(e) @ row for row, e in zip(problem.x, problem.adapter.tolist(), strict=True)]
        update = torch.stack(rows)
        assert torch.allclose(ours, problem.base(problem.x) + update, atol=1e-5)
        assert torch.allclose(problem.update(problem.x), update, atol=1e-5)
        alone = problem.peft(alone=True)
        assert torch.allclose(alone(problem.x, adapter_names=problem.names), update, atol=1e-5)


def test_the_contestants_of_each_case(monkeypatch):
    def names(case, direction):
        return list(case.make(direction))

    whole, alone = lora.cases(quick=True)
    assert names(whole, "forward") == ["limit", "workbench", "peft/mixed_batch"]
    assert names(whole, "forward+backward") == ["limit", "workbench"]  # theirs is for inference
    assert alone.directions == ("forward",) and names(alone, "forward") == ["workbench", "peft/mixed_batch"]
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    assert names(alone, "forward") == ["workbench"]


def test_a_quick_run_gives_the_rows(home):
    rows = bench.run("lora", threads=(1,), repeats=1, quick=True)["rows"]
    case = "N=16 I=O=32 E=4 r=2"
    assert [(row["case"], row["direction"], row["implementation"]) for row in rows] == [
        (case, "forward", "workbench"),
        (case, "forward", "peft/mixed_batch"),
        (case, "forward+backward", "workbench"),
        (f"{case}, adapters alone", "forward", "workbench"),
        (f"{case}, adapters alone", "forward", "peft/mixed_batch"),
    ]
    assert all(row["median_s"] > 0 for row in rows)
    assert all((row["ratio_to_limit"] is None) == ("alone" in row["case"]) for row in rows)
