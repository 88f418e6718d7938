"""Do the domains of the data pull a group of parameters in different directions?"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from workbench.lib.core.observe import quiet
from workbench.lib.core.task import Task
from workbench.lib.measures.gradients import Member
from workbench.lib.measures.meters import ConflictMeter
from workbench.live.records import CONFLICT


class ConflictProbe:
    """Gradients of every domain's own mean loss on two independent half batches; all that is kept are Gramians.

    The model runs in evaluation mode, without dropout, router noise or balance losses, so that the gradient is that of
    the task alone and nothing a training step counts is touched. Costs 2 n backward passes over `rows` rows and, while
    it runs, the memory of 2 n gradients, for n domains.

    Args:
        groups: trained parameters by group, see `find.groups`.
        rows: rows of each half batch.
    """

    def __init__(self, model: nn.Module, task: Task, groups: Mapping[str, Sequence[Member]], rows: int):
        self.model, self.task, self.rows = model, task, rows
        self.meter = ConflictMeter(groups)

    def take(self, seed: int) -> dict[str, np.ndarray]:
        """[G1, G2, X] float64 (3, n, n) by their `records.CONFLICT`, on batches that `seed` draws."""
        generator = torch.Generator().manual_seed(seed)

        def loss(domain: int):
            return lambda half: self.task.loss(self.model, self._batch(generator, domain))[0]

        losses = {name: loss(i) for i, name in enumerate(self.task.domains)}
        with undisturbed(self.model), torch.enable_grad():
            gramians = self.meter.gramians(losses)
        return {CONFLICT.name(group): values.numpy() for group, values in gramians.items()}

    def _batch(self, generator: torch.Generator, domain: int):
        return self.task.batch("train", self.rows, generator, domain=domain)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in which no forward leaves a trace: modes, buffers, observers, random numbers are put back."""
    modes = {module: module.training for module in model.modules()}
    buffers: dict[Tensor, Tensor] = {buffer: buffer.clone() for buffer in model.buffers()}
    devices = {buffer.device for buffer in (*model.parameters(), *model.buffers()) if buffer.is_cuda}
    with torch.random.fork_rng(devices=[device.index for device in devices]), quiet(model):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for buffer, value in buffers.items():
                    buffer.copy_(value)
