"""The Triton kernel of `haar_dwt2` and `haar_idwt2` under the interpreter; test_interpreter runs it by itself."""

import pytest
import torch

from tests.draws import draw
from workbench.kernels import dispatch, haar_dwt2, haar_idwt2

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


def check(function, x):
    out = function(x, backend="triton")
    assert dispatch.last_backend("haar") == "triton" and out.dtype == x.dtype
    expected = function(x, backend="reference")
    if x.dtype == torch.bfloat16:  # to which the interpreter cuts off, where a GPU rounds
        assert torch.allclose(out, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(out, expected)


@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 6, 10), (1, 2, 32, 34)])
def test_equals_the_reference_to_the_last_bit(dtype, shape):
    n, channels, height, width = shape
    check(haar_dwt2, draw(*shape, dtype=dtype))
    check(haar_idwt2, draw(n, 4 * channels, height // 2, width // 2, dtype=dtype))


def test_views_and_nothing():
    check(haar_dwt2, draw(2, 2, 8, 8)[..., ::2])
    check(haar_idwt2, draw(2, 3, 8, 4, 4)[:, 1])
    assert haar_dwt2(torch.empty(0, 1, 2, 2), backend="triton").shape == (0, 4, 1, 1)


def test_gradients_and_registration():
    x = draw(2, 4, 4, 6).requires_grad_()
    for inverse, function in ((False, haar_dwt2), (True, haar_idwt2)):
        ours, theirs = (
            torch.autograd.grad(function(x, backend=b).square().sum(), x)[0] for b in ("triton", "reference")
        )
        assert torch.equal(ours, theirs)
        torch.library.opcheck(torch.ops.workbench.haar.default, (x, inverse, "triton"))
