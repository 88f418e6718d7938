"""Text that a decoder has to complete: a task whose domains are the denoisers of a mixture (UL2).

So what is shown of domains is shown of denoisers: the loss of each, and where their gradients pull apart. The questions
of `hidden` are of no mixture: the same held-out rows with the same holes for every model, whatever it was trained on.

Tensor letters: B batch, T time, L length of a text.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError, unknown
from workbench.lib.core.denoising import IGNORED, Example, PrefixForm, Vocabulary, blank_out
from workbench.lib.core.modes import evaluating
from workbench.lib.core.routing import Context
from workbench.lib.core.task import EVALUATION_BATCH, Batch, LanguageModelling, device_of
from workbench.lib.data.types import TextDomains
from workbench.lib.data_mixtures.ul2 import MixtureOfDenoisers


@dataclass(frozen=True)
class Denoised(Batch):
    """inputs, targets (B, T), `IGNORED` where nothing is to be said; domain (B,): the denoiser; prefix (B,)."""

    prefix: Tensor

    def to(self, device: torch.device) -> "Denoised":
        return Denoised(*(part.to(device) for part in (self.inputs, self.targets, self.domain, self.prefix)))


class Denoising:
    """A `Task`; metric: bits per token that is to be said, the unweighted mean over the denoisers.

    Rows begin anywhere in the text of any domain of `texts`, all domains alike.

    Args:
        mixture: with a `PrefixForm`.

    Raises:
        InputError: the mixture has another form, or a text is shorter than its rows.
    """

    metric, unit, higher_is_better = "bits_per_token", "bits/token", False

    def __init__(self, texts: TextDomains, mixture: MixtureOfDenoisers):
        if not isinstance(mixture.form, PrefixForm):
            raise InputError(f"mixture has {mixture.form} but must have a PrefixForm")
        self.mixture, self.domains, self.vocab = mixture, mixture.names, mixture.vocab.size
        self.texts = LanguageModelling(texts, mixture.raw_length - 1)
        self.name, self.manifest = f"{texts.name}, denoised", texts.manifest

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Denoised:
        rows = _whole(self.texts.batch(split, size, generator))
        return self._denoised(rows, generator, domain)

    def batches(self, split: str, size: int) -> Iterator[Denoised]:
        for domain in range(len(self.domains)):
            yield from self._of(split, size, domain)

    def _of(self, split: str, size: int, domain: int) -> Iterator[Denoised]:
        """One pass over a split by one denoiser; the texts are mixed, so that a few batches are of all of them."""
        generator = torch.Generator().manual_seed(domain)
        rows = torch.cat([_whole(batch) for batch in self.texts.batches(split, size)])
        for part in rows[torch.randperm(len(rows), generator=generator)].split(size):
            yield self._denoised(part, generator, domain)

    def loss(self, model: nn.Module, batch: Denoised) -> tuple[Tensor, Context]:
        nats, context = completed(model, batch.to(device_of(model)))
        return nats.sum() / (batch.targets != IGNORED).sum(), context

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        bits, said = torch.zeros(2, len(self.domains), dtype=torch.float64)
        with evaluating(model):
            for domain in range(len(self.domains)):
                for batch in islice(self._of(split, EVALUATION_BATCH, domain), max_batches):
                    nats, _ = completed(model, batch.to(device_of(model)))
                    bits[domain] += nats.double().sum().cpu() / math.log(2)
                    said[domain] += (batch.targets != IGNORED).sum()
        each = (bits / said).tolist()
        return {self.metric: sum(each) / len(each)} | {
            f"{self.metric}/{name}": value for name, value in zip(self.domains, each, strict=True)
        }

    def _denoised(self, rows: Tensor, generator: torch.Generator, domain: int | None) -> Denoised:
        chosen = None if domain is None else torch.full((len(rows),), domain)
        made = self.mixture(rows, generator, chosen)
        return Denoised(made["tokens"], made["labels"], made["spec_id"], made["prefix"])


def completed(
    model: nn.Module, batch: Denoised, among: int | None = None
) -> tuple[Float[Tensor, "batch time"], Context]:
    """What each target costs, nats, 0 where nothing is to be said; `among`: given that it is one of the first ids."""
    time = batch.inputs.shape[1]
    read = torch.arange(time, device=batch.inputs.device) < _length(batch)[:, None]
    context = Context(domain=batch.domain.repeat_interleave(time), prefix=batch.prefix, mask=read.flatten())
    logits = model(batch.inputs, context)[..., :among]
    return F.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=IGNORED, reduction="none"), context


def _length(batch: Denoised) -> Int64[Tensor, " batch"]:
    """Tokens of each row up to the last that has something to say; the rest is padding."""
    said = batch.targets != IGNORED
    return said.shape[1] - said.flip(1).int().argmax(1)


def _whole(batch: Batch) -> Int64[Tensor, "batch raw"]:
    return torch.cat([batch.inputs, batch.targets[:, -1:]], 1)


# -- questions


ASKS = ("fill", "prefix", "causal")
HOLES = ("suffix", "short", "long")
"""A quarter of the row at its end; holes of 4 tokens, a quarter of it; one hole of a quarter of it, in the middle."""


@dataclass(frozen=True)
class Questions:
    """rows (B, L) of held-out text, and which tokens are hidden in each kind of hole, kind -> (B, L)."""

    rows: Int64[Tensor, "batch length"]
    masks: dict[str, Bool[Tensor, "batch length"]]


def questions(texts: TextDomains, length: int, count: int, split: str = "test", seed: int = 0) -> Questions:
    """`count` random rows of each domain, of `length` tokens, which 16 divides, with holes of every kind of `HOLES`."""
    if length < 16 or length % 16:
        raise InputError(f"length is {length} but must be a multiple of 16")
    generator, task = torch.Generator().manual_seed(seed), LanguageModelling(texts, length - 1)
    rows = torch.cat([_whole(task.batch(split, count, generator, domain)) for domain in range(len(task.domains))])
    quarter, place = length // 4, torch.arange(length)
    start = torch.randint(quarter // 2, length - quarter - quarter // 2 + 1, (len(rows), 1), generator=generator)
    # one short hole in each part of 16 tokens, at its second to twelfth place: no two touch, none begins the row
    parts = torch.randint(1, 12, (len(rows), length // 16), generator=generator).repeat_interleave(16, 1)
    masks = {
        "suffix": (place >= length - quarter).expand_as(rows),
        "short": (place % 16 >= parts) & (place % 16 < parts + 4),
        "long": (place >= start) & (place < start + quarter),
    }
    return Questions(rows, masks)


def hidden(
    model: nn.Module,
    asked: Questions,
    kind: str,
    vocab: Vocabulary,
    *,
    ask: str,
    mode: str | None = None,
) -> float:
    """Bits per hidden token: what it costs the model to say what stands in the holes, given where they are.

    So it is not asked where a hole ends, in which it was taught a rule that these holes do not keep: what a token costs
    is counted among the tokens of the data.

    Args:
        kind: of the holes.
        ask: "fill": with sentinels, so that what follows a hole is seen. Otherwise the row is read from its left, and
            what is hidden counts of all that is said: "prefix", what stands before the first hole is read in both
            directions; "causal", nothing is.
        mode: whose token to begin with.
    """
    if kind not in asked.masks:
        raise unknown("kind of hole", kind, asked.masks)
    if ask not in ASKS:
        raise unknown("way to ask", ask, ASKS)
    examples, counted = [], []
    for row, mask in zip(asked.rows, asked.masks[kind], strict=True):
        if ask == "fill":
            example = blank_out(row, mask, vocab)
            counted.append(example.said < vocab.data)
        else:
            first = int(mask.int().argmax()) if ask == "prefix" else 1
            example = Example(row[:first], row[first:], True)
            counted.append(mask[first:])
        examples.append(example)
    length = asked.rows.shape[1]
    form, total, tokens = PrefixForm(length + length // 8 + 2), 0.0, 0  # what short holes need, with a mode
    with evaluating(model):
        for start in range(0, len(examples), EVALUATION_BATCH):
            part = examples[start : start + EVALUATION_BATCH]
            modes = None if mode is None else [vocab.mode(mode)] * len(part)
            made = form.collate(part, modes, vocab)
            counts = torch.cat(counted[start : start + EVALUATION_BATCH])
            domain = torch.zeros(len(part), dtype=torch.int64)
            labels = made["labels"].clone()
            labels[labels != IGNORED] = labels[labels != IGNORED].where(counts, IGNORED)  # row by row, as `counts` are
            batch = Denoised(made["tokens"], labels, domain, made["prefix"]).to(device_of(model))
            total += float(completed(model, batch, vocab.data)[0].double().sum()) / math.log(2)
            tokens += int(counts.sum())
    return total / tokens
