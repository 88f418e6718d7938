"""Traces of routers: kept as they are, refused where they are none, and synthetic ones that drift."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workbench.errors import InputError
from workbench.lib.core.simulation.traces import RouterTrace, zipf_markov


def test_a_trace_is_read_as_it_was_written(tmp_path: Path):
    for made in (zipf_markov(3), RouterTrace("one", 1, 0, torch.rand(1, 1, 1, 1))):
        made.write(tmp_path / "a.safetensors")
        found = RouterTrace.read(tmp_path / "a.safetensors")
        assert (found.source, found.top_k, found.prompt) == (made.source, made.top_k, made.prompt)
        assert torch.equal(found.probs, made.probs)
        assert (found.ahead is None) == (made.ahead is None)
        assert made.ahead is None or torch.equal(found.ahead, made.ahead)


def test_the_seed_is_all_the_randomness():
    torch.manual_seed(1)
    made = zipf_markov(5)
    torch.manual_seed(2)
    assert torch.equal(made.probs, zipf_markov(5).probs) and torch.equal(made.ahead, zipf_markov(5).ahead)
    assert not torch.equal(made.probs, zipf_markov(6).probs)


def test_a_synthetic_trace_is_skewed_and_drifts():
    sizes = {"prompts": 8, "prompt": 0, "generated": 100, "layers": 2}
    drifting, independent = zipf_markov(stay=0.95, **sizes), zipf_markov(stay=0.0, skew=0.0, **sizes)
    assert independent.reuse() == pytest.approx(4 / 16, abs=0.02)
    assert drifting.reuse() > independent.reuse() + 0.3
    counts = torch.bincount(zipf_markov(skew=2.0, **sizes).chosen()[:, :, 0].flatten(), minlength=16).sort().values
    assert counts[-1] > 6 * counts[0] and counts.sum() == 8 * 100 * 4


def test_what_is_reused_and_foreseen_is_counted():
    probs = torch.zeros(1, 3, 2, 4)
    for t, (first, second) in enumerate([((0, 1), (2, 3)), ((0, 2), (2, 3)), ((1, 3), (0, 3))]):
        probs[0, t, 0, list(first)], probs[0, t, 1, list(second)] = 0.5, 0.5
    ahead = torch.zeros(1, 3, 2, 3, 4)
    ahead[0, :, 0, 0] = torch.tensor([0.4, 0.0, 0.0, 0.6])  # one of {2, 3}, one of {2, 3}, both of {0, 3}
    found = RouterTrace("by hand", 2, 1, probs, ahead)
    assert found.reuse() == (1 + 2 + 0 + 1) / 8
    assert found.foreseen() == [4 / 6]
    assert RouterTrace("by hand", 2, 1, probs).foreseen() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probs": torch.zeros(0, 4, 2, 4)}, r"probs has shape \(0, 4, 2, 4\) but must be .* all above 0"),
        ({"probs": torch.zeros(4, 4)}, r"probs has shape \(4, 4\)"),
        ({"top_k": 5}, r"top_k is 5 but must be from 1 to the 4 experts"),
        ({"prompt": 4}, r"prompt is 4 but must leave one or more generated tokens of the 4"),
        ({"ahead": torch.zeros(1, 4, 2, 3, 5)}, r"ahead has shape \(1, 4, 2, 3, 5\) but must be \(1, 4, 2, ahead, 4\)"),
        ({"probs": torch.full((1, 4, 2, 4), torch.nan)}, r"probs must hold finite numbers"),
        ({"probs": -torch.ones(1, 4, 2, 4)}, r"probs must hold finite numbers of at least 0"),
        ({"probs": torch.ones(1, 4, 2, 4, dtype=torch.int64)}, r"in a floating-point type"),
        (
            {"probs": torch.ones(1, 4, 2, 4) * torch.tensor([0.0, 1.0])[:, None]},
            r"probs is 0 for all experts of a token",
        ),
    ],
)
def test_what_is_no_trace_is_refused(change, message, unchecked):
    parts = {"source": "x", "top_k": 2, "prompt": 1, "probs": torch.ones(1, 4, 2, 4)} | change
    with pytest.raises(InputError, match=message):
        RouterTrace(**parts)


def test_a_file_that_holds_no_trace_is_refused(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match=r"cannot be read"):
        RouterTrace.read(path)
    path.write_text("no")
    with pytest.raises(InputError, match=r"cannot be read"):
        RouterTrace.read(path)
    for tensors, about in (
        ({"probs": torch.ones(1, 2, 1, 2)}, None),
        ({"probs": torch.ones(1, 2, 1, 2)}, {"source": "x", "top_k": "2", "prompt": 0}),
        ({"other": torch.ones(1)}, {"source": "x", "top_k": 1, "prompt": 0}),
    ):
        save_file(tensors, str(path), None if about is None else {"trace": json.dumps(about)})
        with pytest.raises(InputError, match=r"must have a tensor 'probs' and, in its metadata"):
            RouterTrace.read(path)
    save_file({"probs": torch.ones(1, 2, 1, 2)}, str(path), {"trace": '{"source": "x", "top_k": 3, "prompt": 0}'})
    with pytest.raises(InputError, match=r"a.safetensors': top_k is 3"):
        RouterTrace.read(path)


def test_numbers_of_the_synthetic_one_that_are_refused():
    with pytest.raises(InputError, match=r"stay is 1.0 but must be at least 0 and below 1"):
        zipf_markov(stay=1.0)
    with pytest.raises(InputError, match=r"probs has shape"):
        zipf_markov(prompts=0)
    with pytest.raises(InputError, match=r"layers is 0 but must be at least 1"):
        zipf_markov(layers=0)
