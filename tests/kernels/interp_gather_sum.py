"""The Triton kernel of `gather_sum` under the interpreter; run by test_interpreter in a process of its own."""

import pytest
import torch

from workbench.kernels import RoutePlan, dispatch, gather_sum
from workbench.kernels.gather_sum import reference
from workbench.kernels.gather_sum.triton import STEP, TILES

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}
dtypes = pytest.mark.parametrize("dtype", list(DTYPES), ids=str)


def fixed_plan(n_tokens, top_k, n_experts=7):
    expert = torch.rand(n_tokens, n_experts, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :top_k]
    return RoutePlan.build(expert.reshape(-1), n_experts, top_k=top_k)


def ragged_plan(counts, n_experts=7):
    expert = torch.randint(n_experts, (sum(counts),), generator=torch.Generator().manual_seed(0))
    return RoutePlan.build(expert, n_experts, tok_offs=torch.tensor([0, *counts]).cumsum(0))


def draw(plan, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(plan.n_pairs, dim, generator=generator, dtype=torch.float64)
    return y.to(dtype), torch.randn(plan.n_pairs, generator=generator, dtype=torch.float64)


def close(out, y, plan, weight):
    expected = reference.gather_sum(y.double(), plan, None if weight is None else weight.double())
    scale = expected.abs().amax(1, keepdim=True).clamp_min(1)
    return bool(((out.double() - expected).abs() <= DTYPES[y.dtype] * scale).all())


def check(plan, dim, dtype):
    y, weight = draw(plan, dim, dtype)
    for w in (None, weight.float(), weight.to(dtype)):
        out = gather_sum(y, plan, w, backend="triton")
        assert out.dtype == dtype and out.shape == (plan.n_tokens, dim) and close(out, y, plan, w)
        assert torch.equal(out, gather_sum(y, plan, w, backend="triton"))


@dtypes
@pytest.mark.parametrize("top_k", [1, STEP - 1, STEP, STEP + 1])
def test_a_fixed_number_of_pairs(dtype, top_k):
    check(fixed_plan(6, top_k), 40, dtype)
    assert dispatch.last_backend("gather_sum") == "triton"


@dtypes
def test_any_number_of_pairs_and_tokens_without_one(dtype):
    plan = ragged_plan([0, 1, STEP - 1, 0, STEP, 2 * STEP + 1, 0])
    check(plan, 33, dtype)
    y, weight = draw(plan, 33, dtype)
    out = gather_sum(y, plan, weight.to(dtype), backend="triton")
    assert not out[[0, 3, 6]].any()


@pytest.mark.parametrize("width", [1, TILES[4][0] - 1, TILES[4][0], TILES[4][0] + 1])
def test_the_edges_of_the_columns(width):
    check(fixed_plan(3, 2), width, torch.float32)


def test_fixed_and_variable_k_agree_bit_for_bit():
    fixed = fixed_plan(5, 3)
    ragged = RoutePlan(**{**vars(fixed), "tok_offs": fixed.token_offsets(), "top_k": None})
    y, weight = draw(fixed, 20)
    for w in (weight.float(), None):
        assert torch.equal(gather_sum(y, fixed, w, backend="triton"), gather_sum(y, ragged, w, backend="triton"))


def test_no_pairs_and_no_tokens():
    none = ragged_plan([0, 0, 0])
    assert torch.equal(gather_sum(torch.empty(0, 6), none, torch.empty(0), backend="triton"), torch.zeros(3, 6))
    assert gather_sum(torch.empty(0, 6), fixed_plan(0, 2), backend="triton").shape == (0, 6)
    plan = fixed_plan(3, 2)
    assert gather_sum(torch.empty(6, 0), plan, backend="triton").shape == (3, 0)


def test_what_lies_between_the_rows_and_the_rows_of_other_tokens_are_not_read():
    from workbench.kernels.gather_sum import triton as path

    plan = ragged_plan([2, 0, 3, 1])
    y, weight = draw(plan, 20)
    weight = weight.float()
    spaced = torch.full((plan.n_pairs, 50), float("nan"))
    spaced[:, :20] = y
    clean = path.gather_sum(y, plan, weight)
    assert torch.equal(path.gather_sum(spaced[:, :20], plan, weight), clean)
    assert torch.equal(gather_sum(spaced[:, :20], plan, weight, backend="triton"), clean)
    spaced[plan.inv[2]] = float("nan")  # the first pair of the third token
    poisoned = path.gather_sum(spaced[:, :20], plan, weight)
    assert poisoned[2].isnan().all() and torch.equal(poisoned[[0, 1, 3]], clean[[0, 1, 3]])


def test_a_row_that_begins_past_2_to_the_31(far_rows):
    from workbench.kernels.gather_sum import triton as path  # the operator makes its rows contiguous first

    plan = fixed_plan(3, 1)
    y, weight = draw(plan, 20, torch.float16)
    for w in (weight.float(), None):
        assert torch.equal(path.gather_sum(far_rows(y), plan, w), path.gather_sum(y, plan, w))


def test_gradients_and_registration():
    plan = ragged_plan([2, 0, 3, 1])
    y, weight = draw(plan, 5)
    y, weight = y.requires_grad_(), weight.float().requires_grad_()
    results = [
        torch.autograd.grad(gather_sum(y, plan, weight, backend=backend).square().sum(), (y, weight))
        for backend in ("triton", "reference")
    ]
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    tensors = (plan.order, plan.inv, plan.tok, plan.offs, plan.tok_offs, plan.n_tokens, plan.n_experts, plan.top_k)
    torch.library.opcheck(torch.ops.workbench.gather_sum.default, (y, weight, *tensors, "triton"))
