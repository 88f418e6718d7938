"""The cost of training together: what is measured is what it is called, and what must hold holds."""

import pytest
import torch

from workbench.lib.core.adapt.expert_ffn import RoutedFeedForward
from workbench.studies.lora_experts.multi_adapter_cost import (
    SMOKE,
    Alone,
    flops,
    make_base,
    make_jobs,
    measure,
    peak_bytes,
    separate_blocks,
    table,
)


@pytest.mark.study
def test_mixlora_jobs_together_have_the_same_losses_in_less_memory_than_processes():
    rows = measure(SMOKE)
    assert [row["jobs"] for row in rows] == [1, 2]
    for row in rows:
        assert row["loss_gap"] <= 1e-5
        assert row["time_ratio"] == pytest.approx(row["ms_together"] / row["ms_apart"]) and row["ms_apart"] > 0
        assert row["gflop_together"] <= row["gflop_apart"] < row["gflop_separate_blocks"]
        assert row["memory_ratio"] == pytest.approx(row["mb_together"] / row["mb_processes"])
    one, two = rows
    assert two["memory_ratio"] < one["memory_ratio"] and two["mb_one"] == pytest.approx(one["mb_one"], rel=0.05)
    assert two["gflop_apart"] == pytest.approx(2 * one["gflop_apart"])
    assert len(table(rows).splitlines()) == len(one)


def test_mixlora_peak_is_of_what_is_alive_at_once():
    def call():
        a = torch.zeros(250_000)
        b = a + 1
        del a
        return (b * 2).sum()

    assert peak_bytes(call) == pytest.approx(2e6, rel=0.01)


def test_mixlora_separate_blocks_are_the_same_function_at_more_operations():
    base, jobs = make_base(SMOKE), make_jobs(1, SMOKE)
    one = Alone(base, jobs["job 0"])
    for p in one.adapted.parameters():
        torch.nn.init.normal_(p, std=0.2)
    layer = next(layer for layer in one.adapted.layers.values() if isinstance(layer, RoutedFeedForward))
    x = torch.randn(5, 7, 32)
    shared = layer(x)
    shared_cost = flops(lambda: layer(x))
    separate_blocks(one.adapted)
    torch.testing.assert_close(layer(x), shared, atol=1e-5, rtol=1e-5)
    # (3 K - 3) D H products a token more, K = 2: the two input layers and the output layer once for each expert
    assert flops(lambda: layer(x)) - shared_cost == 2 * 35 * (3 * 2 - 3) * 32 * 64
