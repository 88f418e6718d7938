"""Three domains of Python's own text, other text to judge by, and a small decoder that knows the first of them.

    code     the standard library without its tables of characters, PSF-2.0
    prose    Python's language reference, PSF-2.0
    names    names of Unicode characters, Unicode-3.0

Judged by is held-out text of these, and text that is none of them: "tables" are the files of character sets, code that
lists names; "docstrings" are those of modules that no training text holds, prose about code. The base has learned the
first half of the code. What is mixed are windows of the second halves of the domains, of which none is seen twice.

Tensor letters: T time, S steps, B batch.
"""

import ast
import hashlib
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from workbench.beds.pretrained import pretrained
from workbench.lib.core.experts import GLU
from workbench.lib.core.mixtures import MixtureSampler, Weights
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.task import Batch, LanguageModelling
from workbench.lib.core.train import Hook, State, TrainConfig, train
from workbench.lib.data import documents, text
from workbench.lib.data.documents import Documents
from workbench.lib.data.splits import TEXT_SHARES, digest, split_of
from workbench.lib.data.types import TextDomains

DOMAINS = ("code", "prose", "names")
JUDGED = (*DOMAINS, "tables", "docstrings")
BASE_LR = 3e-3
SHAPE = ("d_model", "d_hidden", "n_layers", "n_heads", "seq_len", "cap", "base_steps", "base_batch")
"""What of the settings decides the base."""
SIGNS = "python/encodings/"
"""Ids of the files of character sets begin with it."""
PIECE = 1024
"""Bytes of a document that stand together in a target."""


@cache
def texts(cap: int) -> tuple[TextDomains, TextDomains, TextDomains]:
    """What the base is trained on, what is mixed, and what is only judged by.

    Args:
        cap: bytes of a domain, of which the base and the mixtures have 3/8 each, and each text of a split an eighth.
    """
    python = documents.python()
    code = {item: found for item, found in python.items() if not item.startswith(SIGNS)}
    streams = {}
    for domain, found in zip(DOMAINS, (code, documents.docs(), documents.names()), strict=True):
        streams[domain] = {split: _bytes(part) for split, part in text.streams(found, cap)[0].items()}
    halves = {domain: found["train"].tensor_split(2) for domain, found in streams.items()}
    tables = {split: {} for split in ("validation", "test")}
    docstrings = {split: {} for split in ("validation", "test")}
    for item, source in python.items():
        if item.startswith(SIGNS):
            tables["test" if digest(item) % 2 else "validation"][item] = source
        elif (split := split_of(digest(item), TEXT_SHARES)) != "train":
            docstrings[split][item] = docstrings_of(source)
    held = {}
    for split in ("validation", "test"):
        held[split] = {domain: streams[domain][split] for domain in DOMAINS}
        held[split] |= {"tables": _sample(tables[split], cap // 8), "docstrings": _sample(docstrings[split], cap // 8)}
    return (
        _domains("stdlib-code", ("code",), held | {"train": {"code": halves["code"][0]}}),
        _domains("stdlib-domains", DOMAINS, held | {"train": {domain: half[1] for domain, half in halves.items()}}),
        _domains("stdlib-held-out", JUDGED, held),
    )


def docstrings_of(source: bytes) -> bytes:
    """All docstrings of a module, a blank line between them."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return "\n\n".join(filter(None, found)).encode()


def base(settings: Mapping[str, Any]) -> DecoderLM:
    """The decoder that every expert and every true run starts from: trained once, then from the cache."""
    source = texts(settings["cap"])[0]
    task = LanguageModelling(source, settings["seq_len"])

    def build() -> nn.Module:
        width = settings["d_model"]
        torch.manual_seed(0)
        return DecoderLM(
            LanguageModelling.vocab,
            width,
            settings["n_layers"],
            settings["n_heads"],
            lambda layer: GLU(width, settings["d_hidden"]),
            settings["seq_len"],
        )

    def teach(model: nn.Module) -> object:
        return train(model, task, TrainConfig(settings["base_steps"], settings["base_batch"], BASE_LR, eval_every=None))

    recipe = {name: settings[name] for name in SHAPE} | {"lr": BASE_LR, "data": digests(source)}
    return pretrained("stdlib-code-base", recipe, build, teach, [sys.modules[__name__]])


class DrawnText(LanguageModelling, Hook):
    """Next bytes of windows drawn by a mixture, S steps of B of them, none twice; as a hook it follows the step.

    Batches are decided beforehand, so that a training that was stopped goes on with those that it has not seen.

    Args:
        weights: of the domains.
        seq_len: T.
        steps, batch_size: S, B.
        seed: of the order; of one seed close mixtures see mostly the same windows (`MixtureSampler`).

    Raises:
        InputError: a domain has not as many windows as are asked of it.
    """

    def __init__(self, data: TextDomains, weights: Weights, seq_len: int, steps: int, batch_size: int, seed: int):
        super().__init__(data, seq_len)
        windows = {domain: (data.splits["train"][domain].numel() - 1) // seq_len for domain in data.domains}
        domain, window = MixtureSampler(windows, weights, seed).draw(steps * batch_size)
        self.drawn, self.window = domain.view(steps, batch_size), window.view(steps, batch_size)
        self.step = 0

    def before_step(self, state: State) -> None:
        self.step = state.step

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        if split != "train" or domain is not None or size != self.drawn.shape[1]:
            return super().batch(split, size, generator, domain)  # a probe asks for text of its own
        at, rows = self.drawn[self.step], []
        for index, window in zip(at.tolist(), self.window[self.step].tolist(), strict=True):
            start = window * self.seq_len
            rows.append(self.data.splits["train"][self.domains[index]][start : start + self.seq_len + 1])
        rows = torch.stack(rows).long()
        return Batch(rows[:, :-1], rows[:, 1:], at)


def task(settings: Mapping[str, Any]) -> LanguageModelling:
    """The three domains, drawn evenly."""
    return LanguageModelling(texts(settings["cap"])[1], settings["seq_len"])


def bits(model: nn.Module, settings: Mapping[str, Any], split: str) -> list[float]:
    """Bits per byte of held-out text, in the order of `JUDGED`."""
    judged = LanguageModelling(texts(settings["cap"])[2], settings["seq_len"])
    found = judged.evaluate(model, split, settings["batches"])
    return [found[f"{judged.metric}/{name}"] for name in JUDGED]


def digests(source: TextDomains) -> dict[str, str]:
    """The digest of each domain's text, for a recipe."""
    return {name: source.manifest[name]["sha256"] for name in source.domains}


def _bytes(found: bytes) -> Tensor:
    return torch.frombuffer(bytearray(found), dtype=torch.uint8)


def _sample(found: Documents, size: int) -> Tensor:
    """At most so many bytes of pieces of documents, in the order of their digests."""
    pieces = [(digest(f"{item}#{i}"), piece) for item, whole in found.items()
              for i, piece in enumerate(text.pieces(whole, PIECE))]  # fmt: skip
    return _bytes(b"\n".join(piece for _, piece in sorted(pieces))[:size])


def _domains(name: str, domains: tuple[str, ...], splits: dict[str, dict[str, Tensor]]) -> TextDomains:
    manifest = {}
    for domain in domains:
        parts = {split: splits[split][domain] for split in splits}
        whole = b"".join(bytes(part.tolist()) for part in parts.values())
        manifest[domain] = {
            "source": "standard library, pydoc_data.topics and unicodedata",
            "version": sys.version.split()[0],
            "sha256": hashlib.sha256(whole).hexdigest(),
            "bytes": len(whole),
            "splits": {split: len(part) for split, part in parts.items()},
        }
    return TextDomains(name, domains, splits, manifest)
