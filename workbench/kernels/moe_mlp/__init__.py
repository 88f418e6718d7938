"""The expert layer as one operator: each token through its experts, weighted and summed. `reference` has the formulas.

Paths: "reference", "cpu", "native" (float32), "grouped_mm" and "triton". What a path provides, as functions of its
module:

    forward(x, w1, w2, plan, score, b1, b2, activation, save: bool) -> (out, z or None)
    backward(grad, x, z, w1, w2, plan, score, b1, b2, activation) -> (dx, dw1, dw2, dscore, db1, db2)

Every tensor but x is contiguous, and the elements of a row of x are neighbours. z is (P, 2I or I) in the type of x,
dscore is token-major in the type of score, and the gradient of a bias that is not there is None. Kept for the backward
are x, z, the weights and biases, score and the plan, nothing else.
"""

from importlib import import_module
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from workbench.errors import InputError, unknown
from workbench.kernels import dispatch
from workbench.kernels.plan import RoutePlan

BACKENDS = ("reference", "cpu", "native", "grouped_mm", "triton")
NATIVE = Path(__file__).with_name("native.c")
ACTIVATIONS = {"swiglu": 2, "relu": 1}  # rows of w1 for each hidden unit
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def moe_mlp(
    x: Float[Tensor, "tokens dim"],
    w1: Float[Tensor, "experts up dim"],
    w2: Float[Tensor, "experts dim hidden"],
    plan: RoutePlan,
    score: Float[Tensor, " pairs"],
    b1: Float[Tensor, "experts up"] | None = None,
    b2: Float[Tensor, "experts dim"] | None = None,
    *,
    activation: str = "swiglu",
    backend: str | None = None,
) -> Float[Tensor, "tokens dim"]:
    """sum over the pairs of each token of score * expert(x); differentiable once in x, w1, w2, score, b1 and b2.

    Args:
        x: (T, H) tokens; rows may lie apart, so long as the elements of a row are neighbours.
        w1: (E, 2I, H), gate rows first; (E, I, H) for "relu".
        w2: (E, H, I).
        plan: which token goes where, from `RoutePlan.build`.
        score: (P,) weight of each pair, token-major, float32 or the type of x.
        b1, b2: (E, 2I or I) and (E, H).
        activation: "swiglu", silu(gate) * up, or "relu", a perceptron of two layers.
        backend: one of `BACKENDS`; None chooses by device. `dispatch.last_backend("moe_mlp")` says which one ran.

    Under `torch.autocast`, x, weights and biases are cast to its type, and score is not.

    Raises:
        InputError: names the argument that does not fit, or the backend that cannot do this.
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):  # meta has no autocast
        half = torch.get_autocast_dtype(x.device.type)
        x, w1, w2, b1, b2 = (None if t is None else t.to(half) for t in (x, w1, w2, b1, b2))
    _check(x, w1, w2, plan, score, b1, b2, activation)
    chosen = dispatch.choose("moe_mlp", backend, x.device, BACKENDS, x.dtype, NATIVE)
    if chosen == "grouped_mm":
        _check_grouped_mm(x, w1, w2)
    x, w1, w2, score, b1, b2 = _laid(x, w1, w2, score, b1, b2)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, w2, score, b1, b2))
    out, _ = _forward(
        x, w1, w2, score, b1, b2, plan.order, plan.inv, plan.tok, plan.offs, plan.tok_offs, plan.top_k,
        activation, chosen, save,
    )  # fmt: skip
    return out


@torch.library.custom_op("workbench::moe_mlp", mutates_args=())
def _forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    score: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    order: Tensor,
    inv: Tensor,
    tok: Tensor,
    offs: Tensor,
    tok_offs: Tensor | None,
    top_k: int | None,
    activation: str,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and Z where it is to be kept, else an empty tensor."""
    plan = _plan(x, w1, order, inv, tok, offs, tok_offs, top_k)
    _check(x, w1, w2, plan, score, b1, b2, activation)
    path = _enter("moe_mlp", backend, x, w1, w2, plan)
    x, w1, w2, score, b1, b2 = _laid(x, w1, w2, score, b1, b2)
    out, z = path.forward(x, w1, w2, plan, score, b1, b2, activation, save)
    return out, x.new_empty(0, w1.shape[1]) if z is None else z


@_forward.register_fake
def _(x, w1, w2, score, b1, b2, order, inv, tok, offs, tok_offs, top_k, activation, backend, save):
    return x.new_empty(x.shape), x.new_empty(order.shape[0] if save else 0, w1.shape[1])


@torch.library.custom_op("workbench::moe_mlp_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    w1: Tensor,
    w2: Tensor,
    score: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    order: Tensor,
    inv: Tensor,
    tok: Tensor,
    offs: Tensor,
    tok_offs: Tensor | None,
    top_k: int | None,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, w2, score, b1, b2; an empty tensor for a bias that is not there."""
    plan = _plan(x, w1, order, inv, tok, offs, tok_offs, top_k)
    _check(x, w1, w2, plan, score, b1, b2, activation)
    for name, tensor, shape in (("grad", grad, tuple(x.shape)), ("z", z, (plan.n_pairs, w1.shape[1]))):
        if tuple(tensor.shape) != shape or tensor.dtype != x.dtype or tensor.device != x.device:
            raise InputError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device} but must be {x.dtype} of "
                f"shape {shape} on {x.device}"
            )
    path = _enter("moe_mlp.backward", backend, x, w1, w2, plan)
    x, w1, w2, score, b1, b2 = _laid(x, w1, w2, score, b1, b2)
    grad, z = grad.contiguous(), z.contiguous()
    *grads, db1, db2 = path.backward(grad, x, z, w1, w2, plan, score, b1, b2, activation)
    return *grads, x.new_empty(0) if db1 is None else db1, x.new_empty(0) if db2 is None else db2


@_backward.register_fake
def _(grad, x, z, w1, w2, score, b1, b2, order, inv, tok, offs, tok_offs, top_k, activation, backend):
    biases = (x.new_empty(0) if b is None else torch.empty_like(b) for b in (b1, b2))
    return x.new_empty(x.shape), torch.empty_like(w1), torch.empty_like(w2), torch.empty_like(score), *biases


def _setup(ctx, inputs, output) -> None:
    tensors, (ctx.top_k, ctx.activation, ctx.backend, _) = inputs[:11], inputs[11:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tensors[0], output[1], *tensors[1:])


def _grads(ctx, grad, _):
    if grad is None:
        return (None,) * 15
    tensors = ctx.saved_tensors
    grads = _backward(grad.contiguous(), *tensors, ctx.top_k, ctx.activation, ctx.backend)
    kept = [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)]
    return *kept, *(None,) * 9


_forward.register_autograd(_grads, setup_context=_setup)


@register_flop_formula(torch.ops.workbench.moe_mlp)
def _forward_flops(x, w1, w2, score, *_, **__) -> int:
    """Each pair through its expert's two matrices: 6 P I H for SwiGLU, 4 P I H for perceptrons."""
    return 2 * score[0] * (w1[1] * w1[2] + w2[1] * w2[2])


@register_flop_formula(torch.ops.workbench.moe_mlp_backward)
def _backward_flops(grad, x, z, w1, w2, score, *_, **__) -> int:
    """Two products for each of the forward."""
    return 4 * score[0] * (w1[1] * w1[2] + w2[1] * w2[2])


def _plan(x: Tensor, w1: Tensor, order: Tensor, *others) -> RoutePlan:
    """The plan of an operator's arguments."""
    *indices, top_k = others
    n_tokens, n_experts = (t.shape[0] if t.ndim else 0 for t in (x, w1))
    return RoutePlan(order, *indices, n_tokens, n_experts, top_k)


def _enter(op: str, backend: str, x: Tensor, w1: Tensor, w2: Tensor, plan: RoutePlan):
    """The module of the path that begins to run; it can take what is there, and follow the plan wherever it points."""
    dispatch.admit(op, backend, x.device, BACKENDS, x.dtype)
    if backend == "grouped_mm":
        _check_grouped_mm(x, w1, w2)
    path = _path(dispatch.begin(op, backend, NATIVE))
    plan.require(getattr(path, "fits", None))
    return path


def _laid(x: Tensor, w1: Tensor, w2: Tensor, score: Tensor, *biases: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in memory as the paths read them; nothing is copied that lies so."""
    x = x if x.stride(1) == 1 else x.contiguous()
    biases = (None if b is None else b.contiguous() for b in biases)
    return x, w1.contiguous(), w2.contiguous(), score.contiguous(), *biases


def _path(backend: str):
    """The module of a path, imported when it is used: importing an operator must not import triton."""
    return import_module(f"{__name__}.{backend}")


def _check(x, w1, w2, plan, score, b1, b2, activation) -> None:
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    plan.require_form()
    if x.ndim != 2:
        raise InputError(f"x has shape {tuple(x.shape)} but must be (tokens, dim)")
    if x.dtype not in DTYPES:
        raise InputError(f"x is {x.dtype} but must be one of {', '.join(map(str, DTYPES))}")
    if w2.ndim != 3:
        raise InputError(f"w2 has shape {tuple(w2.shape)} but must be (experts, dim, hidden)")
    n_experts, dim, hidden = w2.shape
    up, pairs = ACTIVATIONS[activation] * hidden, plan.order.shape[0]
    wanted = {
        "x": (x, (plan.n_tokens, dim)),
        "w1": (w1, (plan.n_experts, up, dim)),
        "w2": (w2, (plan.n_experts, dim, hidden)),
        "score": (score, (pairs,)),
        "b1": (b1, (n_experts, up)),
        "b2": (b2, (n_experts, dim)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)} but must be {shape}, for a plan of {plan.n_tokens} tokens, "
                f"{plan.n_experts} experts and {pairs} pairs, w2 of shape {tuple(w2.shape)} and {activation!r}"
            )
        allowed = (torch.float32, x.dtype) if name == "score" else (x.dtype,)
        if tensor.dtype not in allowed:
            raise InputError(
                f"{name} is {tensor.dtype} but must be {' or '.join(map(str, allowed))}, as x is {x.dtype}"
            )
        if tensor.device != x.device:
            raise InputError(f"{name} is on {tensor.device} but must be where x is, on {x.device}")
    if plan.order.device != x.device:
        raise InputError(f"plan is on {plan.order.device} but must be where x is, on {x.device}")


def _check_grouped_mm(x: Tensor, w1: Tensor, w2: Tensor) -> None:
    """torch's grouped product takes no float64, and rows of whole 16 bytes only."""
    if x.dtype == torch.float64:
        raise InputError("backend is 'grouped_mm' but x is torch.float64; it must be float32, bfloat16 or float16")
    multiple = 16 // x.element_size()
    for name, width in (("dim", x.shape[1]), ("up", w1.shape[1]), ("hidden", w2.shape[2])):
        if width % multiple:
            raise InputError(
                f"backend is 'grouped_mm' but {name} is {width}; for {x.dtype} it must be divisible by {multiple}"
            )
