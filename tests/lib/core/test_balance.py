"""Balance losses and the loss-free bias against their closed forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.lib.core.balance import LossFreeBias, band_loss, check_coefficients, switch_lbl, top1_lbl, z_loss
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context


@given(st.integers(2, 8), st.integers(0, 2**31))
def test_switch_lbl_is_one_for_uniform_probabilities_whatever_the_load(n_experts, seed):
    counts = torch.randint(0, 50, (n_experts,), generator=torch.Generator().manual_seed(seed))
    counts[0] += 1
    probs = torch.full((10, n_experts), 1 / n_experts, dtype=torch.float64)
    assert switch_lbl(probs, counts).item() == pytest.approx(1.0)


def test_switch_lbl_by_hand():
    probs = torch.tensor([[0.8, 0.2], [0.6, 0.4]])
    assert switch_lbl(probs, torch.tensor([2, 0])).item() == pytest.approx(2 * 0.7)


@given(st.integers(2, 8), st.floats(0.1, 10), st.integers(0, 2**31))
def test_top1_lbl_lies_between_one_and_e(n_experts, temperature, seed):
    logits = torch.randn(20, n_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5
    value = top1_lbl(logits, temperature).item()
    assert 1 - 1e-9 <= value <= n_experts + 1e-9


def test_z_loss_of_equal_logits_is_the_squared_log_of_e():
    assert z_loss(torch.zeros(3, 4)).item() == pytest.approx(torch.log(torch.tensor(4.0)).item() ** 2)


def test_band_loss_is_zero_inside_and_positive_outside():
    assert band_loss(torch.full((5, 4), 0.25)).item() == 0
    assert band_loss(torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])).item() > 0


def test_loss_free_bias_moves_by_the_rate_towards_the_mean_and_rests_when_balanced():
    bias = LossFreeBias(3, rate=0.1)
    bias.update(torch.tensor([4, 1, 1]))
    assert torch.allclose(bias.bias, torch.tensor([-0.1, 0.1, 0.1]))
    before = bias.bias.clone()
    bias.update(torch.tensor([2, 2, 2]))
    assert torch.equal(bias.bias, before)


def test_loss_free_bias_counts_training_batches_only_and_never_enters_the_weights():
    torch.manual_seed(0)
    router = LinearRouter(6, 4, 2, bias_rate=0.5)
    x = torch.randn(9, 6)
    plain = router(x, Context())
    assert int(router.bias.load.sum()) == 18
    router.eval()
    router(x, Context())
    assert int(router.bias.load.sum()) == 18  # unchanged by evaluation
    router.bias.bias += 3.0  # the same for all experts: nothing may change
    shifted = router(x, Context())
    assert torch.equal(plain.expert, shifted.expert) and torch.equal(plain.weight, shifted.weight)
    storage = router.bias.bias.data_ptr()
    router.bias.load.fill_(1)
    router.bias.load[0] = 9
    router.bias.after_step()
    assert router.bias.bias.data_ptr() == storage, "the buffer is updated in place: a checkpoint holds the live one"
    assert int(router.bias.load.sum()) == 0


def test_the_coefficients_are_checked():
    with pytest.raises(InputError, match="did you mean 'lbl'"):
        check_coefficients({"lb": 0.1})
    with pytest.raises(InputError, match="at least 0"):
        check_coefficients({"z": float("nan")})
