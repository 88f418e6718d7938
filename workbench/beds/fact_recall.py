"""Recall of facts in Python text: in the first three quarters a key byte and a value byte side by side, in the last
quarter a question for each fact, its key, whose answer is the value. One fact has one place, so that what an attention
has to find is known.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds.python_text import text
from workbench.errors import InputError
from workbench.lib.core.modes import evaluating
from workbench.lib.core.routing import Context
from workbench.lib.core.task import EVALUATION_BATCH, Batch, device_of
from workbench.lib.data.types import TextDomains

SYMBOLS = 64  # keys, and values: the bytes from 128 and from 192, which the text is freed from


class FactRecall:
    """A `Task`: next-byte prediction on text with facts and questions; metric: the share of questions answered.

    Args:
        source: text domains with the domain "python".
        seq_len: T; a multiple of 8.
        facts: F of a row, each asked for once.
        weight: of the mean loss on the answers, beside the mean loss on all bytes.
        test_rows: rows of an evaluation; the same ones each time.
    """

    name, domains, metric, unit, higher_is_better = "recall", ("python",), "recall", "fraction", True

    def __init__(self, source: TextDomains, seq_len: int, facts: int, weight: float, test_rows: int):
        if seq_len % 8 or not 1 <= facts <= min(seq_len // 8, SYMBOLS):
            raise InputError(
                f"seq_len is {seq_len} and facts is {facts} but must be a multiple of 8 and at least 1 and at most "
                f"{min(seq_len // 8, SYMBOLS)}"
            )
        self.seq_len, self.facts, self.weight, self.test_rows = seq_len, facts, weight, test_rows
        self.manifest = source.manifest
        texts = {split: parts["python"] for split, parts in source.splits.items()}
        self.text = {split: torch.where(text < 128, text, ord("?")) for split, text in texts.items()}

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        return self.rows(split, size, generator)[0]

    def rows(self, split: str, size: int, generator: torch.Generator) -> tuple[Batch, Tensor, Tensor]:
        """A batch, and of each question (size, F) where it stands and where the value of its fact stands."""
        text, t, f = self.text[split], self.seq_len, self.facts
        start = torch.randint(len(text) - t, (size, 1), generator=generator)
        rows = text[start + torch.arange(t + 1)].long()

        def distinct(among: int) -> Tensor:
            return torch.rand(size, among, generator=generator).argsort(1)[:, :f]

        key, value = 128 + distinct(SYMBOLS), 192 + torch.randint(SYMBOLS, (size, f), generator=generator)
        fact, question = 2 * distinct(3 * t // 8), 2 * distinct(t // 8) + 3 * t // 4
        for place in (fact, question):
            rows.scatter_(1, place, key).scatter_(1, place + 1, value)
        return Batch(rows[:, :-1], rows[:, 1:], torch.zeros(size, dtype=torch.int64)), question, fact + 1

    def held_out(self, split: str) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for first in range(0, self.test_rows, EVALUATION_BATCH):
            yield self.rows(split, min(EVALUATION_BATCH, self.test_rows - first), generator)

    def batches(self, split: str, size: int) -> Iterator[Batch]:
        for batch, _, _ in self.held_out(split):
            parts = (part.split(size) for part in (batch.inputs, batch.targets, batch.domain))
            yield from map(Batch, *parts)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        batch, context = batch.to(device_of(model)), Context()
        losses = F.cross_entropy(model(batch.inputs, context).transpose(1, 2), batch.targets, reduction="none")
        answers = answered(batch)
        return losses.mean() + self.weight * (losses * answers).sum() / answers.sum(), context

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        right = asked = bits = plain = 0
        with evaluating(model):
            for batch, _, _ in self.held_out(split):
                batch = batch.to(device_of(model))
                logits, answers = model(batch.inputs, Context()), answered(batch)
                right += int(((logits.argmax(-1) == batch.targets) & answers).sum())
                asked += int(answers.sum())
                text = (batch.inputs < 128) & (batch.targets < 128)
                losses = F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none") / math.log(2)
                bits, plain = bits + float((losses * text).sum()), plain + int(text.sum())
        return {"recall": right / asked, "bits_per_byte": bits / plain}


def answered(batch: Batch) -> Tensor:
    """(B, T) True where the next byte is the answer to a question."""
    late = torch.arange(batch.inputs.shape[1], device=batch.inputs.device) >= 3 * batch.inputs.shape[1] // 4
    return late & (batch.targets >= 192)


def fact_recall(settings: Mapping[str, Any]) -> FactRecall:
    """The task by the settings of a study."""
    source, names = text(settings["cap"]), ("seq_len", "facts", "recall_weight", "test_rows")
    return FactRecall(source, *(settings[name] for name in names))
