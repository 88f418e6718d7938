"""The measurement that D2MoE's simulator is held to: what it runs and keeps, not what the errors are."""

import json

from workbench.bench.serving import d2moe
from workbench.lib.serving.d2moe_orders import PlaneCosts
from workbench.lib.serving.d2moe_schedule import POLICIES


def test_configurations_are_run_for_real_and_keep_to_their_budgets():
    record = d2moe.measure(quick=True)
    assert len(record.rows) == len(d2moe.CONFIGURATIONS) >= 4
    assert {policy for policy, _ in d2moe.CONFIGURATIONS} == set(POLICIES)
    costs = PlaneCosts.from_dict(json.loads(json.dumps(record.calibration["costs"])), record.label)
    whole = d2moe.LAYERS * d2moe.EXPERTS * costs.sizes[8]
    for row, (_, share) in zip(record.rows, d2moe.CONFIGURATIONS, strict=True):
        assert row["predicted"] > 0 and row["measured"] > 0 and row["peak_bytes"] <= share * whole
