"""UL2: a mixture of denoisers, so that one model is good at filling holes and at going on.

Tay et al. 2022, "UL2: Unifying Language Learning Paradigms" (arXiv:2205.05131). An objective is seen as a denoiser:
some of the text is hidden, by mean span and rate, and the model says what it was. Seven of them, in three modes:

    R  regular      spans of 3 or 8 tokens, 15 % hidden (T5's objective)
    S  sequential   the end of the text, 25 % of it in the mean (a prefix language model)
    X  extreme      spans of 3 or 8 with 50 % hidden; spans of 64 with 15 % or 50 % hidden

Each EXAMPLE is drawn one denoiser, never a union of their masks, and begins with the token of its mode, by which the
model is told later what it is used for. A transform of the data: the model may be of any kind (`lib.core.denoising`).

The long spans are made for 512 tokens. In a text that is no longer than a span there is nothing left to see, and such a
span is refused; `scaled` makes those that are longer than a quarter of a text a quarter of it.

Tensor letters: B batch, T time, L length of a text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.denoising import (
    BYTES,
    Example,
    Form,
    Vocabulary,
    blank_out,
    cut_off,
    longest_text,
    random_span_mask,
    span_counts,
)

METHOD = Method(
    slug="ul2",
    title="UL2: Unifying Language Learning Paradigms",
    family="data_mixtures",
    year=2022,
    paper="arXiv:2205.05131",
    claim="Training on a mixture of denoisers with mode tokens makes one model good where span corruption or causal "
    "training alone is good at one side.",
    objects=("MixtureOfDenoisers", "DenoiserSpec", "corrupt", "scaled", "UL2_PAPER", "UL2R"),
    example=None,
    kind=None,
)

MODES = BYTES.modes


@dataclass(frozen=True)
class DenoiserSpec:
    """What is hidden of a text.

    Attributes:
        mode: "R", "S" or "X".
        rate: the share that is hidden; None for all but the first token (a causal language model).
        mean_span: mean length of the spans; None for one span, at the end, of a length that is drawn anew each time,
            all lengths around the mean alike.
        weight: of this denoiser in a mixture, relative to the others.
    """

    mode: str
    rate: float | None = None
    mean_span: float | None = None
    weight: float = 1.0

    def __post_init__(self):
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)
        if self.rate is not None and not 0 < self.rate < 1:
            raise InputError(f"rate is {self.rate} but must be above 0 and below 1, or None for a causal model")
        if self.mean_span is not None and (self.rate is None or not 1 <= self.mean_span < math.inf):
            raise InputError(f"mean_span is {self.mean_span} but must be at least 1, and needs a rate: {self.rate}")
        if not 0 <= self.weight < math.inf:
            raise InputError(f"weight is {self.weight} but must be finite and not negative")

    @property
    def name(self) -> str:
        """Such as "R 3 15%", "S 25%" or "S causal"."""
        if self.rate is None:
            return f"{self.mode} causal"
        span = "" if self.mean_span is None else f" {self.mean_span:.3g}"
        return f"{self.mode}{span} {100 * self.rate:.3g}%"

    @property
    def goes_on(self) -> bool:
        """Whether the end of the text is hidden, so that what is to be said follows what is given."""
        return self.mean_span is None

    @property
    def shortest(self) -> int:
        """Tokens of the shortest text that this can be done to."""
        return max(2, math.ceil(self.mean_span or 0))

    def ends(self, length: int) -> tuple[int, int]:
        """The least and the most tokens that are hidden at the end of a text; the lengths between are drawn alike."""
        if length < 2:
            raise InputError(f"length is {length} but must be at least 2: a token to hide, and one before it")
        if self.rate is None:
            return length - 1, length - 1
        both = min(max(round(2 * self.rate * length), 2), 2 * length - 2)  # their mean is rate L
        least = max(1, both - (length - 1))
        return least, both - least

    def sizes(self, length: int) -> list[tuple[int, int]]:
        """How many tokens of a text of this length are given and said, at the least and at the most."""
        if self.mean_span is None:
            return [(length - hidden, hidden) for hidden in self.ends(length)]
        hidden, spans = span_counts(length, self.mean_span, self.rate)
        return [(length - hidden + spans, hidden + spans + 1)]


UL2_PAPER = (
    DenoiserSpec("R", 0.15, 3),
    DenoiserSpec("R", 0.15, 8),
    DenoiserSpec("S", 0.25),
    DenoiserSpec("X", 0.5, 3),
    DenoiserSpec("X", 0.5, 8),
    DenoiserSpec("X", 0.15, 64),
    DenoiserSpec("X", 0.5, 64),
)
T5_ONLY = (DenoiserSpec("R", 0.15, 3),)
PREFIX_LM = (DenoiserSpec("S", 0.25),)
CAUSAL = (DenoiserSpec("S"),)
SPAN_PLUS_LM = (*T5_ONLY, *CAUSAL)
#: For a short time after causal training (Tay et al. 2022, U-PaLM, 2210.11399): a half S, a quarter R, a quarter X.
UL2R = (
    DenoiserSpec("S", 0.25, weight=0.5),
    DenoiserSpec("R", 0.15, 3, weight=0.25),
    DenoiserSpec("X", 0.5, 3, weight=0.125),
    DenoiserSpec("X", 0.15, 32, weight=0.125),
)


def scaled(specs: Sequence[DenoiserSpec], length: int) -> tuple[DenoiserSpec, ...]:
    """The denoisers for texts of about `length` tokens: spans longer than a quarter of them are a quarter of them."""
    if length < 2:
        raise InputError(f"length is {length} but must be at least 2")
    longest = max(1.0, length / 4)
    return tuple(s if s.mean_span is None else replace(s, mean_span=min(s.mean_span, longest)) for s in specs)


def corrupt(
    ids: Shaped[Tensor, " length"], spec: DenoiserSpec, generator: torch.Generator, vocab: Vocabulary = BYTES
) -> Example:
    """Hide of a text what the denoiser hides: what a model is given then, and what it has to say.

    Raises:
        InputError: the text is too short for the denoiser, or has ids that are none of the data.
    """
    if spec.mean_span is not None:
        return blank_out(ids, random_span_mask(len(ids), spec.mean_span, spec.rate, generator), vocab)
    least, most = spec.ends(len(ids))
    return cut_off(ids, int(torch.randint(least, most + 1, (), generator=generator)), vocab)


class MixtureOfDenoisers:
    """Rows of text -> the batch of a model, each row by one denoiser of the mixture.

    Of each row a denoiser takes as many tokens as fit after it has been at them (`lengths`), so that nothing of what is
    to be said is ever cut off. Room for a mode token is left with and without one, so that all else is the same.

    Args:
        specs: the denoisers; one of weight 0 is never drawn.
        form: `PrefixForm` or `EncoderDecoderForm`; says what a batch holds.
        vocab: its first ids are those of the text.
        mode_tokens: begin each row with the token of its mode.

    Attributes:
        raw_length: tokens that a row must have: of the denoiser that takes the most.
        lengths: tokens that each denoiser takes of a row.
        shares: (denoisers,) the probability of each.

    Raises:
        InputError: two denoisers are the same, no weight is above 0, a span is longer than what the form has room for,
            or there are more spans than sentinels.
    """

    def __init__(self, specs: Sequence[DenoiserSpec], form: Form, vocab: Vocabulary = BYTES, mode_tokens: bool = True):
        self.specs, self.form, self.vocab, self.mode_tokens = tuple(specs), form, vocab, mode_tokens
        self.names = tuple(spec.name for spec in self.specs)
        if len(set(self.names)) < len(self.names):
            raise InputError(f"specs are {self.names} but must each be another")
        weights = torch.tensor([spec.weight for spec in self.specs], dtype=torch.float64)
        if not weights.sum() > 0:
            raise InputError(f"specs have the weights {weights.tolist()} but one must be above 0")
        self.shares = weights / weights.sum()
        self.lengths = tuple(longest_text(form, spec.sizes, spec.goes_on, spec.shortest) for spec in self.specs)
        for spec, length in zip(self.specs, self.lengths, strict=True):
            spans = 0 if spec.mean_span is None else span_counts(length, spec.mean_span, spec.rate)[1]
            if spans > vocab.sentinels:
                raise InputError(
                    f"vocab has {vocab.sentinels} sentinels but {spec.name} makes {spans} spans of {length} tokens"
                )
        if mode_tokens:
            for spec in self.specs:
                vocab.mode(spec.mode)  # refuses now one that it has not
        self.raw_length = max(self.lengths)

    @property
    def said(self) -> float:
        """Mean number of tokens of a row that are to be said, and so have a label."""
        ends = [[said for _, said in s.sizes(n)] for s, n in zip(self.specs, self.lengths, strict=True)]
        means = [sum(said) / len(said) for said in ends]
        return float(self.shares @ torch.tensor(means, dtype=torch.float64))

    def draw(self, size: int, generator: torch.Generator) -> Int64[Tensor, " batch"]:
        """A denoiser for each of `size` rows."""
        return torch.multinomial(self.shares, size, replacement=True, generator=generator)

    def __call__(
        self,
        rows: Shaped[Tensor, "batch raw"],
        generator: torch.Generator,
        spec_id: Shaped[Tensor, " batch"] | None = None,
    ) -> dict[str, Tensor]:
        """The batch of the form, with spec_id (B,), the denoiser of each row.

        spec_id: which denoisers; None to draw them.

        Raises:
            InputError: the rows are shorter than `raw_length`, or hold ids that are none of the data.
        """
        if rows.ndim != 2 or len(rows) == 0 or rows.shape[1] < self.raw_length:
            raise InputError(
                f"rows has shape {tuple(rows.shape)} but must be (batch, at least raw_length = {self.raw_length})"
            )
        spec_id = self.draw(len(rows), generator) if spec_id is None else spec_id
        whole = not spec_id.is_floating_point() and spec_id.dtype != torch.bool
        if spec_id.shape != rows.shape[:1] or not whole or spec_id.min() < 0 or spec_id.max() >= len(self.specs):
            raise InputError(
                f"spec_id is {spec_id.tolist()} but must be one of {len(self.specs)} denoisers for each row"
            )
        chosen = spec_id.tolist()
        examples = [
            corrupt(row[: self.lengths[i]], self.specs[i], generator, self.vocab)
            for row, i in zip(rows, chosen, strict=True)
        ]
        modes = [self.vocab.mode(self.specs[i].mode) for i in chosen] if self.mode_tokens else None
        return self.form.collate(examples, modes, self.vocab) | {"spec_id": spec_id}
