"""Parameters that several processes hold in parts (DTensor, FSDP2): whole for the step, and in parts again after it."""

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
