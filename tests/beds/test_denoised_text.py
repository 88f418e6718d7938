"""Text to complete: every denoiser a domain, questions that are no mixture's, and bits of what is hidden alone."""

import math

import pytest
import torch
from torch import nn

from workbench.beds.denoised_text import ASKS, HOLES, Denoising, completed, hidden, questions
from workbench.errors import InputError
from workbench.lib.core.denoising import BYTES, IGNORED, EncoderDecoderForm, PrefixForm
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.types import TextDomains
from workbench.lib.data_mixtures.ul2 import UL2_PAPER, MixtureOfDenoisers, scaled

LENGTH, ROW = 64, 32


def text(make=lambda size, generator: torch.randint(256, (size,), generator=generator)) -> TextDomains:
    generator = torch.Generator().manual_seed(0)
    sizes = {"train": 2000, "validation": 500, "test": 500}
    splits = {
        split: {name: make(size, generator).to(torch.uint8) for name in ("a", "b")} for split, size in sizes.items()
    }
    return TextDomains("noise", ("a", "b"), splits, {})


def task(source: TextDomains | None = None) -> Denoising:
    return Denoising(source or text(), MixtureOfDenoisers(scaled(UL2_PAPER, LENGTH), PrefixForm(LENGTH)))


class Uniform(nn.Module):
    def forward(self, tokens, context):
        self.context = context
        return torch.zeros(*tokens.shape, BYTES.size)


class Peeking(nn.Module):
    """Is sure of the token that follows, which it looks up; of what follows the last it knows nothing."""

    def forward(self, tokens, context):
        following = torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), BYTES.pad)], 1)
        return 1e4 * nn.functional.one_hot(following, BYTES.size).float()


def test_denoisers_are_the_domains_and_each_can_be_drawn_alone():
    made = task()
    assert made.domains == made.mixture.names and len(made.domains) == 7
    batch = made.batch("train", 32, torch.Generator().manual_seed(0))
    assert batch.inputs.shape == batch.targets.shape == (32, LENGTH) and len(batch.domain.unique()) > 3
    alone = made.batch("train", 5, torch.Generator().manual_seed(0), domain=3)
    assert alone.domain.tolist() == [3] * 5
    assert (alone.inputs[:, 0] == BYTES.mode("X")).all()
    passes = [*made.batches("validation", 8)]
    assert [int(part.domain[0]) for part in passes] == sorted([*range(7)] * 2)  # 14 rows of each denoiser
    assert sum(len(part) for part in passes) == 7 * 14
    again = [*made.batches("validation", 8)]
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(passes, again, strict=True))


def test_the_loss_is_that_of_what_is_said_and_padding_counts_nowhere():
    made, model = task(), Uniform()
    batch = made.batch("train", 16, torch.Generator().manual_seed(0))
    loss, context = made.loss(model, batch)
    assert float(loss) == pytest.approx(math.log(BYTES.size))
    assert torch.equal(context.mask.view(16, LENGTH), batch.inputs != BYTES.pad)
    assert torch.equal(context.domain.view(16, LENGTH)[:, 5], batch.domain) and context.prefix is batch.prefix
    nats, _ = completed(model, batch)
    assert ((nats == 0) == (batch.targets == IGNORED)).all()
    found = made.evaluate(model)
    assert found == {name: pytest.approx(math.log2(BYTES.size)) for name in found}
    assert set(found) == {"bits_per_token", *(f"bits_per_token/{name}" for name in made.domains)}


def test_a_decoder_learns_from_it():
    """Text that repeats itself after three letters can be completed."""
    made = task(text(lambda size, generator: torch.tensor(list(b"abc")).repeat(size // 3 + 1)[:size]))
    torch.manual_seed(0)
    model = DecoderLM(BYTES.size, 32, 2, 2, lambda layer: GLU(32, 32), LENGTH)
    before = made.evaluate(model)["bits_per_token"]
    assert made.evaluate(model, max_batches=1) == made.evaluate(model, max_batches=None)  # 14 rows are one batch
    after = train(model, made, TrainConfig(40, 8, 1e-2)).metrics["bits_per_token"]
    assert after < 2 < 7 < before


def test_another_form_and_texts_that_are_too_short_are_refused():
    with pytest.raises(InputError, match="must have a PrefixForm"):
        Denoising(text(), MixtureOfDenoisers(UL2_PAPER[:1], EncoderDecoderForm(64, 32)))
    with pytest.raises(InputError, match="seq_len is 599 but must be below"):
        Denoising(text(), MixtureOfDenoisers(UL2_PAPER[2:3], PrefixForm(600)))


# -- questions


def test_holes_are_where_they_are_said_to_be():
    asked = questions(text(), ROW, 50)
    assert asked.rows.shape == (100, ROW) and tuple(asked.masks) == HOLES
    place = torch.arange(ROW)
    for kind, mask in asked.masks.items():
        assert (mask.sum(1) == ROW // 4).all() and not mask[:, 0].any()
        runs = (mask[:, 1:] & ~mask[:, :-1]).sum(1)
        assert (runs == (ROW // 16 if kind == "short" else 1)).all()
    assert torch.equal(asked.masks["suffix"], (place >= ROW - ROW // 4).expand(100, ROW))
    for kind in ("short", "long"):
        assert not asked.masks[kind][:, -1].any()
        assert len(asked.masks[kind].unique(dim=0)) > 5
    same = questions(text(), ROW, 50)
    assert torch.equal(asked.rows, same.rows) and all(torch.equal(asked.masks[k], same.masks[k]) for k in HOLES)


@pytest.mark.parametrize("mode", [None, "X"])
@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("kind", HOLES)
def test_bits_are_of_what_is_hidden_and_nothing_else(kind: str, ask: str, mode: str | None):
    """Who knows nothing pays 8 bits a byte. Who peeks pays nothing, but for the last of a row, which none follows."""
    asked = questions(text(), ROW, 50)
    assert hidden(Uniform(), asked, kind, BYTES, ask=ask, mode=mode) == pytest.approx(8)
    last = kind == "suffix" and ask != "fill"
    expected = 8 / (ROW // 4) if last else 0
    assert hidden(Peeking(), asked, kind, BYTES, ask=ask, mode=mode) == pytest.approx(expected, abs=1e-6)


def test_how_it_is_asked_decides_what_is_read_both_ways():
    model, asked = Uniform(), questions(text(), ROW, 4)
    ends = {}
    for ask in ASKS:
        hidden(model, asked, "suffix", BYTES, ask=ask)
        ends[ask] = model.context.prefix.tolist()
    given = ROW - ROW // 4
    assert ends == {"fill": [given + 2] * 8, "prefix": [given] * 8, "causal": [1] * 8}  # a sentinel, and START


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("middle", "fill", None), "kind of hole 'middle' is unknown"),
        (("long", "guess", None), "way to ask 'guess' is unknown"),
        (("long", "fill", "Q"), "mode 'Q' is unknown"),
    ],
)
def test_questions_that_there_are_not_are_refused(arguments: tuple, said: str):
    kind, ask, mode = arguments
    with pytest.raises(InputError, match=said):
        hidden(Uniform(), questions(text(), ROW, 2), kind, BYTES, ask=ask, mode=mode)
    with pytest.raises(InputError, match="length is 40 but must be a multiple of 16"):
        questions(text(), 40, 2)
