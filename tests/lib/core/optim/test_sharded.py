"""Two processes that hold the parameters in parts make the steps of one that holds them whole, to the last bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from workbench.catalogue import methods

SCRIPT = Path(__file__).with_name("sharded_steps.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("sharded")
    done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_optimiser_makes_the_steps_of_the_whole(found):
    optimisers = {row.slug for row in methods(family="low_rank", status="ready") if row.kind == "optimiser"}
    assert (
        optimisers | {"galore"} == {name.partition(",")[0] for name in found[0]} and found[0].keys() == found[1].keys()
    )
    for of_process in found:
        assert {name: result["differ"] for name, result in of_process.items() if result["differ"]} == {}


def test_a_matrix_of_one_row_has_a_process_that_holds_none_of_it(found):
    rows = [result["rows_here"] for of_process in found for result in of_process.values()]
    assert set(rows) == {0, 1}


def test_what_is_not_finite_in_one_part_stops_all_of_them(found):
    for of_process in found:
        assert {name for name, result in of_process.items() if not result["refused"]} == set()
