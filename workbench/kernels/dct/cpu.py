"""The cosine transform of rows on a processor: by the basis while a row is short, by a real FFT from `FFT_FROM` on.

With v the row's even entries followed by its odd ones backwards, and V its FFT (Makhoul 1980):

    W_k = V_k exp(-i pi k / 2m),    y_k = sqrt(2/m) Re W_k,    y_(m-k) = -sqrt(2/m) Im W_k,    k = 0 .. m/2

and y_0 = V_0 / sqrt(m). As v is real, half of the FFT says it all.
"""

from functools import lru_cache
from math import pi

import torch
from torch import Tensor

from workbench.kernels.dct import reference

FFT_FROM = 256
"""Width from which on the FFT is faster; found by `workbench bench optimisers`."""


def dct_rows(x: Tensor, inverse: bool) -> Tensor:
    """As `reference.dct_rows`."""
    if x.shape[1] < FFT_FROM:
        return reference.dct_rows(x, inverse)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (_backward(wide) if inverse else _forward(wide)).to(x.dtype)


def _forward(x: Tensor) -> Tensor:
    m = x.shape[1]
    half = m // 2 + 1
    v = torch.empty_like(x)
    v[:, : m - m // 2] = x[:, ::2]
    v[:, m - m // 2 :] = x[:, 1::2].flip(1)
    w = torch.view_as_real(torch.fft.rfft(v).mul_(_turns(m, x.dtype)))
    v[:, :half] = w[..., 0]
    v[:, half:] = w[:, 1 : m - half + 1, 1].flip(1).neg_()
    return v


def _backward(y: Tensor) -> Tensor:
    m = y.shape[1]
    half = m // 2 + 1
    w = torch.empty(len(y), half, 2, dtype=y.dtype)
    w[..., 0] = y[:, :half]
    w[:, 0, 1] = 0
    torch.neg(y[:, m - half + 1 :].flip(1), out=w[:, 1:, 1])
    v = torch.fft.irfft(torch.view_as_complex(w).div_(_turns(m, y.dtype)), m)
    x = torch.empty_like(y)
    x[:, ::2] = v[:, : m - m // 2]
    x[:, 1::2] = v[:, m - m // 2 :].flip(1)
    return x


@lru_cache(maxsize=16)
def _turns(m: int, dtype: torch.dtype) -> Tensor:
    """(m/2 + 1,) exp(-i pi k / 2m) and the scale of the orthonormal transform."""
    with torch.inference_mode(False):
        k = torch.arange(m // 2 + 1, dtype=torch.float64)
        turns = torch.polar(torch.full_like(k, (2 / m) ** 0.5), -pi * k / (2 * m))
        turns[0] = m**-0.5
        return turns.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
