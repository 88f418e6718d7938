"""LoRAs that are there already, from a peft folder or from training, as the experts of a bank."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.adapt.peft import LoRAs, read_loras

Part = tuple[Tensor, Tensor, float] | None
"""A (r, I), B (O, r) and the scale of one expert's LoRA of one layer; None where it has none."""


def by_layer(model: nn.Module, loras: Sequence[LoRAs | str | Path], *kinds: type[nn.Module]) -> dict[str, list[Part]]:
    """The LoRAs of each layer, one an expert, None where an expert has none; in the order of the model.

    Raises:
        InputError: none is given; or layers that the model lacks, that are none of `kinds` or that have other widths.
    """
    read = [lora if isinstance(lora, Mapping) else read_loras(lora, model) for lora in loras]
    if not any(read):
        raise InputError("loras is empty but must hold the LoRAs of at least one layer")
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in kinds}
    kind = " or ".join(kind.__name__ for kind in kinds)
    wrong = []
    for e, lora in enumerate(read):
        for name, (a, b, _) in lora.items():
            if name not in layers:
                wrong.append(f"{name} of expert {e} is no {kind} of the model")
            elif a.shape[1:] != layers[name].weight.shape[1:] or b.flatten(1).shape != (
                len(layers[name].weight),
                len(a),
            ):
                shapes = f"A {tuple(a.shape)}, B {tuple(b.shape)}"
                wrong.append(f"{name} of expert {e} has {shapes} but the layer {tuple(layers[name].weight.shape)}")
    if wrong:
        raise InputError(f"loras do not fit this model: {'; '.join(wrong)}")
    return {name: [lora.get(name) for lora in read] for name in layers if any(name in lora for lora in read)}


def highest_ranks(experts: Mapping[str, Sequence[Part]]) -> dict[str, int]:
    """The rank that a bank needs for the LoRAs of each layer."""
    return {name: max(len(part[0]) for part in parts if part is not None) for name, parts in experts.items()}


@torch.no_grad()
def fill(bank: nn.Module, parts: Sequence[Part]) -> Tensor:
    """Put the LoRAs of one layer, one an expert, in a bank; the rest of it becomes zero. Returns the ranks (E,)."""
    bank.a.zero_(), bank.b.zero_()
    for e, part in enumerate(parts):
        if part is not None:
            a, b, scale = part
            bank.a[e, : len(a)], bank.b[e, :, : len(a)], bank.scale[e] = a, b.flatten(1), scale
    return torch.tensor([0 if part is None else len(part[0]) for part in parts])


def rank_for(rank: int | dict[str, int] | None, layer: nn.Module, name: str, default: int = 8) -> int:
    """The rank of one layer, from the option `rank` of an adapter that may have them by name; `fitting_rank` else.

    A convolution is as wide as its kernel and channels together.
    """
    if isinstance(rank, dict):
        if name not in rank:
            raise InputError(f"rank names {', '.join(rank)} but must name {name} as well")
        return rank[name]
    return min(default, len(layer.weight), layer.weight[0].numel()) if rank is None else rank
