"""Do the domains of the data, or its modalities, pull a group of parameters in different directions?"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from workbench.lib.core.observe import quiet
from workbench.lib.core.task import Task
from workbench.lib.measures.gradients import Gradients, Member
from workbench.lib.measures.meters import ConflictMeter
from workbench.live.probes.find import Matrix
from workbench.live.probes.spectra import spectra
from workbench.live.records import BY_DOMAIN, BY_MODALITY, Division


class ConflictProbe:
    """Gradients of every part's own mean loss on two independent half batches: Gramians, and spectra of a sample.

    The parts are domains, whose loss is that of a batch of the domain, and modalities, where the task has several and a
    `modality_loss`: that of the tokens of one, in batches of all.

    The model runs in evaluation mode, without dropout, router noise or balance losses, so that the gradient is that of
    the task alone and nothing a training step counts is touched. Costs 2 n backward passes over `rows` rows and, while
    it runs, the memory of 2 n gradients, for n parts.

    Args:
        groups: trained parameters by group, see `find.groups`.
        rows: rows of each half batch.
        matrices: whose gradients' singular values are taken, of the mean of the two halves.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        groups: Mapping[str, Sequence[Member]],
        rows: int,
        matrices: Sequence[Matrix] = (),
    ):
        self.model, self.task, self.rows = model, task, rows
        self.meter = ConflictMeter(groups)
        self.matrices = list(matrices)
        losses = {BY_DOMAIN: self._domain_loss, BY_MODALITY: self._modality_loss}
        self.divisions = [by for by in losses if compared(task, by)]
        self._losses = {by: losses[by] for by in self.divisions}

    def in_turn(self, record: int) -> list[Division]:
        """What is compared in a record of this number: all in the first, then one after the other.

        Each costs as much as the conflict of domains alone, so that a second one does not make watching dearer.
        """
        return self.divisions if record == 0 else [self.divisions[record % len(self.divisions)]]

    def take(self, seed: int, record: int = 0) -> dict[str, np.ndarray]:
        """By the records of each `Division`: [G1, G2, X] float64 (3, n, n) of every group, spectra float32 (n, k).

        On batches that `seed` draws, of the divisions whose turn it is.
        """
        found: dict[str, np.ndarray] = {}
        for by in self.in_turn(record):
            generator = torch.Generator().manual_seed(seed)
            losses = {name: self._losses[by](part, generator) for part, name in enumerate(by.names(self.task))}
            with undisturbed(self.model), torch.enable_grad():
                halves = self.meter.gradients(losses)
            gramians = self.meter.gramians_of(halves)
            found |= {by.conflict.name(group): values.numpy() for group, values in gramians.items()}
            found |= self._spectra(by, halves, seed)
        return found

    @torch.no_grad()
    def _spectra(self, by: Division, halves: list[list[Gradients]], seed: int) -> dict[str, np.ndarray]:
        def mean(matrix: Matrix, part: int) -> Tensor:
            both = [half[part].get(id(matrix.parameter)) for half in halves]
            zero = torch.zeros_like(matrix.parameter)
            return matrix.pick(sum(zero if gradient is None else gradient for gradient in both) / 2)

        n = len(halves[0])
        wanted = {(m.name, part): mean(m, part) for m in self.matrices for part in range(n)}
        values = spectra(wanted, torch.Generator().manual_seed(seed))
        return {by.gradients.name(m.name): np.stack([values[m.name, part] for part in range(n)]) for m in self.matrices}

    def _domain_loss(self, domain: int, generator: torch.Generator) -> Callable[[int], Tensor]:
        return lambda half: self.task.loss(self.model, self._batch(generator, domain))[0]

    def _modality_loss(self, modality: int, generator: torch.Generator) -> Callable[[int], Tensor]:
        return lambda half: self.task.modality_loss(self.model, self._batch(generator, None), modality)

    def _batch(self, generator: torch.Generator, domain: int | None):
        return self.task.batch("train", self.rows, generator, domain=domain)


def compared(task: Task | None, by: Division) -> bool:
    """Whether there is anything to compare: several parts, and a loss of each."""
    return len(by.names(task)) > 1 and (by is BY_DOMAIN or hasattr(task, "modality_loss"))


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
