"""Traces of trained routers: of a model trained once, drawn from it byte by byte, foreseen without cheating."""

import pytest
import torch

from workbench.beds import router_traces as bed

LEARNED = bed.SMOKE | {"cap": 65_536, "width": 32, "hidden": 32, "steps": 150, "prompts": 4, "prompt": 16}
"""As little as makes routers that drift slowly."""


@pytest.fixture(scope="module")
def learned():
    return bed.trace(LEARNED)


def test_it_learns_and_its_routers_are_neither_independent_nor_blind(learned):
    text, locality, foresight = bed.measure(LEARNED)
    assert text.reached < 0.75 * text.trivial
    assert locality.reached == learned.reuse() > locality.trivial + 0.1
    assert foresight.reached == learned.foreseen()[0] > foresight.trivial + 0.2


def test_model_and_trace_are_made_once(learned, monkeypatch):
    monkeypatch.setattr(bed, "train", None)
    monkeypatch.setattr(bed, "listen", None)
    again = bed.trace(LEARNED)
    assert torch.equal(again.probs, learned.probs) and torch.equal(again.ahead, learned.ahead)
    with pytest.raises(TypeError):
        bed.trace(LEARNED, seed=1)


def test_a_trace_is_what_routers_say_when_bytes_come_one_by_one(learned):
    """What comes later changes nothing of what was said: the model is causal, and the trace is of one pass."""
    model, task = bed.base(LEARNED), bed.make_task(LEARNED)
    tokens = bed.go_on(model, task, LEARNED, 0)
    prompts = task.batch("test", LEARNED["prompts"], torch.Generator().manual_seed(0)).inputs
    assert torch.equal(tokens[:, : LEARNED["prompt"]], prompts[:, : LEARNED["prompt"]])
    assert tokens.shape == learned.probs.shape[:2] == (4, 16 + LEARNED["generated"])
    probs, ahead = bed.listen(model, tokens[:, :20])
    torch.testing.assert_close(probs, learned.probs[:, :20], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ahead, learned.ahead[:, :20], rtol=1e-4, atol=1e-6)


def test_gates_ahead_are_asked_of_the_state_that_is_there():
    """Where no block adds anything the state is the same later, and foresight is perfect; otherwise it is not."""
    model = bed.base(LEARNED)
    tokens = torch.arange(28)[None]
    probs, ahead = bed.listen(model, tokens)
    assert not torch.allclose(ahead[:, :, 0, 0], probs[:, :, 1], atol=1e-3)
    for block in model.blocks:
        block.attention.out.weight.data.zero_()
        block.ffn.experts.down.data.zero_()
    probs, ahead = bed.listen(model, tokens)
    torch.testing.assert_close(ahead[:, :, 0, 0], probs[:, :, 1])
    torch.testing.assert_close(ahead[:, :, 0, 1], probs[:, :, 2])
    torch.testing.assert_close(ahead[:, :, 1, 0], probs[:, :, 2])
    assert not ahead[:, :, 2].any() and not ahead[:, :, 1, 1:].any() and not ahead[:, :, 0, 2].any()
