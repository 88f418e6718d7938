"""Languages made of one real text, and a decoder that translates between them: parallel data at no cost.

The text is English prose in its 26 letters and a space. A language writes it with a permutation of the letters of its
own, so that a letter means another thing in each; one in six swaps neighbouring words, and one says them backwards, so
that a word is to be looked for. Language l has 2^-l of the text: the last are poor, and drawn with p_l ~ n_l^(1/5), as
in multilingual training. A share of the rows is denoising in one language: three in ten letters are hidden, in spans of
3 in the mean.

    row      [to] [from] source START target         source and target have L letters each
    to say   the target, letter by letter, while the head of the row is read in both directions

Judged by bits per letter of translations, the mean over the languages that are translated into.

Tensor letters: B batch, T time, L letters of a text.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError, unknown
from workbench.lib.core.denoising import IGNORED, random_span_mask
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Batch, check_domain, device_of, mean_by_domain
from workbench.lib.data.types import TextDomains

LETTERS = 26
SPACE = LETTERS
MASK, START, FIRST = range(SPACE + 1, SPACE + 4)  # FIRST: the token of language 0
HIDDEN, SPAN = 0.3, 3.0
ORDERS = ("same", "same", "swapped", "same", "same", "backwards")  # of the words, language by language


class Translation:
    """A `Task` whose domains are the languages that are written; metric: bits per letter of translations.

    Args:
        texts: of which all domains are taken, one after the other.
        length: L.
        languages: how many.
        denoising: share of training rows that are denoising.
        shard: (i, n): training rows begin in the i-th of n parts of what a language has.

    Raises:
        InputError: there are less than two languages, or one has less than two rows of text.
    """

    metric, unit, higher_is_better = "bits_per_letter", "bits/letter", False

    def __init__(
        self,
        texts: TextDomains,
        length: int,
        languages: int = 6,
        denoising: float = 0.5,
        shard: tuple[int, int] = (0, 1),
    ):
        if languages < 2:
            raise InputError(f"languages is {languages} but must be at least 2")
        if not 0 <= denoising <= 1:
            raise InputError(f"denoising is {denoising} but must be from 0 to 1")
        if not 0 <= shard[0] < shard[1]:
            raise InputError(f"shard is {shard} but must be (i, n) with 0 <= i < n")
        self.length, self.denoising, self.shard = length, denoising, shard
        self.name, self.manifest = f"{texts.name}, translated", texts.manifest
        self.text = {split: letters(torch.cat(list(parts.values()))) for split, parts in texts.splits.items()}
        self.domains = tuple(f"language {i} ({ORDERS[i % len(ORDERS)]})" for i in range(languages))
        generator = torch.Generator().manual_seed(0)
        self.maps = torch.stack([torch.randperm(LETTERS, generator=generator) for _ in range(languages)])
        self.maps = torch.cat([self.maps, torch.full((languages, 1), SPACE)], 1)
        self.sizes = torch.tensor([len(self.text["train"]) >> i for i in range(languages)])
        if self.sizes[-1] // shard[1] < 2 * length or min(map(len, self.text.values())) < 2 * length:
            raise InputError(f"length is {length} but the last language has {self.sizes[-1]} letters: take more text")
        self.share = self.sizes.double() ** 0.2
        self.vocab = FIRST + languages

    @property
    def time(self) -> int:
        """T of a row."""
        return 2 * self.length + 2

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        if size < 1:
            raise InputError(f"size is {size} but must be at least 1")
        n = len(self.domains)
        if domain is None:
            into = torch.multinomial(self.share, size, True, generator=generator)
        else:
            check_domain(domain, self.domains)
            into = torch.full((size,), domain)
        others = self.share.expand(size, n).scatter(1, into[:, None], 0.0)
        source = torch.multinomial(others, 1, generator=generator)[:, 0]
        source = torch.where(torch.rand(size, generator=generator) < self.denoising, into, source)
        text = self._split(split)
        common = self.sizes[torch.maximum(into, source)] if split == "train" else torch.full((size,), len(text))
        place = (torch.rand(size, generator=generator, dtype=torch.float64) + self.shard[0]) / self.shard[1]
        start = (place * (common - self.length)).long()
        return self._rows(text[start[:, None] + torch.arange(self.length)], source, into, generator)

    def batches(self, split: str, size: int) -> Iterator[Batch]:
        """Translations alone: each row of the split into each language, from the others in turn."""
        rows, n = self._split(split), len(self.domains)
        rows = rows[: len(rows) // self.length * self.length].view(-1, self.length)
        for into in range(n):
            source = (into + 1 + torch.arange(len(rows)) % (n - 1)) % n
            for part in torch.arange(len(rows)).split(size):
                yield self._rows(rows[part], source[part], torch.full((len(part),), into), None)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        nats, context = self.costs(model, batch)
        return nats.mean(), context

    def costs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        """(B, L) nats of each letter to be said."""
        batch = batch.to(device_of(model))
        rows, time = batch.inputs.shape
        prefix = torch.full((rows,), self.length + 2, device=batch.inputs.device)
        context = Context(domain=batch.domain.repeat_interleave(time), prefix=prefix)
        logits = model(batch.inputs, context)[:, -self.length :]
        return F.cross_entropy(logits.transpose(1, 2), batch.targets[:, -self.length :], reduction="none"), context

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        bits = mean_by_domain(self, model, split, max_batches, lambda batch: self.loss(model, batch)[0] / math.log(2))
        return {self.metric: sum(bits.values()) / len(bits)} | {f"{self.metric}/{d}": v for d, v in bits.items()}

    def written(self, text: Int64[Tensor, "batch length"], language: Int64[Tensor, " batch"]) -> Tensor:
        """Texts (B, L) as each row's language writes them."""
        orders = [ORDERS[i % len(ORDERS)] for i in language.tolist()]
        ordered = torch.tensor([reordered(*pair) for pair in zip(text.tolist(), orders, strict=True)])
        return self.maps[language].gather(1, ordered)

    def _rows(self, text: Tensor, source: Tensor, into: Tensor, generator: torch.Generator | None) -> Batch:
        """inputs, targets (B, T) of texts (B, L); where both languages are the same it is denoising."""
        text = text.long()
        given, said = self.written(text, source), self.written(text, into)
        for row in (source == into).nonzero()[:, 0].tolist():
            given[row, random_span_mask(self.length, SPAN, HIDDEN, generator)] = MASK
        start = torch.full((len(text), 1), START)
        head = torch.stack([FIRST + into, FIRST + source], 1)
        inputs = torch.cat([head, given, start, said[:, :-1]], 1)
        targets = torch.cat([torch.full((len(text), self.length + 2), IGNORED), said], 1)
        return Batch(inputs, targets, into)

    def _split(self, split: str) -> Tensor:
        if split not in self.text:
            raise unknown("split", split, self.text)
        return self.text[split]


def letters(text: UInt8[Tensor, " bytes"]) -> UInt8[Tensor, " letters"]:
    """Bytes as letters 0 to 25 without case, and one `SPACE` for each run of anything else."""
    lower = text.long() | 0x20
    found = torch.where((lower >= ord("a")) & (lower <= ord("z")), lower - ord("a"), SPACE)
    again = (found == SPACE) & F.pad(found == SPACE, (1, 0))[:-1]
    return found[~again].to(torch.uint8)


def reordered(row: list[int], order: str) -> list[int]:
    """A text with its words, what is between two spaces, in another order of `ORDERS`; as long as it was."""
    if order == "same":
        return row
    words = bytes(row).split(bytes([SPACE]))
    if order == "backwards":
        words.reverse()
    else:
        words = [word for i in range(0, len(words), 2) for word in words[i : i + 2][::-1]]
    return list(bytes([SPACE]).join(words))
