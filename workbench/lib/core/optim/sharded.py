"""Parameters that several processes hold in parts (DTensor, FSDP2): whole for the step, and in parts again after it."""

import math
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
    sound = [True] * len(parts)
    if held:
        norms = torch._foreach_norm([parts[i] for i in held])
        for i, norm in zip(held, torch.stack([norm.to(norms[0]) for norm in norms]).tolist(), strict=True):
            sound[i] = math.isfinite(norm) or bool(parts[i].isfinite().all())  # the norm of huge numbers is infinite
    if meshes := {tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}:
        flags = torch.tensor(sound, dtype=torch.float32, device=parts[0].device)
        for mesh in meshes:
            for dimension in range(mesh.ndim):
                dist.all_reduce(flags, dist.ReduceOp.MIN, mesh.get_group(dimension))
        sound = flags.bool().tolist()
    return sound
