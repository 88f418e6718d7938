"""The measurement of what watching costs: it measures both trainings, pair by pair."""

import itertools
import json
import time

import pytest
import torch

from workbench.live import cost
from workbench.live.recipe import Recipe

SMALL = {"domains": ["docs", "names"], "cap": 4096, "seq_len": 8, "batch_size": 2, "d_model": 8, "n_layers": 1}


def test_pairs_of_steps_are_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    threads = torch.get_num_threads()
    small = Recipe.from_dict(SMALL | {"n_heads": 1, "n_experts": 2, "top_k": 1, "d_hidden": 4})
    # a clock that goes on by a millisecond whenever it is read: what is compared does not depend on the machine
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) / 1000)
    found = cost.measure(12, small)
    assert found["pairs"] == 10
    assert all(value > 0 for value in found.values())
    assert found["store_mean_share"] < found["mean_ratio"] > 1
    assert torch.get_num_threads() == threads

    monkeypatch.setattr(cost, "measure", lambda steps: {"pairs": steps - 2})
    assert cost.main(["--steps", "30"]) == 0
    assert json.loads(capsys.readouterr().out) == {"pairs": 28}


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="steps is 2 but must be at least 3"):
        cost.measure(2)
