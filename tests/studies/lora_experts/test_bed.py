"""The test-bed of the low-rank mixtures: its base is frozen and kept, and its rows say what was trained."""

import pytest
import torch

from workbench.studies.lora_experts import bed


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))


@pytest.mark.study
def test_an_arm_trains_its_adapters_on_the_new_maps_alone_and_the_same_each_time():
    base = {name: value.clone() for name, value in bed.base(bed.SMOKE).state_dict().items()}
    rows = []
    for _ in range(2):
        adapted, state = bed.adapt_and_train("lora", {"rank": 2}, bed.SMOKE, seed=3)
        rows.append(bed.row("lora", 3, adapted, state))
        assert all(torch.equal(value, base[name]) for name, value in adapted.remove().state_dict().items())
    assert rows[0] == rows[1]
    row = rows[0]
    assert row.steps == 8 and row.flops > 0 and len(row.extra["by_task"]) == bed.NEW
    assert row.extra["trained"] == 2 * 2 * (48 + 192 + 96 + 48) and row.extra["worst"] == min(row.extra["by_task"])
