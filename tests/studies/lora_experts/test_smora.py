"""The study of SMoRA: it runs, its arms match, and its rule says what it says."""

import json

import pytest

from workbench.beds import symbol_maps as bed
from workbench.lib.core.adapt import adapt
from workbench.studies.lora_experts.smora import ARMS, BLOCKS, judge
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.02, -0.01, 0.01)
ACCURACY = {
    "lora-active": 0.4,
    "lora-total": 0.8,
    "loras-softmax": 0.6,
    "b=4": 0.6,
    "b=2": 0.7,
    "b=1": 0.8,
    "b=1, whole router": 0.85,
}


def judged(seeds=4, noise=None, **accuracy):
    accuracy = ACCURACY | {name.replace("b", "b=").replace("lora_", "lora-"): v for name, v in accuracy.items()}
    rows = []
    for i, (arm, value) in enumerate(accuracy.items()):
        for seed in range(seeds):
            own = (noise or {}).get(arm, [0.05 * i * part for part in NOISE])[seed]
            extra = {"worst": value - 0.1} | ({} if arm.startswith("lora-") else {"overlap": [0.5, 0.7]})
            rows.append(Row(arm, seed, 1, 1, 1, 1, value + NOISE[seed] + own, extra))
    return judge(Rows(rows), {})


def test_smora_study_reproduces_if_finer_is_better_and_beats_the_active_rank():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(0.2, abs=0.01)
    assert list(result.details["halvings"]) == ["b=2 minus b=4", "b=1 minus b=2"]
    assert result.details["overlap"]["b=1"] == pytest.approx(0.6)
    json.dumps(result.details)
    assert judged(lora_total=0.99).verdict == REPRODUCED  # reported, not judged


@pytest.mark.parametrize("accuracy", [{"b4": 0.9}, {"b2": 0.9}, {"lora_active": 0.9}])
def test_smora_study_does_not_reproduce_if_an_interval_is_below_zero(accuracy):
    assert judged(**accuracy).verdict == NOT_REPRODUCED


def test_smora_study_resolves_nothing_if_an_interval_includes_zero():
    assert judged(noise={"b=1": (0.3, -0.3, 0.3, -0.3)}).verdict == NOT_RESOLVED
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_smora_study_compares_equal_ranks_and_nearly_equal_routers():
    sizes = {}
    for arm, (slug, options) in ARMS.items():
        layers = adapt(bed.make_model(), slug, bed.TARGETS, **options).layers.values()
        if slug == "smora":
            assert all(layer.n_experts * layer.experts.rank == 16 for layer in layers)
            assert all(layer.top_k * layer.experts.rank == 4 for layer in layers)
            assert all(layer.experts.scale.unique().tolist() == [1.0] for layer in layers)
        sizes[arm] = sum(p.numel() for layer in layers for p in layer.parameters() if p.requires_grad)
    blocks = [sizes[f"b={b}"] for b in BLOCKS]
    assert max(blocks) < 1.03 * min(blocks)


@pytest.mark.study
def test_smora_study_rows_say_what_their_arms_did(smoke):
    rows = {row.arm: row for row in smoke("smora").rows}
    assert "overlap" not in rows["lora-total"].extra
    for arm in ("b=4", "b=1"):
        extra = rows[arm].extra
        assert all(0 <= value <= 1 + 1e-9 for value in extra["overlap"] + extra["load_entropy"])
        assert all(sum(shares) == pytest.approx(1) for shares in extra["load_by_task"])
    assert len(rows["b=1"].extra["load_by_task"][0]) == 16
