"""The roofline model: its operations are those of the operators, and its bound has the two sides of a roof."""

import pytest

from workbench.kernels.roofline import H100, Cost, Device, moe_costs


def test_the_operations_of_the_expert_layer_are_6_forward_and_12_backward():
    t, d, i, e, k = 4096, 1024, 256, 64, 8
    products = [cost.flops for cost in moe_costs(t, d, i, e, k) if cost.name != "gather-sum"]
    assert sum(products[:2]) == 6 * t * k * d * i and sum(products[2:]) == 12 * t * k * d * i


def test_bytes_of_a_product_count_every_operand_and_result_once():
    down = next(cost for cost in moe_costs(10, 6, 4, 3, 2) if cost.name == "down")
    assert down.bytes == 2 * (20 * 4 + 3 * 6 * 4 + 20 * 6)


@pytest.mark.parametrize(("flops", "bound"), [(10.0, 20.0), (1000.0, 100.0)])
def test_the_bound_is_memory_below_the_ridge_and_arithmetic_above(flops, bound):
    assert Cost("x", flops, 10.0).bound(Device("d", 100.0, 20.0)) == bound
    assert H100.peak / H100.bandwidth == pytest.approx(295, abs=1)
