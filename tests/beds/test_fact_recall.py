"""Recall of facts: what is asked, what is held out, and what counts as an answer."""

import pytest
import torch

from workbench.beds.fact_recall import FactRecall, answered
from workbench.beds.python_text import text
from workbench.errors import InputError


def task(**options):
    return FactRecall(text(65_536), **{"seq_len": 64, "facts": 4, "weight": 1.0, "test_rows": 70} | options)


def test_every_question_has_its_fact_before_it():
    batch, question, value = task().rows("train", 9, torch.Generator().manual_seed(0))
    rows = torch.cat([batch.inputs, batch.targets[:, -1:]], 1)
    assert batch.inputs.shape == (9, 64) and question.shape == value.shape == (9, 4)
    key_of_fact, key_asked = rows.gather(1, value - 1), rows.gather(1, question)
    assert torch.equal(key_of_fact, key_asked) and (key_asked >= 128).all() and (key_asked < 192).all()
    assert torch.equal(rows.gather(1, value), batch.targets.gather(1, question))
    assert (value < 48).all() and (question >= 48).all()
    assert all(len(set(row.tolist())) == 4 for row in key_asked)
    assert torch.equal(answered(batch).nonzero()[:, 1].view(9, 4), question.sort(1).values)
    assert ((rows >= 128).sum(1) == 16).all()  # the text has no byte of these


def test_held_out_rows_are_the_same_each_time():
    first, second = ([batch.inputs for batch, _, _ in task().held_out("test")] for _ in range(2))
    assert [len(rows) for rows in first] == [64, 6]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert sum(len(batch) for batch in task().batches("test", 10)) == 70


def test_an_answer_that_is_known_counts():
    """A model that reads the answer off the targets recalls everything, and one that says a space nothing."""
    exam = task()

    class Cheat(torch.nn.Module):
        def __init__(self, knows):
            super().__init__()
            self.knows = knows
            self.rows = {batch.inputs.numpy().tobytes(): batch.targets for batch, _, _ in exam.held_out("test")}

        def forward(self, tokens, context):
            targets = self.rows[tokens.numpy().tobytes()] if self.knows else torch.full_like(tokens, 32)
            return 100.0 * torch.nn.functional.one_hot(targets, 256)

    assert exam.evaluate(Cheat(True), "test") == {"recall": 1.0, "bits_per_byte": pytest.approx(0, abs=1e-6)}
    assert exam.evaluate(Cheat(False), "test")["recall"] == 0.0


@pytest.mark.parametrize("options", [{"seq_len": 60}, {"facts": 0}, {"facts": 9}])
def test_a_task_that_cannot_be_is_refused(options):
    with pytest.raises(InputError, match=r"seq_len is .* and facts is"):
        task(**options)


def test_evaluation_leaves_the_model_in_its_mode_after_an_error():
    class Broken(torch.nn.Module):
        def forward(self, tokens, context):
            raise RuntimeError("broken")

    model = Broken().train()
    with pytest.raises(RuntimeError, match="broken"):
        task().evaluate(model, "test")
    assert model.training
