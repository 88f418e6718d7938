"""A task: real data with splits, a loss and a metric, in the one form the training loop and the studies use.

Tensor letters: B batch, T time, V vocabulary, C classes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int64
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
        bits = _mean_by_domain(self, model, split, max_batches, lambda batch: self.loss(model, batch)[0] / math.log(2))
        return {self.metric: sum(bits.values()) / len(bits)} | {f"{self.metric}/{d}": v for d, v in bits.items()}

    def _split(self, split: str) -> dict[str, Tensor]:
        if split not in self.data.splits:
            raise unknown("split", split, self.data.splits)
        return self.data.splits[split]


class Classification:
    """Classification of arrays; metric: accuracy."""

    metric, unit, higher_is_better = "accuracy", "fraction", True

    def __init__(self, data: Arrays):
        self.data = data
        self.name, self.manifest = data.name, data.manifest
        self.domains = (data.name,)
        self.n_classes = len(data.classes)

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        if size < 1:
            raise InputError(f"size is {size} but must be at least 1")
        x, y = self._split(split)
        rows = torch.randint(len(x), (size,), generator=generator)
        return Batch(x[rows], y[rows], torch.zeros(size, dtype=torch.int64))

    def batches(self, split: str, size: int) -> Iterator[Batch]:
        for x, y in zip(*(part.split(size) for part in self._split(split)), strict=True):
            yield Batch(x, y, torch.zeros(len(x), dtype=torch.int64))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        batch = batch.to(device_of(model))
        context = Context()
        return F.cross_entropy(model(batch.inputs, context), batch.targets), context

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        def accuracy(batch: Batch) -> Tensor:
            batch = batch.to(device_of(model))
            return (model(batch.inputs, Context()).argmax(-1) == batch.targets).double().mean()

        mean = _mean_by_domain(self, model, split, max_batches, accuracy)
        return {self.metric: mean[self.name], f"{self.metric}/{self.name}": mean[self.name]}

    def _split(self, split: str) -> tuple[Tensor, Tensor]:
        if split not in self.data.splits:
            raise unknown("split", split, self.data.splits)
        return self.data.splits[split]


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are (CPU for a model without any)."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


EVALUATION_BATCH = 64
"""Rows per forward pass in evaluation: a fixed number, so that a metric does not depend on the training batch."""


def _mean_by_domain(task: Task, model: nn.Module, split: str, max_batches: int | None, value) -> dict[str, float]:
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
