"""The measurement that HybriMoE's simulator is held to: what it runs and keeps, not what the errors are."""

import json
import math

import pytest
import torch

from workbench.bench.serving import hybrimoe as bench
from workbench.lib.core.simulation.validation import Validation
from workbench.lib.serving.hybrid_schedule import CostModel, Rate


def test_a_quick_run_predicts_and_measures_every_policy():
    before = torch.get_num_threads()
    record = bench.measure(quick=True)
    assert [row["policy"] for row in record.rows] == [*bench.POLICIES] and record.unit == "ms"
    for row in record.rows:
        assert min(row["predicted"], row["measured"]) > 0
        assert 0 <= row["hit_rate_predicted"] <= 1 and 0 <= row["hit_rate_measured"] <= 1
        if row["policy"] != "hybrimoe":  # nothing is fetched, so nothing depends on the clock
            assert row["hit_rate_measured"] == row["hit_rate_predicted"]
    found = record.calibration
    cost = CostModel(*(Rate(**found["cost"][name]) for name in ("cpu", "device")), found["cost"]["transfer"])
    assert found["one_thread"] == found["cost"]["device"] and cost.cpu.seconds([1]) > 0
    weights = 4 * 3 * bench.QUICK.width * bench.QUICK.hidden
    assert cost.transfer >= weights / bench.QUICK.bandwidth * (1 - 1e-3)
    assert found["copy"] > 0 and math.isfinite(found["pair_speedup"])
    assert Validation.from_dict(json.loads(json.dumps(record.to_dict()))).rows == record.rows
    assert torch.get_num_threads() == before


def test_what_goes_on_beside_ends_with_the_block():
    done = []
    with pytest.raises(KeyError), bench.beside(lambda: done.append(0)):
        while not done:
            pass
        raise KeyError
    count = len(done)
    assert count and len(done) == count
