"""The meaning of `dct2_rows` and `dct3_rows`: the product with the basis, or with its transpose."""

import torch
from torch import Tensor

from workbench.kernels.dct import dct_basis


def dct_rows(x: Tensor, inverse: bool) -> Tensor:
    """(rows, m) from (rows, m), added in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    basis = dct_basis(x.shape[1], wide.dtype, x.device)
    return (wide @ (basis.T if inverse else basis)).to(x.dtype)
