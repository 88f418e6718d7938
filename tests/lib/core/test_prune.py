"""Masks chosen before training: those of the highest scores, over all layers, and what each score is."""

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.prune import CRITERIA, apply_masks, highest, masks_at_start

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def loss(model: nn.Module) -> torch.Tensor:
    return model(X).square().mean()


def flat(masks: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([mask.flatten() for mask in masks.values()])


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("keep", [1, 7, 72])
def test_so_many_are_kept_and_the_model_is_as_it_was(criterion, keep):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = masks_at_start(model, criterion, keep, loss, X)
    assert flat(masks).sum() == keep and set(flat(masks).unique().tolist()) <= {0.0, 1.0}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    apply_masks(model, masks)
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight, before[f"{name}.weight"] * masks[name])
    loss(model).backward()
    assert not model[0].weight_orig.grad[masks["0"] == 0].any()


def test_scores_are_what_their_names_say():
    model = network()
    weights = torch.cat([model[i].weight.detach().flatten() for i in (0, 2)])
    assert torch.equal(
        flat(masks_at_start(model, "magnitude", 9)) == 1, weights.abs() >= weights.abs().sort().values[-9]
    )
    grads = torch.autograd.grad(loss(model), [model[0].weight, model[2].weight])
    snip = (weights * torch.cat([g.flatten() for g in grads])).abs()
    assert torch.equal(flat(masks_at_start(model, "snip", 9, loss)) == 1, snip >= snip.sort().values[-9])
    torch.manual_seed(3)
    first = flat(masks_at_start(model, "random", 9))
    assert not torch.equal(first, flat(masks_at_start(model, "random", 9)))


def test_synflow_keeps_whole_paths_where_magnitude_may_cut_a_layer_off():
    """A second layer of weights so small that by magnitude none is left."""
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    assert not masks_at_start(model, "magnitude", 12)["2"].any()
    masks = masks_at_start(model, "synflow", 12, example=X)
    into, out = masks["0"].sum(1) > 0, masks["2"].sum(0) > 0
    assert masks["2"].any() and bool((out[into]).all())  # a unit that is fed is read


def test_of_equal_scores_the_first_are_kept():
    assert torch.equal(highest({"a": torch.ones(3), "b": torch.ones(2)}, 4)["b"], torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("grasp", 3), "criterion 'grasp' is unknown"),
        (("random", 0), "keep is 0 but must be from 1 to the 72"),
        (("random", 73), "keep is 73 but must be from 1 to the 72"),
        (("snip", 3), "loss is None but snip needs one"),
        (("synflow", 3), "example is None but synflow needs one"),
    ],
)
def test_wrong_input_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        masks_at_start(network(), *arguments)
    with pytest.raises(InputError, match="without a linear layer or a convolution"):
        masks_at_start(nn.ReLU(), "random", 1)
