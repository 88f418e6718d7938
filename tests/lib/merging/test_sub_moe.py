"""Sub-MoE: what its formulas say exactly, above all that at full rank it is the weighted average."""

import itertools

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.experts import GLUExperts, MLPExperts, expert_outputs
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import HashRouter, LinearRouter
from workbench.lib.core.routing import Context, Routing
from workbench.lib.merging.sub_moe import (
    ExpertStats,
    MappedRouter,
    calibrate,
    cluster_experts,
    cluster_weights,
    compress_model,
    compress_moe,
    merge_cluster,
    merge_experts,
    rank_for,
)

D, H, E = 12, 10, 6


def layer_of(experts=E, top_k=2, seed=0, **options):
    torch.manual_seed(seed)
    layer = MoELayer(LinearRouter(D, experts, top_k, **options), GLUExperts(experts, D, H))
    nn.init.normal_(layer.router.projection.weight)
    return layer


def tokens(n=200, seed=1):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def seen(layer, x=None):
    stats = ExpertStats(layer)
    stats.update(tokens() if x is None else x)
    return stats


def matrices(g=3, m=8, n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(g, m, n, generator=generator), torch.tensor([0.5, 0.3, 0.2][:g], dtype=torch.float64)


def doubled():
    """A layer of pairs of the same expert, whose router tells the two apart: 0 and 3, 1 and 4, 2 and 5."""
    layer = layer_of()
    with torch.no_grad():
        for weight in (layer.experts.gate_up, layer.experts.down):
            weight[E // 2 :] = weight[: E // 2]
    return layer


PAIRS = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("shape", [(8, 12), (40, 5), (5, 5)])
def test_sub_moe_at_full_rank_is_the_weighted_average(shape):
    weights, w = matrices(3, *shape)
    average = torch.einsum("g,gmn->mn", w, weights.double())
    for rank in (None, 1.0, min(shape[0], 3 * shape[1])):
        torch.testing.assert_close(merge_cluster(weights.double(), w, rank), average, atol=1e-13, rtol=0)
        torch.testing.assert_close(merge_cluster(weights, w, rank), average.float(), atol=1e-5, rtol=0)


def test_sub_moe_of_a_whole_layer_at_full_rank_is_the_weighted_average_of_each_matrix():
    layer, labels = layer_of(), torch.tensor([0, 1, 0, 0, 2, 1])
    frequency = torch.tensor([5, 1, 3, 2, 7, 9])
    merged = merge_experts(layer, labels, frequency)
    for name in ("gate_up", "down"):
        old, new = getattr(layer.experts, name), getattr(merged.layer.experts, name)
        for cluster in range(3):
            w = (frequency * (labels == cluster)).double()
            average = torch.einsum("e,emn->mn", w / w.sum(), old.double())
            torch.testing.assert_close(new[cluster].double(), average, atol=1e-6, rtol=0)
    assert max(error for errors in merged.errors for error in errors.values()) < 1e-6


@pytest.mark.parametrize("rank", range(1, 9))
def test_a_cut_merge_is_the_average_projected_on_the_left_basis(rank):
    weights, w = matrices()
    weights = weights.double()
    u = torch.linalg.svd(torch.cat(list(weights), dim=1))[0][:, :rank]
    average = torch.einsum("g,gmn->mn", w, weights)
    torch.testing.assert_close(merge_cluster(weights, w, rank), u @ (u.T @ average))


def test_a_cut_merge_comes_closer_to_the_average_with_each_rank():
    weights, w = matrices()
    average = merge_cluster(weights.double(), w)
    off = [float((merge_cluster(weights.double(), w, rank) - average).norm()) for rank in range(1, 9)]
    assert all(a > b for a, b in itertools.pairwise(off)) and off[-1] < 1e-12


def test_experts_that_are_one_make_it_at_any_rank_that_holds_it():
    low = torch.randn(8, 3, dtype=torch.float64) @ torch.randn(3, 12, dtype=torch.float64)
    weights, (_, w) = low.expand(3, -1, -1), matrices()
    for rank in (3, 5, 8):
        torch.testing.assert_close(merge_cluster(weights, w, rank), low)
    assert (merge_cluster(weights, w, 2) - low).norm() > 0.01


def test_the_rank_by_energy_is_the_least_that_keeps_it():
    s = torch.tensor([3.0, 2.0, 1.0, 1.0], dtype=torch.float64)  # energies 9, 4, 1, 1 of 15
    assert [rank_for(s, share) for share in (0.5, 9 / 15, 0.61, 13 / 15, 0.9, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert rank_for(s, 2) == 2 and rank_for(s, None) == 4
    assert rank_for(torch.zeros(3, dtype=torch.float64), 0.9) == 1
    for wrong in (0, 5, -1, True, 0.0, 1.5, float("nan")):
        with pytest.raises(InputError, match="rank is"):
            rank_for(s, wrong)


def test_as_many_clusters_as_experts_change_nothing():
    layer, x = layer_of(), tokens(50, 3)
    for router in ("map", "mean"):
        merged = compress_moe(layer, seen(layer), E, rank=0.5, router=router)
        torch.testing.assert_close(merged.layer(x), layer(x), atol=1e-6, rtol=0)
        assert torch.equal(merged.layer.experts.gate_up, layer.experts.gate_up)
        assert torch.equal(merged.layer.experts.down, layer.experts.down)
        assert merged.labels.tolist() == list(range(E)) and merged.before == merged.after


def test_an_expert_alone_in_its_cluster_stays_bit_for_bit_and_nothing_is_changed_in_place():
    layer, labels = layer_of(), torch.tensor([0, 0, 1, 0, 0, 0])
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    merged = merge_experts(layer, labels, torch.ones(E), rank=2)
    assert torch.equal(merged.layer.experts.gate_up[1], before["experts.gate_up"][2])
    assert torch.equal(merged.layer.experts.down[1], before["experts.down"][2])
    assert merged.ranks[0] == {"gate": 2, "up": 2, "down": 2}
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    with torch.no_grad():
        merged.layer.router.router.projection.weight.zero_()
    assert torch.equal(layer.router.projection.weight, before["router.projection.weight"])


def test_copies_are_found_and_with_the_map_their_merge_changes_nothing():
    layer, x = doubled(), tokens(50, 3)
    merged = compress_moe(layer, seen(layer), E // 2)
    assert merged.labels.tolist() == PAIRS.tolist()
    torch.testing.assert_close(merged.layer(x), layer(x), atol=1e-5, rtol=0)
    averaged = compress_moe(layer, seen(layer), E // 2, router="mean").layer
    assert (averaged(x) - layer(x)).abs().max() > 0.01  # the rows of two copies are not one row


def test_the_map_adds_the_weights_of_slots_that_fall_into_one_cluster():
    layer, x = layer_of(top_k=3), tokens(40, 4)
    before = layer.router(x, Context())
    after = MappedRouter(layer.router, PAIRS)(x, Context())
    expected = torch.stack([before.dense()[:, cluster == PAIRS].sum(1) for cluster in range(3)], dim=1)
    torch.testing.assert_close(after.dense(), expected)
    torch.testing.assert_close(after.probs.sum(1), torch.ones(40))
    assert after.active_counts.min() < 3 and after.n_experts == 3


def test_the_map_takes_any_router_and_the_mean_only_rows():
    x, context = tokens(8), Context(token_ids=torch.arange(8))
    layer = MoELayer(HashRouter(16, E, 2), GLUExperts(E, D, H))
    merged = merge_experts(layer, PAIRS, torch.ones(E)).layer
    assert merged(x, context).shape == x.shape
    for router in (HashRouter(16, E, 2), LinearRouter(D, E, 2, bias_rate=0.1)):
        with pytest.raises(InputError, match="must be a LinearRouter without a bias"):
            merge_experts(MoELayer(router, GLUExperts(E, D, H)), PAIRS, torch.ones(E), router="mean")


def test_the_mean_router_has_the_weighted_rows_and_no_more_slots_than_clusters():
    layer, frequency = layer_of(top_k=4), torch.tensor([3, 1, 0, 1, 1, 0])
    made = merge_experts(layer, PAIRS, frequency, router="mean").layer.router
    rows = layer.router.projection.weight
    expected = torch.stack([0.75 * rows[0] + 0.25 * rows[3], (rows[1] + rows[4]) / 2, (rows[2] + rows[5]) / 2])
    torch.testing.assert_close(made.projection.weight, expected)
    assert made.top_k == 3


def test_weights_are_frequencies_of_sum_one_and_alike_where_nothing_was_routed():
    frequency = torch.tensor([3, 0, 1, 0])
    assert cluster_weights(frequency, torch.tensor([0, 2])).tolist() == [0.75, 0.25]
    assert cluster_weights(frequency, torch.tensor([1, 3])).tolist() == [0.5, 0.5]
    merged = merge_experts(layer_of(), PAIRS, torch.tensor([3, 1, 0, 4, 4, 0]))
    sums = torch.zeros(3, dtype=torch.float64).index_add_(0, PAIRS, merged.weights)
    torch.testing.assert_close(sums, torch.ones(3, dtype=torch.float64))


def test_statistics_added_up_are_those_of_all_tokens_at_once():
    layer, x = layer_of(), tokens(300)
    stats = ExpertStats(layer)
    for part in x.split([100, 1, 199]):
        stats.update(part)
    outputs = torch.stack(  # one expert after the other, by the layer itself
        [layer.experts(x, Routing.fixed(torch.full((300, 1), e), torch.ones(300, 1), E)) for e in range(E)]
    ).double()
    torch.testing.assert_close(expert_outputs(layer.experts, x).double(), outputs, atol=1e-5, rtol=1e-5)
    cosines = nn.functional.cosine_similarity(outputs[:, None], outputs[None], dim=-1).mean(-1)
    torch.testing.assert_close(stats.similarity, cosines, atol=1e-5, rtol=0)
    torch.testing.assert_close(stats.mean_output, outputs.mean(1), atol=1e-6, rtol=1e-5)
    assert torch.equal(stats.frequency, layer.router(x).counts) and stats.tokens == 300


def test_similarity_is_symmetric_within_one_and_one_on_the_diagonal():
    layer = doubled()
    with torch.no_grad():
        layer.experts.down[1] = 0  # an expert that says nothing is like none
    similarity = seen(layer).similarity
    assert torch.equal(similarity, similarity.T) and similarity.abs().max() <= 1
    assert torch.equal(similarity.diagonal(), torch.ones(E, dtype=torch.float64))
    assert similarity[0, 3] == pytest.approx(1) and similarity[1, 2] == 0


@pytest.mark.parametrize("clusters", [1, 2, 3, 4])
def test_clusters_do_not_depend_on_the_order_of_the_experts(clusters):
    similarity = seen(layer_of(8, seed=5)).similarity
    labels = cluster_experts(similarity, clusters)
    assert sorted(set(labels.tolist())) == list(range(clusters))
    together = labels[:, None] == labels[None]
    for seed in range(5):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        again = cluster_experts(similarity[order][:, order], clusters)
        assert torch.equal(again[:, None] == again[None], together[order][:, order])


def test_experts_too_alike_for_so_many_clusters_still_fill_them():
    for clusters in range(1, 7):
        labels = cluster_experts(torch.ones(E, E, dtype=torch.float64), clusters)
        assert sorted(set(labels.tolist())) == list(range(clusters))
    for wrong in (0, E + 1, True):
        with pytest.raises(InputError, match="clusters is"):
            cluster_experts(torch.eye(E), wrong)


def test_parameters_are_those_of_the_formula():
    layer, labels = layer_of(), torch.tensor([0, 0, 0, 1, 1, 2])
    expert, router = 3 * D * H, E * D
    whole = merge_experts(layer, labels, torch.ones(E))
    assert (whole.before, whole.after) == (E * expert + router, 3 * expert + router)
    assert sum(p.numel() for p in whole.layer.parameters()) == whole.after
    assert merge_experts(layer, labels, torch.ones(E), router="mean").after == 3 * (expert + D)
    cut = merge_experts(layer, labels, torch.ones(E), rank=2)
    assert cut.after == 2 * 3 * 2 * (D + H) + expert + router
    wide = merge_experts(layer, labels, torch.ones(E), rank=min(D, H))
    assert wide.after == whole.after  # factors that are more numbers than their product are not kept


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([layer_of(seed=1), layer_of(4, seed=2)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_a_model_is_calibrated_and_compressed_layer_by_layer():
    model, x = Model().train(), tokens(64)
    stats = calibrate(model, x.split(16))
    assert model.training and not any(layer.observed or layer._forward_pre_hooks for layer in model.layers)
    first, second = model.layers
    alone = seen(second, x + first(x))
    torch.testing.assert_close(stats["layers.1"].similarity, alone.similarity, atol=1e-6, rtol=0)
    assert torch.equal(stats["layers.1"].frequency, alone.frequency) and stats["layers.0"].tokens == 64
    merged = compress_model(model, stats, 2)
    assert [layer.n_experts for layer in model.layers] == [2, 2] and model.layers[0] is merged["layers.0"].layer
    assert model(x).shape == x.shape


def test_what_cannot_be_merged_is_refused_by_name():
    with pytest.raises(InputError, match="MLPExperts but must be GLUExperts"):
        ExpertStats(MoELayer(LinearRouter(D, 2, 1), MLPExperts(2, D, H)))
    layer = layer_of()
    with pytest.raises(InputError, match="no tokens"):
        compress_moe(layer, ExpertStats(layer), 2)
    with pytest.raises(InputError, match="NaN or infinite"):
        ExpertStats(layer).update(torch.full((3, D), torch.inf), layer.router(tokens(3)))
    for labels in ([0, 0, 2, 2, 0, 0], [0, 1], [1, 1, 1, 1, 1, 1]):
        with pytest.raises(InputError, match="labels are"):
            merge_experts(layer, torch.tensor(labels), torch.ones(E))
    for frequency in (torch.ones(2), -torch.ones(E), torch.full((E,), torch.nan)):
        with pytest.raises(InputError, match="frequency is"):
            merge_experts(layer, PAIRS, frequency)
    with pytest.raises(InputError, match="router"):
        merge_experts(layer, PAIRS, torch.ones(E), router="median")
