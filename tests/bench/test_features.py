"""The bench of features: contestants that look up the same and move the same rows, and the rows it promises."""

import pytest
import torch

from workbench import bench
from workbench.bench import features
from workbench.bench.core import BOTH, FORWARD
from workbench.bench.features import BAGS, DEEPCTR, LIMIT, OURS, QUICK, Problem, deepctr


@pytest.mark.parametrize("by_hash", [False, True])
def test_contestants_look_up_the_same_and_move_the_same_rows(by_hash):
    problem = Problem(**QUICK, by_hash=by_hash)
    found = {}
    for make in (problem.ours, problem.bags, *([problem.deepctr] if deepctr() else [])):
        tables, step = make(BOTH)
        assert torch.equal(make(FORWARD)[1](), problem.ours(FORWARD)[1]())
        first = step()
        found[make.__name__] = [first, *(table.detach().clone() for table in tables), step()]
    ours = found.pop("ours")
    for name, theirs in found.items():
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, msg=name)
    assert not torch.equal(ours[0], ours[-1])


def test_a_quick_run_gives_the_rows(home):
    result = bench.run("features", threads=(1,), repeats=1, quick=True)
    looked = [OURS, BAGS, *([DEEPCTR] if deepctr() else [])]
    cases = [f"8 rows x 3 fields x 4, {how}" for how in ("ids", "hashed")]
    wanted = [(case, direction, name) for case in cases for direction in (FORWARD, BOTH) for name in looked]
    wanted += [(f"cross {kind}, 8 rows x 12", d, OURS) for kind in ("full", "low_rank") for d in (FORWARD, BOTH)]
    assert [(row["case"], row["direction"], row["implementation"]) for row in result["rows"]] == wanted
    assert all(row["median_s"] > 0 and row["ratio_to_limit"] > 0 for row in result["rows"])
    assert result["peers"] == [{"peer": DEEPCTR, "there": deepctr() is not None}]
    assert result["busy"][0]["cores"] >= 1


def test_the_limit_of_a_cross_are_its_products():
    made = features._crosses(8, 12, "low_rank", BOTH)
    assert [part.shape for part in made[LIMIT]()] == [(8, 12), (12, 12), (12, 12)]
    assert [part.shape for part in made[OURS]()] == [(8, 12), (12,), (12, 12), (12, 12)]
