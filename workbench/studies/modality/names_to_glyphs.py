"""Drawing a character from its name, by a model of bytes that knows names and has never seen a picture.

A row is what a model of Python's documentation and of Unicode names may have read, and then new tokens:

    newline  G R E E K   S M A L L ...  BOI  c1 ... c49  EOI  padding

Pictures, codes and the split by codepoint are those of `beds.glyph_stream`. Judged are the 49 codes and EOI.

The text models are trained once a seed and kept. Not a part of the study's own file, so that another rule or arm leaves
them as they are.
"""

import math
import sys
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds import glyph_stream as bed
from workbench.beds.glyph_stream import GlyphStream
from workbench.beds.pretrained import pretrained
from workbench.errors import InputError, unknown
from workbench.lib import data
from workbench.lib.core import moe, routers, split
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.modes import evaluating
from workbench.lib.core.routing import Context
from workbench.lib.core.split import split_glu
from workbench.lib.core.task import EVALUATION_BATCH, Batch, LanguageModelling, device_of
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.modality.moe_redundancy import ExtendedLM
from workbench.studies.core import Settings

VOCAB = 256
BOI, EOI, FIRST_CODE = VOCAB, VOCAB + 1, VOCAB + 2
NEW = 2 + bed.CODES
UNJUDGED = -100
LENGTH = 1 + bed.CAPTION + 1 + bed.IMAGE
"""T of a batch: a row without its last token."""
BASES = ("dense", "moe")
#: What of the settings decides the text models.
SHAPE = ("d_model", "d_hidden", "n_layers", "n_heads", "n_experts", "top_k", "balance")
TRAINING = ("base_steps", "split_steps", "base_batch", "base_lr", "cap")


class NamesToGlyphs:
    """Next-token prediction of pictures; metric: bits per token of an image, its end included.

    Args:
        faces: type faces that characters are drawn in.
    """

    metric, unit, higher_is_better = "bits_per_image_token", "bits/token", False
    name, domains = "names-to-glyphs", ("glyphs",)
    vocab = VOCAB + NEW

    def __init__(self, faces: Sequence[str]):
        stream = GlyphStream(faces)
        self.codebook, self.manifest = stream.codebook, stream.manifest
        self.names, self.codes, self.rows = {}, {}, {}
        for part, rows in stream.rows.items():
            first = rows[:, bed.ORDERS.index("caption first")].long()
            begin = (first == bed.BOI).int().argmax(1, keepdim=True)
            at = torch.arange(bed.CAPTION)
            self.names[part] = _bytes(first[:, 1 : 1 + bed.CAPTION].masked_fill(at >= begin - 1, bed.PAD))
            self.codes[part] = first.gather(1, begin + 1 + torch.arange(bed.IMAGE)) - bed.FIRST_CODE
            self.rows[part] = rows_of(self.names[part], self.codes[part])

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        if size < 1:
            raise InputError(f"size is {size} but must be at least 1")
        rows = self._rows(split)
        return _batch(rows[torch.randint(len(rows), (size,), generator=generator)])

    def batches(self, split: str, size: int) -> Iterator[Batch]:
        for rows in self._rows(split).split(size):
            yield _batch(rows)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        batch = batch.to(device_of(model))
        inputs = batch.inputs.flatten()
        context = Context(
            domain=torch.zeros_like(inputs), modality=(inputs >= VOCAB).long(), mask=(batch.inputs != 0).flatten()
        )
        logits = model(batch.inputs, context)
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=UNJUDGED), context

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        bits = self.bits(model, self._rows(split), max_batches)
        return {self.metric: bits, f"{self.metric}/{self.domains[0]}": bits}

    def bits(self, model: nn.Module, rows: Int64[Tensor, "rows time"], max_batches: int | None = None) -> float:
        """Bits per image token of some rows: every row has as many."""
        with evaluating(model):
            parts = rows.split(EVALUATION_BATCH)[:max_batches]
            return sum(float(self.loss(model, _batch(part))[0]) * len(part) for part in parts) / (
                math.log(2) * sum(map(len, parts))
            )

    def with_wrong_names(self, split: str) -> Int64[Tensor, "rows time"]:
        """The rows of a split, the name of each that of the row half the split away."""
        names = self.names[split]
        return rows_of(names.roll(len(names) // 2, 0), self.codes[split])

    def _rows(self, split: str) -> Tensor:
        if split not in self.rows:
            raise unknown("split", split, self.rows)
        return self.rows[split]


def _bytes(letters: Int64[Tensor, "rows caption"]) -> Int64[Tensor, "rows caption"]:
    """Letters of the stream as bytes of Unicode's names, which are upper-case; 0 for padding."""
    table = torch.zeros(bed.VOCAB, dtype=torch.int64)
    table[bed.FIRST_LETTER : bed.FIRST_CODE] = torch.tensor(list(bed.LETTERS.upper().encode()))
    return table[letters]


def rows_of(names: Int64[Tensor, "rows caption"], codes: Int64[Tensor, "rows 49"]) -> Int64[Tensor, "rows time"]:
    """Rows of T + 1 tokens from names, padded with 0, and codes."""
    length = (names != 0).sum(1, keepdim=True)
    rows = torch.zeros(len(names), LENGTH + 1, dtype=torch.int64)
    rows[:, 0] = ord("\n")
    rows[:, 1 : 1 + bed.CAPTION] = names
    shown = F.pad(codes + FIRST_CODE, (1, 0), value=BOI)
    shown = F.pad(shown, (0, 1), value=EOI)
    return rows.scatter_(1, 1 + length + torch.arange(shown.shape[1]), shown)


def _batch(rows: Tensor) -> Batch:
    inputs, targets = rows[:, :-1], rows[:, 1:]
    return Batch(inputs, targets.masked_fill(targets <= BOI, UNJUDGED), torch.zeros(len(rows), dtype=torch.int64))


@torch.no_grad()
def draw(model: ExtendedLM, name: str, count: int = 1, seed: int = 0) -> Int64[Tensor, "count 49"]:
    """Codes that the model draws for a name, at random by its probabilities of the codes."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.tensor([ord("\n"), *name.upper().encode()[: bed.CAPTION], BOI])
    tokens = start.expand(count, -1)
    with evaluating(model):
        for _ in range(bed.IMAGE):
            chances = model(tokens)[:, -1, FIRST_CODE:].softmax(-1)
            tokens = torch.cat([tokens, FIRST_CODE + torch.multinomial(chances, 1, generator=generator)], 1)
    return tokens[:, len(start) :] - FIRST_CODE


# -- the models of text


def text_task(settings: Settings) -> LanguageModelling:
    texts = data.load("text-domains", domains=("docs", "names"), cap=settings["cap"])
    return LanguageModelling(texts, LENGTH)


def frequent(task: LanguageModelling, least: int = 100) -> Int64[Tensor, " bytes"]:
    """Bytes that the training text has so many times."""
    counts = sum(text.long().bincount(minlength=VOCAB) for text in task.data.splits["train"].values())
    return (counts >= least).nonzero().flatten()


def text_model(base: str, seed: int, settings: Settings) -> DecoderLM:
    """A model of bytes, trained in two parts. For "moe" its blocks are split between them, for "dense" they are not."""
    if base not in BASES:
        raise unknown("base", base, BASES)
    task, width, hidden = text_task(settings), settings["d_model"], settings["d_hidden"]
    shape = (VOCAB, width, settings["n_layers"], settings["n_heads"])

    def dense() -> DecoderLM:
        torch.manual_seed(seed)
        return DecoderLM(*shape, lambda layer: GLU(width, hidden), LENGTH)

    def build() -> DecoderLM:
        return split_blocks(dense(), seed, settings) if base == "moe" else dense()

    def learn(model: nn.Module, steps: str) -> None:
        config = TrainConfig(settings[steps], settings["base_batch"], settings["base_lr"], seed=seed, eval_every=None)
        train(model, task, config)

    def teach(model: DecoderLM) -> None:
        half = pretrained("byte-text", recipe | {"base": None}, dense, lambda made: learn(made, "base_steps"), code)
        half = split_blocks(half, seed, settings) if base == "moe" else half
        model.load_state_dict(half.state_dict())
        learn(model, "split_steps")

    recipe = {name: settings[name] for name in (*SHAPE, *TRAINING)} | {"seed": seed, "data": task.manifest}
    code = [moe, routers, split, sys.modules[__name__]]
    return pretrained("byte-text", recipe | {"base": base}, build, teach, code)


def split_blocks(model: DecoderLM, seed: int, settings: Settings) -> DecoderLM:
    """Each feed-forward block becomes a mixture of slices of it."""
    torch.manual_seed(seed)
    for block in model.blocks:
        balance = {"lbl": settings["balance"]}
        block.ffn = split_glu(block.ffn, settings["n_experts"], settings["top_k"], seed=seed, coefficients=balance)
    return model
