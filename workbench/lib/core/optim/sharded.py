"""Parameters that several processes hold in parts (DTensor, FSDP2): whole for the step, and in parts again after it."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process that has a part of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parted(update: Tensor, like: Tensor) -> Tensor:
    """The parts of `update`, which every process has whole, as those of `like` lie. Nothing is sent."""
    if not isinstance(like, DTensor):
        return update
    return distribute_tensor(update, like.device_mesh, like.placements, src_data_rank=None)


def finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Of each tensor whether all of it is finite, on every process that has a part of it alike.

    Every process has to ask of the same ones. Nothing is gathered: flags are sent, once for each dimension of a mesh.
    """
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    held = [i for i, part in enumerate(parts) if part.numel()]  # of a matrix of one row most processes hold none
    wrong = torch.zeros(len(parts), device=parts[0].device if parts else None)
    if held:
        norms = torch.stack([norm.to(wrong) for norm in torch._foreach_norm([parts[i] for i in held])])
        for i, sound in zip(held, norms.isfinite().tolist(), strict=True):
            wrong[i] = 0 if sound else 1 - int(parts[i].isfinite().all())  # the norm of huge numbers is infinite
    for mesh in {tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}:
        for dimension in range(mesh.ndim):
            dist.all_reduce(wrong, dist.ReduceOp.MAX, mesh.get_group(dimension))
    return (wrong == 0).tolist()
