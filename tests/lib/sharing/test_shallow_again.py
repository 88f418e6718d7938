"""Shallow again: layouts that agree to the order that is said, and one wide convolution that is the parallel one."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.sharing.shallow_again import (
    ResidualStack,
    conv_layer,
    equivalence_gap,
    fuse_parallel_convs,
    order_terms,
    residual_network,
    to_parallel,
)

ACTIVATIONS = {"linear": nn.Identity, "tanh": nn.Tanh, "relu": nn.ReLU}
Z = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def stack(n=4, kind="relu", bias=True, **options) -> ResidualStack:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(5, 5, bias=bias), ACTIVATIONS[kind]()) for _ in range(n)]
    return ResidualStack(layers, **options).double()


def rms(x: torch.Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


def rewired(model: ResidualStack, mode: str, **options) -> ResidualStack:
    return ResidualStack(model.layers, mode, scale=model.scale, **options)


def fit(model: nn.Module, steps: int = 5) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        x = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_one_layer_is_the_same_in_any_layout_through_a_whole_training():
    torch.manual_seed(0)
    deep = residual_network((1, 6, 6), channels=4, n=1, classes=3)
    wide = copy.deepcopy(deep)
    wide.stack = to_parallel(wide.stack)
    assert all(torch.equal(a, b) for a, b in zip(fit(deep), fit(wide), strict=True))


def test_linear_layers_are_the_sum_of_all_orders():
    model = stack(bias=False, kind="linear")
    layers = [layer[0] for layer in model.layers]
    terms = order_terms(layers, Z, 4)
    torch.testing.assert_close(model(Z), sum(terms), atol=1e-12, rtol=0)
    torch.testing.assert_close(rewired(model, "parallel")(Z), terms[0] + terms[1], atol=1e-12, rtol=0)
    for order, term in enumerate(terms):
        products = []
        for chosen in itertools.combinations(layers, order):
            z = Z
            for layer in chosen:
                z = layer(z)
            products.append(z)
        assert len(products) == math.comb(4, order)
        torch.testing.assert_close(term, sum(products), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_gap_is_of_second_order(kind):
    """Half the layers' size, a quarter of the gap; and s sweeps are off by the order s + 1."""
    model = stack(kind=kind, bias=kind != "linear")
    for sweeps in (1, 2, 3):
        gaps = []
        for scale in (0.02, 0.01, 0.005):
            model.scale = scale
            other = rewired(model, "picard", sweeps=sweeps)
            gaps.append(float((model(Z) - other(Z)).norm().detach()))
        for above, below in itertools.pairwise(gaps):
            assert above / below == pytest.approx(2 ** (sweeps + 1), rel=0.0375)
    model.scale = 0.01
    found = equivalence_gap(model, to_parallel(model), Z)
    assert found["order_estimate"] == pytest.approx(2, abs=0.05)
    assert found["norm_gap"] == pytest.approx(rms(model(Z) - to_parallel(model)(Z)))
    assert found["rel_gap"] == pytest.approx(found["norm_gap"] / rms(model(Z) - Z))
    assert found["rel_gap"] < 0.05 and model.scale == 0.01


def test_far_from_small_layers_the_gap_is_large_and_of_no_order():
    model = stack(scale=20.0)
    assert equivalence_gap(model, to_parallel(model), Z)["rel_gap"] > 0.5
    same = stack(n=1)
    assert equivalence_gap(same, to_parallel(same), Z) == {"norm_gap": 0.0, "rel_gap": 0.0, "order_estimate": 0.0}


def test_the_order_of_layers_matters_in_sequence_alone():
    model = stack()
    other = ResidualStack(list(model.layers)[::-1])
    torch.testing.assert_close(rewired(other, "parallel")(Z), rewired(model, "parallel")(Z))
    assert (other(Z) - model(Z)).abs().max() > 1e-3


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_wide_convolution_is_the_parallel_ones(dims, scale):
    torch.manual_seed(0)
    model = ResidualStack([conv_layer(3, 5, dims) for _ in range(4)], "parallel", scale=scale)
    wide, z = fuse_parallel_convs(model), torch.randn(2, 3, *[7] * dims)
    results = []
    for layout in (model, wide):
        given = z.clone().requires_grad_()
        y = layout(given)
        y.sin().sum().backward()
        results.append([y, given.grad])
    weight, bias = (torch.cat([getattr(layer[0], name).grad for layer in model.layers]) for name in ("weight", "bias"))
    results[0] += [weight, bias]
    results[1] += [wide.conv.weight.grad, wide.conv.bias.grad]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_layouts_have_the_same_parameters_and_to_parallel_shares_them():
    deep = residual_network((1, 8, 8), channels=6, n=5, classes=10, kernel=3)
    count = sum(p.numel() for p in deep.parameters())
    stem, head = 9 * 6 + 6, 6 * 64 * 10 + 10
    assert count == stem + 5 * (9 * 36 + 6) + head
    wide = to_parallel(deep.stack)
    assert all(a is b for a, b in zip(deep.stack.parameters(), wide.parameters(), strict=True))
    fused = fuse_parallel_convs(wide)
    assert sum(p.numel() for p in fused.parameters()) == sum(p.numel() for p in wide.parameters())
    assert not {id(p) for p in fused.parameters()} & {id(p) for p in wide.parameters()}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_sweeps_lead_from_parallel_to_sequential(kind):
    """To the last bit at both ends, and nearer with each, of small layers."""
    model = stack(kind=kind, scale=0.1)
    ends = [rewired(model, "picard", sweeps=s)(Z) for s in (1, 2, 3, 4)]
    assert torch.equal(ends[0], rewired(model, "parallel")(Z)) and torch.equal(ends[3], model(Z))
    gaps = [float((end - model(Z)).norm().detach()) for end in ends]
    assert gaps == sorted(gaps, reverse=True) and gaps[3] == 0


def test_a_sweep_calls_a_layer_only_while_its_input_changes():
    model, calls = stack(), []
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    rewired(model, "picard", sweeps=3)(Z)
    assert calls == [0, 1, 2, 3, 1, 2, 3, 2, 3]


@pytest.mark.parametrize(("kind", "collapses"), [("linear", True), ("tanh", False), ("relu", False)])
def test_linear_layers_side_by_side_are_one_matrix(kind, collapses):
    model = rewired(stack(n=6, kind=kind, bias=False), "parallel")
    x = torch.randn(200, 5, dtype=torch.float64)
    matrix = torch.eye(5) + sum(layer[0].weight for layer in model.layers)
    assert torch.allclose(model(x), x @ matrix.T) == collapses
    hidden = torch.cat([layer(x) for layer in model.layers], 1)  # what a readout could take apart
    assert int(torch.linalg.matrix_rank(hidden)) == (5 if collapses else 30)


def test_a_saved_network_computes_the_same_in_its_layout():
    first, second = (residual_network((2, 10), channels=4, n=3, classes=2, mode="picard") for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 2, 10)
    assert torch.equal(first(x), second(x))


def test_wrong_input_is_named():
    def convs(*layers: nn.Module) -> ResidualStack:
        return ResidualStack(layers, "parallel")

    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU())
    for call, message in [
        (lambda: ResidualStack([]), "layers is empty"),
        (lambda: stack(mode="deep"), "mode 'deep' is unknown"),
        (lambda: stack(mode="picard", sweeps=0), "sweeps is 0 but must be from 1 to the 4 layers"),
        (lambda: stack(mode="picard", sweeps=5), "sweeps is 5 but must be from 1 to the 4 layers"),
        (lambda: ResidualStack([nn.Linear(5, 1).double()])(Z), r"layers\[0\] makes \(6, 1\) of \(6, 5\) but must keep"),
        (lambda: fuse_parallel_convs(stack()), "stack is sequential but must be parallel"),
        (lambda: fuse_parallel_convs(stack(mode="parallel")), r"layers\[0\] is a Sequential but must be Sequential\(c"),
        (lambda: fuse_parallel_convs(convs(conv_layer(3), conv_layer(3, 5))), r"layers\[1\] has another form than"),
        (
            lambda: fuse_parallel_convs(convs(nn.Sequential(nn.Conv2d(3, 3, 1), nn.PReLU()))),
            "an activation with parameters",
        ),
        (lambda: fuse_parallel_convs(convs(grouped)), "layers have 2 groups but must have 1"),
        (lambda: order_terms([nn.Linear(5, 5)], Z, 1), r"layers\[0\] is a Linear but .* without a bias"),
        (lambda: order_terms([nn.Sequential(nn.ReLU())], Z, 1), r"layers\[0\] is a Sequential but must be linear"),
        (lambda: order_terms([nn.Linear(5, 5, bias=False)], Z, 2), "max_order is 2 but must be from 0 to the 1 layers"),
        (lambda: residual_network((8,), 4, 2, 10), r"shape is \(8,\) but must be"),
        (lambda: residual_network((1, 8, 8), 4, 0, 10), "below 1"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
