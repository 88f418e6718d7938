"""A task: real data with splits, a loss and a metric, in the one form the training loop and the studies use.

Tensor letters: B batch, T time, V vocabulary; of images C channels, H height, W width.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError, unknown
from workbench.lib.core.modes import evaluating
from workbench.lib.core.routing import Context
from workbench.lib.data.types import Arrays, TextDomains


@dataclass(frozen=True)
class Batch:
    """inputs (B, ...), targets (B, ...) and the domain (B,) of each row."""

    inputs: Tensor
    targets: Tensor
    domain: Int64[Tensor, " batch"]

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device; data stays on the CPU until it is used."""
        return Batch(self.inputs.to(device), self.targets.to(device), self.domain.to(device))

    def rows(self, start: int, stop: int) -> "Batch":
        """Some of its rows, as a batch."""
        return Batch(self.inputs[start:stop], self.targets[start:stop], self.domain[start:stop])


@runtime_checkable
class Task(Protocol):
    """What a model is trained and judged on."""

    name: str
    domains: tuple[str, ...]
    metric: str
    unit: str
    higher_is_better: bool
    manifest: dict

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        """A random batch, of one domain or (default) of all."""

    def batches(self, split: str, size: int) -> Iterator[Batch]:
        """One pass over a split, in a fixed order; each batch is of one domain."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        """Mean task loss (nats), and the context of the forward pass with the auxiliary loss in `context.aux`.

        Runs on the model's device, wherever the batch is.
        """

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        """The metric, overall under its name and per domain under "metric/domain", in eval mode and without gradients.

        max_batches: of each domain; None for the whole split.
        """


class LanguageModelling:
    """Next-byte prediction on several text domains; metric: bits per byte, the unweighted mean over the domains.

    Args:
        data: the domains and their splits.
        seq_len: T, bytes predicted per row.
    """

    metric, unit, higher_is_better = "bits_per_byte", "bits/byte", False
    vocab = 256

    def __init__(self, data: TextDomains, seq_len: int):
        self.data, self.seq_len = data, seq_len
        self.name, self.domains, self.manifest = data.name, tuple(data.domains), data.manifest
        for split, texts in data.splits.items():
            for domain, text in texts.items():
                if text.numel() <= seq_len:
                    raise InputError(
                        f"seq_len is {seq_len} but must be below the {text.numel()} bytes of {domain!r} ({split})"
                    )

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        if size < 1:
            raise InputError(f"size is {size} but must be at least 1")
        if domain is None:
            domains = torch.randint(len(self.domains), (size,), generator=generator)
        else:
            check_domain(domain, self.domains)
            domains = torch.full((size,), domain)
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        rows = []
        for index, u in zip(domains.tolist(), uniform.tolist(), strict=True):
            text = self._split(split)[self.domains[index]]
            start = int(u * (text.numel() - self.seq_len))
            rows.append(text[start : start + self.seq_len + 1])
        rows = torch.stack(rows).long()
        return Batch(rows[:, :-1], rows[:, 1:], domains)

    def batches(self, split: str, size: int) -> Iterator[Batch]:
        for index, domain in enumerate(self.domains):
            text = self._split(split)[domain]
            count = (text.numel() - 1) // self.seq_len
            windows = text[: count * self.seq_len + 1].long().unfold(0, self.seq_len + 1, self.seq_len)
            for rows in windows.split(size):
                yield Batch(rows[:, :-1], rows[:, 1:], torch.full((len(rows),), index))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        batch = batch.to(device_of(model))
        context = Context(domain=batch.domain.repeat_interleave(batch.inputs.shape[1]))
        logits = model(batch.inputs, context)
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()), context

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        bits = mean_by_domain(self, model, split, max_batches, lambda batch: self.loss(model, batch)[0] / math.log(2))
        return {self.metric: sum(bits.values()) / len(bits)} | {f"{self.metric}/{d}": v for d, v in bits.items()}

    def _split(self, split: str) -> dict[str, Tensor]:
        if split not in self.data.splits:
            raise unknown("split", split, self.data.splits)
        return self.data.splits[split]


class ArrayTask:
    """What the tasks on arrays share: random rows, a pass over a split, the metric as a mean over rows.

    A subclass says what the loss of a batch of outputs is, and `value`, its mean metric.

    Args:
        name: of the data.
        splits: split -> domain -> (inputs (rows, ...), targets (rows, ...)); the same domains in every split.
        manifest: of the data.
    """

    metric: str

    def __init__(self, name: str, splits: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]], manifest: dict):
        self.name, self.splits, self.manifest = name, splits, manifest
        self.domains = tuple(splits["train"])
        for split, parts in splits.items():
            for domain in self.domains:
                if domain not in parts or not len(parts[domain][0]) == len(parts[domain][1]) > 0:
                    raise InputError(f"splits has no rows, or not one target a row, of {domain!r} in {split!r}")

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        if size < 1:
            raise InputError(f"size is {size} but must be at least 1")
        parts = self._split(split)
        if domain is not None:
            check_domain(domain, self.domains)
        if domain is None and len(parts) > 1:
            domains = torch.randint(len(parts), (size,), generator=generator).sort().values
        else:
            domains = torch.full((size,), domain or 0)
        chosen = []
        for (x, y), count in zip(parts, domains.bincount(minlength=len(parts)).tolist(), strict=True):
            rows = torch.randint(len(x), (count,), generator=generator)
            chosen.append((x[rows], y[rows]))
        return Batch(*(torch.cat(part) for part in zip(*chosen, strict=True)), domains)

    def batches(self, split: str, size: int) -> Iterator[Batch]:
        for index, part in enumerate(self._split(split)):
            for x, y in zip(*(rows.split(size) for rows in part), strict=True):
                yield Batch(x, y, torch.full((len(x),), index))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        batch = batch.to(device_of(model))
        context = self.context(batch)
        return self.criterion(model(batch.inputs, context), batch), context

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        def value(batch: Batch) -> Tensor:
            batch = batch.to(device_of(model))
            return self.value(model(batch.inputs, self.context(batch)), batch)

        mean = mean_by_domain(self, model, split, max_batches, value)
        return {self.metric: sum(mean.values()) / len(mean)} | {f"{self.metric}/{d}": v for d, v in mean.items()}

    def context(self, batch: Batch) -> Context:
        return Context(domain=batch.domain) if len(self.domains) > 1 else Context()

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The loss."""
        raise NotImplementedError

    def value(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The mean of the metric over the rows of a batch of one domain."""
        raise NotImplementedError

    def _split(self, split: str) -> list[tuple[Tensor, Tensor]]:
        if split not in self.splits:
            raise unknown("split", split, self.splits)
        return [self.splits[split][domain] for domain in self.domains]


class Classification(ArrayTask):
    """Classification of arrays; metric: accuracy."""

    metric, unit, higher_is_better = "accuracy", "fraction", True

    def __init__(self, data: Arrays):
        super().__init__(data.name, {split: {data.name: rows} for split, rows in data.splits.items()}, data.manifest)
        self.data, self.n_classes = data, len(data.classes)

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.targets)

    def value(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs.argmax(-1) == batch.targets).double().mean()


class Regression(ArrayTask):
    """Arrays (B, ...) from arrays (B, ...); metric: normalised squared error, the unweighted mean over the domains.

    Errors are in units of the domain's variance: the mean square of the training targets around their mean, which is
    taken for each element. So 1 is the error of a model that always says that mean; the loss is weighted likewise.
    """

    metric, unit, higher_is_better = "nmse", "of the variance", False

    def __init__(self, name: str, splits: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]], manifest: dict):
        super().__init__(name, splits, manifest)
        targets = [y for _, y in self._split("train")]
        self.variance = torch.stack([(y - y.mean(0)).square().mean() for y in targets])  # (domains,)
        if not (self.variance > 0).all():
            raise InputError("the training targets of a domain are all the same, so their errors have no unit")

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        squares = (outputs - batch.targets).square().flatten(1).mean(1)
        return (squares / self.variance.to(squares.device)[batch.domain]).mean()

    def value(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.criterion(outputs.double(), batch)


class Restoration(ArrayTask):
    """Images (B, C, H, W) of values 0 to 1 from spoiled ones; metric: PSNR, the mean over images and then over domains.

    The loss is the logarithm of each image's mean square error, so that slightly and badly spoiled ones count alike (as
    PSNR does: Chen et al., NAFNet, 2204.04676). For the metric what the model says is held within 0 and 1.
    """

    metric, unit, higher_is_better = "psnr", "dB", True

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        squares = (outputs - batch.targets).square().flatten(1).mean(1)
        return (squares + 1e-8).log().mean()

    def value(self, outputs: Tensor, batch: Batch) -> Tensor:
        return psnr(outputs, batch.targets).mean()


def psnr(images: Float[Tensor, "batch ..."], truth: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """Peak signal to noise ratio of each image, dB at a peak of 1; infinite where it is the truth."""
    return -10 * (images.double().clamp(0, 1) - truth).square().flatten(1).mean(1).log10()


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are (CPU for a model without any)."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


EVALUATION_BATCH = 64
"""Rows per forward pass in evaluation: a fixed number, so that a metric does not depend on the training batch."""


def check_domain(domain: int, domains: Sequence[str]) -> None:
    """Raise `InputError` unless it is the number of one of the domains."""
    if not 0 <= domain < len(domains):
        raise InputError(f"domain is {domain} but must be 0 to {len(domains) - 1}, of {', '.join(domains)}")


def mean_by_domain(task: Task, model: nn.Module, split: str, max_batches: int | None, value) -> dict[str, float]:
    """Row-weighted mean of `value(batch)` for each domain, in eval mode; the model's mode is restored."""
    total, rows, seen = [dict.fromkeys(range(len(task.domains)), 0.0) for _ in range(3)]
    with evaluating(model):
        for batch in task.batches(split, EVALUATION_BATCH):
            domain = int(batch.domain[0])
            if max_batches is not None and seen[domain] >= max_batches:
                continue
            seen[domain] += 1
            total[domain] += float(value(batch)) * len(batch)
            rows[domain] += len(batch)
    return {name: total[i] / rows[i] for i, name in enumerate(task.domains)}
