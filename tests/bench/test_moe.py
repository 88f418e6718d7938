"""The bench: equal results from every contestant, ratios as they are defined, a record, and memory by the formula."""

import json

import pytest
import torch

from workbench import bench
from workbench.bench import core, moe
from workbench.errors import InputError

SHAPE = (12, 8, 4, 6, 2)


def test_contestants_compute_the_same():
    problem = moe.Problem(*SHAPE)
    layers = problem.layers(scatter=True)
    assert list(layers) == ["workbench", "transformers/eager", "transformers/grouped_mm", "scatter-style"]
    x, _, weight = problem.inputs
    found = {}
    for name, layer in layers.items():
        out = layer(*problem.inputs)
        found[name] = [out, *torch.autograd.grad(out, (x, weight, *problem.weights), problem.grad)]
    for name in layers:
        for ours, theirs in zip(found["workbench"], found[name], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5), name


def test_rows_hold_medians_of_ratios_within_rounds():
    seconds = {"limit": [1.0, 2.0, 4.0], "workbench": [2.0, 2.0, 2.0], "peer": [4.0, 10.0, 2.0]}
    ours, peer = core.rows_of("case", 2, "forward", seconds)
    assert ours == {
        "case": "case",
        "threads": 2,
        "direction": "forward",
        "implementation": "workbench",
        "median_s": 2.0,
        "ratio_to_limit": 1.0,  # of 2, 1 and 0.5
        "speedup_over": {"peer": 2.0},  # of 2, 5 and 1
    }
    assert peer["implementation"] == "peer" and peer["ratio_to_limit"] == 4.0
    (alone,) = core.rows_of("case", 1, "forward", {"workbench": [1.0]})
    assert alone["ratio_to_limit"] is None and alone["speedup_over"] == {}


def test_contestants_take_turns_and_the_first_round_does_not_count():
    calls: list[str] = []
    seconds = core.measure({name: lambda name=name: calls.append(name) for name in "abc"}, 4)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert all(len(spent) == 4 and min(spent) >= 0 for spent in seconds.values())


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(moe, "SHAPES", (SHAPE,))
    monkeypatch.setattr(
        moe, "MEMORY", {"n_tokens": 32, "dim": 16, "active": 32, "experts_per_k": 2, "top_k": (1, 2, 4)}
    )


def test_a_run_times_every_combination_and_keeps_a_record(small, home):
    calls: list[tuple[int, int, str]] = []
    before = torch.get_num_threads()
    result = bench.run("moe", threads=(1, 2), repeats=1, progress=lambda *call: calls.append(call))
    assert torch.get_num_threads() == before
    found = {(r["case"], r["threads"], r["direction"], r["implementation"]) for r in result["rows"]}
    names = ("workbench", "transformers/eager", "transformers/grouped_mm")
    assert found == {
        ("T=12 D=8 H=4 E=6 K=2", threads, direction, name)
        for threads in (1, 2)
        for direction in ("forward", "forward+backward")
        for name in names
    }
    for row in result["rows"]:
        assert row["median_s"] > 0 and row["ratio_to_limit"] > 0
        assert set(row["speedup_over"]) == set(names) - {row["implementation"]}
    assert calls[0] == (0, 4, "T=12 D=8 H=4 E=6 K=2, forward, 1 thread")
    assert [done for done, _, _ in calls] == [0, 1, 2, 3]
    kept = json.loads((home / "bench").glob("moe-*.json").__next__().read_text())
    assert kept == {key: value for key, value in result.items() if key != "record"}
    assert result["record"].startswith(str(home / "bench"))


def test_what_was_timed_before_an_interruption_is_kept(small, home):
    def interrupt(at: int):
        def progress(done: int, total: int, now: str) -> None:
            if done == at:
                raise KeyboardInterrupt

        return progress

    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt, match="bench moe had timed nothing yet"):
        bench.run("moe", threads=(1, 2), repeats=1, progress=interrupt(0))
    assert not (home / "bench").exists()
    with pytest.raises(KeyboardInterrupt, match="6 timings of bench moe are kept at") as caught:
        bench.run("moe", threads=(1, 2), repeats=1, progress=interrupt(2))
    assert torch.get_num_threads() == before
    (path,) = (home / "bench").glob("moe-*.json")
    kept = json.loads(path.read_text())
    assert str(caught.value).endswith(str(path)) and kept["interrupted"] is True
    assert [(row["threads"], row["direction"]) for row in kept["rows"][::3]] == [
        (1, "forward"),
        (1, "forward+backward"),
    ]


def test_memory_is_flat_for_ours_and_grows_for_the_rest(small):
    rows = moe.tables()["memory"]
    by_name: dict[str, list[int]] = {}
    for row in rows:
        by_name.setdefault(row["implementation"], []).append(row["saved_bytes"])
    n_tokens, dim = 32, 16
    for top_k, kept in zip((1, 2, 4), by_name["workbench"], strict=True):
        pairs = n_tokens * top_k
        small = 4 * (3 * pairs + 2 * top_k + 1) + 4 * pairs  # plan and scores
        assert kept - small == 4 * n_tokens * dim + 4 * n_tokens * 2 * 32  # X and Z, whatever K
    for name, kept in by_name.items():
        if name != "workbench":
            assert all(theirs > ours for theirs, ours in zip(kept, by_name["workbench"], strict=True))
            assert kept[2] - kept[1] > 4 * n_tokens * dim  # at least the (P, D) rows that grow with K


def test_wrong_input_is_named(home):
    with pytest.raises(InputError, match="bench 'mo' is unknown; did you mean 'moe'"):
        bench.run("mo")
    with pytest.raises(InputError, match=r"threads is \(0,\) but must be one or more numbers of at least 1"):
        bench.run("moe", threads=(0,))
    with pytest.raises(InputError, match="repeats is 0"):
        bench.run("moe", repeats=0)
    assert not (home / "bench").exists()
