"""Text with holes, and what stood in them: the parts of every objective that gives a model a text to complete.

A row of text becomes an `Example`, what the model is given and what it has to say, in one of two ways:

    blank_out   a b [c d] e [f] g   ->  a b <0> e <1> g       <0> c d <1> f END       T5's sentinels
    cut_off     a b c d e f g       ->  a b c d e             f g                     the text goes on

Examples become a batch in one of two forms, a dictionary of tensors for any model that reads one:

    EncoderDecoderForm   encoder: [mode] given     decoder: START said     labels: said
    PrefixForm           [mode] given START said, with an attention mask: `given` is read in both directions, `said`
                         causally. Text that goes on does so without START, so that it is a prefix language model, and
                         with one token given a causal one.

A form knows how long a text may be so that nothing is cut off: whoever trims what is too long trains on fewer of the
late spans than it says.

Tensor letters: B batch, T time, L length of a text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from workbench.errors import InputError, unknown
from workbench.lib.core.attention import prefix_mask

IGNORED = -100
"""The label where nothing is to be said; torch's cross entropy leaves it out."""


@dataclass(frozen=True)
class Vocabulary:
    """Token ids: first those of the data, then the sentinels in order, START, END, PAD, and a token for each mode."""

    data: int = 256
    sentinels: int = 32
    modes: tuple[str, ...] = ("R", "S", "X")

    def __post_init__(self):
        for name in ("data", "sentinels"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)!r} but must be a whole number, at least 1")
        if len(set(self.modes)) < len(self.modes):
            raise InputError(f"modes are {self.modes} but must each be another")

    @property
    def start(self) -> int:
        return self.data + self.sentinels

    @property
    def end(self) -> int:
        return self.start + 1

    @property
    def pad(self) -> int:
        return self.start + 2

    @property
    def size(self) -> int:
        return self.start + 3 + len(self.modes)

    def mode(self, name: str) -> int:
        """The token of a mode."""
        if name not in self.modes:
            raise unknown("mode", name, self.modes)
        return self.start + 3 + self.modes.index(name)

    def is_sentinel(self, ids: Tensor) -> Tensor:
        return (ids >= self.data) & (ids < self.start)

    def written(self, token: int) -> str:
        """A token as a reader sees it; of data the character with that code."""
        if not 0 <= token < self.size:
            raise InputError(f"token is {token} but must be between 0 and {self.size - 1}")
        if token < self.data:
            return chr(token)
        if token < self.start:
            return f"<{token - self.data}>"
        return ("START", "END", "PAD", *(f"[{mode}]" for mode in self.modes))[token - self.start]


BYTES = Vocabulary()


@dataclass(frozen=True, eq=False)
class Example:
    """What a model is given and what it has to say; `goes_on`: the second follows the first as text does."""

    given: Int64[Tensor, " given"]
    said: Int64[Tensor, " said"]
    goes_on: bool


def span_counts(length: int, mean_span: float, rate: float) -> tuple[int, int]:
    """How many tokens of a text are hidden, and in how many spans: T5's rule.

    Hidden are round(rate L), between 1 and L - 1 tokens, and spans are round(hidden / mean_span) of them. T5 fails
    where there are more spans than tokens to part them; here there are then as many spans as such tokens.

    Raises:
        InputError: the text has less than two tokens, the mean span is below 1 or longer than the text, or the rate is
            not strictly between 0 and 1.
    """
    if length < 2:
        raise InputError(f"length is {length} but must be at least 2: a token to hide, and one to hide it from")
    if not 0 < rate < 1:
        raise InputError(f"rate is {rate} but must be above 0 and below 1")
    if not 1 <= mean_span <= length:
        raise InputError(f"mean_span is {mean_span} but must be at least 1 and at most the {length} tokens of the text")
    hidden = min(max(round(rate * length), 1), length - 1)
    return hidden, min(max(round(hidden / mean_span), 1), length - hidden)


def random_span_mask(length: int, mean_span: float, rate: float, generator: torch.Generator) -> Bool[Tensor, " length"]:
    """Which tokens of a text are hidden. The counts are those of `span_counts`, always.

    As in T5, the hidden tokens and the others are each parted at random into as many pieces as there are spans, none
    of them empty, all ways alike, and the pieces alternate, beginning with what is not hidden. So two spans never
    touch, the first token is never hidden and the last one always is.
    """
    hidden, spans = span_counts(length, mean_span, rate)
    pieces = torch.stack([_pieces(length - hidden, spans, generator), _pieces(hidden, spans, generator)], 1)
    return torch.tensor([False, True]).repeat(spans).repeat_interleave(pieces.flatten())


def _pieces(total: int, count: int, generator: torch.Generator) -> Int64[Tensor, " count"]:
    """Lengths of `count` pieces that make `total`, none of them 0, each way with the same probability."""
    cuts = torch.randperm(total - 1, generator=generator)[: count - 1].sort().values + 1
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([total])]).diff()


def blank_out(ids: Shaped[Tensor, " length"], mask: Bool[Tensor, " length"], vocab: Vocabulary = BYTES) -> Example:
    """Hide the spans of a text where `mask` holds behind sentinels; to say are the spans, each after its own, and END.

    Raises:
        InputError: nothing is hidden, or everything; there are more spans than sentinels; an id is none of the data.
    """
    ids = _checked_data(ids, vocab)
    if mask.shape != ids.shape or mask.dtype != torch.bool:
        raise InputError(f"mask is {mask.dtype} of shape {tuple(mask.shape)} but must be bool, one a token: {len(ids)}")
    if not 0 < int(mask.sum()) < len(ids):
        raise InputError(f"mask hides {int(mask.sum())} of {len(ids)} tokens but must hide some and not all")
    first = mask.clone()
    first[1:] &= ~mask[:-1]
    spans = int(first.sum())
    if spans > vocab.sentinels:
        raise InputError(f"mask has {spans} spans but the vocabulary has {vocab.sentinels} sentinels")
    sentinels = vocab.data - 1 + first.cumsum(0)
    given = torch.where(first, sentinels, ids)[first | ~mask]
    said = torch.stack([sentinels, ids], 1)[torch.stack([first, mask], 1)]
    return Example(given, torch.cat([said, torch.tensor([vocab.end])]), False)


def cut_off(ids: Shaped[Tensor, " length"], count: int, vocab: Vocabulary = BYTES) -> Example:
    """Hide the last `count` tokens of a text. It goes on past them, so there is no END.

    Raises:
        InputError: nothing is hidden, or everything; an id is none of the data.
    """
    ids = _checked_data(ids, vocab)
    if not 0 < count < len(ids):
        raise InputError(f"count is {count} but must be between 1 and {len(ids) - 1}, one less than the text has")
    return Example(ids[:-count], ids[-count:], True)


def _checked_data(ids: Tensor, vocab: Vocabulary) -> Int64[Tensor, " length"]:
    """The ids of a text as int64: in bytes, as text is kept, there is no number for a sentinel."""
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise InputError(f"ids are {ids.dtype} but must be whole numbers")
    ids = ids.long()
    if ids.ndim != 1 or len(ids) < 2:
        raise InputError(f"ids has shape {tuple(ids.shape)} but must be one text of at least 2 tokens")
    if ids.min() < 0 or ids.max() >= vocab.data:
        raise InputError(
            f"ids are {int(ids.min())} to {int(ids.max())} but must be between 0 and {vocab.data - 1}, which are the "
            "data; the ids above are sentinels"
        )
    return ids


def reconstruct(given: Shaped[Tensor, " given"], said: Shaped[Tensor, " said"], vocab: Vocabulary = BYTES) -> Tensor:
    """The text that an example was made of: the spans back in their places, or the two parts one after the other.

    Raises:
        InputError: the sentinels are not the same ones in both, 0, 1, 2, ... in order, END is not the last, or there
            are other tokens that are none of the data.
    """
    given, said = given.long(), said.long()
    holes = vocab.is_sentinel(given)
    if not holes.any() and not vocab.is_sentinel(said).any():
        _check_known("given", given, vocab)
        _check_known("said", said, vocab)
        return torch.cat([given, said])
    opens = vocab.is_sentinel(said)
    order = torch.arange(vocab.data, vocab.data + int(holes.sum()))
    if not torch.equal(given[holes], order) or not torch.equal(said[opens], order) or not opens[0]:
        raise InputError(
            "given and said must have the same sentinels, 0, 1, 2, ..., and said must begin with the first"
        )
    if said[-1] != vocab.end:
        raise InputError(f"said must end with END, {vocab.end}, but ends with {int(said[-1])}")
    _check_known("given", given, vocab)
    _check_known("said", said[:-1], vocab)
    at = opens.nonzero().flatten().tolist()
    spans = [said[a + 1 : b] for a, b in zip(at, [*at[1:], len(said) - 1], strict=True)]
    kept = given.tensor_split(holes.nonzero().flatten())  # every piece but the first begins with its sentinel
    return torch.cat(
        [kept[0], *(part for span, rest in zip(spans, kept[1:], strict=True) for part in (span, rest[1:]))]
    )


def _check_known(name: str, ids: Tensor, vocab: Vocabulary) -> None:
    if strange := ids[(ids < 0) | (ids >= vocab.start)].tolist():
        raise InputError(f"{name} holds {strange[0]} but must hold data and sentinels, from 0 to {vocab.start - 1}")


Sizes = Sequence[tuple[int, int]]
"""How many tokens are given and said, for the extremes of what may be drawn."""


@runtime_checkable
class Form(Protocol):
    """How examples become the batch of a kind of model."""

    def fits(self, given: int, said: int, goes_on: bool) -> bool:
        """Whether there is room for an example of these lengths and a mode token."""

    def collate(self, examples: Sequence[Example], modes: Sequence[int] | None, vocab: Vocabulary) -> dict[str, Tensor]:
        """The batch; `modes` are the tokens that its rows begin with."""


@dataclass(frozen=True)
class EncoderDecoderForm:
    """For an encoder of `given` tokens and a decoder of `said` tokens.

    A batch has encoder_ids, encoder_mask (False for padding), decoder_ids and labels (`IGNORED` for padding).
    """

    given: int
    said: int

    def fits(self, given: int, said: int, goes_on: bool) -> bool:
        return given + 1 <= self.given and said <= self.said

    def collate(self, examples: Sequence[Example], modes: Sequence[int] | None, vocab: Vocabulary) -> dict[str, Tensor]:
        _check_batch(self, [(len(one.given) + bool(modes), self.given) for one in examples], examples, modes)
        _check_batch(self, [(len(one.said), self.said) for one in examples], examples, modes)
        encoder = torch.full((len(examples), self.given), vocab.pad)
        decoder, labels = torch.full((len(examples), self.said), vocab.pad), _ignored(len(examples), self.said)
        for i, example in enumerate(examples):
            head = torch.cat([torch.tensor(modes[i : i + 1] if modes else [], dtype=torch.int64), example.given])
            encoder[i, : len(head)] = head
            decoder[i, : len(example.said)] = torch.cat([torch.tensor([vocab.start]), example.said[:-1]])
            labels[i, : len(example.said)] = example.said
        return {"encoder_ids": encoder, "encoder_mask": encoder != vocab.pad, "decoder_ids": decoder, "labels": labels}


@dataclass(frozen=True)
class PrefixForm:
    """For a decoder of `length` tokens that reads the head of each row in both directions (`Context.prefix`).

    A batch has tokens, labels (that of a token is what follows it; `IGNORED` but for what is said), prefix (B,) and the
    attention_mask (B, 1, T, T) that it stands for, True where a token is seen.
    """

    length: int

    def fits(self, given: int, said: int, goes_on: bool) -> bool:
        return 1 + given + (not goes_on) + said <= self.length + 1  # the last one is said and not read

    def collate(self, examples: Sequence[Example], modes: Sequence[int] | None, vocab: Vocabulary) -> dict[str, Tensor]:
        lengths = [bool(modes) + len(one.given) + (not one.goes_on) + len(one.said) - 1 for one in examples]
        _check_batch(self, [(length, self.length) for length in lengths], examples, modes)
        tokens, labels = torch.full((len(examples), self.length), vocab.pad), _ignored(len(examples), self.length)
        prefix = torch.zeros(len(examples), dtype=torch.int64)
        for i, example in enumerate(examples):
            mode = torch.tensor(modes[i : i + 1] if modes else [], dtype=torch.int64)
            head = [mode, example.given, *([] if example.goes_on else [torch.tensor([vocab.start])])]
            row = torch.cat([*head, example.said])
            prefix[i] = len(row) - len(example.said)
            tokens[i, : len(row) - 1] = row[:-1]
            labels[i, prefix[i] - 1 : len(row) - 1] = example.said
        mask = prefix_mask(prefix, self.length)
        return {"tokens": tokens, "labels": labels, "prefix": prefix, "attention_mask": mask}


def _check_batch(form: Form, rooms: Sequence[tuple[int, int]], examples: Sequence, modes: Sequence[int] | None) -> None:
    """Whether all lengths are within their room, and each example has a mode where there are any."""
    for row, (length, room) in enumerate(rooms):
        if length > room:
            raise InputError(f"examples[{row}] has {length} tokens but {form} has room for {room}")
    if modes and len(modes) != len(examples):
        raise InputError(f"modes has {len(modes)} tokens but must have one for each of {len(examples)} examples")


def _ignored(*shape: int) -> Tensor:
    return torch.full(shape, IGNORED)


def longest_text(form: Form, sizes: Callable[[int], Sizes], goes_on: bool, least: int = 2) -> int:
    """The longest text of which every example fits; T5's own case, 512 and 114 tokens, mean span 3, 15 %: 568.

    Args:
        sizes: of a text of this length, what may be given and said; both must not shrink as it grows.
        least: the shortest text that there may be.

    Raises:
        InputError: not even that one fits.
    """

    def fits(length: int) -> bool:
        return all(form.fits(given, said, goes_on) for given, said in sizes(length))

    if not fits(least):
        raise InputError(f"{form} has no room for a text of {least} tokens, which is the shortest there may be")
    while fits(least + 1):
        least += 1
    return least
