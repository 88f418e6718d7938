"""The Triton kernels of `selective_scan` under the interpreter; run by test_interpreter in a process of its own."""

from functools import partial

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels import dispatch, selective_scan
from workbench.kernels.selective_scan import triton


def draw(batch, channels, states, steps, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    cube, row = (batch, channels, steps), (batch, states, steps)
    shapes = cube, cube, (channels, states), row, row, (channels,), cube, (batch, channels, states)
    given = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    given[2] = -given[2].abs()
    given = [tensor.to(torch.float32 if at in (2, 5, 7) else dtype) for at, tensor in enumerate(given)]
    return [tensor.requires_grad_() for tensor in given]


def results(given, path):
    y, last = selective_scan(*given, backend=path)
    torch.manual_seed(1)
    grads = [torch.randn(out.shape).to(out.dtype) for out in (y, last)]
    return [y, last, *torch.autograd.grad((y, last), given, grads)]


def check(given, tolerance=1e-5):
    found = results(given, "triton")
    assert dispatch.last_backend("selective_scan") == dispatch.last_backend("selective_scan.backward") == "triton"
    wanted = results([tensor.detach().double().requires_grad_() for tensor in given], "reference")
    for ours, exact, like in zip(found, wanted, (given[0], given[7], *given), strict=True):
        assert ours.dtype == like.dtype
        scale = max(1.0, float(exact.detach().abs().max())) if exact.numel() else 1.0
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 2, 70), (1, 2, 5, 64), (1, 1, 3, 129)], ids=str)
def test_equals_the_reference(shape):
    check(draw(*shape))


def test_more_states_and_channels_than_go_together(monkeypatch):
    monkeypatch.setattr(triton, "STATES", 4)
    monkeypatch.setattr(triton, "GROUPS", 2)
    check(draw(2, 5, 6, 66))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_its_states_in_float32(dtype):
    check(draw(1, 2, 2, 66, dtype), 2e-2)


def test_layouts_that_are_kept_and_edges():
    given = draw(2, 3, 2, 5)
    check([t.detach().mT.contiguous().mT.requires_grad_() if t.ndim == 3 else t for t in given])
    for shape in ((0, 3, 2, 4), (2, 3, 2, 0), (2, 0, 2, 5)):
        check(draw(*shape))


def test_long_steps_and_shut_gates():
    given = [tensor.detach() for tensor in draw(1, 2, 2, 6)]
    given[1][..., 0], given[1][..., 1], given[1][..., 2] = -200.0, 300.0, -20.0
    given[6][..., 3], given[6][..., 4] = -200.0, 200.0
    check([tensor.requires_grad_() for tensor in given])


def test_two_runs_agree_and_registration():
    given = draw(1, 3, 2, 9)
    assert all(map(torch.equal, results(given, "triton"), results(given, "triton")))
    torch.library.opcheck(torch.ops.workbench.selective_scan.default, (*given, "triton", True))


def test_what_it_does_not_take_is_refused():
    wide = [tensor.detach().double() for tensor in draw(1, 1, 1, 2)]
    with pytest.raises(InputError, match=r"x is torch\.float64"):
        partial(selective_scan, backend="triton")(*wide)
    with pytest.raises(InputError, match=r"x is torch\.float64"):
        torch.ops.workbench.selective_scan(*wide, "triton", False)
