"""Cells of image networks: shapes, what their products cost, and what they commute with."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from workbench.errors import InputError
from workbench.lib.core.cells import CELLS, FusedMBConv, ResidualConv, TransformerCell


def products(cell, x) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cell.eval()(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_halves_or_keeps_the_map_and_is_itself_in_a_batch_of_one(name: str):
    torch.manual_seed(0)
    for d_in, d_out, stride in ((16, 16, 1), (16, 24, 1), (16, 24, 2), (16, 16, 2)):
        cell, x = CELLS[name].build(d_in, d_out, stride).eval(), torch.randn(3, d_in, 8, 8)
        assert cell(x).shape == (3, d_out, 8 // stride, 8 // stride)
        torch.testing.assert_close(cell(x)[:1], cell(x[:1]))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(("d_in", "d_out"), [(16, 16), (16, 24)])
def test_the_formula_counts_the_products(name: str, d_in: int, d_out: int):
    cell = CELLS[name].build(d_in, d_out, 1)
    assert CELLS[name].macs(d_in, d_out, 8, 6) == products(cell, torch.randn(1, d_in, 8, 6))


def weights(cell) -> int:
    """Of matrices and kernels, without norms, biases and position codes."""
    return sum(p.numel() for name, p in cell.named_parameters() if p.ndim > 1 and name != "position")


def test_as_many_weights_as_papers_say():
    assert weights(FusedMBConv(24, 24)) == 40 * 24**2
    assert weights(TransformerCell(24, 24)) == 12 * 24**2


def test_convolutions_that_pad_in_a_circle_commute_with_shifts():
    torch.manual_seed(0)
    cell, x = FusedMBConv(8, 8, circular=True).double().eval(), torch.randn(2, 8, 6, 6).double()
    shifted = torch.roll(x, (2, 1), (2, 3))
    torch.testing.assert_close(cell(shifted), torch.roll(cell(x), (2, 1), (2, 3)))


def test_without_its_position_code_attention_commutes_with_permutations_of_the_places():
    torch.manual_seed(0)
    cell, x = TransformerCell(16, 16).double(), torch.randn(2, 16, 4, 4).double()
    order = torch.randperm(16)

    def permuted(maps):
        return maps.flatten(2)[:, :, order].unflatten(2, (4, 4))

    torch.testing.assert_close(cell(permuted(x)), permuted(cell(x)))
    torch.nn.init.normal_(cell.position)
    assert not torch.allclose(cell(permuted(x)), permuted(cell(x)))


def test_the_bias_of_two_places_is_that_of_their_difference():
    cell = TransformerCell(16, 16, side=5)
    torch.nn.init.normal_(cell.position)
    bias = cell.bias(3, 4).unflatten(2, (3, 4)).unflatten(1, (3, 4))  # heads, from, to
    for (y, x), (v, u) in (((0, 0), (2, 3)), ((2, 3), (0, 0)), ((1, 2), (1, 0))):
        assert torch.equal(bias[:, y, x, v, u], cell.position[:, y - v + 4, x - u + 4])


def test_of_one_place_attention_is_its_value():
    torch.manual_seed(0)
    cell, x = TransformerCell(16, 16).double(), torch.randn(2, 16, 1, 1).double()
    token = x.flatten(1)
    value = cell.qkv(cell.norm(token)).unflatten(-1, (3, -1))[:, 2]
    token = token + cell.out(value)
    torch.testing.assert_close(cell(x).flatten(1), token + cell.mlp(token))


@pytest.mark.parametrize("cell", [FusedMBConv(16, 16, still=True), TransformerCell(16, 16, still=True)])
def test_a_cell_that_starts_still_is_the_identity(cell):
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(cell(x), x)


def test_a_gate_sees_all_places_and_is_counted_by_none():
    torch.manual_seed(0)
    cell, x = FusedMBConv(8, 8, squeeze=0.25).eval(), torch.randn(1, 8, 6, 6)
    moved = x.clone()
    moved[..., 5, 5] += 10
    assert not torch.equal(cell(moved)[..., 0, 0], cell(x)[..., 0, 0])
    assert sum(p.numel() for p in cell.body[3].parameters()) == 32 * 2 + 2 + 2 * 32 + 32


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: FusedMBConv(0, 8), "channels are 0 in and 8 out"),
        (lambda: ResidualConv(8, 8, 3), "stride is 3 but must be 1 or 2"),
        (lambda: TransformerCell(16, 20), "d_out is 20 but must be a multiple of head, 8"),
        (lambda: TransformerCell(8, 8, side=4)(torch.randn(1, 8, 5, 4)), "maps are 5 x 4"),
    ],
)
def test_what_is_no_cell_is_refused(build, said: str):
    with pytest.raises(InputError, match=said):
        build()
