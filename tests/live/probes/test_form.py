"""Layers that tell their form are asked at the cadence, and what they tell is recorded as it was."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from workbench.live.store import Run
from workbench.live.watch import watch


class Shrinking(nn.Linear):
    """A layer that loses a unit with every forward pass in training, and counts how often it was asked."""

    def __init__(self):
        super().__init__(4, 4)
        self.rank, self.asked, self.more = 4, 0, {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rank -= self.training and self.rank > 1
        return super().forward(x)

    def form_now(self) -> dict:
        self.asked += 1
        kept = (torch.arange(4) < self.rank).to(torch.bfloat16)
        return {"rank": self.rank, "kept": kept, "overlap": self.weight @ self.weight.T} | self.more


def steps(model: nn.Module, watching, count: int) -> None:
    for _ in range(count):
        model(torch.ones(2, 4)).sum().backward()
        if watching:
            watching.step()


def test_numbers_vectors_and_matrices_are_recorded_at_the_cadence(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(Shrinking(), nn.Sequential(Shrinking()))
    with watch(model, tmp_path / "run", cadence={"routing": 2}) as watching:
        assert "2 layers that tell their form" in watching.found
        steps(model, watching, 5)
    with Run(tmp_path / "run") as run:
        told = {"rank": [], "kept": [1, 4], "overlap": [4, 4]}
        assert run.meta["model"]["forms"] == {"0": told, "1.0": told}
        at, ranks = run.scalars("form/1.0/rank")
        assert at.tolist() == [0, 2, 4] and ranks.tolist() == [3, 1, 1]
        assert run.tensors("form_table/0/kept")[1][:, 0].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
        weight = model[0].weight.detach()
        np.testing.assert_allclose(run.tensor("form_table/0/overlap", 4)[1], weight @ weight.T, rtol=1e-6)


def test_with_nobody_there_no_layer_is_asked():
    model = nn.Sequential(Shrinking())
    steps(model, None, 3)
    assert model[0].asked == 0


def test_a_model_that_is_one_layer_tells_its_form(tmp_path: Path):
    model = Shrinking()
    with watch(model, tmp_path / "run") as watching:
        steps(model, watching, 1)
    with Run(tmp_path / "run") as run:
        assert run.scalars("form/model/rank")[1].tolist() == [3]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"stage": 2}, r"its form is now .*'stage'.* but was first"),
        ({"kept": torch.ones(3)}, r"'kept': \(1, 3\).* but was first .*'kept': \(1, 4\)"),
        ({"mask": torch.ones(2, 2, 2)}, "its form has mask, which must be a number, a vector or a matrix"),
        ({"name": "late"}, "its form has name, which must be"),
    ],
)
def test_a_form_that_changes_its_kind_is_said_once_and_recorded_no_more(more: dict, said: str, tmp_path: Path):
    model = nn.Sequential(Shrinking(), Shrinking())
    with watch(model, tmp_path / "run", cadence={"routing": 1}) as watching:
        steps(model, watching, 1)
        model[0].more = more
        with pytest.warns(UserWarning, match=f"0: .*{said}") as seen:
            steps(model, watching, 2)
    assert len(seen) == 1
    with Run(tmp_path / "run") as run:
        assert run.steps("form/0/rank").tolist() == [0] and run.steps("form/1/rank").tolist() == [0, 1, 2]
        assert [event.kind for event in run.events()].count("note") == 1


def test_a_layer_that_was_replaced_is_asked_no_more(tmp_path: Path):
    model = nn.Sequential(Shrinking(), Shrinking())
    with watch(model, tmp_path / "run", cadence={"routing": 1}) as watching:
        old, model[0] = model[0], Shrinking()
        with pytest.warns(UserWarning, match="0: replaced in the model"):
            steps(model, watching, 1)
        assert old.asked == 2  # for the description of the model, and for the shapes
    with Run(tmp_path / "run") as run:
        assert "form/0/rank" not in run.names() and "form/1/rank" in run.names()


def test_a_run_goes_on_where_the_forms_are_the_same(tmp_path: Path):
    with watch(nn.Sequential(Shrinking()), tmp_path / "run") as watching:
        steps(watching.model, watching, 1)
    with watch(nn.Sequential(Shrinking()), tmp_path / "run", resume=True, cadence={"routing": 1}) as watching:
        steps(watching.model, watching, 1)
    other = nn.Sequential(Shrinking())
    other[0].more = {"stage": 1}
    with pytest.raises(ValueError, match=r"form '0' is .*stage.* but was"):
        watch(other, tmp_path / "run", resume=True)
    with Run(tmp_path / "run") as run:
        assert run.steps("form/0/rank").tolist() == [0, 1]
