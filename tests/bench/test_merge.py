"""The bench of merges: equal results from every contestant, the rows it promises, and a meter of memory."""

import subprocess
import sys

import pytest
import torch

from workbench import bench
from workbench.bench import merge


def test_contestants_compute_the_same():
    problem = merge.Problem(2000)
    for name in merge.MERGES:
        calls = problem.contestants(name)
        ours = calls["workbench"]()
        assert set(problem.absent(name)) | set(calls) >= {"workbench"}
        for peer, call in calls.items():
            if peer not in ("limit", "workbench"):
                close = torch.isclose(ours, call(), atol=1e-5)
                # fusion_bench keeps an entry more of each model, PCB may be off where a score is at the limit
                assert int((~close).sum()) <= (merge.MODELS if peer.startswith("fusion") or name == "pcb" else 0)


def test_a_peer_that_is_absent_is_said(monkeypatch):
    def none(tau):
        raise ImportError("No module named 'peft'")

    monkeypatch.setattr(merge, "_peft", none)
    problem = merge.Problem(100)
    assert "peft/ties" not in problem.contestants("ties")
    assert problem.absent("ties")["peft/ties"] == "not installed: No module named 'peft'"
    monkeypatch.setattr(merge, "_available", lambda: 2**10)
    assert list(problem.contestants("ties")) == ["workbench"]
    assert "0.0 GiB of memory are available" in problem.absent("ties")["peft/ties"]


def test_a_quick_run_gives_the_rows(home, monkeypatch):
    monkeypatch.setattr(merge, "QUICK", (1000,))
    result = bench.run("merge", threads=(1,), repeats=1, quick=True)
    rows = {(row["case"], row["implementation"]): row for row in result["rows"]}
    assert ("ties n=8 P=1000", "workbench") in rows and ("pcb n=8 P=1000", "tensor form") in rows
    assert rows["average n=8 P=1000", "workbench"]["ratio_to_limit"] > 0
    assert rows["ties n=8 P=1000", "workbench"]["ratio_to_limit"] is None
    for row in result["left_out"]:
        assert set(row) == {"case", "implementation", "reason"}


GARBAGE = """
import ctypes, gc, torch
from workbench.kernels.memory import peak_bytes

SIZE = 64 * 2**20
gc.disable()

def call():
    gc.collect()
    torch.ones(SIZE, dtype=torch.uint8)

cycle = [torch.ones(2 * SIZE, dtype=torch.uint8)]
cycle.append(cycle)
del cycle
print(peak_bytes(call))  # beside garbage that is collected in the call
library = ctypes.CDLL(None)
if hasattr(library, "mallopt"):
    library.mallopt(-4, 0), library.mallopt(-1, 2**30)  # all of the heap, and nothing of it given back
torch.ones(2 * SIZE, dtype=torch.uint8)
print(peak_bytes(call))  # and beside memory that the C library keeps
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system keeps no such number")
def test_the_peak_of_memory_is_that_of_the_call_whatever_was_there_before():
    said = subprocess.run([sys.executable, "-c", GARBAGE], capture_output=True, text=True, check=True, timeout=300)
    for found in said.stdout.split():
        assert found == "None" or 0.9 < int(found) / (64 * 2**20) < 1.5
