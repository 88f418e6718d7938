"""What a training changes: for systems that train in stages, each with a list of what is frozen."""

from collections.abc import Callable

import torch
from torch import nn


def moved(model: nn.Module, train: Callable[[nn.Module], object]) -> set[str]:
    """The names of the parameters and buffers that `train` changes by as much as a bit. It may not rename any."""
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    train(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}
