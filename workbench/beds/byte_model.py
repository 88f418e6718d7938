"""A decoder of bytes that has learned long enough to be worth compressing.

For low-rank methods (cutting ranks after training, training by ranks): two thousand steps on three text domains of
Python itself, 2.29 bits per byte. Its matrices are used: cut by SVD to half the rank it says 2.71, to a quarter 4.76.

    python, docs, names    256 KiB each, PSF-2.0 and Unicode-3.0

Judged by bits per byte, the mean over the domains. A bigram model of the same text has 3.76; lzma (-9), which sees the
training text before the test and finds long repeats that no window holds, 1.69. The text of python and docs is of the
Python that runs; its digest is part of the recipe.

Tensor letters: B batch, T time.
"""

import lzma
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from workbench.beds.baseline import Measured, seeded
from workbench.beds.pretrained import pretrained
from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.types import TextDomains

NEEDS = ()
DOMAINS = ("python", "docs", "names")

SMOKE = {"cap": 16_384, "width": 32, "layers": 1, "length": 32, "steps": 40, "batch": 16, "decay": 0.1}
SMALL = {"cap": 262_144, "width": 96, "layers": 2, "length": 64, "steps": 2000, "batch": 16, "decay": 0.1}
FULL = {"cap": 1_048_576, "width": 192, "layers": 6, "length": 256, "steps": 20_000, "batch": 32, "decay": 0.1}


def make_task(settings: Mapping[str, Any] = SMALL) -> LanguageModelling:
    return LanguageModelling(data.load("text-domains", domains=DOMAINS, cap=settings["cap"]), settings["length"])


def base(settings: Mapping[str, Any] = SMALL, seed: int = 0) -> DecoderLM:
    """The trained decoder: from its file, or trained now."""
    task = make_task(settings)

    def build() -> DecoderLM:
        width = settings["width"]
        return seeded(
            seed,
            lambda: DecoderLM(
                256, width, settings["layers"], 4, lambda layer: GLU(width, 2 * width), settings["length"]
            ),
        )

    def teach(made: nn.Module) -> None:
        config = TrainConfig(settings["steps"], settings["batch"], lr=4e-3, weight_decay=settings["decay"], seed=seed)
        train(made, task, config)

    recipe = dict(settings) | {"seed": seed, "data": task.manifest}
    return pretrained("byte-model", recipe, build, teach, [sys.modules[__name__]])


@torch.no_grad()
def cut_ranks(made: nn.Module, share: float) -> None:
    """Cut every linear layer's matrix, in place, to this share of its rank by SVD: the plainest compression there is.

    Raises:
        InputError: `share` is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise InputError(f"share is {share} but must be above 0 and at most 1")
    for layer in made.modules():
        if isinstance(layer, nn.Linear):
            left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
            values[max(1, round(share * len(values))) :] = 0
            layer.weight.copy_((left * values) @ right)


def bigram_bits(texts: TextDomains, split: str = "test") -> dict[str, float]:
    """Bits per byte of each domain by the counts of byte pairs in its training text, one added to each pair."""
    bits = {}
    for domain in texts.domains:
        pairs = torch.stack([texts.splits["train"][domain][:-1], texts.splits["train"][domain][1:]]).long()
        counts = torch.ones(256, 256, dtype=torch.float64)
        counts.index_put_(tuple(pairs), torch.ones(pairs.shape[1], dtype=torch.float64), accumulate=True)
        text = texts.splits[split][domain].long()
        share = counts[text[:-1], text[1:]] / counts.sum(1)[text[:-1]]
        bits[domain] = -float(share.log2().mean())
    return bits


def lzma_bits(texts: TextDomains, split: str = "test") -> dict[str, float]:
    """Bits per byte that a split adds to the compressed training text of its domain."""

    def size(*parts: Tensor) -> int:
        return 8 * len(lzma.compress(b"".join(part.numpy().tobytes() for part in parts), preset=9))

    return {
        domain: (size(texts.splits["train"][domain], texts.splits[split][domain]) - size(texts.splits["train"][domain]))
        / texts.splits[split][domain].numel()
        for domain in texts.domains
    }


def prepare(settings: Mapping[str, Any] = SMALL) -> DecoderLM:
    return base(settings)


def measure(settings: Mapping[str, Any] = SMALL) -> list[Measured]:
    """The decoder whole, and with every matrix cut to a half and a quarter of its rank."""
    task, rows = make_task(settings), []
    bigram, best = (sum(bits.values()) / len(bits) for bits in (bigram_bits(task.data), lzma_bits(task.data)))
    weights = sum(p.numel() for p in base(settings).parameters())
    size = f"{len(DOMAINS)} x {settings['cap'] // 1024} KiB, {weights:,} weights"
    for share in (1.0, 0.5, 0.25):
        made = base(settings)
        cut_ranks(made, share)
        reached = task.evaluate(made, "test")["bits_per_byte"]
        case = "whole" if share == 1 else f"ranks cut to {share:g}"
        rows.append(Measured(case, size, "decoder (trivial: bigram, best: lzma)", "bits/byte", bigram, reached, best))
    return rows
