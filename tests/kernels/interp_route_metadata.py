"""The Triton kernels of `route_metadata` under the interpreter; run by test_interpreter in a process of its own."""

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels import RoutePlan, dispatch
from workbench.kernels.route_metadata import _triton, route_metadata
from workbench.kernels.route_metadata.triton import BLOCK

NAMES = ("order", "inv", "tok", "offs")


def ids(n_pairs, n_experts, dtype=torch.int64, seed=0):
    return torch.randint(n_experts, (n_pairs,), generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(expert, n_experts, **tokens):
    ours, plan = (route_metadata(expert, n_experts, **tokens, backend=backend) for backend in ("triton", "reference"))
    for name in NAMES:
        assert getattr(ours, name).dtype == torch.int32
        assert torch.equal(getattr(ours, name), getattr(plan, name)), name
    assert (ours.n_tokens, ours.n_experts, ours.top_k) == (plan.n_tokens, plan.n_experts, plan.top_k)
    assert (ours.tok_offs is None) == (plan.tok_offs is None)
    assert ours.tok_offs is None or torch.equal(ours.tok_offs, plan.tok_offs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("n_experts", [1, 7, 64, 65])
def test_equals_the_reference(dtype, n_experts):
    check(ids(300, n_experts, dtype), n_experts, top_k=3)
    assert dispatch.last_backend("route_metadata") == "reference"
    route_metadata(ids(4, 2), 2, top_k=2, backend="triton")
    assert dispatch.last_backend("route_metadata") == "triton"


@pytest.mark.parametrize("n_pairs", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_the_edges_of_the_blocks(n_pairs):
    check(ids(n_pairs, 5), 5, top_k=1)


def test_experts_without_pairs_and_one_with_all():
    check(torch.full((BLOCK + 9,), 3), 8, top_k=1)
    check(torch.tensor([7, 0, 7, 0]), 8, top_k=2)


@pytest.mark.parametrize("counts", [[0], [2, 0, 3, 1], [0, 0, 5, 0], [1] * 9, [0, 200, 0, 3]])
def test_tokens_with_different_numbers_of_pairs(counts):
    offsets = torch.tensor([0, *counts]).cumsum(0)
    for kind in (torch.int32, torch.int64):
        check(ids(sum(counts), 6), 6, tok_offs=offsets.to(kind))


def test_strides_do_not_matter():
    expert = ids(80, 4)
    assert torch.equal(
        route_metadata(expert[::2], 4, top_k=2, backend="triton").order, RoutePlan.build(expert[::2], 4, top_k=2).order
    )


def test_registration():
    expert, offsets = ids(20, 4), torch.tensor([0, 5, 5, 20], dtype=torch.int32)
    torch.library.opcheck(_triton, (expert, 4, 2, None))
    torch.library.opcheck(_triton, (expert, 4, None, offsets))


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match="top_k is 3 but must be at least 1 and divide"):
        route_metadata(ids(4, 2), 2, top_k=3, backend="triton")
    with pytest.raises(InputError, match="expert holds values from 0 to 9 but all must be"):
        route_metadata(torch.tensor([0, 9]), 2, top_k=1, backend="triton")
