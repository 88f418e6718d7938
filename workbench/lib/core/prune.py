"""Pruning at initialisation: a fixed mask over the weights of a model, chosen before it trains. Baselines of sharing.

    masks = masks_at_start(model, "synflow", keep=1000, example=images)
    apply_masks(model, masks)

A criterion gives every weight of the model's linear layers and convolutions a score, and those of the highest scores
are kept, whichever layer they are in. Masks are put on by `torch.nn.utils.prune`, so what is trained are the
parameters `weight_orig`, and `prune.remove` makes the mask final. Biases and norms are never pruned.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from workbench.errors import InputError, unknown
from workbench.lib.core.modes import evaluating

CRITERIA = ("random", "magnitude", "snip", "synflow")
ROUNDS = 100

Layers = dict[str, nn.Module]
Scores = dict[str, Tensor]


def masks_at_start(
    model: nn.Module,
    criterion: str,
    keep: int,
    loss: Callable[[nn.Module], Tensor] | None = None,
    example: Tensor | None = None,
) -> Scores:
    """Which weights of a model to keep, by a criterion. The model stays as it is.

    Args:
        criterion: "random" (torch's global generator); "magnitude" |w|; "snip" |w dL/dw| (Lee et al. 2019); "synflow"
            (Tanaka et al. 2020): |w| dR/d|w| with R the sum of the outputs for an input of ones where every parameter
            is its absolute value, in 100 rounds that prune exponentially more.
        keep: at least 1.
        loss: of a model on a batch, for "snip".
        example: an input (B, ...) whose shape "synflow" needs.

    Returns:
        The mask of each layer, 0 or 1.

    Raises:
        InputError: the criterion is unknown, lacks what it needs, `keep` is out of range, or there is no layer.
    """
    if criterion not in CRITERIA:
        raise unknown("criterion", criterion, CRITERIA)
    layers = prunable(model)
    n = sum(layer.weight.numel() for layer in layers.values())
    if not 1 <= keep <= n:
        raise InputError(f"keep is {keep} but must be from 1 to the {n} weights that can be pruned")
    if criterion == "synflow":
        if example is None:
            raise InputError("example is None but synflow needs one")
        return _synflow(model, keep, example)
    if criterion == "snip":
        if loss is None:
            raise InputError("loss is None but snip needs one")
        weights = [layer.weight for layer in layers.values()]
        grads = torch.autograd.grad(loss(model), weights)
        scores = {name: (w * g).detach().abs() for name, w, g in zip(layers, weights, grads, strict=True)}
    elif criterion == "magnitude":
        scores = {name: layer.weight.detach().abs() for name, layer in layers.items()}
    else:
        scores = {name: torch.rand_like(layer.weight) for name, layer in layers.items()}
    return highest(scores, keep)


def apply_masks(model: nn.Module, masks: Scores) -> None:
    """Put masks on the layers they are named after."""
    for name, mask in masks.items():
        prune.custom_from_mask(model.get_submodule(name), "weight", mask)


def highest(scores: Scores, keep: int) -> Scores:
    """Masks of the `keep` highest scores of all layers together; of equal ones the first."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    kept = torch.zeros_like(flat)
    kept[flat.argsort(descending=True, stable=True)[:keep]] = 1
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}


def prunable(model: nn.Module) -> Layers:
    """The linear layers and convolutions of a model, by name."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    if not found:
        raise InputError(f"model is a {type(model).__name__} without a linear layer or a convolution to prune")
    return found


def _synflow(model: nn.Module, keep: int, example: Tensor) -> Scores:
    copy = deepcopy(model).double()  # products of many layers leave float32's range
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.abs_()
    layers, whole = prunable(copy), {name: layer.weight.detach().clone() for name, layer in prunable(copy).items()}
    n = sum(weight.numel() for weight in whole.values())
    ones = torch.ones_like(example[:1], dtype=torch.float64)
    masks = {name: torch.ones_like(weight) for name, weight in whole.items()}
    weights = [layer.weight for layer in layers.values()]
    with evaluating(copy), torch.enable_grad():
        for step in range(1, ROUNDS + 1):
            grads = torch.autograd.grad(copy(ones).sum(), weights)
            scores = {name: w.detach() * g for name, w, g in zip(layers, weights, grads, strict=True)}
            # what is masked stays so: its score is 0, and it comes after all that are kept
            ranked = {name: torch.where(masks[name] > 0, score, -1.0) for name, score in scores.items()}
            masks = highest(ranked, round(n * (keep / n) ** (step / ROUNDS)))
            with torch.no_grad():
                for name, layer in layers.items():
                    layer.weight.copy_(whole[name] * masks[name])
    return {name: mask.to(prunable(model)[name].weight.dtype) for name, mask in masks.items()}
