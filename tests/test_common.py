"""Behaviour that every system shares, for each ready row of the catalogue: a new method is a tested method."""

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from workbench.catalogue import Method, methods

WIDTH = 32
ROWS = [row for row in methods(status="ready") if row.example is not None]
pytestmark = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.slug)


def build(row: Method, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return row.build_example()


def tokens(n: int) -> Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(7))


def forward(module: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(11)  # of a router's noise, if it has any
    return module(x)


@pytest.mark.parametrize("n", [1, 7, 64])
def test_tokens_go_in_and_tokens_come_out(row: Method, n: int):
    output = forward(build(row), tokens(n))
    assert output.shape == (n, WIDTH) and output.dtype == torch.float32
    assert output.isfinite().all()


def test_the_example_is_small(row: Method):
    assert 0 < sum(p.numel() for p in build(row).parameters()) < 100_000


def test_every_trained_parameter_gets_a_finite_gradient(row: Method):
    module = build(row).train()
    # Not a sum of squares of the output alone: a layer that only rescales would get none from that.
    (forward(module, tokens(512)) - tokens(512).roll(1, 0)).square().mean().backward()
    trained = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert trained
    assert [name for name, grad in trained.items() if grad is None] == []
    assert [name for name, grad in trained.items() if not grad.isfinite().all()] == []
    assert any(grad.any() for grad in trained.values())


def test_a_saved_and_loaded_module_computes_the_same(row: Method, tmp_path):
    saved, loaded = build(row, seed=1).eval(), build(row, seed=2).eval()
    save_model(saved, str(tmp_path / "model.safetensors"))
    load_model(loaded, str(tmp_path / "model.safetensors"))
    assert torch.equal(forward(saved, tokens(64)), forward(loaded, tokens(64)))


def test_the_same_seed_builds_and_computes_the_same_bits(row: Method):
    first, second = build(row).train(), build(row).train()
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(forward(first, tokens(64)), forward(second, tokens(64)))


def test_evaluation_is_repeatable(row: Method):
    """Without a seed set in between: nothing is drawn in evaluation mode, and nothing is carried over."""
    module = build(row).eval()
    with torch.no_grad():
        assert torch.equal(module(tokens(64)), module(tokens(64)))
