"""What a training asks of the other processes that train the same model; `ALONE` is the answer of one process.

Every process draws the whole batch and takes its share of the rows. Means over the batch (loss, gradients) are means
over the shares, which are equal; counts over the batch (the load of the experts) are sums. So all processes together
make the step that one would make of the whole batch. `distributed.layouts` has those that are not alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Replicas:
    """One process, which has it all.

    A module that counts over the batch has an attribute `replicas`, by default `ALONE`.

    Attributes:
        rank, world: which process this is, of how many.
    """

    rank, world = 0, 1

    def share(self, batch: Any) -> Any:
        """What this process trains on of a batch, which is of the task's own kind."""
        return batch

    def means(self, loss: Tensor, aux: Tensor | float) -> tuple[float, float]:
        """Task loss and auxiliary loss of the whole batch, from those of the share."""
        return loss.item(), float(torch.as_tensor(aux).detach())

    def total(self, counts: Tensor) -> Tensor:
        """Counts over the whole batch, from those over the share; without gradient."""
        return counts

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        """Make the gradients those of the whole batch, scale them to a norm of at most `max_norm`; the norm before."""
        return float(nn.utils.clip_grad_norm_(parameters, max_norm))


ALONE = Replicas()
