"""A pyramid on its ranks: groups that differ by layer, experts in slices, and each layer as one process computes it."""

import itertools

import pytest
import torch

from tests.lib.serving import ranks
from workbench.errors import InputError
from workbench.lib.core.budget import count_params
from workbench.lib.core.distributed.processes import run_processes
from workbench.lib.core.experts import ExpertWeights, GLUExperts, expert_outputs
from workbench.lib.core.simulation.fits import LinkModel
from workbench.lib.core.simulation.hardware import Hardware
from workbench.lib.serving.all_to_all import Flat, all_to_all_seconds, messages
from workbench.lib.serving.inference_plan import (
    InferencePlan,
    LayerPlan,
    ServedExperts,
    layer_times,
    serve,
    slice_experts,
    touched_experts,
)

PYRAMID = [2, 4, 8, 16]
MACHINE = Hardware.from_dict(
    {
        "name": "made up",
        "basis": "specified",
        "source": "this test",
        "device": {"flops": 1e12, "memory_bytes": 1e9, "memory_bandwidth": 1e11},
        "node": {"bandwidth": 1e10, "latency_seconds": 1e-5},
        "network": {"bandwidth": 1e9, "latency_seconds": 1e-4},
        "devices_per_node": 4,
    }
)


# -- who has what


def test_groups_are_others_in_each_layer():
    plan = InferencePlan(PYRAMID, world=8, tp=2)
    assert plan.grid.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [(layer.slices, layer.per_rank) for layer in plan.layers] == [(4, 1), (2, 1), (1, 1), (1, 2)]
    assert plan.layers[0].grid.groups("slice") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert plan.layers[1].grid.groups("expert") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [list(plan.layers[3].experts_of(rank)) for rank in (0, 7)] == [[0, 1], [14, 15]]


@pytest.mark.parametrize("layer", [LayerPlan(n, 8) for n in (1, 2, 4, 8, 16, 24)])
def test_every_slice_of_every_expert_is_on_exactly_one_rank(layer: LayerPlan):
    found = [(e, layer.slice_of(rank)) for rank in range(8) for e in layer.experts_of(rank)]
    assert sorted(found) == list(itertools.product(range(layer.n_experts), range(layer.slices)))


def test_a_plan_that_does_not_fit_is_refused_with_what_does():
    with pytest.raises(
        InputError, match=r"experts\[1\] is 6 but must divide the world of 8 ranks \(1, 2, 4, 8\) or be a"
    ):
        InferencePlan([8, 6], world=8)
    with pytest.raises(InputError, match=r"do not fit a world of 8: those that divide it are 1, 2, 4, 8"):
        InferencePlan([8], world=8, tp=3)
    with pytest.raises(InputError, match="slices is 3 but must divide the hidden width of 16"):
        slice_experts(GLUExperts(2, 8, 16), 3, 0)
    with pytest.raises(InputError, match="index is 2 but must be 0 to 1"):
        slice_experts(GLUExperts(2, 8, 16), 2, 2)


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_the_slices_of_an_expert_add_up_to_it(slices: int):
    torch.manual_seed(0)
    bank, x = GLUExperts(3, 8, 16), torch.randn(20, 8)
    parts = [slice_experts(bank, slices, index) for index in range(slices)]
    assert all(isinstance(part, ExpertWeights) and part.down.shape == (3, 8, 16 // slices) for part in parts)
    total = sum(expert_outputs(part, x) for part in parts)
    torch.testing.assert_close(total, expert_outputs(bank, x), atol=1e-6, rtol=1e-5)


# -- on real processes


@pytest.mark.parametrize(("form", "size", "tp"), [("flat", 1, 2), ("hierarchical", 4, 1), ("coordinated", 2, 2)])
def test_served_on_eight_ranks_every_layer_is_what_one_process_computes(form: str, size: int, tp: int):
    plan, x = InferencePlan(PYRAMID, 8, tp), ranks.drawn(300, 8 // tp, 23, ranks.D)
    found = run_processes(serve, 8, ranks.layers(PYRAMID), plan, form, size, x)
    alone, dropped = ranks.layers(PYRAMID), 0
    for rank, (said, sent) in enumerate(found):
        here = x[rank // tp]
        for layer, y in zip(alone, said, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(y, layer(here), atol=1e-12, rtol=1e-10)
                routing = layer.router(here)
            dropped += int((~layer.capacity.kept(routing, training=False)).sum())
        there, back = (len(PYRAMID) * messages(form, 8, size, way) for way in (False, True))
        assert sent.pop("all_reduce") == len(PYRAMID) * 2 * 7  # of the places
        assert sum(sent.values()) == there + back
    assert dropped > 0


@pytest.mark.parametrize("layer", [LayerPlan(n, 8) for n in (2, 8, 16)])
def test_a_rank_has_its_share_of_the_weights(layer: LayerPlan):
    bank = GLUExperts(layer.n_experts, 8, 16)
    parts = [ServedExperts(bank, layer, rank, Flat(None)) for rank in range(8)]
    assert {count_params(part) for part in parts} == {count_params(bank) // 8}
    with pytest.raises(InputError, match=r"bank has 3 experts but the plan is of"):
        ServedExperts(GLUExperts(3, 8, 16), layer, 0, Flat(None))


# -- how long it takes, by the model


def test_touched_experts_are_the_mean_of_draws():
    generator = torch.Generator().manual_seed(0)
    for n, tokens in ((4, 1), (8, 5), (16, 40)):
        draws = torch.randint(n, (4000, tokens), generator=generator)
        seen = torch.stack([(draws == e).any(1) for e in range(n)]).double().sum(0)
        assert touched_experts(n, tokens) == pytest.approx(float(seen.mean()), abs=4 * float(seen.std()) / 4000**0.5)
    assert touched_experts(8, 1) == pytest.approx(1) and touched_experts(8, 1e6) == pytest.approx(8)


def test_a_layer_takes_as_long_as_its_slowest_rank():
    layer, d, h = LayerPlan(8, 8), 64, 256
    even, skewed = (
        layer_times(layer, counts, d, h, MACHINE, "flat") for counts in ([10] * 8, [73, 1, 1, 1, 1, 1, 1, 1])
    )
    block = 3 * d * h
    assert even.experts == pytest.approx(2 * block * 10 / 1e12 + 2 * block / 1e11) and even.touched == 1
    assert skewed.experts == pytest.approx(2 * block * 73 / 1e12 + 2 * block / 1e11)
    near, far = LinkModel(1e-5, 1e-10), LinkModel(1e-4, 1e-9)
    for times, most in ((even, 10), (skewed, 73)):  # places for the fullest expert
        way = all_to_all_seconds("flat", most / 8 * d * 2, 8, 1, near, far, node=4)
        assert times.exchange == pytest.approx(2 * way)
    assert even.total == even.gate + even.exchange + even.experts


def test_an_idle_expert_is_not_read_and_slices_share_the_reading():
    d, h = 64, 256
    few = layer_times(LayerPlan(16, 8), [0, 5] * 8, d, h, MACHINE, "flat")
    all_ = layer_times(LayerPlan(16, 8), [5] * 16, d, h, MACHINE, "flat")
    assert (few.touched, all_.touched) == (1, 2)
    whole = layer_times(LayerPlan(8, 8), 4.0, d, h, MACHINE, "coordinated", 2, 2)
    sliced = layer_times(LayerPlan(4, 8), 4.0, d, h, MACHINE, "coordinated", 2, 2)
    assert sliced.experts < whole.experts * 1.3
    with pytest.raises(InputError, match="counts has 3 numbers but the layer has 8 experts"):
        layer_times(LayerPlan(8, 8), [1, 2, 3], d, h, MACHINE, "flat")


def test_copies_of_tensor_parallelism_are_computed_once_by_the_coordinated_exchange():
    flat = layer_times(LayerPlan(8, 8), [80] * 8, 64, 256, MACHINE, "flat", 1, tp=2)
    once = layer_times(LayerPlan(8, 8), [80] * 8, 64, 256, MACHINE, "coordinated", 2, tp=2)
    read = 2 * 3 * 64 * 256 / 1e11
    assert flat.experts - read == pytest.approx(2 * (once.experts - read))
    assert once.exchange < flat.exchange
