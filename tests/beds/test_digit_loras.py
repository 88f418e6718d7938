"""Adapters of one base: what the sources have in common, that they know their tasks, and that they are kept."""

import pytest
import torch

from workbench.beds import digit_experts, digit_loras
from workbench.beds.digit_experts import SMOKE
from workbench.beds.digit_loras import RANK, SOURCES, adapter
from workbench.errors import InputError


@pytest.fixture(scope="module", autouse=True)
def mnist(fetched):
    fetched("mnist-5k")


def dense(a, b, scale):
    return scale * b @ a


def test_every_matrix_of_the_trunk_is_adapted_and_the_tasks_are_learned():
    start = digit_experts.base(SMOKE)
    state, task = start.state_dict(), digit_experts.task("flipped")
    before = task.evaluate(start, "test")["accuracy"]
    for source in SOURCES:
        loras = adapter("flipped", source, SMOKE)
        assert list(loras) == digit_loras.layers(state) and len(loras) == 7 and "head" not in loras
        for name, (a, b, scale) in loras.items():
            assert len(a) == b.shape[1] == RANK and scale == 1 and not a.requires_grad
            assert (b.shape[0], a.shape[1]) == state[f"{name}.weight"].shape
        model = digit_experts.DigitNet(SMOKE["width"]).eval()
        added = {f"{name}.weight": state[f"{name}.weight"] + dense(*factors) for name, factors in loras.items()}
        model.load_state_dict(state | added)
        assert task.evaluate(model, "test")["accuracy"] > before + 0.1, source


def test_tasks_share_their_first_a_or_have_their_own():
    """A moves little in training: those that started alike are still much alike."""
    for source, alike in (("shared", True), ("independent", False)):
        one, other = (adapter(name, source, SMOKE)["blocks.0.1"][0].flatten() for name in ("edges", "mirrored"))
        assert (torch.cosine_similarity(one, other, dim=0) > 0.5) == alike


def test_pt_svd_is_the_nearest_of_its_rank():
    name = "blocks.1.1.weight"
    start, own = digit_experts.base(SMOKE).state_dict()[name], digit_experts.expert("edges", SMOKE).state_dict()[name]
    whole = dense(*adapter("edges", "pt-svd", SMOKE, rank=32)["blocks.1.1"])
    torch.testing.assert_close(whole, own - start, rtol=0, atol=1e-6)
    a, b, scale = adapter("edges", "pt-svd", SMOKE, rank=4)["blocks.1.1"]
    left = (own - start - dense(a, b, scale)).square().sum()
    torch.testing.assert_close(left, torch.linalg.svdvals(own - start)[4:].square().sum(), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(a @ a.T, b.T @ b, rtol=0, atol=1e-5)  # balanced


def test_adapters_are_kept_alone_and_come_back_as_they_were(monkeypatch):
    first = adapter("edges", "shared", SMOKE, rank=3)
    monkeypatch.setattr(digit_loras, "train", None)  # whatever is trained from now on fails
    again = adapter("edges", "shared", SMOKE, rank=3)
    assert all(torch.equal(x, y) for key in first for x, y in zip(first[key][:2], again[key][:2], strict=True))
    with pytest.raises(TypeError):
        adapter("edges", "shared", SMOKE, rank=4)


def test_an_unknown_source_or_task_is_named():
    with pytest.raises(InputError, match="source 'pt_svd' is unknown; did you mean 'pt-svd'"):
        adapter("edges", "pt_svd", SMOKE)
    with pytest.raises(InputError, match="task 'edge' is unknown"):
        adapter("edge", "independent", SMOKE)
