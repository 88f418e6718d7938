"""The bench of two processes on a shaped link: what its processes do, and what is made of what they measured.

The timings themselves are a command, `workbench bench distributed`.
"""

import json

import pytest

from workbench import bench
from workbench.bench import distributed
from workbench.bench.distributed import _ranks, _shaped, streaming_diloco
from workbench.catalogue import PACKAGE
from workbench.errors import InputError
from workbench.lib.core.distributed.processes import run_processes
from workbench.lib.core.simulation.validation import Validation

TINY = {"d_model": 8, "d_hidden": 8, "n_layers": 4, "seq_len": 8, "batch_size": 2, "steps": 1}
SIZES = (10**5, 10**6, 10**7)


def made(seconds: float = 0.05) -> _shaped.Seen:
    """As on a link of 10 MB/s in all, on which ours waits for a hundredth of what the others do."""
    trained = [{"seconds": 0.052, "alone": seconds}, {"seconds": 0.25, "alone": seconds}]
    trained += [{"seconds": 0.25, "alone": seconds}] + [{"seconds": 0.1, "alone": seconds}] * (len(_shaped.ARMS) - 3)
    gathers = [2 * size / 1e7 for size in SIZES]
    return _shaped.Seen(1e7, SIZES, gathers, 250_000, trained, {"forward": (0.11, 10**6)})


def test_its_processes_train_and_dispatch():
    arms = [{**arm, "steps": 1, "warm": 0} for arm in _shaped.ARMS]
    for found in run_processes(_ranks.trainings, 2, TINY, arms):
        assert len(found) == len(arms) and all(one["seconds"] > 0 and one["alone"] > 0 for one in found)
    ranks = run_processes(_ranks.dispatches, 2, 40, 8, 4, 2, 1)
    forward, both = ([rank[direction] for rank in ranks] for direction in ("forward", "forward+backward"))
    assert all(seconds > 0 for seconds, _ in forward + both)
    # every pair that goes to the other rank is sent there and back, with counts of 2 experts of 8 bytes
    pairs = [(n_bytes - 16) / (2 * 8 * 4) for _, n_bytes in forward]
    assert sum(pairs) == int(sum(pairs)) and 0 < sum(pairs) < 2 * 40 * 2
    assert all(back - 16 == 2 * (there - 16) for (_, there), (_, back) in zip(forward, both, strict=True))
    assert all(seconds > 0 for seconds in run_processes(_ranks.gathers, 2, (100, 1000), 1)[0])


def test_rows_are_those_of_every_bench():
    rows = made().rows()
    assert [(row["implementation"], row["direction"]) for row in rows[:3]] == [
        ("workbench", "forward+backward"),
        ("torch/ddp", "forward+backward"),
        ("torch/all_reduce", "forward+backward"),
    ]
    step, exposed, dispatched = rows[0], rows[3], rows[6]
    assert step["ratio_to_limit"] == pytest.approx(1.04) and step["speedup_over"]["torch/ddp"] == pytest.approx(
        4.81, 0.01
    )
    assert exposed["median_s"] == pytest.approx(0.002) and exposed["case"].startswith("exposed communication")
    assert exposed["speedup_over"] == {"torch/ddp": pytest.approx(100), "torch/all_reduce": pytest.approx(100)}
    assert dispatched["case"].startswith("dispatch and combine") and dispatched["ratio_to_limit"] == pytest.approx(1.1)
    assert all(set(row) == set(step) for row in rows)
    assert [row["Mbit/s"] for row in made().link_table()] == [80.0] * 4


def test_what_is_predicted_is_calibrated_by_the_link_and_by_steps_alone(monkeypatch):
    monkeypatch.setattr(streaming_diloco, "seen", lambda quick: made())
    record = distributed.measure("streaming-diloco")
    assert record.calibration["link"]["beta"] == pytest.approx(1e-7) and record.unit == "share of computing"
    rows = {row["configuration"]: row for row in record.rows}
    assert len(rows) == len(_shaped.ARMS) - 1
    # a megabyte from each of two, all of it on one link: 0.2 s beside 0.05 s
    assert rows["data-parallel, float32"]["predicted"] == pytest.approx(0.2)
    assert rows["P=4 H=28 tau=1, four bits"]["predicted"] == 1  # 33,000 bytes twice, within a step
    assert rows["P=1 H=10 tau=0, float32"]["predicted"] == pytest.approx(0.05 / (0.05 + 0.02))
    assert rows["P=1 H=10 tau=0, float32"]["measured"] == pytest.approx(0.5)


def test_the_whole_is_a_record_and_says_why_where_it_cannot_be(monkeypatch, home):
    monkeypatch.setattr(streaming_diloco, "seen", lambda quick: made())
    monkeypatch.setattr(_shaped, "seen", lambda quick: made())
    only = {"streaming-diloco": streaming_diloco.__name__}
    monkeypatch.setattr(distributed, "systems", lambda: only)  # the others' are timed for real
    monkeypatch.setattr(distributed, "available", lambda: (True, ""))
    result = bench.run("distributed", quick=True)
    assert len(result["rows"]) == 7 and result["accuracy"][0]["system"] == "streaming-diloco"
    json.dumps(result, allow_nan=False)
    monkeypatch.setattr(distributed, "available", lambda: (False, "a shaped link needs tc"))
    result = bench.run("distributed", quick=True)
    assert result["rows"] == [] and result["not measured"] == [{"why": "a shaped link needs tc"}]


def test_sparse_gathers_send_what_the_formula_says():
    rows = run_processes(_ranks.sparse_bytes, 2)[0]
    assert [row["copies"] for row in rows] == [0, 2, 3, 16]
    assert all(row["bytes"] == row["by formula"] for row in rows) and rows[-1]["bytes"] == 2 * 4 * 3 * 64 * 128 * 16


def test_the_record_that_travels_is_of_these_configurations():
    record = Validation.read(PACKAGE / "studies" / "distributed" / "measured" / "streaming_diloco.json")
    assert record.system == "streaming-diloco" and len(record.rows) >= 4
    arms = [arm for arm in _shaped.ARMS if arm["kind"] != "ddp"]
    assert [row["configuration"] for row in record.rows] == [streaming_diloco._text(arm) for arm in arms]
    with pytest.raises(InputError):
        Validation.read(PACKAGE / "studies" / "distributed" / "measured" / "no_such.json")
