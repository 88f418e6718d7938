"""Experts that share parameters on the page: their conflict, their overlap, and whether the one follows the other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.live.synthetic import write_synthetic_run
from workbench.figures.conflict import expert_cosines, expert_overlaps, parting_lines
from workbench.figures.theme import theme_named
from workbench.lib.core.routing import Context
from workbench.lib.subspaces.cdsp_moe import CDSPMoELayer
from workbench.live.store import Run
from workbench.live.views import ConflictView, SpectraView
from workbench.live.watch import watch

STEPS, EVERY, E = 9, 2, 4


class Apart(CDSPMoELayer):
    """One whose experts have nothing in common."""

    def __init__(self):
        super().__init__(8, 16, E)

    def form_now(self) -> dict:
        """What a layer tells whose masks do not overlap."""
        nan = torch.full((E, E), torch.nan)
        return {"cosine": nan, "overlap": torch.eye(E), "overlap in conflict": torch.nan}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """A run of two such layers, and what each step's records of the second had to be."""
    folder, told = tmp_path_factory.mktemp("parting") / "run", []
    torch.manual_seed(0)
    model = nn.ModuleList(CDSPMoELayer(8, 16, E) for _ in range(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_QUIET", "1")
        with watch(model, folder, cadence={"routing": EVERY, "structure": 0, "conflict": 0}) as watched:
            for step in range(STEPS):
                x, context = torch.randn(30, 8), Context()
                loss = (model[1](model[0](x, context), context) - x).square().mean() + context.aux
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if step % EVERY == 0:
                    told.append(model[1].form_now())
                watched.step(loss=loss.item())
    return folder, told


def test_the_cards_show_what_the_layer_told(trained: tuple[Path, list]):
    folder, told = trained
    with Run(folder) as run:
        view = ConflictView(run)
        view.selection.layer = 1
        assert all(view.cards[name].visible for name in ("experts", "shared", "parted")) and view.parting.layer.visible
        for step, row in ((None, -1), (4, 2), (5, 2)):
            view.selection.step = step
            for card, what in (("experts", "cosine"), ("shared", "overlap")):
                (figure,) = view.cards[card].figures
                expected = told[row][what].float().numpy().copy()
                np.fill_diagonal(expected, np.nan)
                np.testing.assert_allclose(figure.data[0].z, np.clip(expected, -1, 1), rtol=1e-5)
        (lines,) = view.cards["parted"].figures
        for line in lines.data:
            np.testing.assert_allclose(line.y, [form[line.name] for form in told], rtol=1e-5)
            assert list(line.x) == list(range(0, STEPS, EVERY))


def test_experts_that_share_nothing_are_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a plain mixture has them, that stands beside such a layer: not an empty picture."""
    monkeypatch.setenv("WORKBENCH_QUIET", "1")
    model = Apart()
    with watch(model, tmp_path / "run", cadence={"routing": 1, "structure": 0, "conflict": 0}) as watched:
        for _ in range(2):
            model(torch.randn(9, 8))
            watched.step(loss=1.0)
    with Run(tmp_path / "run") as run:
        view = ConflictView(run)
        assert len(view.cards["shared"].figures) == 1
        for name in ("experts", "parted"):
            assert "share a parameter" in str(view.cards[name].contents[0])
        assert SpectraView(run).cards["form"].contents[0].args == (
            "overlap in conflict is undefined in every record so far",
        )


def test_other_runs_have_no_such_cards(tmp_path: Path):
    write_synthetic_run(tmp_path / "run", 11, n_layers=2)
    with Run(tmp_path / "run") as run:
        view = ConflictView(run)
        assert not view.parting.layer.visible
        for name in ("experts", "shared", "parted"):
            assert not view.cards[name].visible
            assert "no experts of this layer share parameters" in str(view.cards[name].contents[0])


def test_the_first_expert_is_at_the_top_and_named():
    for draw in (expert_cosines, expert_overlaps):
        axes = draw(np.full((3, 3), np.nan)).layout
        assert tuple(axes.yaxis.range) == (2.5, -0.5) and tuple(axes.xaxis.range) == (-0.5, 2.5)
        assert axes.xaxis.title.text == axes.yaxis.title.text == "expert"


def test_conflict_is_orange_and_what_is_undefined_is_left_out():
    matrix = np.array([[1.0, -0.5], [np.nan, 1.0]])
    data = expert_cosines(matrix).data[0]
    assert np.isnan(data.z[0, 0]) and data.z[0, 1] == -0.5 and np.isnan(data.z[1, 0])
    assert data.colorscale[0][1] == theme_named("light").diverging[-1] and (data.zmin, data.zmax) == (-1, 1)
    assert expert_overlaps(np.eye(2)).data[0].zmin == 0
    lines = parting_lines({"link in conflict": (np.arange(3), np.ones(3)), "overlap in agreement": ([0], [1.0])}).data
    assert lines[0].line.color == theme_named("light").diverging[-1] and lines[0].line.dash == "dot"
    assert lines[1].line.color == theme_named("light").diverging[0] and lines[1].line.dash == "solid"
