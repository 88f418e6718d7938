"""The Triton kernels of `pcb_merge` under the interpreter; run by test_interpreter in a process of its own."""

import sys
from pathlib import Path

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels import dispatch, pcb_merge
from workbench.kernels.pcb_merge import Bounds, pcb_bounds, pcb_piece
from workbench.kernels.pcb_merge import triton as path

sys.path.insert(0, str(Path(__file__).parent))
from test_pcb_merge import differences, nearness, ranks


@pytest.mark.parametrize("n, size", [(1, 700), (3, 1025), (5, 515)])
def test_it_is_as_near_as_it_says(n, size):
    """Each parameter, whether the models begin at whole vectors or not."""
    tau, base, scale = differences(n, size), torch.randn(size), [0.8 + 0.1 * i for i in range(n)]
    gap = nearness((tau + base) - base, **ranks(size))
    assert gap.median() > 1e-3  # else nothing is said
    how = ranks(size) | {"scale": scale}
    ours, theirs = (pcb_merge(tau + base, base, **how, backend=name) for name in ("triton", "reference"))
    assert bool(((ours - theirs).abs() / tau.abs().max() <= 1e-5 / gap + 1e-6).all())
    apart = [x.clone() for x in tau + base]  # each where a vector may begin
    assert torch.equal(pcb_merge(apart, base, **how, backend="triton"), ours)


def test_what_is_kept_is_as_many_as_are_wanted_and_signs_and_orders_do_not_matter():
    size = 600
    how = ranks(size) | {"backend": "triton"}
    one = differences(1, size)
    merged = pcb_merge(one, **how)
    assert dispatch.last_backend("pcb_merge") == "triton"
    assert int((merged != 0).sum()) == int(0.2 * size)  # those above the rank that drops
    tau = differences(3, size, seed=1)
    merged = pcb_merge(tau, **how)
    assert torch.equal(pcb_merge(-tau, **how), -merged)
    assert torch.equal(pcb_merge(4 * tau, **how), 4 * merged)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(2))
    assert torch.equal(pcb_merge(tau[:, order], **how), merged[order])
    opposite = torch.cat([one, -one])  # nobody wins: every score is 0
    assert torch.equal(pcb_merge(opposite, **how), torch.zeros(size))
    flat = torch.cat([torch.full((1, size), 0.5), one])  # has no say
    assert torch.allclose(pcb_merge(flat, **how), pcb_merge(flat, **how | {"backend": "reference"}), atol=1e-5)


def test_in_pieces_it_is_the_same():
    size = 700
    tau, how = differences(3, size), ranks(size)
    ends = tau.abs().sort(1).values[:, list(how["clip"])].T.tolist()
    parts = list(tau.split([300, 0, 400], 1))
    bounds = pcb_bounds(parts, *ends, how["drop"], backend="triton")
    assert isinstance(bounds, Bounds)
    merged = torch.cat([pcb_piece(part, bounds, [1.0] * 3, backend="triton") for part in parts])
    assert torch.equal(merged, pcb_merge(tau, **how, backend="triton"))


def test_types_and_registration():
    tau = differences(3, 600)
    half = tau.half()
    expected = pcb_merge(half.float(), **ranks(600), backend="triton").half()
    assert torch.equal(pcb_merge(list(half), **ranks(600), backend="triton"), expected)
    with pytest.raises(InputError, match="got tensors of"):
        pcb_merge(tau.double(), **ranks(600), backend="triton")
    with pytest.raises(InputError, match="has NaN but must have none"):
        pcb_merge(torch.full((2, 600), torch.nan), **ranks(600), backend="triton")
    given = (list(tau[:2, :60]), torch.ones(60), [2, 58], 40, [1.0] * 2, "triton")
    torch.library.opcheck(torch.ops.workbench.pcb_merge.default, given)
    assert path.BLOCK < 600  # several programs in all the others
