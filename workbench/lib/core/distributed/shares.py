"""All ranks of torch.distributed, with equal shares of the rows of every batch."""

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.core.distributed.grids import divisors
from workbench.lib.core.replicas import Replicas
from workbench.lib.core.task import Batch


class Ranks(Replicas):
    """Shares out the rows of a batch in the order of the ranks, and brings together what is found on them.

    How gradients become those of the whole batch is for those to say who know which ranks have what of the model.
    """

    def __init__(self):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def share(self, batch: Batch) -> Batch:
        if len(batch) % self.world:
            fit = ", ".join(map(str, divisors(len(batch))))
            raise InputError(f"{self.world} processes cannot share batch_size = {len(batch)} evenly: {fit} can")
        n = len(batch) // self.world
        return batch.rows(self.rank * n, (self.rank + 1) * n)

    def means(self, loss: Tensor, aux: Tensor | float) -> tuple[float, float]:
        both = torch.stack([loss.detach().double(), torch.as_tensor(aux, device=loss.device).detach().double()])
        dist.all_reduce(both)
        return tuple((both / self.world).tolist())

    def total(self, counts: Tensor) -> Tensor:
        counts = counts.clone()
        dist.all_reduce(counts)
        return counts
