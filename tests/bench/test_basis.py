"""The bench of seeded bases: equal results from those who have the same numbers, and the rows it promises."""

import torch

from workbench import bench
from workbench.bench import basis


def test_contestants_compute_the_same():
    problem = basis.Problem(130, (3, 8))
    (total, gradient), *others = problem.operator(), problem.operator("reference"), problem.stored()
    for their_total, their_gradient in others:
        assert torch.allclose(total(), their_total(), atol=1e-4)
        assert torch.allclose(gradient(), their_gradient(), atol=1e-4)


def test_torchs_own_generator_is_asked_for_as_much():
    """Its sums have the spread of a sum of uniform numbers, and its gradient is that of its sum."""
    problem = basis.Problem(130, (300,))
    total, gradient = problem.generator()
    assert torch.equal(total(), total()) and gradient().shape == (130,)
    assert abs((total().square().mean() / problem.c.square().sum() * 3).sqrt() - 1) < 0.2
    assert torch.allclose(gradient() @ problem.c, problem.grad @ total(), rtol=1e-3, atol=1e-2)


def test_a_quick_run_gives_the_rows(home):
    rows = bench.run("basis", threads=(1,), repeats=1, quick=True)["rows"]
    names = ["workbench", "torch/philox", "torch/generator", "torch/stored"]
    wanted = [("k=5 3x8", direction, name) for direction in ("forward", "forward+backward") for name in names]
    assert [(row["case"], row["direction"], row["implementation"]) for row in rows] == wanted
    assert all(row["median_s"] > 0 for row in rows) and set(rows[0]["speedup_over"]) == set(names[1:])
