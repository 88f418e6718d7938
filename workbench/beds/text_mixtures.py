"""Text without labels to train a small language model on, in proportions that have to be found for a purpose.

The documents are pieces of Python sources, of its documentation and of lists of Unicode names, 512 bytes each, with a
twelfth of junk among them: pieces whose bytes are in random order. Domains are clusters of these (`clusters`), or the
three kinds of text as they are (`kinds`). A mixture of domains is judged by a model that goes on from a common warm
start on text drawn by it: bits per byte of held-out text of the three kinds, weighted by the purpose. The proxy is a
small model and a short training, the target a larger and longer one.

Draws of one seed are common to all mixtures (`MixtureSampler`): close mixtures differ little by chance.
Tensor letters: K domains.
"""

import random
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from workbench.beds.pretrained import pretrained
from workbench.lib import data
from workbench.lib.core.experts import GLU
from workbench.lib.core.mixtures import MixtureSampler, Weights, check_weights
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.task import Batch, LanguageModelling
from workbench.lib.core.train import TrainConfig, attended, nobody, train
from workbench.lib.data.types import TextDomains
from workbench.lib.data_mixtures.clusters import PRUNED, ClusterDomains, Clusters, NgramEmbedder

KINDS = ("python", "docs", "names")
NATURAL = {"python": 0.6, "docs": 0.2, "names": 0.2}  # of the documents
PURPOSE = {"python": 0.2, "docs": 0.5, "names": 0.3}  # of what a mixture is for; no search is told
JUNK = 1 / 12
LENGTH = 512  # bytes of a document
PRUNE_BELOW = 0.4  # share of a cluster's bytes that zlib has to save: random order saves about 0.33, text 0.45 or more
"""Settings of a study: "documents", "initial" clusters, "merge" distance, "seq_len" and "batch_size"; of a model
"proxy" or "target": (width, layers, warm steps, steps, learning rate); "eval_batches" of each kind."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents, and what is known of them that no search is told.

    Attributes:
        texts: bytes each.
        kind: index in `KINDS` of the text it is, or was made of.
        junk: whether its bytes are in random order.
    """

    texts: list[bytes]
    kind: np.ndarray
    junk: np.ndarray


@dataclass(frozen=True, eq=False)
class Domains:
    """What a mixture is a mixture of.

    Attributes:
        texts: name -> its documents one after the other, uint8 (bytes,).
        kinds: name -> the kind of text at each byte.
        share: of the bytes, of sum 1.
    """

    texts: dict[str, Tensor]
    kinds: dict[str, Tensor]
    share: Float64[Tensor, " domains"]

    @classmethod
    def of(cls, documents: Documents, members: Mapping[str, list[int]]) -> "Domains":
        texts, kinds = {}, {}
        for name, inside in members.items():
            joined = bytearray(b"".join(documents.texts[index] for index in inside))
            texts[name] = torch.frombuffer(joined, dtype=torch.uint8)
            sizes = torch.tensor([len(documents.texts[index]) for index in inside])
            kinds[name] = torch.from_numpy(documents.kind[inside]).repeat_interleave(sizes)
        sizes = torch.tensor([len(text) for text in texts.values()], dtype=torch.float64)
        return cls(texts, kinds, sizes / sizes.sum())


@cache
def held_out(count: int) -> TextDomains:
    """The three kinds of text: what the documents are cut from, and held-out text to judge by."""
    most = max(NATURAL.values())
    return data.load("text-domains", domains=KINDS, cap=int(count * most * LENGTH * 4 / 3))  # 3/4 of it trains


@cache
def documents(count: int) -> Documents:
    """About `count` documents in random order, the same every time."""
    draw = random.Random(0)
    rows = []
    for index, kind in enumerate(KINDS):
        text = held_out(count).splits["train"][kind].numpy().tobytes()
        for start in range(0, int(count * NATURAL[kind]) * LENGTH, LENGTH):
            rows.append((text[start : start + LENGTH], index))
    rows = [row for row in rows if len(row[0]) == LENGTH]
    draw.shuffle(rows)
    junk = np.arange(len(rows)) < round(JUNK * len(rows))
    texts = [bytes(draw.sample(text, LENGTH)) if bad else text for (text, _), bad in zip(rows, junk, strict=True)]
    order = draw.sample(range(len(rows)), len(rows))
    return Documents([texts[i] for i in order], np.array([rows[i][1] for i in order]), junk[order])


@cache
def clusters(count: int, initial: int, merge: float) -> Clusters:
    """The clusters of the documents, found without any label."""
    embed = NgramEmbedder(dimensions=min(48, count // 4))
    return ClusterDomains(initial, merge, PRUNE_BELOW, embed=embed).fit(documents(count).texts)


@cache
def discovered(count: int, initial: int, merge: float) -> Domains:
    """The clusters as domains, the largest first."""
    found = clusters(count, initial, merge)
    return Domains.of(documents(count), {f"cluster {k}": found.members(k) for k in range(len(found))})


@cache
def kinds(count: int) -> Domains:
    """The three kinds of text as domains, without the junk."""
    made = documents(count)
    members = {name: np.flatnonzero((made.kind == index) & ~made.junk).tolist() for index, name in enumerate(KINDS)}
    return Domains.of(made, members)


def purity(found: Clusters, made: Documents) -> dict[str, float]:
    """How much of what clusters keep is of the kind that most of the cluster is; and of junk, how much is kept."""
    labels = found.labels.numpy()
    inside = (labels != PRUNED) & ~made.junk
    most = sum(np.bincount(made.kind[inside & (labels == k)]).max(initial=0) for k in range(len(found)))
    return {
        "purity": float(most / inside.sum()),
        "junk_kept": float((labels[made.junk] != PRUNED).mean()),
        "text_pruned": float((labels[~made.junk] == PRUNED).mean()),
    }


class MixedText(LanguageModelling):
    """Next-byte prediction, trained on a mixture of domains; metric: bits per byte of held-out text for a purpose.

    Its own domains are the kinds of text: a row of a mixture has the kind that it begins in.

    Args:
        source: of the mixture.
        weights: of its domains.
        held: text of the kinds.
        purpose: weights of the kinds in the metric.
    """

    def __init__(self, source: Domains, weights: Weights, held: TextDomains, purpose: Weights, seq_len: int):
        super().__init__(held, seq_len)
        self.source, self.names = source, tuple(source.texts)
        self.weights = check_weights(weights, self.names)
        self.purpose = check_weights(purpose, self.domains)
        self._sizes = {name: max(0, len(text) - seq_len) for name, text in source.texts.items()}

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        if split != "train" or domain is not None:
            return super().batch(split, size, generator, domain)
        sampler = MixtureSampler(self._sizes, self.weights, generator.initial_seed(), replacement=True)
        rows, kinds = [], []
        for index, start in zip(*(part.tolist() for part in sampler.draw(size)), strict=True):
            name = self.names[index]
            rows.append(self.source.texts[name][start : start + self.seq_len + 1])
            kinds.append(self.source.kinds[name][start])
        rows = torch.stack(rows).long()
        return Batch(rows[:, :-1], rows[:, 1:], torch.stack(kinds))

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        found = super().evaluate(model, split, max_batches)
        by_kind = [found[f"{self.metric}/{kind}"] for kind in self.domains]
        return found | {self.metric: float(self.purpose @ torch.tensor(by_kind, dtype=torch.float64))}


@dataclass(frozen=True)
class Trainer:
    """Trains one model, a proxy or a target, on any mixture of some domains: always from the same warm start.

    Attributes:
        source: domains; the warm start has seen them in their natural shares.
        purpose: weights of the kinds of text.
        count: documents that the held-out text belongs to.
    """

    source: Domains
    purpose: Mapping[str, float]
    count: int
    width: int
    layers: int
    warm_steps: int
    steps: int
    lr: float
    seq_len: int
    batch_size: int
    eval_batches: int | None

    @classmethod
    def of(cls, source: Domains, purpose: Mapping[str, float], settings: Mapping[str, Any], which: str) -> "Trainer":
        """The "proxy" or the "target" of some settings."""
        common = (settings["seq_len"], settings["batch_size"], settings["eval_batches"])
        return cls(source, purpose, settings["documents"], *settings[which], *common)

    def task(self, weights: Weights) -> MixedText:
        return MixedText(self.source, weights, held_out(self.count), self.purpose, self.seq_len)

    def warm(self) -> DecoderLM:
        """The model that every mixture starts from: trained once, then from the cache."""
        task = self.task(self.source.share)

        def build() -> nn.Module:
            torch.manual_seed(0)
            width = self.width
            return DecoderLM(256, width, self.layers, 4, lambda layer: GLU(width, 2 * width), self.seq_len)

        def teach(model: nn.Module) -> object:
            return train(model, task, TrainConfig(self.warm_steps, self.batch_size, self.lr, eval_every=None))

        only_warm = ("count", "width", "layers", "warm_steps", "lr", "seq_len", "batch_size", "share", "data")
        recipe = {name: value for name, value in self.recipe().items() if name in only_warm}
        return pretrained("text-mixtures", recipe, build, teach, [sys.modules[__name__]])

    def recipe(self) -> dict[str, Any]:
        """All that decides what a mixture comes to but the mixture and the seed, as plain values."""
        plain = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "source"}
        data = {name: held_out(self.count).manifest[name]["sha256"] for name in KINDS}
        return plain | {"purpose": dict(self.purpose), "share": self.source.share.tolist(), "data": data}

    def expert(self, domain: int, seed: int) -> DecoderLM:
        """The model that has gone on with one domain alone: trained once, then from the cache."""
        only = torch.zeros_like(self.source.share)
        only[domain] = 1.0

        def teach(model: nn.Module) -> object:
            return train(model, self.task(only), self._config(seed))

        recipe = self.recipe() | {"domain": domain, "seed": seed}
        return pretrained("text-mixtures-expert", recipe, self.warm, teach, [sys.modules[__name__]])

    def learn(self, weights: Weights, seed: int, watched: bool = False) -> DecoderLM:
        """The model that has gone on with a mixture; `watched` where it may be looked at live."""
        model = self.warm()
        with nullcontext() if watched else attended(nobody):
            train(model, self.task(weights), self._config(seed))
        return model

    def _config(self, seed: int) -> TrainConfig:
        return TrainConfig(self.steps, self.batch_size, self.lr, warmup=5, seed=seed, eval_every=None)

    def score(self, weights: Weights, seed: int) -> float:
        """Bits per byte for the purpose on validation text: what a search asks for. The smaller the better."""
        return self.judged(self.learn(weights, seed))

    def judged(self, model: nn.Module) -> float:
        """That of any model, merged ones among them."""
        task = self.task(self.source.share)
        return task.evaluate(model, "validation", self.eval_batches)[task.metric]
