"""The wavelet cell: shapes, its count of products, and that it begins where its block adds nothing."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.draws import draw
from workbench.errors import InputError
from workbench.lib.core.cells import CELLS, WaveletCell


@pytest.mark.parametrize(("d_in", "d_out", "stride"), [(8, 8, 1), (8, 16, 1), (6, 16, 2)])
def test_shapes_and_products(d_in, d_out, stride):
    cell = CELLS["wavelet"].build(d_in, d_out, stride).eval()
    with FlopCounterMode(display=False) as counter:
        out = cell(draw(1, d_in, 8 * stride, 8 * stride))
    assert out.shape == (1, d_out, 8, 8)
    assert counter.get_total_flops() == 2 * CELLS["wavelet"].macs(d_in, d_out, 8, 8)


def test_without_its_block_it_is_the_identity():
    cell, x = WaveletCell(8, 8), draw(2, 8, 4, 4)
    torch.nn.init.zeros_(cell.block.ups[-1][-1].weight)
    assert torch.equal(cell(x), x)


def test_what_it_cannot_be():
    for call, said in [
        (lambda: WaveletCell(8, 8, 3), "stride is 3"),
        (lambda: WaveletCell(8, 6), "dim is 6 but must be a multiple of 4"),
        (lambda: WaveletCell(8, 8)(torch.zeros(1, 8, 5, 4)), "x is 5 x 4 but"),
    ]:
        with pytest.raises(InputError, match=said):
            call()
