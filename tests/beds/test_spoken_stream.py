"""Glyphs, names and utterances in one sequence: its grammar, its three modalities, and no leak between splits."""

import math

import pytest
import torch
from torch import nn

from workbench.beds import glyph_stream, spoken_stream
from workbench.beds.glyph_stream import BOS, FIRST_CODE, FIRST_LETTER, IMAGE, LETTERS, PAD, SMOKE
from workbench.beds.spoken_stream import FIRST_FRAME, FRAMES, SPOKEN, VOCAB
from workbench.errors import InputError
from workbench.lib import data

FACES = SMOKE["faces"]


@pytest.fixture(scope="module")
def task(fetched):
    fetched("speech")
    return spoken_stream.SpokenStream(FACES)


def test_a_row_is_an_utterance_with_its_speaker_and_then_a_row_of_glyphs(task):
    glyphs = glyph_stream.GlyphStream(FACES)
    for order, batch in enumerate(next(b for b in task.batches("test", 5) if b.domain[0] == o) for o in (0, 1)):
        plain = next(b for b in glyphs.batches("test", 5) if b.domain[0] == order)
        rows = torch.cat([batch.inputs[:, :1], batch.targets], 1)
        assert (rows[:, 0] == BOS).all()
        assert torch.equal(rows[:, 1 + SPOKEN :], plain.targets)
        label, frames = (rows[:, 1 : 1 + SPOKEN - FRAMES], rows[:, 1 + SPOKEN - FRAMES : 1 + SPOKEN])
        if order:
            frames, label = rows[:, 1 : 1 + FRAMES], rows[:, 1 + FRAMES : 1 + SPOKEN]
        said = ["".join(LETTERS[token - FIRST_LETTER] for token in row) for row in label.tolist()]
        assert said == ["speaker 1"] * 5  # the official test split begins with the first speaker's
        heard, _ = data.load("speech").splits["test"][0]
        assert torch.equal(frames[0] - FIRST_FRAME, torch.cdist(heard[:FRAMES], task.sounds).argmin(1))


def test_the_ratio_of_the_modalities_is_fixed(task):
    batch = task.batch("train", 32, torch.Generator().manual_seed(0))
    assert batch.inputs.shape == (32, task.length) and task.length == glyph_stream.LENGTH + SPOKEN
    assert ((batch.modality == 1).sum(1) == IMAGE).all() and ((batch.modality == 2).sum(1) == FRAMES).all()
    assert torch.equal(batch.modality == 2, batch.inputs >= FIRST_FRAME)
    assert torch.equal(batch.modality == 1, (batch.inputs >= FIRST_CODE) & (batch.inputs < FIRST_FRAME))
    assert batch.inputs.max() < VOCAB and 0 < batch.domain.sum() < 32
    assert torch.equal(task.batch("train", 32, torch.Generator().manual_seed(0)).inputs, batch.inputs)
    assert (task.batch("train", 8, torch.Generator(), domain=1).domain == 1).all()


def test_every_window_of_training_and_the_first_of_what_is_judged(task):
    found = data.load("speech")
    long = [frames for frames, _ in found.splits["train"] if len(frames) >= FRAMES]
    assert (len(long), len(task.spoken["train"])) == (210, sum(len(frames) - FRAMES + 1 for frames in long))
    assert [len(task.spoken[split]) for split in ("train", "validation", "test")] == [1153, 29, 320]
    every = torch.cat([frames for frames, _ in found.splits["train"]])
    assert torch.equal(task.sounds, spoken_stream.codebook(every))
    error = torch.cdist(every, task.sounds).amin(1).square().mean() / (every - every.mean(0)).square().sum(1).mean()
    assert error < 0.2  # the codes keep four fifths of what the cepstra vary by


class Uniform(nn.Module):
    def forward(self, tokens, context=None):
        return torch.zeros(*tokens.shape, VOCAB)


def test_bits_are_counted_by_three_modalities(task):
    found = task.evaluate(Uniform(), max_batches=1)
    assert set(found) == {
        f"bits_per_token{end}" for end in ("", "/caption first", "/image first", "/text", "/image", "/speech")
    }
    assert all(bits == pytest.approx(math.log2(VOCAB), abs=1e-6) for bits in found.values())
    assert (task.batch("train", 4, torch.Generator()).targets != PAD).any()
    for wrong in (-1, 2):
        with pytest.raises(InputError, match=f"domain is {wrong} but must be 0 to 1"):
            task.batch("train", 4, torch.Generator(), domain=wrong)
    with pytest.raises(InputError, match="size is 0 but must be at least 1"):
        task.batch("train", 0, torch.Generator())


def test_a_plain_decoder_learns_all_three():
    settings = spoken_stream.SMALL | {"faces": FACES, "width": 48, "layers": 1, "steps": 120, "batch": 16}
    rows = {row.case: row for row in spoken_stream.measure(settings)}
    assert set(rows) == set(spoken_stream.MODALITIES)
    for row in rows.values():
        assert 0.5 < row.reached < row.trivial
