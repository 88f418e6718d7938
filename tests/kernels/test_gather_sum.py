"""The sum of the grouped rows of each token, on every path of a CPU, against a loop over the pairs."""

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels import RoutePlan, gather_sum

PATHS = ("reference", "cpu")


def ragged_plan(n_tokens: int = 9, n_experts: int = 4, seed: int = 0) -> RoutePlan:
    """Tokens with any number of experts, some with none, and an expert that nobody chose."""
    mask = torch.rand(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[:, 1] = False
    mask[2] = False
    offs = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    return RoutePlan.build(mask.nonzero()[:, 1], n_experts, tok_offs=offs)


def rows_of(plan: RoutePlan, dim: int = 6, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(plan.n_pairs, dim, generator=generator, dtype=torch.float64).to(dtype)
    return y, torch.rand(plan.n_pairs, generator=generator, dtype=torch.float64).to(dtype)


def loop(y: torch.Tensor, plan: RoutePlan, weight: torch.Tensor | None) -> torch.Tensor:
    out = y.new_zeros(plan.n_tokens, y.shape[1])
    for pair, row in enumerate(plan.inv.tolist()):
        out[plan.tok[row]] += y[row] * (1 if weight is None else weight[pair])
    return out


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_equals_the_loop(backend, dtype, tolerance):
    plan = ragged_plan()
    y, weight = rows_of(plan, dtype=dtype)
    for w in (weight, weight.float(), None):
        out = gather_sum(y, plan, w, backend=backend)
        expected = loop(y.double(), plan, None if w is None else w.double())
        assert out.dtype == dtype and torch.allclose(out.double(), expected, atol=tolerance)
        assert torch.equal(out, gather_sum(y, plan, w, backend=backend))
        assert torch.equal(out[2], torch.zeros(6, dtype=dtype))


@pytest.mark.parametrize("backend", PATHS)
def test_fixed_and_variable_k_agree_bit_for_bit(backend):
    expert = torch.rand(11, 5, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :3].reshape(-1)
    fixed = RoutePlan.build(expert, 5, top_k=3)
    ragged = RoutePlan.build(expert, 5, tok_offs=torch.arange(0, 34, 3))
    y, weight = rows_of(fixed, dtype=torch.float32)
    for w in (weight, None):
        assert torch.equal(gather_sum(y, fixed, w, backend=backend), gather_sum(y, ragged, w, backend=backend))


@pytest.mark.parametrize("backend", PATHS)
def test_gradients_registration_and_compilation(backend):
    plan = ragged_plan()
    y, weight = (t.requires_grad_() for t in rows_of(plan))
    assert torch.autograd.gradcheck(lambda y, w: gather_sum(y, plan, w, backend=backend), (y, weight))
    assert torch.autograd.gradcheck(lambda y: gather_sum(y, plan, backend=backend), (y,))
    tensors = (plan.order, plan.inv, plan.tok, plan.offs, plan.tok_offs, plan.n_tokens, plan.n_experts, plan.top_k)
    for w in (weight, None):
        torch.library.opcheck(torch.ops.workbench.gather_sum.default, (y, w, *tensors, backend))

    def loss(y, weight):
        return gather_sum(y, plan, weight, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(*(torch.autograd.grad(f(y, weight), (y, weight)) for f in (compiled, loss)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", PATHS)
def test_no_pairs_no_tokens_and_views(backend):
    none = RoutePlan.build(torch.empty(0, dtype=torch.int64), 3, tok_offs=torch.zeros(5, dtype=torch.int64))
    assert torch.equal(gather_sum(torch.empty(0, 6), none, backend=backend), torch.zeros(4, 6))
    empty = RoutePlan.build(torch.empty(0, dtype=torch.int64), 3, top_k=2)
    assert gather_sum(torch.empty(0, 6), empty, torch.empty(0), backend=backend).shape == (0, 6)
    plan = ragged_plan()
    y, weight = rows_of(plan)
    view, spaced = y.T.contiguous().T, torch.stack([weight, weight], 1)[:, 0]
    assert torch.equal(gather_sum(view, plan, spaced, backend=backend), gather_sum(y, plan, weight, backend=backend))


def test_wrong_input_is_named():
    plan = ragged_plan()
    y, weight = rows_of(plan)
    for call, message in [
        (lambda: gather_sum(y[1:], plan), r"y is torch.float64 of shape .* must be floating point"),
        (lambda: gather_sum(y.long(), plan), "y is torch.int64"),
        (lambda: gather_sum(y, plan, weight[1:]), "weight is torch.float64 of shape"),
        (lambda: gather_sum(y, plan, weight.half()), "weight is torch.float16 .* must be torch.float64 or float32"),
        (lambda: gather_sum(y.to("meta"), plan), "y is on meta but must be where plan is"),
        (lambda: gather_sum(y, plan, weight.to("meta")), "weight is on meta but must be where y is"),
        (lambda: gather_sum(y, plan, backend="grouped_mm"), "backend of gather_sum 'grouped_mm' is unknown"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
