"""The columns of the largest norm on the CPU: by hand, in stacks, registration."""

import pytest
import torch

from tests.draws import draw
from workbench.errors import InputError
from workbench.kernels import column_topk, dispatch, gather_columns


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (5, 9), (3, 7, 5), (2, 2, 4, 6)])
def test_the_largest_columns_in_ascending_order(shape, norm):
    x = draw(*shape)
    for k in {1, shape[-1] // 2 + 1, shape[-1]}:
        index, found = column_topk(x, k, norm=norm)
        assert dispatch.last_backend("column_topk") == "reference"
        assert index.dtype == torch.int32 and index.shape == (*shape[:-2], k) and found.shape == (*shape[:-1], k)
        for matrix, chosen, columns in zip(
            x.view(-1, *shape[-2:]), index.view(-1, k).tolist(), found.view(-1, shape[-2], k), strict=True
        ):
            norms = matrix.norm(p=norm, dim=0).tolist()
            assert chosen == sorted(sorted(range(shape[-1]), key=lambda j: -norms[j])[:k])
            assert torch.equal(columns, matrix[:, chosen])
        assert torch.equal(gather_columns(x, index), found)


def test_views_and_half_precision():
    x = draw(6, 8, dtype=torch.bfloat16)
    x[:, 3] *= 8
    index, found = column_topk(x.mT.contiguous().mT, 2)
    assert 3 in index.tolist() and found.dtype == torch.bfloat16 and torch.equal(found, x[:, index.long()])
    tall = torch.full((70_000, 2), 0.1, dtype=torch.float16)  # sums that float16 cannot hold
    tall[:, 1] *= 1.5
    assert column_topk(tall, 1, norm=1)[0].item() == 1


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-30), (torch.float32, 1e25), (torch.float64, 1e-250)])
def test_columns_whose_squares_are_no_numbers(dtype, size):
    x = draw(2, 7, 5, dtype=dtype)
    index, found = column_topk(x * torch.tensor([size, 1.0], dtype=dtype)[:, None, None], 2)
    assert torch.equal(index, column_topk(x, 2)[0]) and torch.equal(found[1], column_topk(x, 2)[1][1])
    assert column_topk(torch.zeros(3, 4), 2)[1].eq(0).all()


def test_registration_and_compilation():
    x = draw(3, 7, 5)
    torch.library.opcheck(torch.ops.workbench.column_topk.default, (x, 2, 2, "reference"))
    torch.library.opcheck(torch.ops.workbench.gather_columns.default, (x, torch.zeros(3, 2).int(), "reference"))
    compiled = torch.compile(lambda x: column_topk(x, 2), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(x), column_topk(x, 2), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: column_topk(torch.zeros(4), 1), r"of shape \(4,\) but must be floating point"),
        (lambda: column_topk(torch.zeros(4, 4).long(), 1), "x is torch.int64"),
        (lambda: column_topk(torch.zeros(0, 4), 1), "at least one row and column"),
        (lambda: column_topk(torch.zeros(3, 4), 5), "k is 5 but must be from 1 to 4"),
        (lambda: column_topk(torch.zeros(3, 4), 0), "k is 0"),
        (lambda: column_topk(torch.zeros(3, 4), 1, norm=3), "norm is 3 but must be 1 or 2"),
        (lambda: column_topk(torch.zeros(3, 4), 1, backend="cpu"), "backend of column_topk 'cpu' is unknown"),
        (lambda: gather_columns(torch.zeros(2, 3, 4), torch.zeros(3, 1).int()), r"index has shape \(3, 1\)"),
        (lambda: torch.ops.workbench.column_topk(torch.zeros(3, 4), 5, 2, "reference"), "k is 5"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
