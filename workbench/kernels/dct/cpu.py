"""The cosine transform of rows on a processor: by the basis while a row is short, by a real FFT from `FFT_FROM` on.

With v the row's even entries followed by its odd ones backwards, and V its FFT (Makhoul 1980):

    W_k = V_k exp(-i pi k / 2m),    y_k = sqrt(2/m) Re W_k,    y_(m-k) = -sqrt(2/m) Im W_k,    k = 0 .. m/2

and y_0 = V_0 / sqrt(m). As v is real, half of the FFT says it all. With a factor i no sign has to be changed:
i W_k has the parts -Im W_k and Re W_k. Entries change places by one gather on either side.
"""

from functools import lru_cache
from math import pi

import torch
from torch import Tensor

from workbench.kernels.dct import reference

FFT_FROM = 128
"""Width from which on the FFT is faster; found by `workbench bench optimisers`."""


def dct_rows(x: Tensor, inverse: bool) -> Tensor:
    """As `reference.dct_rows`."""
    if x.shape[1] < FFT_FROM or not len(x):
        return reference.dct_rows(x, inverse)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (_backward(wide) if inverse else _forward(wide)).to(x.dtype)


def _forward(x: Tensor) -> Tensor:
    plan = _plan(x.shape[1], x.dtype)
    w = torch.fft.rfft(x.index_select(1, plan["spread"])).mul_(plan["turns"])
    return torch.view_as_real(w).flatten(1).index_select(1, plan["parts"])


def _backward(y: Tensor) -> Tensor:
    m = y.shape[1]
    plan = _plan(m, y.dtype)
    w = y.index_select(1, plan["pairs"]).view(len(y), -1, 2)
    w[:, 0, 0] = 0
    return torch.fft.irfft(torch.view_as_complex(w).mul_(plan["back"]), m).index_select(1, plan["gather"])


@lru_cache(maxsize=16)
def _plan(m: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """For rows of m: "spread" makes v of x, "gather" x of v; "parts" makes y of the parts of i W, Re before Im, "pairs"
    these of y; "turns" is `turns`, "back" its inverse."""
    with torch.inference_mode(False):
        k, by = torch.arange(m // 2 + 1), turns(m)
        wide = torch.complex128 if dtype == torch.float64 else torch.complex64
        at = torch.arange(m)
        spread = torch.cat([at[::2], at[1::2].flip(0)])
        parts = torch.where(at <= m // 2, 2 * at + 1, 2 * (m - at))
        pairs = torch.stack([(m - k) % m, k], 1).flatten()
        plan = {"spread": spread, "gather": spread.argsort(), "parts": parts, "pairs": pairs}
        return plan | {"turns": by.to(wide), "back": (1 / by).to(wide)}


def turns(m: int) -> Tensor:
    """i exp(-i pi k / 2m) with the scale, for k = 0 .. m/2, of double precision."""
    k = torch.arange(m // 2 + 1, dtype=torch.float64)
    by = torch.polar(torch.full_like(k, (2 / m) ** 0.5), pi / 2 - pi * k / (2 * m))
    by[0] = 1j * m**-0.5
    return by
