"""Questions about signals: what is asked, of which rows, and when an answer is right."""

import math
import unicodedata

import pytest
import torch
from torch import nn

from workbench.beds import signal_questions as bed
from workbench.beds.signal_questions import ANSWERS, END, MODALITIES, QUESTIONS, SILENT, TEXT, SignalQuestions
from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.core.routing import Context
from workbench.lib.modality.uni_moe import PAD


@pytest.fixture(scope="module", autouse=True)
def sets() -> None:
    for name in ("mnist-5k", "speech"):
        data.get(name)


class Says(nn.Module):
    """Says a fixed byte after every byte but where it is told what to say."""

    def __init__(self, told: dict[bytes, bytes]):
        super().__init__()
        self.told = told

    def forward(self, text, signals, context=None):
        logits = torch.zeros(*text.shape, 256)
        for i, row in enumerate(text):
            said = bytes(row[row != PAD].tolist())
            for t in range(len(said)):
                known = self.told.get(said, b"?" * 99)[t : t + 1]
                logits[i, t, known[0] if known else 0] = 1.0
        return logits


def test_a_row_asks_in_the_words_of_its_modality_and_wants_the_answer_s_bytes():
    batch = SignalQuestions().batch("train", 30, torch.Generator().manual_seed(0))
    assert batch.inputs.shape == batch.targets.shape == (30, TEXT) and batch.domain.bincount().tolist() == [10] * 3
    for text, target, domain in zip(batch.inputs, batch.targets, batch.domain, strict=True):
        said = bytes(text[text != PAD].tolist()).decode()
        name = MODALITIES[domain]
        assert said.startswith(QUESTIONS[name]) and said.removeprefix(QUESTIONS[name]) in ANSWERS[name]
        wanted = bytes(target[target != SILENT].tolist()).decode()
        assert wanted == said.removeprefix(QUESTIONS[name]) + END
        first = int((target != SILENT).nonzero()[0])
        assert first == len(QUESTIONS[name]) - 1  # the question's last byte is followed by the answer's first
    rows = torch.cat([batch.signals[name].rows for name in MODALITIES])
    assert torch.equal(rows, torch.arange(30))


def test_a_batch_has_the_same_share_of_each_modality_every_time():
    task = SignalQuestions(shares=(8, 1, 1))
    for size, counts in ((20, [16, 2, 2]), (30, [24, 3, 3]), (4, [3, 1])):
        for seed in range(2):
            batch = task.batch("train", size, torch.Generator().manual_seed(seed))
            assert batch.domain.bincount().tolist() == counts
    one = task.batch("train", 5, torch.Generator().manual_seed(0), domain=2)
    assert set(one.signals) == {"glyphs"} and one.domain.tolist() == [2] * 5
    alone = SignalQuestions(("speech",))
    assert alone.batch("train", 5, torch.Generator().manual_seed(0)).domain.tolist() == [0] * 5
    assert alone.domains == ("speech",) and alone.modalities == ("text", *MODALITIES)


def test_an_answer_is_right_to_its_last_byte_and_modalities_count_alike():
    questions = {
        (QUESTIONS[n] + a).encode(): (QUESTIONS[n] + a + END).encode()[1:] for n in MODALITIES for a in ANSWERS[n]
    }
    task = SignalQuestions()
    assert task.evaluate(Says(questions), "test")["accuracy"] == 1
    no_end = {said: wanted[:-1] + b"." if said.startswith(b"who") else wanted for said, wanted in questions.items()}
    found = task.evaluate(Says(no_end), "test")
    assert found["accuracy/speech"] == 0 and found["accuracy"] == pytest.approx(2 / 3)
    only = {said: wanted for said, wanted in questions.items() if said.endswith(b"zero")}
    zeros = (data.load("mnist-5k").splits["test"][1] == 0).double().mean()
    assert task.evaluate(Says(only), "test")["accuracy/digits"] == pytest.approx(float(zeros))


def test_signals_are_patches_frames_and_characters_of_other_codepoints():
    task = SignalQuestions(frames=9)
    image = data.load("mnist-5k").splits["test"][0][3, 0]
    states = task.rows["digits"]["test"].states[3].view(2, 2, 14, 14)
    assert torch.equal(states[1, 0], image[14:, :14])
    heard = task.rows["speech"]["train"]
    lengths = torch.tensor([min(9, len(points)) for points, _ in data.load("speech").splits["train"]])
    assert heard.states.shape[1:] == (9, 12) and torch.equal(heard.mask.sum(1), lengths)
    assert not heard.states[~heard.mask].any()
    whole = SignalQuestions(frames=29).rows["speech"]["train"]
    points = whole.states[whole.mask]
    torch.testing.assert_close(points.mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(points.std(0), torch.ones(12), atol=1e-3, rtol=0)
    for split in ("train", "test"):
        found = task.rows["glyphs"][split].answer.bincount(minlength=len(bed.SCRIPTS))
        assert (found > 0).all() and found.max() <= bed.PER_SCRIPT * len(bed.FACES)
    assert unicodedata.name("Ω").split()[0].lower() in bed.SCRIPTS


def test_the_base_reads_names_and_questions_and_no_answer_is_likelier():
    text = bytes(bed.text(16_384).splits["train"]["names"].tolist()).decode().splitlines()
    asked = [line for line in text if "? " in line]
    assert len(asked) == len(text) // 2 and "LATIN" in text[0]
    assert {line.split("? ")[0] + "? " for line in asked} == set(QUESTIONS.values())


def test_the_base_is_kept_and_takes_the_context_of_its_width():
    settings = {"cap": 16_384, "d_model": 16, "d_hidden": 16, "n_layers": 1, "seq_len": 32, "base_steps": 2, "batch": 4}
    first, second = bed.base(settings), bed.base(settings)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    loss = (
        first(torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0)), Context()).logsumexp(-1).mean()
    )
    assert math.isfinite(loss.item())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modalities": ("digit",)}, "modality 'digit' is unknown; did you mean 'digits'"),
        ({"shares": (1, 2)}, "shares is"),
        ({"shares": (1, 2, 0)}, "shares is"),
        ({"shares": (1, 2, math.nan)}, "shares is"),
        ({"modalities": ()}, "modalities is"),
        ({"modalities": ("glyphs", "glyphs")}, r"modalities is \('glyphs', 'glyphs'\) but must hold .* each once"),
        ({"frames": 0}, "frames is 0"),
    ],
)
def test_wrong_input_is_named(options, said):
    with pytest.raises(InputError, match=said):
        SignalQuestions(**options)
    task = SignalQuestions(("glyphs",))
    with pytest.raises(InputError, match="split 'trial' is unknown"):
        task.batch("trial", 4, torch.Generator())
    for wrong in (-1, 1):
        with pytest.raises(InputError, match=f"domain is {wrong} but must be 0 to 0"):
            task.batch("train", 4, torch.Generator(), domain=wrong)
    with pytest.raises(InputError, match="size is 0"):
        task.batch("train", 0, torch.Generator())
