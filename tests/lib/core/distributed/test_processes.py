"""Functions on real gloo processes: what they return, who failed, and that none is left."""

import math
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.lib.core.distributed import ranks
from tests.processes import below, running
from workbench.errors import InputError
from workbench.lib.core.distributed.processes import RankError, run_processes


def test_each_rank_returns_what_it_has_and_is_told_what_the_caller_is(monkeypatch: pytest.MonkeyPatch):
    for told, world in (("once", 1), ("again", 3)):  # the server has started by then, with other words
        monkeypatch.setenv("TOLD", told)
        found = run_processes(ranks.whole, world, torch.tensor([1.0, 2.0]))
        assert [row["rank"] for row in found] == list(range(world))
        assert {(row["world"], row["threads"], row["told"]) for row in found} == {(world, 1, told)}
        assert all(torch.equal(row["total"], world * torch.tensor([1.0, 2.0])) for row in found)
        pids = {row["pid"] for row in found}
        assert len(pids) == world and os.getpid() not in pids and not any(map(running, pids))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "ValueError: a number that is none"),
        ("killed", "was ended by SIGKILL without a word"),
        ("leaves", "exited with 3 without a word"),
        ("cannot be pickled", "pickle"),
    ],
)
def test_a_rank_that_fails_ends_all_and_is_named(how: str, said: str):
    run_processes(ranks.whole, 1, torch.ones(1))
    before = below(os.getpid())
    with pytest.raises(RankError, match=r"^rank 1 of 3 ") as error:
        run_processes(ranks.fails, 3, 1, how, timeout=30)
    assert error.value.rank == 1 and said in str(error.value)
    assert below(os.getpid()) == before


def test_a_rank_that_is_stopped_is_ended_in_time():
    run_processes(ranks.whole, 1, torch.ones(1))
    before, began = below(os.getpid()), time.monotonic()
    with pytest.raises(RankError, match="did not end within 1 seconds"):
        run_processes(ranks.fails, 2, 1, "stops", timeout=1)
    assert time.monotonic() - began < 60 and below(os.getpid()) == before


def test_the_error_can_be_handed_on_by_another_process():
    error = pickle.loads(pickle.dumps(RankError(2, "rank 2 of 3 raised")))
    assert error.rank == 2 and str(error) == "rank 2 of 3 raised"


@pytest.mark.parametrize("how", ["sleeps", "late"])
def test_a_rank_that_never_arrives_is_named_with_the_place_where_it_is(how: str):
    run_processes(ranks.whole, 1, torch.ones(1))
    before, began = below(os.getpid()), time.monotonic()
    with pytest.raises(RankError, match="did not end within 1 seconds") as error:
        run_processes(ranks.fails, 2, 1, how, timeout=1)
    assert time.monotonic() - began < 60
    first, _, rest = str(error.value).partition("rank 1 is at\n")
    assert error.value.rank == 1 and first.startswith("ranks 0, 1 of 2") and "ranks.py" in rest.splitlines()[0]
    assert "rank 0 waits in" in rest and below(os.getpid()) == before


@pytest.mark.parametrize("world", [0, -1, 65, True])
def test_a_world_that_is_none_is_refused(world):
    with pytest.raises(InputError, match=r"world is .* but must be a whole number of processes, 1 to 64"):
        run_processes(ranks.whole, world, torch.ones(1))


@pytest.mark.parametrize("timeout", [0, -1, math.inf, math.nan, 1e9])
def test_a_time_limit_that_is_none_is_refused(timeout):
    with pytest.raises(InputError, match="timeout is"):
        run_processes(ranks.whole, 1, torch.ones(1), timeout=timeout)


def test_a_function_that_no_other_process_can_import_is_refused():
    with pytest.raises(InputError, match="must be picklable"):
        run_processes(lambda: 1, 2)
    local = type("local", (), {"__module__": "__main__", "__name__": "local", "__call__": lambda self: 1})()
    with pytest.raises(InputError, match="is of __main__"):
        run_processes(local, 2)


def test_a_script_that_is_not_guarded_runs_once(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from tests.lib.core.distributed import ranks\n"
        "from workbench.lib.core.distributed.processes import run_processes\n"
        "print('begun', len(run_processes(ranks.whole, 2, torch.ones(1))))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "begun 2\n"), done.stderr
