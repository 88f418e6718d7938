"""The study of BossNAS: its rule says what it says, its arms rate what they should, and the method can be watched."""

import json

import numpy as np
import pytest
import torch

from workbench.beds.architectures import TABLE, table
from workbench.errors import InputError
from workbench.lib.core.observe import announcing
from workbench.lib.measures.ranks import spearman
from workbench.live.arm import Arm
from workbench.studies.core import load_study
from workbench.studies.rows import Row, Rows
from workbench.studies.search.bossnas import PRESETS, SharedNet, correlations, judge, over_architectures, run
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

REACHED = np.array([truth.accuracy for truth in table()])
NOISE = {"bossnas": 0.02, "per_path": 0.3, "uncalibrated": 0.3, "supervised": 0.05}


def judged(seeds: int = 6, **noise: float):
    generator, rows = np.random.default_rng(0), []
    for arm, spread in (NOISE | noise).items():
        for seed in range(seeds):
            sign = -1 if spread < 0 else 1
            scores = (sign * REACHED + abs(spread) * generator.normal(size=len(REACHED))).tolist()
            rows.append(Row(arm, seed, 1, 1, 1, 1, spearman(scores, REACHED), {"scores": scores}))
    return judge(Rows(rows), {})


def test_reproduced_if_all_is_as_claimed():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect > 0.3
    json.dumps(result.details["correlations"])
    assert result.details["correlations"]["bossnas"]["partial"] > 0.5


@pytest.mark.parametrize(
    "noise", [{"bossnas": 0.5}, {"bossnas": -0.02}, {"bossnas": 0.06, "per_path": 0.005}, {"per_path": 0.001}]
)
def test_not_reproduced_if_one_part_is_the_other_way(noise: dict[str, float]):
    assert judged(**noise).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("noise", [{"per_path": 0.021}, {"bossnas": 0.11, "per_path": 0.4}])
def test_not_resolved_in_between(noise: dict[str, float]):
    assert judged(**noise).verdict == NOT_RESOLVED


def test_the_interval_over_architectures_is_around_the_mean_over_seeds():
    generator = np.random.default_rng(1)
    mine, other = (
        [(REACHED + spread * generator.normal(size=len(REACHED))).tolist() for _ in range(3)] for spread in (0.05, 0.3)
    )
    found = over_architectures(mine, other, table())
    expected = [np.mean([spearman(one, REACHED) for one in of]) for of in (mine, other)]
    assert found.estimate == pytest.approx(expected[0] - expected[1]) and found.n == 36
    assert found.low < found.estimate < found.high
    assert over_architectures([[1.0] * 36], None, table()).estimate == 0  # what ranks nothing


def test_twelve_of_the_table_have_about_as_many_parameters():
    params = [float(truth.params) for truth in table()]
    alike = [truth.params for truth in table() if truth.alike]
    assert max(alike) / min(alike) < 1.11 and len(alike) == 12
    assert correlations([params], table())["spearman"] == spearman(params, REACHED)
    assert len(table()) == 36 == len({truth.arch for truth in table()})
    assert json.loads(TABLE.read_text())["made"]["seeds"] == 3 == len(table()[0].accuracies)


@pytest.mark.parametrize("arm", ["bossnas", "supervised"])  # all run at smoke, see test_studies
def test_a_row_rates_the_table(arm: str):
    row = run(arm, 0, PRESETS["smoke"])
    assert len(row.extra["scores"]) == 36 and row.metric == pytest.approx(spearman(row.extra["scores"], REACHED))
    assert row.steps == 9 and row.flops > 0
    if arm != "supervised":
        assert [len(each) for each in row.extra["ratings"]] == [16, 16, 4]


def test_the_supernet_with_labels_takes_the_paths_it_is_told():
    torch.manual_seed(0)
    net, x = SharedNet(), torch.randn(4, 40)
    paths = [(0, 1, 2, 3, 0), (3, 3, 3, 3, 3)]
    two = net(x, None, paths)
    assert two.shape == (4, 2, 10)
    torch.testing.assert_close(two[:, 1], net(x, None, paths[1:])[:, 0])


def test_the_method_can_be_watched():
    assert Arm("bossnas", preset="smoke").arm == "bossnas" == load_study("bossnas").main_arm(PRESETS["smoke"])
    assert not announcing(SharedNet())
    with pytest.raises(InputError, match="none"):
        Arm("bossnas", "none", "smoke")
