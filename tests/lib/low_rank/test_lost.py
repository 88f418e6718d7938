"""LOST: the layer is what its formula says, both parts come from one SVD, and budgets are matched by count."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.budget import count_params
from workbench.lib.core.factored import LowRankLinear, merge_back
from workbench.lib.low_rank.lost import (
    CoLALinear,
    LOSTLinear,
    SLTrainLinear,
    apply_lost,
    importance,
    match_budget,
    shapes_of,
)

D_OUT, D_IN, R, C = 20, 14, 4, 3


def start(seed: int = 0, o: int = D_OUT, i: int = D_IN) -> torch.Tensor:
    return torch.randn(o, i, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = start(1, 6, D_IN)


@pytest.mark.parametrize("act", [None, "silu"])
def test_it_is_the_formula_and_so_are_its_gradients(act):
    layer = LOSTLinear.from_dense(start(), R, C, nn.Parameter(start(2, 1, D_OUT)[0]), act=act, gamma=0.6)
    y = layer(X)
    y.sin().sum().backward()
    a, b, z, bias = (p.detach().clone().requires_grad_() for p in (layer.a, layer.b, layer.z, layer.bias))
    pick = F.one_hot(layer.idx, D_IN).double()  # P (c, D_IN)
    code = X @ a.T
    code = F.silu(code) if act else code
    expected = 0.6 * code @ b.T + 0.4 * X @ (z @ pick).T + bias
    torch.testing.assert_close(y, expected)
    expected.sin().sum().backward()
    for ours, theirs in ((layer.a, a), (layer.b, b), (layer.z, z), (layer.bias, bias)):
        torch.testing.assert_close(ours.grad, theirs.grad)
    if act is None:
        torch.testing.assert_close(layer.merged(), 0.6 * b @ a + 0.4 * z @ pick)
        torch.testing.assert_close(y, X @ layer.merged().T + layer.bias)
        assert torch.linalg.matrix_rank(layer.merged()) <= R + C


def test_at_full_rank_without_columns_it_is_the_layer_it_starts_from():
    layer = LOSTLinear.from_dense(start(), D_IN, 0, gamma=1.0, act=None)
    torch.testing.assert_close(layer(X), X @ start().T)
    low = LowRankLinear.from_dense(start(), R)
    torch.testing.assert_close(LOSTLinear.from_dense(start(), R, 0, gamma=1.0, act=None)(X), low(X))


def test_factors_and_choice_come_from_triplets_that_differ():
    weight = start()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    parts = [(left[:, s] * values[s]) @ right[s] for s in (slice(R), slice(R, 2 * R), slice(2 * R, None))]
    layer = LOSTLinear.from_dense(weight, R, C)
    torch.testing.assert_close(layer.b @ layer.a, parts[0])
    torch.testing.assert_close(importance(weight, R), parts[1].norm(dim=0))
    torch.testing.assert_close(importance(weight, R, 14 - R), (parts[1] + parts[2]).norm(dim=0))
    torch.testing.assert_close(importance(weight, R, 6, tail=True), parts[2].norm(dim=0))
    assert layer.idx.tolist() == sorted(parts[1].norm(dim=0).topk(C).indices.tolist())
    torch.testing.assert_close(weight.square().sum(), sum(part.square().sum() for part in parts))
    assert torch.equal(layer.z, weight[:, layer.idx])  # of the weight itself


def test_permuted_inputs_permute_the_choice_and_turned_outputs_leave_it():
    weight, order = start(), torch.randperm(D_IN, generator=torch.Generator().manual_seed(3))
    idx = LOSTLinear.from_dense(weight, R, C).idx
    assert {int(order[j]) for j in LOSTLinear.from_dense(weight[:, order], R, C).idx} == set(idx.tolist())
    turn = torch.linalg.qr(start(4, D_OUT, D_OUT)).Q
    assert torch.equal(LOSTLinear.from_dense(turn @ weight, R, C).idx, idx)


@pytest.mark.parametrize("selection", ["svd", "svd_tail", "magnitude", "random"])
def test_columns_stay_in_training_and_other_inputs_come_through_the_factors_alone(selection):
    torch.manual_seed(0)
    layer = LOSTLinear.from_dense(start(), R, C, selection=selection)
    idx = layer.idx.clone()
    assert idx.tolist() == sorted(set(idx.tolist())) and len(idx) == C
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(X).square().sum().backward()
        optimizer.step()
    assert torch.equal(layer.idx, idx)
    layer.a.data.zero_()
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x), X[0])
    assert jacobian.any(0).nonzero().flatten().tolist() == idx.tolist()


def test_selections_choose_what_they_say():
    weight = start()
    weight[:, 5] *= 100
    assert 5 in LOSTLinear.from_dense(weight, 1, 1, selection="magnitude").idx
    assert 5 not in LOSTLinear.from_dense(weight, 1, 1).idx  # the first triplet has it all
    torch.manual_seed(0)
    drawn = {tuple(LOSTLinear.from_dense(weight, R, C, selection="random").idx.tolist()) for _ in range(20)}
    assert len(drawn) > 10


def test_it_has_the_numbers_of_the_formula_and_nothing_dense():
    layer = LOSTLinear(D_IN, D_OUT, R, C)
    matrices = R * (D_IN + D_OUT) + C * D_OUT
    assert count_params(layer) == matrices + D_OUT and layer.flops == 2 * matrices
    assert not any(t.shape == (D_OUT, D_IN) for t in (*layer.parameters(), *layer.buffers()))
    cola = CoLALinear(D_IN, D_OUT, R, bias=False)
    assert count_params(cola) == R * (D_IN + D_OUT)
    torch.testing.assert_close(cola(X.float()), F.silu(X.float() @ cola.a.T) @ cola.b.T)


def test_gamma_trains_where_it_is_asked_to():
    layer = LOSTLinear.from_dense(start(), R, C, train_gamma=True, gamma=0.5, act=None)
    layer(X).sin().sum().backward()
    low, columns = X @ (layer.b @ layer.a).T, X[:, layer.idx] @ layer.z.T
    torch.testing.assert_close(layer.gamma.grad, (layer(X).cos() * (low - columns)).sum())
    assert LOSTLinear(D_IN, D_OUT, R, C).gamma == 0.7


def test_colas_start_has_its_variance():
    torch.manual_seed(0)
    cola = CoLALinear(200, 300, 50)
    for factor in (cola.a, cola.b):
        assert factor.std().item() == pytest.approx((50 * 500) ** -0.25, rel=0.05)


def test_sltrain_is_its_dense_sum():
    torch.manual_seed(0)
    layer = SLTrainLinear(D_IN, D_OUT, R, 30, alpha=8.0).double()
    assert not layer.b.any() and layer.values.abs().max() <= D_IN**-0.5
    nn.init.normal_(layer.b)
    sparse = torch.zeros(D_OUT * D_IN).double()
    sparse[layer.places] = layer.values.detach()
    assert layer.places.tolist() == sorted(set(layer.places.tolist())) and (sparse != 0).sum() == 30
    expected = 2.0 * layer.b @ layer.a + sparse.view(D_OUT, D_IN)
    torch.testing.assert_close(layer.merged(), expected)
    torch.testing.assert_close(layer(X), X @ expected.T + layer.bias)
    layer(X).sin().sum().backward()
    assert all(p.grad.any() for p in layer.parameters())
    assert count_params(layer) == R * (D_IN + D_OUT) + 30 + D_OUT and layer.flops == 2 * D_IN * D_OUT


SHAPES = {"qkv": (96, 32), "out": (32, 32), "up": (128, 32), "down": (32, 64)}


@pytest.mark.parametrize("numbers", [1500, 2500, 4000, 7000])
@pytest.mark.parametrize("sparse", [0.0, 0.25, 0.6])
def test_a_budget_is_matched_by_count(numbers, sparse):
    fit = match_budget(SHAPES, numbers, sparse)
    factors = fit.rank * sum(o + i for o, i in SHAPES.values())
    assert factors <= (1 - sparse) * numbers < factors + sum(o + i for o, i in SHAPES.values())
    if not sparse:
        assert not any(fit.columns.values()) and not any(fit.counts.values())
        return
    columns = factors + sum(c * SHAPES[name][0] for name, c in fit.columns.items())
    assert numbers - 32 < columns <= numbers and factors + sum(fit.counts.values()) == numbers
    share = (numbers - factors) / sum(o * i for o, i in SHAPES.values())
    assert all(abs(c - share * SHAPES[name][1]) < 2 for name, c in fit.columns.items())


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32, bias=False))


def test_it_is_put_on_a_model_by_one_call_and_a_linear_one_merges_back():
    model = small()
    shapes = shapes_of(model)
    report = apply_lost(model, 0.5, 0.3, act=None).report()
    assert shapes == {"0": (48, 32), "2": (32, 48)}
    dense = 2 * 48 * 32
    assert 0.5 * dense - 32 < report["params"] - 48 <= 0.5 * dense and report["params_before"] == dense + 48
    assert report["flops"] == 2 * (report["params"] - 48)
    x = torch.randn(5, 32)
    y = model(x)
    torch.testing.assert_close(merge_back(model)(x), y)


def test_with_silu_nothing_merges_and_its_weight_can_be_looked_at_but_not_computed_with():
    model = small()
    apply_lost(model)
    with pytest.raises(InputError, match=r"^0 cannot be merged back: silu is between its factors"):
        merge_back(model)
    assert model[0].weight.shape == (48, 32) and model[0].weight.dtype == torch.float32
    with pytest.raises(InputError, match="the model computes with a weight, but silu is between"):
        model[0].weight + 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LOSTLinear(8, 8, 9, 1), "^rank is 9 but must be between 1"),
        (lambda: LOSTLinear(8, 8, 2, 9), "^columns is 9 but must be between 0 and d_in = 8"),
        (lambda: LOSTLinear(8, 8, 2, 1, gamma=0.0), "^gamma is 0.0 but must be above 0"),
        (lambda: LOSTLinear(8, 8, 2, 1, act="relu"), "^act 'relu' is unknown"),
        (lambda: LOSTLinear.from_dense(start(), 2, 1, selection="top"), "^selection 'top' is unknown"),
        (lambda: LOSTLinear.from_dense(start(), 2, 1, k=13), "^k is 13 but must be between 1 and the 12 triplets"),
        (lambda: LOSTLinear.from_dense(start(), D_IN, 1), "^k is 0 but must be between 1 and the 0 triplets"),
        (lambda: LOSTLinear.from_dense(start() / 0, 2, 1), r"^the weight \(20, 14\) is not finite"),
        (lambda: SLTrainLinear(8, 8, 2, 65), "^count is 65 but must be between 0 and 64"),
        (lambda: match_budget(SHAPES, 400, 0.25), "^numbers is 400 but must be at least 598: a rank of 1 everywhere"),
        (lambda: match_budget(SHAPES, 4000, 1.0), "^sparse is 1.0 but must be at least 0 and below 1"),
        (lambda: match_budget({}, 4000, 0.1), "^shapes is empty"),
        (lambda: apply_lost(small(), 0.0), "^share is 0.0 but must be above 0"),
        (lambda: apply_lost(small(), 0.01), "^numbers is 30 but must be at least 214"),
        (lambda: apply_lost(small(), targets="1"), "^targets '1' matches '1', a GELU"),
    ],
)
def test_wrong_numbers_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("layer", [LOSTLinear(8, 8, 2, 3), LOSTLinear(8, 8, 2, 3, act=None), SLTrainLinear(8, 8, 2, 9)])
def test_products_in_half_precision(layer):
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    torch.testing.assert_close(y.float(), layer(x), atol=0.05, rtol=0.05)
