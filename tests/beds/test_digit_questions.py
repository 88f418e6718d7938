"""Digit questions: the domains conflict as they should."""

import pytest
import torch

from workbench.beds import digit_questions as bed
from workbench.beds.digit_questions import CODE, DOMAINS, SYMBOLS, WORDS, DigitQuestions
from workbench.errors import InputError


def test_domains_want_other_answers_to_the_same_picture():
    task = DigitQuestions()
    batches = list(task.batches("validation", 256))
    general, document, medical = batches
    assert torch.equal(general.inputs, document.inputs) and torch.equal(general.inputs, medical.inputs)
    assert sorted(CODE) == list(range(SYMBOLS)) and medical.targets.max() == 3
    strips, digits = task._fixed["validation"]
    assert torch.equal(strips, general.inputs) and strips.shape == (256, 8, 16)
    assert torch.equal(general.targets, digits[:, 0])
    assert torch.equal(document.targets, torch.tensor(CODE)[digits[:, 1]])
    order = strips.sum((1, 2)).argsort()
    assert medical.targets[order].diff().min() >= 0
    train = task.batch("train", 3000, torch.Generator().manual_seed(0), domain=2)
    assert train.targets.bincount().min() > 600  # quarters
    for i, batch in enumerate(batches):  # one word of the domain, anywhere, and words of all
        low = SYMBOLS + WORDS * bed.KINDS.index(DOMAINS[i])
        own = (batch.question >= low) & (batch.question < low + WORDS)
        assert (own.sum(1) == 1).all() and own.any(0).all()
        assert (batch.question[~own] >= bed.VOCAB - WORDS).all()


def test_wrong_input_is_named():
    with pytest.raises(InputError, match="domain 'medica' is unknown; did you mean 'medical'"):
        DigitQuestions(("medica",))
    with pytest.raises(InputError, match="shares is"):
        DigitQuestions(shares=(1.0, 2.0))
    with pytest.raises(InputError, match="size is 0"):
        DigitQuestions().batch("train", 0, torch.Generator())
    with pytest.raises(InputError, match="split 'trial' is unknown"):
        next(DigitQuestions().batches("trial", 4))
    shares = DigitQuestions(shares=(8, 1, 1)).batch("train", 2000, torch.Generator().manual_seed(0)).domain.bincount()
    assert shares[0] > 1500 and shares[1:].min() > 100
