"""Domains of the standard library: what is trained on is not judged by, and every mixture has windows of its own."""

import pytest
import torch

from workbench.beds import stdlib_domains as bed
from workbench.beds.stdlib_domains import DOMAINS, JUDGED, DrawnText, docstrings_of, texts
from workbench.errors import InputError
from workbench.lib.core.train import State, TrainConfig

CAP = 65_536


def test_no_text_is_on_two_sides():
    known, mixed, judged = texts(CAP)
    assert (known.domains, mixed.domains, judged.domains) == (("code",), DOMAINS, JUDGED)
    trained = [bytes(known.splits["train"]["code"].tolist())]
    trained += [bytes(text.tolist()) for text in mixed.splits["train"].values()]
    for split in ("validation", "test"):
        for name, text in judged.splits[split].items():
            window = bytes(text[len(text) // 2 :][:200].tolist())
            assert not any(window in part for part in trained), (split, name)
    assert not torch.equal(judged.splits["validation"]["tables"], judged.splits["test"]["tables"])


def test_targets_are_what_they_are_called():
    found = {name: bytes(text.tolist()).decode(errors="ignore") for name, text in texts(CAP)[2].splits["test"].items()}
    assert "LATIN SMALL LETTER" in found["tables"] and "#" in found["tables"]
    assert "Return" in found["docstrings"] and "def " not in found["docstrings"][:500]
    source = b'"""Of a module."""\nclass A:\n    """Of a class."""\n    def f(self):\n        """Of a function."""\n'
    assert docstrings_of(source) == b"Of a module.\n\nOf a class.\n\nOf a function."


def drawn(weights, seed=0, steps=6, size=8) -> DrawnText:
    return DrawnText(texts(CAP)[1], weights, 32, steps, size, seed)


def test_a_mixture_has_exactly_its_windows_and_none_twice():
    task = drawn([0.5, 0.25, 0.25], steps=20, size=16)
    windows = torch.stack([task.drawn.flatten(), task.window.flatten()])
    assert windows.shape == (2, 320) and windows.unique(dim=1).shape == (2, 320)
    counts = task.drawn.flatten().bincount(minlength=3)
    deviation = (320 * torch.tensor([0.5, 0.25, 0.25]) * torch.tensor([0.5, 0.75, 0.75])).sqrt()
    assert ((counts - torch.tensor([160, 80, 80])).abs() < 3 * deviation).all()
    assert (drawn([1.0, 0, 0]).drawn == 0).all()


def test_a_batch_is_that_of_the_step_and_its_windows_are_text_of_its_domain():
    task, model = drawn([0.2, 0.4, 0.4]), torch.nn.Linear(1, 1)
    task.before_step(State(model, task, torch.optim.SGD(model.parameters()), TrainConfig(6), step=4))
    batch = task.batch("train", 8, torch.Generator())
    assert torch.equal(batch.domain, task.drawn[4]) and torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    for row, domain, window in zip(batch.inputs, batch.domain, task.window[4], strict=True):
        text = task.data.splits["train"][DOMAINS[domain]]
        assert torch.equal(row, text[32 * window : 32 * window + 32].long())
    other = task.batch("validation", 3, torch.Generator().manual_seed(0), domain=1)
    assert (other.domain == 1).all() and other.inputs.shape == (3, 32)


def test_of_one_seed_close_mixtures_see_mostly_the_same():
    pairs = [{*zip(t.drawn.flatten().tolist(), t.window.flatten().tolist(), strict=True)} for t in
             (drawn([0.5, 0.25, 0.25]), drawn([0.48, 0.27, 0.25]), drawn([0.5, 0.25, 0.25], seed=1))]  # fmt: skip
    assert len(pairs[0] & pairs[1]) > 40 > len(pairs[0] & pairs[2])


def test_more_windows_than_there_are_is_refused():
    with pytest.raises(InputError, match="'prose' would be asked for"):
        drawn([0, 1.0, 0], steps=100, size=16)


def test_losses_are_in_the_order_of_the_texts():
    settings = {"cap": CAP, "seq_len": 32, "batches": 1}

    class Sure(torch.nn.Module):
        """Says that the last byte comes again."""

        def forward(self, tokens, context):
            return torch.nn.functional.one_hot(tokens, 256).float()

    found = bed.bits(Sure(), settings, "test")
    task = bed.LanguageModelling(texts(CAP)[2], 32)
    assert found == [task.evaluate(Sure(), "test", 1)[f"bits_per_byte/{name}"] for name in JUDGED]
