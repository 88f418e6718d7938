import copy

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.factored import FactoredLinear, LowRankLinear, factorise, merge_back, replace_linears


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12, bias=False)).double()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ).eval()


X = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_the_error_of_a_truncation_is_the_energy_of_what_is_cut(rank):
    weight = small()[0].weight.detach()
    layer = LowRankLinear.from_dense(weight, rank)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close((weight - layer.merged()).norm(), values[rank:].square().sum().sqrt())
    assert layer.rank == rank and torch.linalg.matrix_rank(layer.merged()) == rank
    torch.testing.assert_close(layer.u.T @ layer.u, torch.diag(values[:rank]))  # the root on either side
    torch.testing.assert_close(layer.v @ layer.v.T, torch.diag(values[:rank]))


def test_at_full_rank_it_is_the_function_that_was_there_and_merged_back_too():
    model = small()
    y = model(X)
    replaced = factorise(model, 12)
    assert [type(layer) for layer in model if not isinstance(layer, nn.GELU)] == [LowRankLinear] * 2
    torch.testing.assert_close(model(X), y)
    low = factorise(merge_back(model), 4).model
    y = low(X)
    torch.testing.assert_close(merge_back(low)(X), y)
    assert [type(layer) for layer in low] == [nn.Linear, nn.GELU, nn.Linear] and low[2].bias is None
    assert replaced.left_out == {}


def test_the_report_counts_parameters_and_operations():
    model = small()
    bias = model[0].bias
    report = factorise(model, {"0": 4}).report()
    row = {"rank": 4, "params_before": 260, "params": 148, "flops_before": 480, "flops": 256}
    assert report["layers"] == {"0": row}
    assert (report["params_before"], report["params"]) == (500, 148 + 240)
    assert model[0].bias is bias and type(model[2]) is nn.Linear


def test_a_new_layer_varies_as_a_new_linear_one():
    torch.manual_seed(0)
    x = torch.randn(4000, 64)
    ours, usual = LowRankLinear(64, 96, 8, bias=False)(x), nn.Linear(64, 96, bias=False)(x)
    assert (ours.std() / usual.std()).item() == pytest.approx(1, abs=0.1)
    assert LowRankLinear(4, 4, 2).bias.shape == (4,)


def test_gradients_are_those_of_the_product():
    layer = LowRankLinear(6, 5, 3).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    layer(x).sin().sum().backward()
    u, v, bias = (p.detach().clone().requires_grad_() for p in (layer.u, layer.v, layer.bias))
    (x @ (u @ v).T + bias).sin().sum().backward()
    for ours, theirs in ((layer.u, u), (layer.v, v), (layer.bias, bias)):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_on_gpt2_the_tied_output_stays_and_turned_layers_turn_back():
    model = gpt2()
    tokens = torch.arange(12).view(2, 6)
    y, before = model(tokens).logits, copy.deepcopy(model)
    replaced = factorise(model, 16)
    assert replaced.left_out["lm_head"] == "its weight is transformer.wte.weight too"
    assert len(replaced.layers) == 8 and all(layer.turned for layer in replaced.layers.values())
    torch.testing.assert_close(model(tokens).logits, y, atol=1e-5, rtol=1e-4)
    layer = model.transformer.h[0].mlp.c_fc
    assert layer.weight.shape == before.transformer.h[0].mlp.c_fc.weight.shape
    merge_back(model)
    model.load_state_dict(before.state_dict())  # the kinds, names and shapes that were there
    assert torch.equal(model(tokens).logits, y)
    with pytest.raises(InputError, match=r"lm_head: its weight is transformer\.wte\.weight too"):
        factorise(model, 2, "lm_head")


def test_what_was_frozen_or_in_evaluation_stays_so():
    model = small().eval()
    model[0].weight.requires_grad_(False)
    factorise(model, 2)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {
        "0.bias": True,
        "0.v": False,
        "0.u": False,
        "2.v": True,
        "2.u": True,
    }
    assert not any(module.training for module in model.modules())


def test_a_layer_that_is_used_twice_is_replaced_in_both_places():
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": layer, "b": nn.ModuleDict({"c": layer})})
    factorise(model, 2, "a")
    assert model["a"] is model["b"]["c"] and isinstance(model["a"], LowRankLinear)


class Twice(FactoredLinear):
    def merged(self):
        raise InputError("it is no linear map")


def test_what_cannot_be_merged_says_so_and_the_model_stays():
    model = small()
    replace_linears(model, lambda layer, name: Twice(20, 12) if name == "2" else None)
    factorise(model, 2, "0")
    with pytest.raises(InputError, match=r"^2 cannot be merged back: it is no linear map"):
        merge_back(model)
    assert isinstance(model[0], LowRankLinear)


@pytest.mark.parametrize(
    ("ranks", "targets", "message"),
    [
        (13, "*", "^0: rank is 13 but must be between 1 and the layer's smaller width, 12"),
        (0, "2", "^2: rank is 0 but must be between 1"),
        (2, "nothing", "^targets 'nothing' is unknown"),
        (2, "1", "^targets '1' matches '1', a GELU, but must match linear layers"),
        ({"0": 2, "3": 2}, "*", "^ranks has '3', which is no linear layer"),
        ({"2": 13}, "*", "^2: rank is 13"),
    ],
)
def test_wrong_ranks_and_targets_are_named_and_the_model_stays(ranks, targets, message):
    model = small()
    with pytest.raises(InputError, match=message):
        factorise(model, ranks, targets)
    assert [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.Linear]


def test_a_weight_that_is_not_finite_has_no_factors():
    model = small()
    model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"^2: the weight \(12, 20\) is not finite"):
        factorise(model, 2)
    assert type(model[0]) is nn.Linear


def test_layers_whose_weight_is_computed_stay():
    for norm in (nn.utils.weight_norm, nn.utils.spectral_norm):
        model = nn.Sequential(norm(nn.Linear(12, 12)), nn.Linear(12, 12))
        replaced = factorise(model, 3)
        assert list(replaced.layers) == ["1"] and replaced.left_out == {"0": "its weight is computed from others"}
