"""Bytes of five domains, three that a public model has learned, on other text, and two that are new to it.

Python code, its documentation and lists of names are real text; a table of facts, the same in all splits, and sums and
products modulo 97 are generated. The base is a small decoder that has learned the first halves of the real text; owners
of the domains have the second halves.
"""

import hashlib
import random
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from workbench.beds.pretrained import pretrained
from workbench.lib import data
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.types import TextDomains

TEXT = ("python", "docs", "names")
KINDS = {"python": "text", "docs": "text", "names": "knowledge", "facts": "knowledge", "arithmetic": "reasoning"}
DOMAINS = tuple(KINDS)
MODULUS, FACTS = 97, 128
LR = 3e-3


@cache
def texts(cap: int) -> tuple[TextDomains, TextDomains]:
    """What the public model is trained on, and what the owners have: other halves of the training text."""
    found = data.load("text-domains", domains=TEXT, cap=cap)
    train_text = found.splits["train"]
    halves = [{}, {}]
    for name, text in train_text.items():
        halves[0][name], halves[1][name] = text.tensor_split(2)
    public = TextDomains(found.name, TEXT, found.splits | {"train": halves[0]}, found.manifest)
    splits, manifest = {"train": halves[1]}, dict(found.manifest)
    for split in ("validation", "test"):
        splits[split] = dict(found.splits[split])
    for name, lines in (("facts", facts), ("arithmetic", sums)):
        for split, share in (("train", 2), ("validation", 8), ("test", 8)):
            size = cap // share
            drawn = lines(split)
            text = "".join(next(drawn) for _ in range(size // 8))[:size].encode()
            splits[split][name] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        stream = b"".join(bytes(splits[split][name].tolist()) for split in splits)
        manifest[name] = {"source": "generated", "sha256": hashlib.sha256(stream).hexdigest(), "bytes": len(stream)}
        manifest[name]["splits"] = {split: len(splits[split][name]) for split in splits}
    return public, TextDomains("owners", DOMAINS, splits, manifest)


def sums(split: str) -> Iterator[str]:
    """Sums and products of two numbers modulo 97; a split has a twentieth of the questions, training has the others."""
    questions = [(a, sign, b) for a in range(MODULUS) for b in range(MODULUS) for sign in "+*"]
    random.Random(0).shuffle(questions)
    held = len(questions) // 20
    parts = {"validation": questions[:held], "test": questions[held : 2 * held], "train": questions[2 * held :]}
    generator = random.Random(f"sums {split}")
    while True:
        a, sign, b = generator.choice(parts[split])
        yield f"{a}{sign}{b}={(a + b if sign == '+' else a * b) % MODULUS}\n"


def facts(split: str) -> Iterator[str]:
    """Names with random values: the same table in all splits, for facts can be known and not be found out."""
    table = random.Random(1)
    rows = ["".join(table.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(FACTS)]
    generator = random.Random(f"facts {split}")
    while True:
        row = generator.choice(rows)
        yield f"{row[:4]} is {row[4:]}\n"


def make_model(settings: Mapping[str, Any]) -> DecoderLM:
    width, hidden = settings["d_model"], settings["d_hidden"]
    shape = (LanguageModelling.vocab, width, settings["n_layers"], settings["n_heads"])
    return DecoderLM(*shape, lambda layer: GLU(width, hidden), settings["seq_len"])


def base(settings: Mapping[str, Any]) -> DecoderLM:
    """The model of the public text: trained once, then from the cache."""
    source = texts(settings["cap"])[0]
    task = LanguageModelling(source, settings["seq_len"])

    def build() -> nn.Module:
        torch.manual_seed(0)
        return make_model(settings)

    def teach(model: nn.Module) -> object:
        return train(model, task, TrainConfig(settings["public_steps"], settings["batch_size"], LR, eval_every=None))

    names = ("d_model", "d_hidden", "n_layers", "n_heads", "seq_len", "batch_size", "public_steps")
    recipe = {name: settings[name] for name in names} | {"lr": LR, "data": digests(source)}
    return pretrained("byte-domains-base", recipe, build, teach, [sys.modules[__name__]])


def digests(source: TextDomains) -> dict[str, str]:
    """The digest of each domain's text, for a recipe."""
    return {name: source.manifest[name]["sha256"] for name in source.domains}


def alone(task: LanguageModelling, domain: str) -> LanguageModelling:
    """The task of one domain."""
    source = task.data
    splits = {split: {domain: parts[domain]} for split, parts in source.splits.items()}
    return LanguageModelling(TextDomains(domain, (domain,), splits, {domain: source.manifest[domain]}), task.seq_len)
