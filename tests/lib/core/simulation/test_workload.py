"""What a simulation is told: a budget counts in experts, and numbers that mean nothing are refused by name."""

import pytest

from workbench.errors import InputError
from workbench.lib.core.simulation.timeline import Event, Timeline
from workbench.lib.core.simulation.traces import zipf_markov
from workbench.lib.core.simulation.workload import Simulation, Workload

TRACE = zipf_markov(layers=3, experts=8, top_k=2)


@pytest.mark.parametrize(("budget", "capacity"), [(30, 1), (59, 1), (60, 2), (240, 8), (1e9, 8)])
def test_the_budget_holds_as_many_experts_of_each_layer(budget, capacity):
    assert Workload(TRACE, 10, budget).capacity == capacity


def test_a_weight_is_a_product_and_a_sum():
    assert Workload(TRACE, 10, 240).expert_flops == 10
    assert Workload(TRACE, 10, 240, weight_bytes=4).expert_flops == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget_bytes": 29}, r"budget is 29 bytes but must hold one expert of each of 3 layers, 30 bytes"),
        ({"budget_bytes": -1}, r"budget_bytes is -1 but must be a finite number above 0"),
        ({"expert_bytes": 0}, r"expert_bytes is 0 but must be a finite number above 0"),
        ({"weight_bytes": float("nan")}, r"weight_bytes is nan but must be"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        Workload(**{"trace": TRACE, "expert_bytes": 10, "budget_bytes": 100} | change)


def test_a_simulation_is_plain_and_says_what_it_rests_on():
    timeline = Timeline((Event("a", "cpu", 0.0, 1.0),), "simulated, calibrated by x")
    found = Simulation("s", timeline.basis, str(Workload(TRACE, 1e6, 6e6)), [{"policy": "p"}], timeline).to_dict()
    assert found["basis"] == found["timeline"]["basis"] == "simulated, calibrated by x"
    assert "2 of 8 experts of 1 MB, in 0.006 GB (synthetic, Zipf-Markov)" in found["workload"]
    assert Timeline.from_dict(found["timeline"]) == timeline
