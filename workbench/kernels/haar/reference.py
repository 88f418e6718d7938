"""The meaning of `haar_dwt2` and `haar_idwt2`: sums and differences of pairs of columns, then of pairs of rows."""

import torch
from torch import Tensor


def haar_dwt2(x: Tensor) -> Tensor:
    """(N, 4 C, H / 2, W / 2) from (N, C, H, W), added in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    a, b = wide[..., 0::2, 0::2], wide[..., 0::2, 1::2]
    c, d = wide[..., 1::2, 0::2], wide[..., 1::2, 1::2]
    bands = (a + b) + (c + d), (a + b) - (c + d), (a - b) + (c - d), (a - b) - (c - d)
    return (torch.cat(bands, 1) * 0.5).to(x.dtype)


def haar_idwt2(y: Tensor) -> Tensor:
    """(N, C, H, W) from (N, 4 C, H / 2, W / 2), added in float32 or wider."""
    n, channels, height, width = y.shape
    ll, lh, hl, hh = y.to(torch.promote_types(y.dtype, torch.float32)).chunk(4, 1)
    out = torch.stack([(ll + lh) + (hl + hh), (ll + lh) - (hl + hh), (ll - lh) + (hl - hh), (ll - lh) - (hl - hh)], -1)
    cells = out.view(n, channels // 4, height, width, 2, 2).transpose(3, 4)
    return (cells.reshape(n, channels // 4, 2 * height, 2 * width) * 0.5).to(y.dtype)
