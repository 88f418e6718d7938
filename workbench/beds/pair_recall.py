"""Recall of pairs strewn in Python text: a key byte with a value byte, and wherever the key comes again, its value.

The distance back to where a value was last said is random, up to the length of the text, so that recall shows how much
of its context a model uses. The base is a decoder with dense attention and rotary positions, one for each seed.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds.pretrained import pretrained
from workbench.beds.python_text import text
from workbench.lib.core.attention import Attention
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.modes import evaluating
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Batch
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.types import TextDomains

KEYS, VALUES = 16, 8
FIRST_KEY, FIRST_VALUE = 14, 128  # bytes that the text does not hold; a value's byte says whose it is
TEXT_WEIGHT = 0.3  # of the text's loss beside that of the answers


class PairRecall:
    """A `Task`: next-byte prediction on text with pairs to recall; metric: accuracy on the answers.

    Args:
        source: text domains with the domain "python".
        seq_len: T, bytes predicted per row.
        spacing: a pair for every so many bytes; half as many of them as distinct keys, up to `KEYS`.
    """

    metric, unit, higher_is_better, name, domains = "recall", "fraction", True, "recall", ("python",)

    def __init__(self, source: TextDomains, seq_len: int, spacing: int):
        self.seq_len, self.spacing, self.manifest = seq_len, spacing, source.manifest
        self.text = {split: plain(texts["python"]) for split, texts in source.splits.items()}

    def rows(self, split: str, size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens (size, length) with pairs, and which of them are answers: values whose key came before."""
        text, pairs = self.text[split], length // self.spacing
        start = torch.randint(len(text) - length, (size, 1), generator=generator)
        tokens = text[start + torch.arange(length)]
        distinct = min(KEYS, max(pairs // 2, 1))
        keys = torch.rand(size, KEYS, generator=generator).argsort(1)[:, :distinct]
        values = keys * VALUES + torch.randint(VALUES, (size, distinct), generator=generator)
        which = torch.randint(distinct, (size, pairs), generator=generator)
        places = torch.rand(size, length // 2 - 1, generator=generator).argsort(1)[:, :pairs] * 2 + 1
        places = places.sort(1).values
        tokens.scatter_(1, places, FIRST_KEY + keys.gather(1, which))
        tokens.scatter_(1, places + 1, FIRST_VALUE + values.gather(1, which))
        return tokens, distances(tokens) > 0

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        tokens, _ = self.rows(split, size, self.seq_len + 1, generator)
        return Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(size, dtype=torch.int64))

    def batches(self, split: str, size: int) -> Iterator[Batch]:
        yield self.batch(split, size, torch.Generator().manual_seed(0))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        context = Context()
        losses = F.cross_entropy(model(batch.inputs, context).flatten(0, 1), batch.targets.flatten(), reduction="none")
        answers = (distances(torch.cat([batch.inputs[:, :1], batch.targets], 1)) > 0)[:, 1:].flatten()
        return losses[answers].mean() + TEXT_WEIGHT * losses[~answers].mean(), context

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        tokens, answers = self.rows(split, 16, self.seq_len, torch.Generator().manual_seed(0))
        with evaluating(model):
            return {"recall": float(hits(model(tokens, Context()), tokens, answers).double().mean())}


def plain(text: Tensor) -> Tensor:
    """Text without the bytes of keys and values; they become question marks."""
    text = text.long()
    foreign = (text >= FIRST_VALUE) | ((text >= FIRST_KEY) & (text < FIRST_KEY + KEYS))
    return text.masked_fill(foreign, ord("?"))


def distances(tokens: Tensor) -> Tensor:
    """(B, T) tokens back to where a value was last said; 0 for what is no value, or a value said first."""
    value = tokens >= FIRST_VALUE
    last = torch.full((len(tokens), KEYS * VALUES), -1)
    result = torch.zeros_like(tokens)
    for place in value.any(0).nonzero().flatten().tolist():
        rows = value[:, place].nonzero().flatten()
        index = tokens[rows, place] - FIRST_VALUE
        before = last[rows, index]
        result[rows, place] = torch.where(before >= 0, place - before, 0)
        last[rows, index] = place
    return result


def hits(logits: Tensor, tokens: Tensor, answers: Tensor) -> Tensor:
    """(answers,) whether each answer is the first choice of the logits (B, T, V)."""
    return (logits[:, :-1].argmax(-1) == tokens[:, 1:])[answers[:, 1:]]


def decoder(settings: Mapping[str, Any]) -> DecoderLM:
    """The dense model, with random weights."""
    width, heads = settings["d_model"], settings["n_heads"]
    return DecoderLM(
        256,
        width,
        settings["n_layers"],
        heads,
        lambda _: GLU(width, settings["d_hidden"]),
        settings["unseen"],
        attention=lambda _: Attention(width, heads, causal=True, rope=True),
        learned_positions=False,
    )


def pair_recall(settings: Mapping[str, Any]) -> PairRecall:
    """The task at the longest profiled length."""
    return PairRecall(text(settings["cap"]), max(settings["profiled"]), settings["spacing"])


def base(recall: PairRecall, seed: int, settings: Mapping[str, Any]) -> DecoderLM:
    """The dense model of a seed: trained once, then from the cache."""

    def build() -> nn.Module:
        torch.manual_seed(seed)
        return decoder(settings)

    names = ("lr", "n_heads", "spacing", "steps", "batch_size", "d_model", "d_hidden", "n_layers", "cap")
    recipe = {name: settings[name] for name in names}
    recipe |= {"seq_len": recall.seq_len, "seed": seed, "data": recall.manifest}
    config = TrainConfig(settings["steps"], settings["batch_size"], settings["lr"], seed=seed, eval_every=None)
    return pretrained(
        "pair-recall-base", recipe, build, lambda model: train(model, recall, config), [sys.modules[__name__]]
    )
