"""Questions about what is seen and heard, asked of a decoder of bytes that has read text only.

    digits    which digit is drawn? a digit of MNIST as 4 patches of 14 x 14 pixels: "seven"
    speech    which of nine men speaks? the first frames of an utterance, 12 cepstra each: "speaker four"
    glyphs    which script is it? a drawn character as 4 patches of 14 x 14 pixels: "greek"

A row is a signal, which a connector turns into soft tokens, and the bytes of a question and its answer. The loss is on
the answer's bytes. The metric is the share of answers that are right to the last byte, which is what is said greedily;
the mean over the modalities, so that a rare one counts as much. There are no encoders: patches and frames are raw.

The base has read names of characters, and lines of questions with random answers: it knows how one asks and answers,
and nothing of any signal. Characters are split by CODEPOINT. Data: `workbench data get mnist-5k` (CC-BY-SA-3.0),
`workbench data get speech` (CC-BY-4.0), matplotlib's faces.

Tensor letters: B rows, T bytes, S states (patches, frames), F their width.
"""

import hashlib
import math
import random
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds.pretrained import pretrained
from workbench.errors import InputError, unknown
from workbench.lib import data
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.modes import evaluating
from workbench.lib.core.routing import Context
from workbench.lib.core.task import EVALUATION_BATCH, Batch, LanguageModelling, check_domain, device_of
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.splits import SPLITS
from workbench.lib.data.types import TextDomains
from workbench.lib.modality.uni_moe import PAD, Signal

MODALITIES = ("digits", "speech", "glyphs")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SCRIPTS = ("latin", "greek", "cyrillic", "arabic", "georgian", "armenian", "hebrew", "canadian")
FACES = ("DejaVuSans", "DejaVuSerif")
PER_SCRIPT = 60  # of the training codepoints of each face, so that no script is most of them
QUESTIONS = {"digits": "what digit? ", "speech": "who speaks? ", "glyphs": "which script? "}
ANSWERS = {
    "digits": NUMBERS,
    "speech": tuple(f"speaker {number}" for number in NUMBERS[1:]),
    "glyphs": SCRIPTS,
}
END = "\n"
TEXT = max(len(QUESTIONS[name] + answer) for name in MODALITIES for answer in ANSWERS[name])
"""T of a batch."""
PATCH = 14
WIDTHS = {"digits": PATCH * PATCH, "speech": 12, "glyphs": PATCH * PATCH}
"""F of each modality."""
SILENT = -100
"""The target where nothing is to be said."""
LR = 3e-3


@dataclass(frozen=True)
class Asked(Batch):
    """inputs, targets (B, T); domain (B,): the modality; signals by modality, see `Signal`."""

    signals: Mapping[str, Signal]

    def to(self, device: torch.device) -> "Asked":
        signals = {name: signal.to(device) for name, signal in self.signals.items()}
        return Asked(*(part.to(device) for part in (self.inputs, self.targets, self.domain)), signals)


@dataclass(frozen=True)
class Answered:
    """The rows of a split: states (R, S, F), mask (R, S) or None, and the answers (R,), numbers in `ANSWERS`."""

    states: Float[Tensor, "rows states width"]
    mask: Tensor | None
    answer: Int64[Tensor, " rows"]

    def __getitem__(self, rows: Tensor | slice) -> "Answered":
        return Answered(self.states[rows], None if self.mask is None else self.mask[rows], self.answer[rows])


class SignalQuestions:
    """Answers in bytes; metric: the share of answers that are right to the last byte, the mean over the modalities.

    Models are called as `model(bytes (B, T), signals, context)`, see `MultimodalLM`.

    Args:
        modalities: of `MODALITIES`.
        shares: of the rows of a batch, one for each modality; default equal ones. A batch of b rows has as near to b
            times each share as whole numbers allow, and the same every time.
        frames: of an utterance that are heard, its first.
    """

    metric, unit, higher_is_better = "accuracy", "fraction", True
    name, vocab = "signal-questions", LanguageModelling.vocab
    modalities = ("text", *MODALITIES)

    def __init__(self, modalities: Sequence[str] = MODALITIES, shares: Sequence[float] | None = None, frames: int = 29):
        for modality in modalities:
            if modality not in MODALITIES:
                raise unknown("modality", modality, MODALITIES)
        if not modalities or len(set(modalities)) < len(modalities):
            raise InputError(f"modalities is {tuple(modalities)} but must hold at least one, and each once")
        shares = [1.0] * len(modalities) if shares is None else [float(share) for share in shares]
        if len(shares) != len(modalities) or not all(0 < share < math.inf for share in shares):
            raise InputError(
                f"shares is {shares} but must hold a number above 0 for each of {len(modalities)} modalities"
            )
        if frames < 1:
            raise InputError(f"frames is {frames} but must be at least 1")
        self.domains, self.shares = tuple(modalities), torch.tensor(shares, dtype=torch.float64)
        found = {name: READ[name](frames) if name == "speech" else READ[name]() for name in modalities}
        self.rows = {name: rows for name, (rows, _) in found.items()}
        self.manifest = {"modalities": list(modalities), "shares": shares, "frames": frames}
        for _, manifest in found.values():
            self.manifest |= manifest

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Asked:
        if size < 1:
            raise InputError(f"size is {size} but must be at least 1")
        if domain is None:
            edges = (self.shares.cumsum(0) / self.shares.sum() * size).round().long()
            counts = edges.diff(prepend=edges.new_zeros(1)).tolist()
        else:
            check_domain(domain, self.domains)
            counts = [size * (number == domain) for number in range(len(self.domains))]
        parts = {}
        for name, count in zip(self.domains, counts, strict=True):
            rows = self._rows(name, split)
            parts[name] = rows[torch.randint(len(rows.answer), (count,), generator=generator)]
        return self._ask(parts)

    def batches(self, split: str, size: int) -> Iterator[Asked]:
        for name in self.domains:
            rows = self._rows(name, split)
            for first in range(0, len(rows.answer), size):
                yield self._ask({name: rows[slice(first, first + size)]})

    def loss(self, model: nn.Module, batch: Asked) -> tuple[Tensor, Context]:
        batch = batch.to(device_of(model))
        context = Context(domain=batch.domain)
        logits = model(batch.inputs, batch.signals, context)
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=SILENT), context

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        right, asked, seen = ([0] * len(self.domains) for _ in range(3))
        with evaluating(model):
            for batch in self.batches(split, EVALUATION_BATCH):
                domain = int(batch.domain[0])
                if max_batches is not None and seen[domain] >= max_batches:
                    continue
                batch = batch.to(device_of(model))
                said = model(batch.inputs, batch.signals, Context(domain=batch.domain)).argmax(-1)
                right[domain] += int(((said == batch.targets) | (batch.targets == SILENT)).all(1).sum())
                asked[domain], seen[domain] = asked[domain] + len(said), seen[domain] + 1
        share = [a / b for a, b in zip(right, asked, strict=True)]
        named = {f"{self.metric}/{name}": value for name, value in zip(self.domains, share, strict=True)}
        return {self.metric: sum(share) / len(share)} | named

    def _rows(self, name: str, split: str) -> Answered:
        if split not in self.rows[name]:
            raise unknown("split", split, self.rows[name])
        return self.rows[name][split]

    def _ask(self, parts: Mapping[str, Answered]) -> Asked:
        texts, domains, signals, first = [], [], {}, 0
        for name, rows in parts.items():
            count = len(rows.answer)
            if count:
                texts.append(_texts(name)[rows.answer])
                domains += [self.domains.index(name)] * count
                signals[name] = Signal(torch.arange(first, first + count), rows.states, rows.mask)
                first += count
        inputs, targets = torch.cat(texts).unbind(1)
        return Asked(inputs, targets, torch.tensor(domains), signals)


@cache
def _texts(name: str) -> Int64[Tensor, "answers two time"]:
    """Inputs and targets of each answer to the question of a modality."""
    rows = torch.full((len(ANSWERS[name]), 2, TEXT), PAD)
    rows[:, 1] = SILENT
    asked = len(QUESTIONS[name])
    for row, answer in zip(rows, ANSWERS[name], strict=True):
        said = torch.tensor([*(QUESTIONS[name] + answer + END).encode()])
        row[0, : len(said) - 1] = said[:-1]
        row[1, asked - 1 : len(said) - 1] = said[asked:]
    return rows


def patches(images: Float[Tensor, "rows 28 28"]) -> Float[Tensor, "rows 4 196"]:
    return F.unfold(images[:, None], PATCH, stride=PATCH).transpose(1, 2)


Read = tuple[dict[str, Answered], dict[str, dict]]
"""The rows of each split, and the manifest."""


@cache
def digits() -> Read:
    found = data.load("mnist-5k")
    return {split: Answered(patches(x[:, 0]), None, y) for split, (x, y) in found.splits.items()}, found.manifest


@cache
def speech(frames: int) -> Read:
    """Frames in units of their deviation over the training utterances."""
    found = data.load("speech")
    heard = torch.cat([points for points, _ in found.splits["train"]])
    mean, deviation = heard.mean(0), heard.std(0)
    splits = {}
    for split, pairs in found.splits.items():
        points = [(row[:frames] - mean) / deviation for row, _ in pairs]
        states = nn.utils.rnn.pad_sequence([*points, torch.zeros(frames, heard.shape[1])], batch_first=True)[:-1]
        lengths = torch.tensor([len(row) for row in points])
        mask = torch.arange(frames) < lengths[:, None]
        splits[split] = Answered(states, mask, torch.tensor([label for _, label in pairs]))
    return splits, found.manifest


@cache
def glyphs() -> Read:
    """Of each face at most `PER_SCRIPT` characters a script and split, spread over the codepoints."""
    found = data.load("glyph-names", faces=FACES)
    splits = {}
    for split, (images, codepoints, faces) in found.splits.items():
        script = [unicodedata.name(chr(code)).split()[0].lower() for code in codepoints.tolist()]
        chosen = []
        for face in range(len(FACES)):
            for name in SCRIPTS:
                rows = [
                    row for row, (s, f) in enumerate(zip(script, faces.tolist(), strict=True)) if (s, f) == (name, face)
                ]
                chosen += rows[:: -(-len(rows) // PER_SCRIPT)] if rows else []
        answer = torch.tensor([SCRIPTS.index(script[row]) for row in chosen])
        splits[split] = Answered(patches(images[chosen].float() / 255), None, answer)
    return splits, found.manifest


READ = {"digits": digits, "speech": speech, "glyphs": glyphs}


def text(cap: int) -> TextDomains:
    """What the base reads: names of characters, and between them lines of questions with random answers."""
    found = data.load("text-domains", domains=("names",), cap=cap)
    splits = {}
    for split in SPLITS:
        draw = random.Random(split)
        lines = []
        for line in bytes(found.splits[split]["names"].tolist()).decode().splitlines():
            name = draw.choice(MODALITIES)
            lines += [line, QUESTIONS[name] + draw.choice(ANSWERS[name])]
        splits[split] = {"names": torch.frombuffer(bytearray(END.join(lines).encode()), dtype=torch.uint8)}
    return TextDomains("names and questions", ("names",), splits, found.manifest)


def base(settings: Mapping[str, Any], seed: int = 0) -> DecoderLM:
    """The decoder that has read: trained once, then from its file."""
    source, width = text(settings["cap"]), settings["d_model"]
    task = LanguageModelling(source, settings["seq_len"])

    def build() -> DecoderLM:
        torch.manual_seed(seed)
        ffn = settings["d_hidden"]
        return DecoderLM(task.vocab, width, settings["n_layers"], 4, lambda layer: GLU(width, ffn), settings["seq_len"])

    def teach(model: nn.Module) -> object:
        config = TrainConfig(settings["base_steps"], settings["batch"], LR, seed=seed, eval_every=None)
        return train(model, task, config)

    recipe = {name: settings[name] for name in ("d_model", "d_hidden", "n_layers", "seq_len", "base_steps", "batch")}
    stream = b"".join(bytes(part["names"].tolist()) for part in source.splits.values())
    recipe |= {"seed": seed, "text": hashlib.sha256(stream).hexdigest()}
    return pretrained("signal-questions-base", recipe, build, teach, [sys.modules[__name__]])
