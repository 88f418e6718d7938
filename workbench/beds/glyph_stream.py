"""A stream of text and images in one sequence: a character drawn, and its Unicode name, in either order.

For models whose experts, projections or states know the modality of a token. A row is one of

    caption first    BOS  g r e e k   s m a l l ...  BOI  c1 ... c49  EOI  EOS
    image first      BOS  BOI  c1 ... c49  EOI  g r e e k ...  EOS

padded to one length; drawn at random in training, both for every row when judged. The name is cut at 40 letters; the
image is 49 patches of 4 x 4, each the nearest of 64 codes (0: black; the others by k-means of training patches). Every
token has a modality: 0 text and the specials, 1 image. The domains are the two orders; and the metric is also given by
the modality of the token that is said.

15,729 training rows in eight faces (2,083 / 1,844 held out), split by CODEPOINT. The faces come with matplotlib (DejaVu
and STIX licences). A small plain decoder has 0.97 bits a token of text and 1.73 of image after 400 steps; unigrams have
4.23 and 2.69. Capital A is drawn alike in Latin, Greek and Cyrillic, so no model names all characters right.

Tensor letters: B batch, T time.
"""

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds.baseline import Measured, seeded
from workbench.errors import InputError, unknown
from workbench.lib import data
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.modes import evaluating
from workbench.lib.core.routing import Context
from workbench.lib.core.task import EVALUATION_BATCH, Batch, check_domain, device_of
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.cache import Parsed, cached
from workbench.lib.data.glyphs import FACES
from workbench.lib.data.splits import SPLITS

NEEDS = ()
PAD, BOS, BOI, EOI, EOS = range(5)
LETTERS = " -0123456789abcdefghijklmnopqrstuvwxyz"
FIRST_LETTER = 5
FIRST_CODE = FIRST_LETTER + len(LETTERS)
CODES, PATCH = 64, 4
VOCAB = FIRST_CODE + CODES
CAPTION, IMAGE = 40, 49
LENGTH = CAPTION + IMAGE + 3
"""T of a batch: a row without its last token."""
ORDERS = ("caption first", "image first")
MODALITIES = ("text", "image")

SMOKE = {"faces": FACES[4:5], "width": 32, "layers": 1, "steps": 20, "batch": 8}
SMALL = {"faces": FACES, "width": 64, "layers": 2, "steps": 400, "batch": 32}
FULL = {"faces": FACES, "width": 128, "layers": 4, "steps": 5000, "batch": 64}


@dataclass(frozen=True)
class Interleaved(Batch):
    """inputs, targets (B, T), 0 where nothing is to be said; domain (B,): the order; modality (B, T) of the inputs."""

    modality: Tensor

    def to(self, device: torch.device) -> "Interleaved":
        return Interleaved(*(part.to(device) for part in (self.inputs, self.targets, self.domain, self.modality)))


class GlyphStream:
    """Next-token prediction; metric: bits per token, the unweighted mean over the two orders.

    Beside it "bits_per_token/text" and "bits_per_token/image", by the modality of the token said.

    Args:
        faces: type faces that characters are drawn in.
    """

    metric, unit, higher_is_better = "bits_per_token", "bits/token", False
    name, domains = "glyph-stream", ORDERS
    modalities, starts = MODALITIES, (FIRST_CODE,)  # the first token of each modality but text
    vocab, length = VOCAB, LENGTH

    def __init__(self, faces: Sequence[str] = FACES):
        found = data.load("glyph-names", faces=faces)

        def build() -> Parsed:
            book = codebook(found.splits["train"][0])
            tensors = {"codebook": book}
            for split in SPLITS:
                images, codepoints, _ = found.splits[split]
                rows = rows_of(captions(codepoints), codes(images, book))
                tensors[split] = rows.to(torch.uint8)
            return tensors, {
                "sha256": sha256(b"".join(tensors[split].numpy().tobytes() for split in SPLITS)).hexdigest()
            }

        code = sha256(Path(__file__).read_bytes()).hexdigest()
        tensors, manifest = cached("glyph-stream", f"{found.manifest['glyph-names']['sha256']} {code}", build)
        self.codebook = tensors["codebook"]
        self.rows = {split: tensors[split] for split in SPLITS}  # split -> (rows, order, T + 1) uint8
        self.manifest = found.manifest | {"glyph-stream": manifest}

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Interleaved:
        if size < 1:
            raise InputError(f"size is {size} but must be at least 1")
        rows = self._rows(split)
        chosen = torch.randint(len(rows), (size,), generator=generator)
        orders = torch.randint(len(ORDERS), (size,), generator=generator)
        if domain is not None:
            check_domain(domain, ORDERS)
            orders = torch.full((size,), domain)
        return self._batch(rows[chosen, orders], orders)

    def batches(self, split: str, size: int) -> Iterator[Interleaved]:
        for order in range(len(ORDERS)):
            for rows in self._rows(split)[:, order].split(size):
                yield self._batch(rows, torch.full((len(rows),), order))

    def loss(self, model: nn.Module, batch: Interleaved) -> tuple[Tensor, Context]:
        bits, context = self._nats(model, batch.to(device_of(model)))
        return bits.sum() / (batch.targets != PAD).sum(), context

    def modality_loss(self, model: nn.Module, batch: Interleaved, modality: int) -> Tensor:
        """The mean loss of the tokens of one modality that are said; 0 where there are none."""
        batch = batch.to(device_of(model))
        said = (batch.targets != PAD) & (self._kinds(batch.targets) == modality)
        return self._nats(model, batch)[0][said].sum() / said.sum().clamp(min=1)

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        total = torch.zeros(len(ORDERS), len(self.modalities), 2, dtype=torch.float64)  # bits, and tokens
        seen = [0] * len(ORDERS)
        with evaluating(model):
            for batch in self.batches(split, EVALUATION_BATCH):
                order = int(batch.domain[0])
                if max_batches is not None and seen[order] >= max_batches:
                    continue
                seen[order] += 1
                batch = batch.to(device_of(model))
                bits = self._nats(model, batch)[0].double() / math.log(2)
                kinds = self._kinds(batch.targets)
                for modality in range(len(self.modalities)):
                    said = (batch.targets != PAD) & (kinds == modality)
                    total[order, modality] += torch.stack([bits[said].sum(), said.sum()]).cpu()
        by_order, by_modality = (total.sum(axis)[:, 0] / total.sum(axis)[:, 1] for axis in (1, 0))
        named = dict(zip(ORDERS, by_order.tolist(), strict=True)) | dict(
            zip(self.modalities, by_modality.tolist(), strict=True)
        )
        return {self.metric: float(by_order.mean())} | {f"{self.metric}/{name}": bits for name, bits in named.items()}

    def _nats(self, model: nn.Module, batch: Interleaved) -> tuple[Float[Tensor, "batch time"], Context]:
        """What each target costs, 0 for padding."""
        domain = batch.domain.repeat_interleave(batch.inputs.shape[1])
        real = (batch.targets != PAD).flatten()  # what is said after is padding to a router too
        context = Context(domain=domain, modality=batch.modality.flatten(), mask=real)
        logits = model(batch.inputs, context)
        return F.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=PAD, reduction="none"), context

    def _batch(self, rows: Tensor, orders: Tensor) -> Interleaved:
        inputs, targets = rows[:, :-1].long(), rows[:, 1:].long()
        return Interleaved(inputs.masked_fill(targets == PAD, PAD), targets, orders, self._kinds(inputs))

    def _kinds(self, tokens: Tensor) -> Tensor:
        """Modality of each token."""
        return sum((tokens >= start).long() for start in self.starts)

    def _rows(self, split: str) -> Tensor:
        if split not in self.rows:
            raise unknown("split", split, self.rows)
        return self.rows[split]


def captions(codepoints: Int64[Tensor, " rows"]) -> Int64[Tensor, "rows caption"]:
    """Tokens of the characters' names, lower-case, cut at 40, padded."""
    tokens = torch.full((len(codepoints), CAPTION), PAD)
    for row, code in zip(tokens, codepoints.tolist(), strict=True):
        name = unicodedata.name(chr(code)).lower()[:CAPTION]
        row[: len(name)] = torch.tensor([FIRST_LETTER + LETTERS.index(letter) for letter in name])
    return tokens


def patches(images: UInt8[Tensor, "rows height width"]) -> Float[Tensor, "rows 49 16"]:
    """The 49 patches of each image as values 0 to 1, row by row."""
    return F.unfold(images[:, None].float() / 255, PATCH, stride=PATCH).transpose(1, 2)


def codebook(images: UInt8[Tensor, "rows height width"], sample: int = 8000) -> Float[Tensor, "codes 16"]:
    """64 patches: black, and the centres of a sample of those that are not (k-means)."""
    from sklearn.cluster import KMeans

    inked = patches(images).flatten(0, 1)
    inked = inked[inked.amax(1) > 0]
    every = max(1, len(inked) // sample)
    found = KMeans(CODES - 1, n_init=1, max_iter=50, random_state=0).fit(inked[::every].numpy())
    centres = torch.from_numpy(found.cluster_centers_.astype(np.float32))
    return torch.cat([torch.zeros(1, PATCH * PATCH), centres[centres.mean(1).argsort()]])


def codes(images: UInt8[Tensor, "rows height width"], book: Float[Tensor, "codes 16"]) -> Int64[Tensor, "rows 49"]:
    """Number of the nearest code of each patch."""
    return torch.cat(
        [torch.cdist(part, book.expand(len(part), -1, -1)).argmin(-1) for part in patches(images).split(512)]
    )


def picture(numbers: Int64[Tensor, "rows 49"], book: Float[Tensor, "codes 16"]) -> Float[Tensor, "rows 28 28"]:
    """The images that codes stand for."""
    side = PATCH * math.isqrt(IMAGE)
    return F.fold(book[numbers].transpose(1, 2), (side, side), PATCH, stride=PATCH)[:, 0]


def rows_of(
    caption: Int64[Tensor, "rows caption"], image: Int64[Tensor, "rows 49"]
) -> Int64[Tensor, "rows orders time"]:
    """Both orders of each row, padded to T + 1."""
    rows = torch.full((len(caption), len(ORDERS), LENGTH + 1), PAD)
    for row, name, drawn in zip(rows, caption, image + FIRST_CODE, strict=True):
        name = name[name != PAD]
        shown = torch.cat([torch.tensor([BOI]), drawn, torch.tensor([EOI])])
        for order, parts in enumerate(((name, shown), (shown, name))):
            tokens = torch.cat([torch.tensor([BOS]), *parts, torch.tensor([EOS])])
            row[order, : len(tokens)] = tokens
    return rows


def unigram_bits(task: GlyphStream, split: str = "test") -> dict[str, float]:
    """Bits per token by how often each token of its modality is said in training, one added to each."""
    training, judged = (
        sum(batch.targets.flatten().bincount(minlength=task.vocab) for batch in task.batches(part, EVALUATION_BATCH))
        for part in ("train", split)
    )
    bits = {}
    for name, first, end in zip(task.modalities, (1, *task.starts), (*task.starts, task.vocab), strict=True):
        counts, said = training[first:end].double(), judged[first:end].double()
        share = (counts + 1) / (counts + 1).sum()
        bits[name] = -float((said * share.log2()).sum() / said.sum())
    return bits


def prepare(settings: Mapping[str, Any] = SMALL) -> GlyphStream:
    return GlyphStream(settings["faces"])


def measure(settings: Mapping[str, Any] = SMALL) -> list[Measured]:
    return measured(prepare(settings), settings)


def measured(task: GlyphStream, settings: Mapping[str, Any]) -> list[Measured]:
    """What a plain decoder reaches that is told nothing of modalities."""
    width = settings["width"]
    model = seeded(
        0, lambda: DecoderLM(task.vocab, width, settings["layers"], 4, lambda layer: GLU(width, 2 * width), task.length)
    )
    train(model, task, TrainConfig(settings["steps"], settings["batch"], eval_batches=4))
    reached, trivial = task.evaluate(model, "test"), unigram_bits(task)
    about = f"{len(task.rows['train']):,} rows of {task.length} tokens"
    return [
        Measured(
            name,
            about,
            "decoder (trivial: unigram)",
            "bits/token",
            trivial[name],
            reached[f"{task.metric}/{name}"],
            math.nan,
        )
        for name in task.modalities
    ]
