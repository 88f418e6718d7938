"""Evaluation mode for a while: inside without gradients, afterwards every module as it was, also after an error."""

import pytest
import torch
from torch import nn

from workbench.lib.core.modes import evaluating


def mixed() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2))).train()
    model[1][0].eval()
    return model


def test_inside_is_evaluation_without_gradients_and_outside_is_as_before():
    model = mixed()
    before = {name: module.training for name, module in model.named_modules()}
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not model(torch.ones(1, 2)).requires_grad
        with torch.enable_grad():
            assert model(torch.ones(1, 2)).requires_grad
    assert {name: module.training for name, module in model.named_modules()} == before
    assert set(before.values()) == {True, False} and torch.is_grad_enabled()


def test_an_error_leaves_every_mode_as_it_was():
    model = mixed()
    before = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        raise RuntimeError("inside")
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.is_grad_enabled()
