"""The view of several processes, on a run that two have trained and on one that one has."""

from pathlib import Path

import numpy as np
import pytest

from tests.live.synthetic import RANKS
from workbench.live.store import Run, RunWriter
from workbench.live.views import ProcessesView
from workbench.live.views.processes import sent, travel, waits, work
from workbench.live.views.readings import Nothing, Readings


def test_work_is_what_the_experts_of_a_rank_are_given(run: Run):
    readings = Readings(run)
    lines, load = work(readings, 1), run.tensors("load/blocks.1.ffn")
    np.testing.assert_array_equal(lines["rank 0"][0], load[0])
    first = load[1][:, : load[1].shape[1] // RANKS].sum(1) / (load[1].sum(1) / RANKS)
    np.testing.assert_allclose(lines["rank 0"][1], first)
    np.testing.assert_allclose(lines["rank 0"][1] + lines["rank 1"][1], RANKS)
    pairs = travel(readings, 1, 100)
    tokens = [run.tensor(f"rank/{rank}/load/blocks.1.ffn", 100)[1].sum() for rank in range(RANKS)]
    np.testing.assert_array_equal(pairs.sum(1), tokens)
    assert pairs.sum() == run.tensor("load/blocks.1.ffn", 100)[1].sum() and (pairs > 0).all()


def test_where_each_process_has_all_experts_nothing_travels(tmp_path: Path, run: Run):
    meta = {"kind": "train", "cadence": {"routing": 1}, "processes": {"world": 2, "layout": "data"}}
    meta["model"] = {"layers": [{"name": "a", "n_experts": 3, "top_k": 1}]}
    with RunWriter.create(tmp_path / "data", meta) as writer:
        for rank in (0, 1):
            writer.tensors(0, {f"rank/{rank}/load/a": np.array([rank + 1, 2, 3], dtype=np.uint32)})
        writer.commit(0)
    readings = Readings(Run(tmp_path / "data"))
    assert travel(readings, 0, None).tolist() == [[6, 0], [0, 7]]
    assert work(readings, 0)["rank 1"][1] == pytest.approx([14 / 13])
    with pytest.raises(Nothing, match="holds no record of it"):
        waits(readings)


def test_waiting_and_bytes_are_those_of_the_record(run: Run):
    readings = Readings(run)
    steps, seconds, waiting = waits(readings)
    assert steps.tolist() == list(range(0, 211, 10)) and seconds.shape == waiting.shape == (RANKS, 22)
    np.testing.assert_allclose(waiting[:, 0], [0.02, 0.005])
    lines = sent(readings)
    assert set(lines) == {"all_reduce", "all_to_all"}
    np.testing.assert_allclose(lines["all_reduce"][1], RANKS * 30.0)  # kilobytes, of both


def test_of_one_process_one_card_says_that_nothing_is_shared(tmp_path: Path):
    with RunWriter.create(tmp_path / "one", {"kind": "train", "processes": None}) as writer:
        writer.scalars(0, {"train/loss": 1.0})
        writer.commit(0)
    view = ProcessesView(tmp_path / "one")
    assert [name for name, card in view.cards.items() if card.visible] == ["work"]
    assert "one process trains this run" in str(view.cards["work"].contents[0])


def test_the_step_on_show_is_the_one_chosen(run: Run):
    view = ProcessesView(run)
    view.selection.step = 105
    assert "Step 100 of each process" in view.cards["time"].figures[0].layout.title.text
    assert all(card.figures for card in view.cards.values())
