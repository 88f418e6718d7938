"""The model of a step: parameters as ranks hold them, bytes as they send them, and the fastest layout chosen."""

import math
from dataclasses import replace

import pytest
import torch

from tests.lib.distributed import folding_ranks as ranks
from workbench.errors import InputError
from workbench.lib.core.simulation.fits import LinkModel
from workbench.lib.core.simulation.hardware import Hardware
from workbench.lib.distributed.folding_layouts import Layout, MoEConfig, layouts
from workbench.lib.distributed.folding_model import Cluster, FoldingModel, Roofline, best, drawn, fastest
from workbench.lib.distributed.parallel_folding import _cut

SMALL = MoEConfig(
    "small",
    layers=1,
    dim=ranks.D,
    heads=ranks.HEADS,
    kv_heads=ranks.HEADS,
    hidden=ranks.HIDDEN,
    experts=ranks.E,
    top_k=2,
    vocab=ranks.VOCAB,
    time=ranks.TIME,
    batch=ranks.ROWS,
    width=8,
    split_vocab=False,
)
FINE = MoEConfig("fine", layers=8, dim=2048, heads=16, kv_heads=8, hidden=1024, experts=32, top_k=4, batch=64)
H100 = Cluster.of(Hardware.named("h100-sxm"))
LAYOUTS = [Layout.fitted(8, *sizes) for sizes in ((2, 2, 1, 1, 8), (2, 1, 1, 2, 2), (1, 1, 1, 1, 4), (2, 4, 1, 2, 4))]


class Free:
    """Work that takes no time."""

    def attention(self, config, layout):
        return 0.0

    def experts(self, config, layout, pairs):
        return 0.0

    def ends(self, config, layout):
        return 0.0

    def update(self, states):
        return 0.0


def counting(per_node: int = 8) -> Cluster:
    """A cluster on which a byte takes a second and all else nothing, so that seconds are bytes that a rank sends."""
    link = LinkModel(0.0, 1.0)
    return Cluster("bytes", Free(), link, link, per_node, math.inf, 1.0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_parameters_of_a_rank_are_those_that_it_holds(layout: Layout):
    whole = dict(ranks.whole(torch.float64).named_parameters())
    at = {"tp": 0, "etp": 0, "ep": 0}
    held = sum(_cut(name)(p, layout, at).numel() for name, p in whole.items())
    besides = whole["position"].numel() + whole["norm.weight"].numel()  # that the model does not know
    assert sum(FoldingModel(SMALL, layout, counting()).held().values()) == held - besides
    assert SMALL.params == sum(p.numel() for p in whole.values()) - besides


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bytes_of_a_step_are_those_that_are_counted_on_the_wire(layout: Layout):
    """By the formulas that tests of the folded model hold real processes to, for loads that are all the same."""
    m, row, rows = layout, 8 * ranks.D, ranks.ROWS * ranks.TIME
    parts = FoldingModel(SMALL, layout, counting()).step().parts
    total = {name: seconds * m.world for name, seconds in parts.items()}
    assert total["tp"] == pytest.approx(4 * row * rows * (m.tp - 1))
    assert total["cp"] == pytest.approx(4 * row * rows * (m.cp - 1))
    assert total["etp"] == pytest.approx(4 * row * rows * 2 * (m.etp - 1))
    away = rows * 2 * (m.ep - 1) / m.ep
    counts = 8 * ranks.E * (m.ep - 1) / m.ep * m.world * ranks.ROWS / m.dp
    assert total["ep"] == pytest.approx(4 * row * away + counts)
    gradients = FoldingModel(SMALL, layout, counting()).held()
    copies = {"cp dp": m.cp * m.dp, "edp": m.edp, "all": 8}
    ring = sum((4 + 8) * n * (copies[kind] - 1) / copies[kind] for kind, n in gradients.items())
    assert parts["gradients"] == pytest.approx(ring)


def test_one_rank_computes_and_sends_nothing():
    config = replace(FINE, layers=2, experts=4)
    report = FoldingModel(config, Layout.fitted(1, 1, 1, 1, 1, 1), H100).step()
    assert {name for name, seconds in report.parts.items() if seconds} == {"attention", "experts", "ends", "update"}
    assert 0.2 < report.mfu < 0.75  # below the efficiency of products, by what memory takes


def test_a_product_is_bound_by_the_peak_or_by_memory():
    device = Hardware.named("h100-sxm").device
    roofline = Roofline(device, 0.5)
    assert roofline.product(1e5, 8192, 8192, 2) == pytest.approx(2 * 1e5 * 8192**2 / (device.flops * 0.5))
    assert roofline.product(1, 8192, 8192, 2) == pytest.approx(2 * (8192**2 + 16384) / device.memory_bandwidth)


def test_a_group_across_nodes_goes_through_the_network():
    node, network = LinkModel(0.0, 1.0), LinkModel(0.0, 10.0)
    cluster = Cluster("links", Free(), node, network, 4, math.inf, 1.0)
    assert cluster.exchange(8.0, ((1, 4),)) == 6.0  # three of four parts stay in the node
    assert cluster.exchange(8.0, ((1, 8),)) == 40.0  # four of eight parts leave it, three do not
    assert cluster.exchange(8.0, ((4, 8),)) == 70.0  # each rank in a node of its own
    assert cluster.gather(8.0, ((1, 4),)) == 6.0
    assert cluster.gather(8.0, ((1, 8),)) == pytest.approx(7 * 2.5)  # four links leave the node side by side
    assert cluster.gather(8.0, ((4, 8),)) == 70.0
    assert cluster.gather(8.0, ((4, 1),)) == cluster.exchange(8.0, ((4, 1),)) == 0.0


def test_stages_wait_for_each_other_as_1f1b_does():
    config = replace(FINE, batch=16)
    for pp in (2, 4, 8):
        layout = Layout.fitted(8, 1, 1, pp, 1, 1)
        parts = FoldingModel(config, layout, H100).step().parts
        busy = sum(parts[name] for name in parts if name not in ("bubble", "gradients", "update"))
        micro = 16 // layout.dp
        assert parts["bubble"] / (busy + parts["bubble"]) == pytest.approx((pp - 1) / (micro + pp - 1))


def test_the_rank_with_most_pairs_is_waited_for():
    loads = (0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05)
    config = replace(FINE, experts=8, loads=loads)
    hottest = {ep: FoldingModel(config, Layout.fitted(8, 1, 1, 1, 1, ep), H100).hottest for ep in (1, 2, 4, 8)}
    assert hottest == pytest.approx({1: 1.0, 2: 1.6, 4: 2.4, 8: 3.2})
    even, uneven = (FoldingModel(each, LAYOUTS[0], H100).step() for each in (replace(config, loads=None), config))
    assert uneven.parts["experts"] > even.parts["experts"] and uneven.parts["tp"] == even.parts["tp"]


def test_layouts_are_all_that_fit_and_those_before_folding_are_bound():
    config = replace(FINE, layers=4, batch=8, experts=8)
    found = list(layouts(config, 8))
    assert len(set(found)) == len(found) and all(m.world == 8 == m.etp * m.ep * m.edp * m.pp for m in found)
    by_hand = set()
    for pp in (1, 2, 4):
        for tp in (1, 2, 4, 8):
            for cp in (1, 2, 4, 8):
                for etp in (1, 2, 4, 8):
                    for ep in (1, 2, 4, 8):
                        if 8 // pp % (tp * cp) == 0 and 8 // pp % (etp * ep) == 0:
                            by_hand.add(Layout.fitted(8, tp, cp, pp, etp, ep, 8))
    assert set(found) == by_hand
    before = list(layouts(config, 8, folded=False))
    assert before and all(m.etp == m.tp and m.dp % m.ep == 0 and not m.folded for m in before)
    assert {replace(m, folded=True) for m in before} < by_hand
    assert {(m.tp, m.cp, m.pp, m.ep) for m in before} == {
        (m.tp, m.cp, m.pp, m.ep) for m in by_hand if m.etp == m.tp and m.dp % m.ep == 0
    }


def test_the_fastest_that_memory_allows_is_chosen():
    reports = [FoldingModel(FINE, layout, H100).step() for layout in layouts(FINE, 16)]
    free = best(FINE, replace(H100, memory_bytes=math.inf), 16)
    assert free.seconds == min(report.seconds for report in reports)
    bound = sorted(report.memory_bytes for report in reports)[len(reports) // 4]
    tight = best(FINE, replace(H100, memory_bytes=bound), 16)
    assert tight.memory_bytes <= bound < free.memory_bytes and tight.seconds > free.seconds
    assert tight.seconds == min(report.seconds for report in reports if report.memory_bytes <= bound)


def test_memory_is_split_as_the_layout_says():
    def memory(*sizes: int) -> float:
        return FoldingModel(FINE, Layout.fitted(16, *sizes), H100).memory()

    assert memory(1, 1, 1, 1, 8) < memory(1, 1, 1, 1, 4) < memory(1, 1, 1, 1, 1)
    assert memory(2, 1, 1, 1, 8) < memory(1, 1, 1, 1, 8)
    model = FoldingModel(FINE, Layout.fitted(16, 1, 1, 1, 1, 8), H100)
    experts = 8 * 4 * FINE.expert_params
    assert model.held()["edp"] == experts
    dense = model.held()["cp dp"] * (6 + 12 / 16) + model.held()["all"] * (6 + 12 / 16)
    assert model.memory() == pytest.approx(experts * (6 + 12 / 2) + dense + model.activations())


def test_draws_are_those_of_their_seed():
    assert drawn(3) == drawn(3) and drawn(3, "coarse") == drawn(3, "coarse")
    (a, cluster, world), (b, same, size) = drawn(3, "fine"), drawn(3, "coarse")
    assert cluster == same and world == size and a.experts == 64 and b.experts == 8
    assert len({drawn(seed)[1].peak_flops for seed in range(5)}) == 5
    assert cluster.basis.startswith("simulated, calibrated by h100-sxm with drawn constants")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: replace(FINE, layers=0), "layers is 0"),
        (lambda: replace(FINE, top_k=33), "top_k is 33 but must be at most experts = 32"),
        (lambda: replace(FINE, heads=12), "heads is 12 but must divide dim = 2048"),
        (lambda: replace(FINE, loads=(1.0,)), "loads must be 32 shares"),
        (lambda: Cluster.of(Hardware.named("h100-sxm"), 0.0), "efficiency is 0.0"),
        (lambda: Cluster.of(Hardware.named("t4-pcie3")), "must have node, network, devices_per_node"),
        (lambda: best(FINE, replace(H100, memory_bytes=1e9), 8), "fits in no layout: the least needs .* GB a device"),
        (lambda: fastest(FINE, H100, iter(()), 7), "world is 7 but no layout of 'fine' has so many ranks"),
        (lambda: drawn(0, "both"), "kind is 'both'"),
    ],
)
def test_what_cannot_be_reckoned_is_refused(call, said: str):
    with pytest.raises(InputError, match=said):
        call()
