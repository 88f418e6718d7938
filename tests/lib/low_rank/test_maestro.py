"""Maestro: ordered factors are the dense layer, what a prefix is and trains, and what sampling and shrinking make."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core import factored
from workbench.lib.core.budget import count_params
from workbench.lib.core.factored import LowRankLinear
from workbench.lib.low_rank.maestro import (
    MaestroConv2d,
    MaestroLinear,
    PrefixSampler,
    decompose,
    extract,
    fit_ranks,
    hierarchical_group_lasso,
    maestro_loss,
    merge_back,
    nested_curve,
    ordered_layers,
    progressive_shrink,
    recalibrate,
)
from workbench.live.probes import find

RANK, SHAPE = 3, (9, 6)
SIGMA = torch.tensor([7.9, 6.2, 3.05])


def network(norm: bool = False) -> nn.Sequential:
    """Two convolutions and two linear layers, the last of them a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(8, 6, (3, 1), stride=2, dilation=(1, 1), bias=False),
        nn.Flatten(),
        nn.Linear(6 * 3 * 4, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
    )


IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(16) % 5


def shake(model: nn.Module) -> nn.Module:
    """Components that are no SVD any more, so that nothing holds because they are."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in ordered_layers(model).values():
            for factor in (layer.a, layer.b):
                factor += 0.3 * torch.randn(factor.shape, generator=generator, dtype=factor.dtype)
    return model


# -- 1 and 2: what the layers are


def test_decomposed_the_model_is_the_same_function_and_merged_back_it_is_dense_again():
    model = network().double()
    x = IMAGES.double()
    before = model(x)
    found = decompose(model)
    assert list(found.layers) == ["0", "3", "5", "7"] and found.left_out == {}
    assert [layer.full_rank for layer in found.layers.values()] == [8, 6, 20, 5]
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-10)
    shake(model)
    for layer in found.layers.values():
        layer.cut(3)
    after = model(x)
    assert not torch.allclose(after, before)
    assert [type(module) for module in merge_back(model)] == [type(module) for module in network()]
    torch.testing.assert_close(model(x), after)


def test_it_starts_ordered_with_the_root_of_each_singular_value_on_either_side():
    dense = nn.Linear(6, 9)
    layer = MaestroLinear.from_dense(dense)
    torch.testing.assert_close(layer.strength(), torch.linalg.svdvals(dense.weight.detach()))
    torch.testing.assert_close(layer.a.norm(dim=1), layer.b.norm(dim=0))
    assert layer.bias is dense.bias


@pytest.mark.parametrize("width", [1, 2, 5, 6])
def test_cut_to_b_it_is_the_product_of_the_prefixes_and_nothing_behind_gets_a_gradient(width: int):
    layer = shake(MaestroLinear(6, 9).double())
    x = torch.randn(4, 6, dtype=torch.float64)
    y = layer(x, width)
    torch.testing.assert_close(y, x @ (layer.b[:, :width] @ layer.a[:width]).T + layer.bias)
    y.square().sum().backward()
    assert layer.a.grad[:width].any(1).all() and layer.b.grad[:, :width].any(0).all()
    assert not layer.a.grad[width:].any() and not layer.b.grad[:, width:].any()
    torch.testing.assert_close(layer(x, 6), layer(x))


@pytest.mark.parametrize("width", [1, 4])
def test_a_convolution_cut_to_b_is_the_convolution_of_the_product(width: int):
    dense = nn.Conv2d(3, 8, 3, stride=2, padding="valid", dilation=2).double()
    layer = shake(MaestroConv2d.from_dense(dense))
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    weight = (layer.b[:, :width] @ layer.a[:width].flatten(1)).view_as(dense.weight)
    y = layer(x, width)
    torch.testing.assert_close(y, F.conv2d(x, weight, dense.bias, stride=2, dilation=2))
    y.square().sum().backward()
    assert layer.a.grad[:width].any() and not layer.a.grad[width:].any() and not layer.b.grad[:, width:].any()


def test_the_sampled_pass_trains_one_layers_prefix_and_all_of_the_others():
    model = decompose(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7))).model
    with PrefixSampler(model, seed=3).step() as widths:
        ((name, width),) = widths.items()
        model(torch.randn(5, 6)).square().sum().backward()
    layers = ordered_layers(model)
    assert width < layers[name].rank
    for other, layer in layers.items():
        cut = width if other == name else layer.rank
        assert layer.a.grad[:cut].any(1).all() and not layer.a.grad[cut:].any()
    assert all(layer.sampled is None for layer in layers.values())


# -- 3: the lasso and the importance


def written_out(layer: MaestroLinear | MaestroConv2d) -> Tensor:
    total = torch.zeros((), dtype=layer.a.dtype)
    for b in range(layer.rank):
        total = total + layer.a[b : layer.rank].norm() + layer.b[:, b : layer.rank].norm()
    return total


def test_the_lasso_is_that_of_the_suffixes_and_has_a_gradient_where_components_are_zero():
    model = shake(decompose(network()).model.double())
    layers = list(ordered_layers(model).values())
    layers[2].cut(7)
    torch.testing.assert_close(hierarchical_group_lasso(model), sum(map(written_out, layers)), rtol=1e-10, atol=1e-9)
    with torch.no_grad():
        layers[1].a[4:], layers[1].b[:, 4:] = 0, 0
    loss = hierarchical_group_lasso(model)
    loss.backward()
    torch.testing.assert_close(loss, sum(map(written_out, layers)), rtol=1e-6, atol=1e-5)
    assert all(p.grad.isfinite().all() for layer in layers for p in (layer.a, layer.b))
    assert layers[0].a.grad[-1].norm() > 0 and not layers[2].a.grad[7:].any()
    single = sum(layer.a[: layer.rank].flatten(1).norm(dim=1).sum() for layer in layers)
    assert not torch.isclose(loss, single, rtol=0.5)  # the plain lasso is another


def test_importances_never_increase_so_what_is_left_is_a_prefix():
    layer = shake(MaestroLinear(12, 10))
    with torch.no_grad():
        layer.a[3] *= 1e-6  # a weak component among strong ones
        layer.a[7:], layer.b[:, 7:] = 1e-4 * layer.a[7:], 1e-4 * layer.b[:, 7:]
    importance, strength = layer.importance(), layer.strength()
    assert (importance.diff() <= 0).all() and (strength.diff() > 0).any()
    expected = [float((layer.a[b:].norm() * layer.b[:, b:].norm()).detach()) for b in range(10)]
    torch.testing.assert_close(importance, torch.tensor(expected))
    assert layer.shrink(1e-2) == 7 and layer.rank == 7  # the weak one stays, the tail goes
    assert not layer.importance()[7:].any() and layer.importance()[:7].all()
    assert layer.shrink(0.0) == 7  # none comes back


# -- 4: what is left


def test_extracted_it_has_the_parameters_that_its_ranks_say():
    model = shake(decompose(network()).model.double())
    ranks = {"0": 4, "3": 2, "5": 7, "7": 3}
    small = extract(model, ranks)
    expected = 4 * (27 + 8) + 8 + 2 * (24 + 6) + 7 * (72 + 20) + 20 + 3 * (20 + 5) + 5
    assert count_params(small) == expected
    assert isinstance(small[5], LowRankLinear) and small[5].rank == 7
    for name, layer in ordered_layers(model).items():
        layer.cut(ranks[name])
    torch.testing.assert_close(small(IMAGES.double()), model(IMAGES.double()))
    assert factored.merge_back(small)[5].weight.shape == (20, 72)


def test_it_is_dense_again_from_the_rank_on_at_which_that_is_smaller():
    """(I, O) = (6, 12): I O / (I + O) = 4 exactly; (5, 7) with 35 / 12 in between."""
    for d_in, d_out, last in ((6, 12, 4), (5, 7, 2)):
        model = decompose(nn.Sequential(nn.Linear(d_in, d_out))).model
        for rank in range(1, min(d_in, d_out) + 1):
            small = extract(model, {"0": rank})[0]
            assert isinstance(small, nn.Linear) == (rank > last)
            assert count_params(small) == min(rank * (d_in + d_out), d_in * d_out) + d_out
    convolution = decompose(nn.Sequential(nn.Conv2d(2, 6, 3))).model
    assert [type(extract(convolution, {"0": rank})[0]) for rank in (4, 5)] == [nn.Sequential, nn.Conv2d]


def test_a_report_says_what_extract_makes():
    found = decompose(model := network(), skip_last=True)
    dense = count_params(network())
    report = found.report()
    assert report["params_before"] == report["params"] == dense and list(report["layers"]) == ["0", "3", "5"]
    for layer in found.layers.values():
        layer.cut(2)
    report = found.report()
    assert report["params"] == count_params(extract(model)) < dense == report["params_before"]
    row = report["layers"]["5"]
    assert (row["rank"], row["full_rank"], row["flops"], row["flops_before"]) == (2, 20, 2 * 2 * 92, 2 * 72 * 20)


def test_a_budget_takes_the_least_important_component_first_and_leaves_what_is_to_be_whole():
    model = shake(decompose(network()).model)
    head = count_params(network()[7])
    for budget in (count_params(extract(model)), 1500, 900, 700):
        ranks = fit_ranks(model, budget, whole="7")
        assert count_params(extract(model, budget=budget, whole="7")) <= budget and ranks["7"] == 5
        kept = min(ordered_layers(model)[n].importance()[r - 1] for n, r in ranks.items() if n != "7" and r > 1)
        gone = [ordered_layers(model)[n].importance()[r:] for n, r in ranks.items()]
        assert all((importance <= kept).all() for importance in gone)
    assert count_params(extract(model, ranks)[7]) == head


# -- 5: the sampler


def test_in_one_pass_every_pair_comes_once_and_a_new_rank_begins_a_new_one():
    model = decompose(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))).model
    sampler = PrefixSampler(model, seed=0)
    every = sorted([("0", b) for b in range(1, 5)] + [("2", b) for b in range(1, 6)])
    passes = [[next(iter(sampler.draw().items())) for _ in range(9)] for _ in range(3)]
    assert all(sorted(drawn) == every for drawn in passes)
    assert passes[0] != passes[1] != passes[2] and passes[0] != every
    sampler.draw()
    model[0].cut(2)
    drawn = [next(iter(sampler.draw().items())) for _ in range(7)]
    assert sorted(drawn) == [pair for pair in every if pair not in (("0", 3), ("0", 4))]


@pytest.mark.parametrize("mode", ["per_layer", "across_layers"])
def test_a_sampler_that_was_saved_goes_on_where_it_was(mode: str):
    model = decompose(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))).model
    whole = PrefixSampler(model, mode, seed=5)
    expected = [whole.draw() for _ in range(25)]
    first = PrefixSampler(model, mode, seed=5)
    assert [first.draw() for _ in range(11)] == expected[:11]
    second = PrefixSampler(model, mode, seed=5)
    second.load_state_dict(first.state_dict())
    assert [second.draw() for _ in range(14)] == expected[11:]
    assert [PrefixSampler(model, mode, seed=6).draw() for _ in range(11)] != expected[:11]


def test_across_layers_every_layer_has_a_width_of_its_own():
    model = decompose(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))).model
    sampler = PrefixSampler(model, "across_layers")
    drawn = [sampler.draw() for _ in range(200)]
    assert {tuple(widths.values()) for widths in drawn} == {(a, b) for a in range(1, 5) for b in range(1, 6)}


# -- 6, 7 and 8: what sampling makes of a linear map


def fitted(sample: bool) -> tuple[MaestroLinear, Tensor]:
    """A layer that has learned a matrix (9, 6) of rank 3 from a random start, by its own words or whole."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, RANK, generator=generator)).Q for n in SHAPE)
    goal = left * SIGMA @ right.T
    layer = MaestroLinear(SHAPE[1], SHAPE[0], bias=False)
    with torch.no_grad():
        layer.a.normal_(0, 0.3, generator=generator), layer.b.normal_(0, 0.3, generator=generator)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    sampler = PrefixSampler(layer)
    for _ in range(1000):
        width = sampler.draw()[""] if sample else None
        loss = F.mse_loss(layer(torch.eye(SHAPE[1]), width).T, goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer, goal


def off_by(layer: MaestroLinear, goal: Tensor) -> Tensor:
    """The distance of each prefix from the best matrix of its rank, by the length of the whole."""
    u, s, v = torch.linalg.svd(goal)
    with torch.no_grad():
        gaps = [(layer.b[:, :b] @ layer.a[:b] - u[:, :b] * s[:b] @ v[:b]).norm() for b in range(1, SHAPE[1] + 1)]
    return torch.stack(gaps) / goal.norm()


def test_sampled_prefixes_become_those_of_the_svd_and_components_as_strong_as_singular_values():
    layer, goal = fitted(sample=True)
    assert off_by(layer, goal).max() < 0.02
    torch.testing.assert_close(layer.strength()[:RANK], SIGMA, rtol=0.03, atol=0)
    assert layer.strength()[RANK:].max() < 0.1
    # of a component with all that follow: the sum of the singular values from there on, as the factors are balanced
    torch.testing.assert_close(layer.importance()[:RANK], SIGMA.flip(0).cumsum(0).flip(0), rtol=0, atol=0.5)
    assert layer.shrink(0.5) == RANK


def test_without_sampling_the_whole_is_learned_and_its_prefixes_are_not():
    layer, goal = fitted(sample=False)
    gaps = off_by(layer, goal)
    assert gaps[-1] < 1e-2 and gaps[:RANK].max() > 0.2
    # any rotation between the factors is as good a whole
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    with torch.no_grad():
        whole = layer.merged()
        layer.a.copy_(turn.T @ layer.a), layer.b.copy_(layer.b @ turn)
    torch.testing.assert_close(layer.merged(), whole, rtol=1e-4, atol=1e-4)


def test_a_linear_autoencoder_finds_principal_components_and_loses_one_that_is_not_in_the_data_any_more():
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    deviation = torch.tensor([3.0, 2.0, 1.5, 1.0, 0, 0, 0, 0])
    layer = MaestroLinear(8, 8, bias=False)
    optimizer, sampler = torch.optim.SGD(layer.parameters(), lr=0.05), PrefixSampler(layer)

    def learn(steps: int, deviation: Tensor) -> None:
        root = axes * deviation  # x = root z has this covariance, over which the loss is a mean
        for _ in range(steps):
            gap = layer(root.T, sampler.draw()[""]) - root.T
            loss = gap.square().sum() + 0.05 * hierarchical_group_lasso(layer)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    learn(800, deviation)
    assert layer.shrink(0.1) == 4
    for b in range(1, 5):
        basis = torch.linalg.svd(layer.b[:, :b].detach() @ layer.a[:b].detach()).U[:, :b]
        overlap = torch.linalg.matrix_norm(basis.T @ axes[:, :b]) ** 2 / b
        assert overlap > 0.99
    learn(800, deviation * torch.tensor([1.0, 1, 0, 1, 0, 0, 0, 0]))
    assert layer.shrink(0.1) == 3
    basis = torch.linalg.svd(layer.merged()).U[:, :3]
    assert torch.linalg.matrix_norm(basis.T @ axes[:, [0, 1, 3]]) ** 2 / 3 > 0.99


# -- training


def trained(model: nn.Module, steps: int, optimizer: torch.optim.Optimizer, sampler: PrefixSampler) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        sum(maestro_loss(model, sampler, IMAGES, CLASSES, 1e-2)).backward()
        optimizer.step()


def test_an_optimizer_keeps_its_state_when_ranks_shrink():
    model = decompose(network()).model
    optimizer, sampler = torch.optim.Adam(model.parameters(), lr=1e-3), PrefixSampler(model)
    trained(model, 3, optimizer, sampler)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    parameters = list(model.parameters())
    ordered_layers(model)["5"].cut(6)
    after = optimizer.state_dict()["state"]
    for key, state in before.items():
        assert all(torch.equal(value, after[key][name]) for name, value in state.items())
    trained(model, 3, optimizer, sampler)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    # what is left moves; what was cut is in no forward pass, whatever its momentum makes of it
    x = model(IMAGES)
    with torch.no_grad():
        model[5].a[6:] += 100.0
    assert torch.equal(model(IMAGES), x)


@pytest.mark.parametrize("target", ["soft", "hard"])
def test_the_cut_model_learns_what_the_whole_one_says_or_the_classes(target: str):
    model = shake(decompose(network()).model.double())
    sampler, x = PrefixSampler(model, seed=1), IMAGES.double()
    whole, cut = maestro_loss(model, sampler, x, CLASSES, 0.1, target)
    again = PrefixSampler(model, seed=1)
    logits = model(x)
    with again.step():
        sampled = model(x)
    goal = logits.softmax(-1).detach() if target == "soft" else F.one_hot(CLASSES, 5).double()
    torch.testing.assert_close(whole, F.cross_entropy(logits, CLASSES))
    by_hand = -(goal * sampled.log_softmax(-1)).sum(1).mean() + 0.1 * hierarchical_group_lasso(model)
    torch.testing.assert_close(cut, by_hand)
    gradients = [torch.autograd.grad(loss, model[7].bias)[0] for loss in (cut, by_hand)]
    torch.testing.assert_close(*gradients)


def test_logits_of_sequences_are_one_a_token():
    model = decompose(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))).model
    x, y = torch.randn(2, 3, 4), torch.randint(5, (2, 3))
    whole, _ = maestro_loss(model, PrefixSampler(model), x, y, 0.0)
    torch.testing.assert_close(whole, F.cross_entropy(model(x).flatten(0, 1), y.flatten()))


def test_batch_norms_are_calibrated_for_every_nested_model():
    model = shake(decompose(network(norm=True)).model)
    seen = []
    curve = nested_curve(
        model.eval(), lambda small: seen.append(small) or 1.0, [2400, 1000], batches=[IMAGES], whole="7"
    )
    assert [nested.params for nested in curve] == [count_params(small) for small in seen] and len(curve) == 2
    assert curve[0].params <= 2400 and curve[1].params <= 1000 and curve[1].ranks["7"] == 5
    for small in seen:
        hidden = small[0](IMAGES)
        torch.testing.assert_close(small[1].running_mean, hidden.mean((0, 2, 3)).detach(), rtol=1e-4, atol=1e-5)
        assert not small.training
    assert not torch.allclose(seen[0][1].running_mean, seen[1][1].running_mean)
    with pytest.raises(InputError, match=r"batches is empty .* batch norms"):
        nested_curve(model, lambda small: 1.0, [2400])
    plain = network().eval()
    assert recalibrate(plain, [IMAGES]) is plain


def test_a_rank_that_was_saved_is_loaded():
    model, other = decompose(network()).model, decompose(network()).model
    model[5].cut(4)
    other.load_state_dict(model.state_dict())
    assert other[5].rank == 4 and torch.equal(other(IMAGES), model(IMAGES))
    assert copy.deepcopy(model)[5].rank == 4
    with pytest.raises(InputError, match="width is 21 but must be between 1 and the 20"):
        other.load_state_dict(model.state_dict() | {"5.kept": torch.tensor(21)})


def test_a_transposed_layer_of_transformers_goes_the_same_way():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(5, 4), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(2, 4)
    before = model(x)
    decompose(model)
    torch.testing.assert_close(model(x), before)
    assert isinstance(merge_back(model)[0], Conv1D)
    torch.testing.assert_close(model(x), before)


def test_a_host_that_reads_the_weight_trains_the_factors_and_is_cut_as_they_are():
    layer = MaestroLinear(6, 9)
    sampler, x = PrefixSampler(layer, seed=2), torch.randn(3, 6)
    with sampler.step() as widths:
        y = F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(y, layer(x))
    y.square().sum().backward()
    assert widths[""] < 6 and layer.a.grad[: widths[""]].any() and not layer.a.grad[widths[""] :].any()


def test_importances_of_half_precision_are_added_up_in_single():
    layer = MaestroLinear(300, 300, bias=False)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.importance().dtype == torch.float32
    torch.testing.assert_close(half.importance(), layer.importance(), rtol=0.01, atol=0.01)
    assert half(torch.ones(1, 300, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_model_of_transformers_is_trained_shrunk_and_extracted():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=8, **sizes)).eval()
    rows = {"input_ids": torch.randint(20, (4, 8)), "attention_mask": torch.ones(4, 8, dtype=torch.int64)}
    before = model(**rows).logits
    found = decompose(model, skip_last=True)
    assert len(found.layers) == 7 and "classifier" not in found.layers
    torch.testing.assert_close(model(**rows).logits, before, atol=1e-5, rtol=1e-5)
    sampler, optimizer = PrefixSampler(model), torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        sum(maestro_loss(model, sampler, rows, torch.tensor([0, 1, 1, 0]), 1e-2)).backward()
        optimizer.step()
    assert max(progressive_shrink(model, 0.1).values()) < 16
    small = extract(model)
    assert count_params(small) == found.report()["params"] < found.report()["params_before"]
    torch.testing.assert_close(small(**rows).logits, model(**rows).logits, atol=1e-5, rtol=1e-5)


def test_a_frozen_layer_stays_frozen():
    model = network()
    model[0].weight.requires_grad_(False), model[5].weight.requires_grad_(False)
    decompose(model)
    assert not model[0].a.requires_grad and not model[5].b.requires_grad and model[5].bias.requires_grad
    small = extract(model, {"5": 3})
    assert not small[5].u.requires_grad and small[5].bias.requires_grad and not small[0].weight.requires_grad


def test_it_is_watched_as_one_matrix_of_what_is_left():
    model = decompose(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Conv2d(2, 6, 3))).model
    model[0].cut(2)
    linear, convolution = find.matrices(model, [])
    assert (linear.name, linear.shape, convolution.shape) == ("0", (9, 6), (6, 18))
    a, b = linear.factors()
    assert a.shape == (6, 6) and not a[2:].any()
    torch.testing.assert_close(b @ a, model[0].merged())
    form = model[0].form_now()
    assert form["rank"] == 2 and form["importance"].shape == (6,) and not form["importance"][2:].any()


# -- what is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": "head*"}, "targets 'head\\*' is unknown"),
        ({"targets": "2"}, "matches '2', a ReLU, but must match linear layers"),
        ({"targets": []}, "targets is empty"),
        ({"skip_first": 3, "skip_last": True}, "leave nothing of 4 layers"),
        ({"skip_first": -1}, "skip_first is -1"),
    ],
)
def test_targets_that_leave_nothing_are_refused(options: dict, said: str):
    model = network()
    if options.get("skip_first") == 3:
        assert list(decompose(network(), skip_first=3).layers) == ["7"]
    with pytest.raises(InputError, match=said):
        decompose(model, **options)
    assert not any(isinstance(module, MaestroLinear | MaestroConv2d) for module in model.modules())


def test_what_is_left_out_is_named_with_the_reason():
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, padding=1, padding_mode="reflect"))
    with pytest.raises(InputError):
        decompose(model)
    found = decompose(nn.Sequential(*model, nn.Conv2d(4, 4, 1)))
    assert list(found.layers) == ["2"] and set(found.left_out) == {"0", "1"}
    assert "2 groups" in found.left_out["0"] and "'reflect'" in found.left_out["1"]


def test_a_weight_that_is_not_finite_changes_nothing():
    model = network()
    with torch.no_grad():
        model[7].weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        decompose(model)
    assert type(model[0]) is nn.Conv2d and type(model[5]) is nn.Linear


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.Conv2d(2, 3, 1), nn.LayerNorm(4)])
def test_what_is_no_linear_layer_has_no_factors(layer: nn.Module):
    with pytest.raises(InputError, match=r"must be an nn\.Linear"):
        MaestroLinear.from_dense(layer)
    if not isinstance(layer, nn.Conv2d):
        with pytest.raises(InputError, match=f"it is a {type(layer).__name__}"):
            MaestroConv2d.from_dense(layer)


@pytest.mark.parametrize("width", [0, 7, -1])
def test_a_rank_above_the_width_or_below_one_is_refused(width: int):
    model = decompose(nn.Sequential(nn.Linear(6, 9))).model
    for call in (lambda: model[0](torch.ones(1, 6), width), lambda: model[0].cut(width)):
        with pytest.raises(InputError, match=f"width is {width} but must be between 1 and the 6"):
            call()
    with pytest.raises(InputError, match="ranks of 0: width is"):
        extract(model, {"0": width})


def test_shrinking_to_nothing_or_by_what_is_no_number_cuts_no_layer():
    model = decompose(network()).model
    with torch.no_grad():
        model[3].a *= 1e-8
    with pytest.raises(InputError, match=r"3 cannot be shrunk: eps is 0\.5 but must be at most its largest importance"):
        progressive_shrink(model, 0.5)
    assert [layer.rank for layer in ordered_layers(model).values()] == [8, 6, 20, 5]
    with torch.no_grad():
        model[3].a[0] = torch.nan
    with pytest.raises(InputError, match="3 cannot be shrunk: its importances are not finite"):
        progressive_shrink(model, 1e-9)
    with pytest.raises(InputError, match="importances of 3 are not finite"):
        extract(model, budget=1000)
    with pytest.raises(InputError, match="eps is nan"):
        model[5].shrink(float("nan"))
    assert [layer.rank for layer in ordered_layers(model).values()] == [8, 6, 20, 5]


def test_a_budget_that_no_ranks_meet_says_what_is_smallest():
    model = decompose(network()).model
    smallest = count_params(extract(model, dict.fromkeys(("0", "3", "5", "7"), 1)))
    assert count_params(extract(model, budget=smallest)) == smallest
    with pytest.raises(InputError, match=f"budget is {smallest - 1} .* the smallest model has {smallest}"):
        extract(model, budget=smallest - 1)
    with pytest.raises(InputError, match="both given"):
        extract(model, {"0": 1}, budget=1000)
    with pytest.raises(InputError, match="ranks '9' is unknown"):
        extract(model, {"9": 1})
    with pytest.raises(InputError, match="whole 'head' is unknown"):
        extract(model, budget=1000, whole="head")


def test_a_model_without_ordered_layers_and_unknown_words_are_refused():
    for call in (hierarchical_group_lasso, PrefixSampler, lambda model: progressive_shrink(model, 1e-3), extract):
        with pytest.raises(InputError, match="model has no ordered layer"):
            call(network())
    model = decompose(network()).model
    with pytest.raises(InputError, match="mode 'per-layer' is unknown"):
        PrefixSampler(model, "per-layer")
    with pytest.raises(InputError, match="target 'softt' is unknown"):
        maestro_loss(model, PrefixSampler(model), IMAGES, CLASSES, 0.0, "softt")


def test_one_layer_alone_is_extracted_and_sampled():
    layer = MaestroLinear(6, 9)
    small = extract(layer, {"": 2})
    x = torch.randn(3, 6)
    torch.testing.assert_close(small(x), layer(x, 2))


def test_convolutions_whose_weight_is_tied_or_computed_stay():
    convolutions = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)]
    convolutions[1].weight = convolutions[0].weight
    nn.utils.weight_norm(convolutions[2])
    found = decompose(nn.Sequential(*convolutions, nn.Conv2d(4, 4, 3)))
    assert list(found.layers) == ["3"] and found.left_out == {
        "0": "its weight is 1.weight too",
        "1": "its weight is 0.weight too",
        "2": "a convolution whose weight is computed from others",
    }
