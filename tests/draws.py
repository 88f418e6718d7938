"""Tensors of a seed, and an optimiser on drawn gradients: where tests of operators and of optimisers begin."""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, in every type those that float64 has, rounded."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def walked(
    kind: Callable[..., torch.optim.Optimizer],
    shape: tuple[int, ...],
    steps: Iterable[int],
    dtype: torch.dtype = torch.float64,
    start: tuple[Tensor, dict] | None = None,
    **options,
) -> tuple[Tensor, torch.optim.Optimizer, list[Tensor]]:
    """The parameter after steps with drawn gradients, its optimiser, and every value on the way.

    Args:
        steps: the seeds of the gradients.
        start: the parameter and the state dict to go on from.
    """
    p = nn.Parameter(draw(*shape, seed=99, dtype=dtype) if start is None else start[0].clone())
    optimizer = kind([p], **options)
    if start is not None:
        optimizer.load_state_dict(copy.deepcopy(start[1]))
    path = [p.detach().clone()]
    for step in steps:
        p.grad = draw(*shape, seed=step, dtype=dtype)
        optimizer.step()
        path.append(p.detach().clone())
    return p.detach(), optimizer, path
