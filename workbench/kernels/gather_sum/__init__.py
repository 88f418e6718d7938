"""Sum of the grouped rows of each token, weighted or not: the way back from expert order, without scattered writes.

Paths: "reference", "cpu" and "triton", each a module with

    gather_sum(y, plan, weight) -> out

y (P, H) contiguous in grouped order, weight (P,) token-major or None, out (T, H) in the type of y, summed in float32 or
wider in the order of the pairs, whether their number is fixed or not.
"""

from importlib import import_module

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels import dispatch
from workbench.kernels.plan import RoutePlan

BACKENDS = ("reference", "cpu", "triton")


def gather_sum(
    y: Float[Tensor, "pairs dim"],
    plan: RoutePlan,
    weight: Float[Tensor, " pairs"] | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, "tokens dim"]:
    """O_t = sum over the pairs j of token t of weight_j * y[inv_j]; differentiable in y and weight.

    Args:
        y: (P, H) rows in grouped order.
        plan: of these P pairs; a token without pairs gets zeros.
        weight: (P,) in token-major order, float32 or the type of y; None stands for ones.
        backend: one of `BACKENDS`; None chooses by device.

    Raises:
        InputError: names the argument that does not fit, or the backend that cannot do this.
    """
    _check(y, plan, weight)
    chosen = dispatch.choose("gather_sum", backend, y.device, BACKENDS)
    weight = None if weight is None else weight.contiguous()
    return _forward(
        y.contiguous(), weight, plan.order, plan.inv, plan.tok, plan.offs, plan.tok_offs, plan.n_tokens, plan.n_experts,
        plan.top_k, chosen,
    )  # fmt: skip


@torch.library.custom_op("workbench::gather_sum", mutates_args=())
def _forward(
    y: Tensor,
    weight: Tensor | None,
    order: Tensor,
    inv: Tensor,
    tok: Tensor,
    offs: Tensor,
    tok_offs: Tensor | None,
    n_tokens: int,
    n_experts: int,
    top_k: int | None,
    backend: str,
) -> Tensor:
    plan = RoutePlan(order, inv, tok, offs, tok_offs, n_tokens, n_experts, top_k)
    _check(y, plan, weight)
    dispatch.admit("gather_sum", backend, y.device, BACKENDS)
    plan.require()
    dispatch.begin("gather_sum", backend)
    weight = None if weight is None else weight.contiguous()
    return import_module(f"{__name__}.{backend}").gather_sum(y.contiguous(), plan, weight)


@_forward.register_fake
def _(y, weight, order, inv, tok, offs, tok_offs, n_tokens, n_experts, top_k, backend):
    return y.new_empty(n_tokens, y.shape[1])


def _setup(ctx, inputs, output) -> None:
    y, weight, order, inv, tok = inputs[:5]
    ctx.save_for_backward(None if weight is None else y, weight, order, inv, tok)


def _grads(ctx, grad):
    """dY[inv_j] = weight_j dO_t and dweight_j = <dO_t, Y[inv_j]>, both gathered."""
    y, weight, order, inv, tok = ctx.saved_tensors
    rows = grad[tok]
    dy = rows if weight is None else (rows * weight[order, None]).to(grad.dtype)
    dweight = None
    if weight is not None and ctx.needs_input_grad[1]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        dweight = (rows.to(wide) * y.to(wide)).sum(1)[inv].to(weight.dtype)
    return dy, dweight, *(None,) * 9


_forward.register_autograd(_grads, setup_context=_setup)


def _check(y: Tensor, plan: RoutePlan, weight: Tensor | None) -> None:
    plan.require_form()
    if y.ndim != 2 or y.shape[0] != plan.order.shape[0] or not y.is_floating_point():
        raise InputError(f"y is {y.dtype} of shape {tuple(y.shape)} but must be floating point ({plan.n_pairs}, dim)")
    if y.device != plan.order.device:
        raise InputError(f"y is on {y.device} but must be where plan is, on {plan.order.device}")
    if weight is not None and (weight.shape != y.shape[:1] or weight.dtype not in (torch.float32, y.dtype)):
        raise InputError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)} but must be {y.dtype} or float32, of shape "
            f"({plan.n_pairs},)"
        )
    if weight is not None and weight.device != y.device:
        raise InputError(f"weight is on {weight.device} but must be where y is, on {y.device}")
