"""Aggregation and pruning of experts by exact properties, utilisation, and what a watched layer tells of its places."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.capacity import Capacity, keep
from workbench.lib.core.experts import GLUExperts, expert_outputs
from workbench.lib.core.models import ResidualStack
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.observe import observing
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.task import Regression
from workbench.lib.distributed.z_code_m3 import (
    PARTS,
    ServedMoELayer,
    aggregate_experts,
    prune_experts,
    served_layer,
    served_shares,
    utilisation,
)

D, E, H, N = 8, 4, 6, 40


def model(seed: int = 0, top_k: int = 1, layers: int = 2, capacity: float | None = None) -> ResidualStack:
    torch.manual_seed(seed)
    made = [MoELayer(LinearRouter(D, E, top_k), GLUExperts(E, D, H), nn.Linear(D, D), capacity) for _ in range(layers)]
    for layer in made:
        nn.init.normal_(layer.router.projection.weight)
    return ResidualStack(made).double().eval()


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows() -> Regression:
    x = torch.cat([tokens(i) for i in range(3)])
    return Regression("rows", {split: {"rows": (x, x)} for split in ("train", "validation")}, {})


# -- aggregation


def test_experts_and_rows_stand_side_by_side_and_the_trunk_is_the_mean():
    a, b = model(0), model(1)
    made, of_a = aggregate_experts(a, b), aggregate_experts(a, b, trunk="a")
    for name, layer in moe_layers(made).items():
        one, other = moe_layers(a)[name], moe_layers(b)[name]
        assert layer.n_experts == layer.router.n_experts == layer.experts.n_experts == 2 * E
        assert torch.equal(layer.router.projection.weight[:E], one.router.projection.weight)
        assert torch.equal(layer.router.projection.weight[E:], other.router.projection.weight)
        for matrix in ("gate_up", "down"):
            assert torch.equal(getattr(layer.experts, matrix)[:E], getattr(one.experts, matrix))
            assert torch.equal(getattr(layer.experts, matrix)[E:], getattr(other.experts, matrix))
        assert torch.equal(layer.shared.weight, (one.shared.weight + other.shared.weight) / 2)
        assert torch.equal(moe_layers(of_a)[name].shared.weight, one.shared.weight)
    assert moe_layers(a)["layers.0"].n_experts == E  # the models stay as they are
    x = tokens()
    y = made(x)
    y.sum().backward()
    assert all(p.grad is not None for p in made.parameters())


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_twin_halves_the_value_of_the_gate(top_k: int):
    """The one known factor of a model aggregated with itself: half for one expert; none once weights are made one."""
    layer = model(top_k=top_k, layers=1).layers[0]
    layer.shared = None
    (twin,) = moe_layers(aggregate_experts(nn.Sequential(layer), nn.Sequential(layer))).values()
    x = tokens()
    with observing([layer, twin]) as seen:
        y, halved = layer(x), twin(x)
    one, both = (seen[m][0][0] for m in (layer, twin))
    assert torch.allclose(both.probs[:, :E], one.probs / 2, atol=1e-15)
    if top_k == 1:
        assert torch.equal(both.expert % E, one.expert)
        assert torch.allclose(halved, y / 2, atol=1e-15)
    else:  # the two largest of twice as many are the first expert and its twin
        first = expert_outputs(layer.experts, x)[one.first, torch.arange(N)]
        assert torch.allclose(halved, first, atol=1e-14)


def test_only_models_of_one_shape_can_be_aggregated():
    with pytest.raises(InputError, match="b has other parameters than a"):
        aggregate_experts(model(), model(layers=1))
    with pytest.raises(InputError, match="trunk"):
        aggregate_experts(model(), model(), trunk="b")
    with pytest.raises(InputError, match="without a MoELayer"):
        aggregate_experts(nn.Linear(2, 2), nn.Linear(2, 2))
    biased = nn.Sequential(MoELayer(LinearRouter(D, E, 1, bias_rate=0.1), GLUExperts(E, D, H)))
    with pytest.raises(InputError, match="must be of a LinearRouter without a bias and GLUExperts"):
        aggregate_experts(biased, deepcopy(biased))


# -- pruning


@pytest.mark.parametrize("criterion", ["utilisation", "random", "weight"])
def test_to_keep_all_changes_nothing(criterion: str):
    whole, x = model(top_k=2), tokens()
    made = prune_experts(whole, E, criterion, utilisation(whole, rows(), rows().batches("validation", N)))
    assert made is not whole and torch.equal(made(x), whole(x))
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), whole.parameters(), strict=True))


def test_the_used_ones_stay_in_order_and_the_softmax_is_theirs():
    whole = model(top_k=2)
    stats = {"layers.0": torch.tensor([0.1, 0.4, 0.2, 0.3]), "layers.1": torch.tensor([0.25, 0.25, 0.25, 0.25])}
    made = prune_experts(whole, 2, "utilisation", stats)
    for name, stay in (("layers.0", [1, 3]), ("layers.1", [0, 1])):
        before, after = moe_layers(whole)[name], moe_layers(made)[name]
        assert after.n_experts == after.experts.n_experts == 2
        assert torch.equal(after.router.projection.weight, before.router.projection.weight[stay])
        assert torch.equal(after.experts.down, before.experts.down[stay])
        routing = after.router(tokens())
        assert torch.allclose(routing.probs, torch.softmax(before.router(tokens()).logits[:, stay], -1), atol=1e-15)
    lone = prune_experts(model(), 1, "utilisation", {name: stats[name] for name in stats})
    layer, x = moe_layers(lone)["layers.0"], tokens()
    assert torch.allclose(layer(x), layer.shared(x) + expert_outputs(layer.experts, x)[0], atol=1e-14)


def test_of_chance_and_of_weight():
    whole = model()
    drawn = [prune_experts(whole, 2, "random", generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    rows = [torch.cat([m.router.projection.weight for m in moe_layers(made).values()]) for made in drawn]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    with torch.no_grad():
        for layer in moe_layers(whole).values():
            layer.experts.down[2] *= 100
    heavy = prune_experts(whole, 1, "weight")
    for name, layer in moe_layers(heavy).items():
        assert torch.equal(layer.experts.down[0], moe_layers(whole)[name].experts.down[2])


def test_utilisation_is_what_experts_are_sent_before_anything_is_dropped():
    whole = model(top_k=2, capacity=0.25).train()
    stats = utilisation(whole, rows(), rows().batches("validation", N))
    assert whole.training
    context = Context()
    layer = whole.layers[0]
    with observing([layer], lambda routing, _: routing) as seen:
        for batch in rows().batches("validation", N):
            whole(batch.inputs, context)
    counts = sum(routing.counts for routing in seen[layer])
    assert not all(routing.kept.all() for routing in seen[layer])
    assert torch.equal(stats["layers.0"], counts.double() / (3 * N * 2))
    assert all(float(share.sum()) == pytest.approx(1, abs=1e-15) for share in stats.values())


def test_what_cannot_be_pruned_is_refused():
    whole = model(top_k=2)
    for wrong in (1, 5):
        with pytest.raises(
            InputError, match=f"keep is {wrong} but must be from top_k = 2 to the 4 experts of layers.0"
        ):
            prune_experts(whole, wrong, "random")
    with pytest.raises(InputError, match=r"stats has not the \(4,\) utilisation of layers.1"):
        prune_experts(whole, 2, "utilisation", {"layers.0": torch.ones(4)})
    with pytest.raises(InputError, match="criterion"):
        prune_experts(whole, 2, "usage")


# -- what is told of places


def test_shares_of_a_batch_and_of_experts_are_counted_pair_by_pair():
    torch.manual_seed(0)
    routing = Routing.fixed(torch.randint(E, (N, 2)), torch.rand(N, 2), E)
    routing.kept = keep(routing, 7, "position")
    expected = torch.zeros(2, PARTS + E)
    for token, expert, kept in zip(routing.token.tolist(), routing.expert.tolist(), routing.kept.tolist(), strict=True):
        for place in (token * PARTS // N, PARTS + expert):
            expected[:, place] += torch.tensor([float(kept), 1.0])
    assert torch.equal(served_shares(routing), expected)
    routing.kept = None
    assert torch.equal(*served_shares(routing))


def test_a_watched_layer_tells_where_its_tokens_were_served_and_one_that_nobody_watches_counts_nothing():
    torch.manual_seed(0)
    layer, x = served_layer(D, E, H, Capacity(0.5, "position")), torch.randn(N, D)
    layer(x)
    assert not layer.served.any() and "served" not in layer.state_dict()
    layer.observe(lambda *_: None)
    layer(x)
    form = layer.form_now()
    places, experts = form["served by place in the batch"], form["served by expert"]
    assert places[0] == 1 and places[-1] < 0.5 and places.shape == (PARTS,)
    assert experts.shape == (E,) and torch.equal(layer.served[0, PARTS:], layer.served[1, PARTS:].clamp(max=5))
    before = layer.served
    layer.eval()(x)
    assert layer.served is before
    (grown,) = moe_layers(aggregate_experts(nn.Sequential(layer), nn.Sequential(layer))).values()
    assert isinstance(grown, ServedMoELayer) and grown.train()(x) is not None
    assert grown.form_now()["served by expert"].shape == (2 * E,)


def test_the_recipe():
    layer = served_layer(D, E, H)
    assert (layer.top_k, layer.router.jitter, layer.router.coefficients) == (1, 0.01, {"lbl": 0.01})
    assert layer.capacity == Capacity(1.0, "random", evaluation=2.0)


def test_a_bank_that_layers_share_and_batches_that_are_none_are_refused():
    made = model()
    with pytest.raises(InputError, match=r"batches brought no token to layers\.0 but must reach every layer"):
        utilisation(made, rows(), [])
    made.layers[1].experts = made.layers[0].experts
    with pytest.raises(InputError, match=r"layers\.1 shares its experts with layers\.0 but must have its own"):
        prune_experts(made, 2, "weight")
    grown = aggregate_experts(made, made)  # which is well defined: they go on sharing
    assert grown.layers[0].experts is grown.layers[1].experts and grown.layers[1].experts.down.shape[0] == 2 * E
