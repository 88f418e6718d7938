"""The inverted residual: its products, its shapes, and batch norms that are set anew."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from workbench.errors import InputError
from workbench.lib.core.cells import CELLS
from workbench.lib.core.cells.inverted_residual import InvertedResidual, inverted_residual_macs, recalibrate


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize(("kernel", "expansion", "stride", "d_out"), [(3, 2, 1, 4), (5, 4, 2, 6), (7, 3, 2, 4)])
@pytest.mark.parametrize("size", [8, 9])
def test_shapes_and_multiplications(dims: int, kernel: int, expansion: int, stride: int, d_out: int, size: int):
    cell = InvertedResidual(4, d_out, kernel, expansion, stride, dims).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made = cell(torch.randn(1, 4, *[size] * dims))
    assert made.shape == (1, d_out, *[-(-size // stride)] * dims)
    macs = inverted_residual_macs(4, d_out, kernel, expansion, size, stride, dims)
    assert counter.get_total_flops() == 2 * macs


def test_what_comes_in_is_added_where_it_fits():
    cell, x = InvertedResidual(4, 4, 3, 2).eval(), torch.randn(2, 4, 5, 5)
    nn.init.zeros_(cell.body[-1].weight)
    assert torch.equal(cell(x), x) and not InvertedResidual(4, 6, 3, 2).residual


def test_the_registry_has_it():
    kind, x = CELLS["inverted_residual"], torch.randn(1, 4, 6, 6)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        kind.build(4, 8, 1)(x)
    assert counter.get_total_flops() == 2 * kind.macs(4, 8, 6, 6)


def test_a_recalibrated_norm_has_the_statistics_of_one_pass():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()).eval()
    net[0].running_mean.fill_(9.0)
    net.append(unused := nn.Identity())
    unused.norm = nn.BatchNorm1d(3)
    unused.norm.running_mean.fill_(4.0)
    x, weight = torch.randn(50, 3), net[1].weight.clone()
    recalibrate(net, x)
    torch.testing.assert_close(net[0].running_mean, x.mean(0))
    torch.testing.assert_close(net[0].running_var, x.var(0))
    assert torch.equal(unused.norm.running_mean, torch.full((3,), 4.0)) and torch.equal(net[1].weight, weight)
    assert not net.training and net[0].momentum == 0.1 and net[0].num_batches_tracked == 0


@pytest.mark.parametrize(("wrong", "said"), [({"kernel": 4}, "kernel is 4"), ({"dims": 3}, "dims is 3")])
def test_what_is_no_cell_is_refused(wrong: dict, said: str):
    with pytest.raises(InputError, match=said):
        InvertedResidual(4, 4, **({"kernel": 3, "expansion": 2} | wrong))
