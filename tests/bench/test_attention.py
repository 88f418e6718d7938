"""The attention bench: its contestants do the same problem, and its rows have their form."""

import json

import pytest
import torch

from workbench.bench import attention
from workbench.bench.core import BOTH, FORWARD, LIMIT, OURS, timed


@pytest.mark.parametrize("direction", [FORWARD, BOTH])
def test_contestants_run(direction):
    made = attention.contestants(256, 32, direction)
    assert set(made) == {OURS, attention.SDPA, LIMIT}
    for once in made.values():
        once()


def test_rows_name_the_peer_and_the_limit():
    rows = [row for rows in timed([attention.case(128, 16)], threads=(1,), repeats=1) for row in rows]
    assert len(rows) == 4
    ours = [row for row in rows if row["implementation"] == OURS]
    assert [row["direction"] for row in ours] == [FORWARD, BOTH]
    for row in ours:
        assert row["ratio_to_limit"] > 0 and row["speedup_over"][attention.SDPA] > 0
        assert row["case"] == "T=128 H=8 d=64 block=16 top_k=8" and row["threads"] == 1
    json.dumps(rows)


def test_the_default_set_has_the_shapes_that_are_promised():
    shapes = {(tokens, block): directions for tokens, block, directions in attention.SHAPES}
    assert shapes[8192, 64] == shapes[8192, 128] == (FORWARD, BOTH)
    assert {tokens for tokens, _ in shapes} == {2048, 4096, 8192, 16384, 32768}


def test_the_bound_has_the_operations_of_the_visited_blocks(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: calls.append(2 * a.shape[0] * a.shape[1] * b.shape[1]))
    attention.bound(4096, 64, both=False)()
    blocks = sum(min(8, block + 1) for block in range(64))
    assert sum(calls) == 4 * attention.HEADS * 64 * blocks * 64 * attention.WIDTH
