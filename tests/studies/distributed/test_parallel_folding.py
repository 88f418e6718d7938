"""The study of parallel folding: its rule says what it says, and its arms choose among their own layouts."""

import json

import pytest

from workbench.catalogue import PACKAGE
from workbench.lib.core.simulation.hardware import Hardware
from workbench.lib.core.simulation.validation import Validation
from workbench.lib.distributed.folding_layouts import MoEConfig
from workbench.lib.distributed.folding_model import Cluster, FoldingModel, drawn
from workbench.studies.distributed.parallel_folding import ARMS, PRESETS, among, chosen, judge, run
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.1, -0.1, 0.2, -0.2)


def judged(gain=4.0, coarse=1.0, relief=0.05, noise=NOISE):
    rows = []
    for arm in ARMS:
        for seed, each in enumerate(noise):
            fine, large, share = 30.0, 45.0, 0.2 + each / 100
            if arm == "folded":
                fine, large, share = fine + gain + each, large + coarse, share - relief - each / 50
            found = {"fine": {"mfu": fine, "dispatch": share}, "coarse": {"mfu": large, "dispatch": share}}
            rows.append(Row(arm, seed, 1, 1, 1, 1, fine, found))
    return judge(Rows(rows), {})


def test_it_reproduces_if_folding_gains_a_point_for_sure_loses_nowhere_and_shortens_the_dispatch():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(4.0) and "Simulated" in result.reason
    json.dumps(result.details, default=str)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"gain": 0.5}, NOT_REPRODUCED),  # for sure less than a point
        ({"coarse": -0.1}, NOT_REPRODUCED),  # slower in a draw
        ({"gain": 1.2, "noise": (1, -1, 1, -1)}, NOT_RESOLVED),
        ({"relief": -0.05}, NOT_RESOLVED),  # gained, and not by the dispatch
        ({"relief": 0.0}, NOT_RESOLVED),
    ],
)
def test_it_does_not_otherwise(change: dict, verdict: str):
    assert judged(**change).verdict == verdict


def test_arms_choose_among_the_layouts_they_are_called_by():
    config, cluster, world = drawn(0)
    found = {arm: list(among(arm, config, cluster, world)) for arm in ARMS}
    assert all(m.etp == m.tp and m.dp % m.ep == 0 and not m.folded for m in found["coupled"])
    assert all(m.folded for arm in ("folded", "free-etp", "free-ep") for m in found[arm])
    assert set(found["free-etp"]) | set(found["free-ep"]) < set(found["folded"])
    assert all(m.dp % m.ep == 0 for m in found["free-etp"]) and any(m.etp != m.tp for m in found["free-etp"])
    assert all(m.etp == m.tp for m in found["free-ep"]) and any(m.dp % m.ep for m in found["free-ep"])
    assert set(found["thumb"]) < set(found["coupled"])
    assert len({m.tp * m.cp * m.pp for m in found["thumb"]}) == 1
    for m in found["thumb"]:
        assert FoldingModel(config, m, cluster).memory() <= cluster.memory_bytes


def test_a_model_that_fits_nowhere_has_no_layout():
    large = MoEConfig("large", layers=64, dim=8192, heads=64, kv_heads=8, hidden=4096, experts=256, top_k=8, batch=64)
    assert all(chosen(arm, large, Cluster.of(Hardware.named("h100-sxm")), 8) is None for arm in ARMS)


def test_a_row_says_what_it_chose():
    settings = {key: value for key, value in PRESETS["smoke"].items() if key != "seeds"}
    row = run("folded", 0, settings)
    assert row.metric == row.extra["fine"]["mfu"] > 0
    assert row.extra["world"] in (32, 64, 128)
    assert row == run("folded", 0, settings)


def test_the_model_was_held_to_steps_that_were_taken():
    record = Validation.read(PACKAGE / "studies" / "distributed" / "measured" / "parallel_folding.json")
    assert record.system == "parallel-folding" and len({row["configuration"] for row in record.rows}) == 8
    assert all(row["predicted"] == pytest.approx(sum(row["parts"].values()), rel=1e-3) for row in record.rows)
    assert 0 < record.median_error <= 0.15  # of the record that is kept, whatever machine reads it
