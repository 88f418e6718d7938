"""The study of the unified embedding: budgets, and its rule on rows made by hand."""

import json

import pytest
import torch

from workbench.studies.features.unified_embedding import CONTROLS, PRESETS, SHARES, SMALL_ARMS, build, judge
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

AUC = {"none": 0.85, "multiplexed@0.5": 0.84, "per_feature@0.5": 0.83, "multiplexed@0.1": 0.83}
AUC |= {"per_feature@0.1": 0.79, "multiplexed@0.03": 0.8, "per_feature@0.03": 0.7} | dict.fromkeys(CONTROLS, 0.78)


def judged(changes=None, spread=0.001, seeds=8):
    draw = torch.Generator().manual_seed(0)
    extra = {"table_bytes": 1, "collisions": {"intra": 0.1, "inter": 0.1}, "row_norm": 1.0, "angle": 80.0}
    rows = Rows(
        Row(arm, seed, 1, 1, 1, 1, value + spread * float(torch.randn((), generator=draw)), extra)
        for arm, value in (AUC | (changes or {})).items()
        for seed in range(seeds)
    )
    return judge(rows, {})


def test_reproduced_if_one_table_is_better_at_all_sizes_and_the_gain_grows():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(0.04, abs=0.003)
    json.dumps(result.details)


@pytest.mark.parametrize("change", [{"per_feature@0.5": 0.86}, {"per_feature@0.03": 0.795}])
def test_not_reproduced_if_it_is_worse_or_the_gain_falls(change):
    assert judged(change).verdict == NOT_REPRODUCED


def test_not_resolved_in_between():
    assert judged({"per_feature@0.5": 0.84}).verdict == NOT_RESOLVED
    assert judged(spread=0.5).verdict == NOT_RESOLVED


def test_arms_have_the_tables_that_they_say_and_the_same_network_behind():
    sizes = (400, 30, 12, 3)
    made = {arm: build(arm, sizes, 0, PRESETS["small"]) for arm in SMALL_ARMS + CONTROLS}
    tables = {arm: getattr(m.embedding, "embedding", m.embedding).table for arm, m in made.items()}
    assert len(tables["none"]) == sum(sizes)
    for share in SHARES:
        assert len({len(table) for arm, table in tables.items() if f"@{share:g}" in arm}) == 1
        assert len(tables[f"multiplexed@{share:g}"]) == round(share * sum(sizes))
    behind = {sum(p.numel() for p in m.cross.parameters()) for arm, m in made.items() if arm not in CONTROLS}
    assert len(behind) == 1
