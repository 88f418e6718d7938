"""Glyphs and names in one sequence: its grammar, its modalities, no leak between splits, and a plain decoder."""

import math

import pytest
import torch
from torch import nn

from workbench.beds import glyph_stream
from workbench.beds.glyph_stream import BOI, BOS, EOI, EOS, FIRST_CODE, FIRST_LETTER, IMAGE, LETTERS, PAD, SMALL, SMOKE
from workbench.errors import InputError
from workbench.lib import data

FACES = SMOKE["faces"]


@pytest.fixture(scope="module")
def task():
    return glyph_stream.GlyphStream(FACES)


def name_of(tokens):
    return "".join(LETTERS[token - FIRST_LETTER] for token in tokens)


def test_a_row_reads_as_it_is_written(task):
    images, codepoints, _ = data.load("glyph-names", faces=FACES).splits["train"]
    rows = task.rows["train"].long()
    at = codepoints.tolist().index(ord("ä"))
    first, second = (order[order != PAD].tolist() for order in rows[at])
    assert first[0] == second[0] == BOS and first[-1] == second[-1] == EOS
    split = first.index(BOI)
    assert name_of(first[1:split]) == "latin small letter a with diaeresis"
    assert first[split:-1] == second[1 : 3 + IMAGE] and first[-2] == EOI
    assert name_of(second[3 + IMAGE : -1]) == name_of(first[1:split])
    drawn = torch.tensor(first[split + 1 : -2]) - FIRST_CODE
    picture = glyph_stream.picture(drawn[None], task.codebook)[0]
    image = images[at].float() / 255
    assert (picture - image).square().mean() < 0.3 * image.square().mean()
    assert set(drawn[image.unfold(0, 4, 4).unfold(1, 4, 4).flatten(2).amax(-1).flatten() == 0].tolist()) == {0}


def test_batches_know_order_and_modality(task):
    batch = task.batch("train", 64, torch.Generator().manual_seed(0))
    assert torch.equal(batch.inputs[:, 1:][batch.targets[:, 1:] != 0], batch.targets[:, :-1][batch.targets[:, 1:] != 0])
    assert torch.equal(batch.modality == 1, batch.inputs >= FIRST_CODE)
    assert (batch.modality.sum(1) == IMAGE).all()  # the ratio in a batch is fixed
    assert torch.equal(batch.domain == 1, batch.inputs[:, 1] == BOI) and 0 < batch.domain.sum() < 64
    assert (task.batch("train", 8, torch.Generator(), domain=1).domain == 1).all()
    again = task.batch("train", 64, torch.Generator().manual_seed(0))
    assert torch.equal(again.inputs, batch.inputs)


def test_no_character_is_in_two_splits():
    splits = data.load("glyph-names", faces=("DejaVuSerif", "DejaVuSans")).splits
    codes = [set(splits[split][1].tolist()) for split in splits]
    assert set.union(*codes) and sum(map(len, codes)) == len(set.union(*codes))


class Uniform(nn.Module):
    """Thinks every token as likely."""

    def forward(self, tokens, context=None):
        assert context.modality.shape == context.domain.shape == tokens.flatten().shape
        return torch.zeros(*tokens.shape, glyph_stream.VOCAB)


def test_bits_are_counted_where_something_is_said(task):
    found = task.evaluate(Uniform(), max_batches=1)
    assert set(found) == {f"bits_per_token{end}" for end in ("", "/caption first", "/image first", "/text", "/image")}
    assert all(bits == pytest.approx(math.log2(glyph_stream.VOCAB), abs=1e-6) for bits in found.values())
    loss, _ = task.loss(Uniform(), task.batch("train", 3, torch.Generator()))
    assert float(loss) == pytest.approx(math.log(glyph_stream.VOCAB), abs=1e-6)


def test_a_plain_decoder_beats_unigrams_and_has_much_to_learn():
    rows = {
        row.case: row
        for row in glyph_stream.measure(SMALL | {"faces": FACES, "width": 48, "layers": 1, "steps": 120, "batch": 16})
    }
    assert 1 < rows["text"].reached < 0.8 * rows["text"].trivial
    assert 1 < rows["image"].reached < rows["image"].trivial


def test_the_codebook_is_of_training_characters_and_kept(task, monkeypatch):
    assert torch.equal(task.codebook, glyph_stream.codebook(data.load("glyph-names", faces=FACES).splits["train"][0]))
    monkeypatch.setattr(glyph_stream, "codebook", None)
    assert torch.equal(glyph_stream.GlyphStream(FACES).rows["test"], task.rows["test"])
    for wrong in (-1, 2):
        with pytest.raises(InputError, match=f"domain is {wrong} but must be 0 to 1"):
            task.batch("train", 4, torch.Generator(), domain=wrong)
    with pytest.raises(InputError, match="face 'Arial' is unknown"):
        glyph_stream.GlyphStream(("Arial",))
