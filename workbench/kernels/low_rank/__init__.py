"""A bank of low-rank updates as one operator: each token through its experts' B_e A_e, weighted and summed.

`reference` has the formulas. Paths: "reference", "dense" (all experts at once in two large products, on any device),
"cpu", "native" and "triton" (each pair alone, in expert order). What a path provides, as functions of its module:

    forward(x, a, b, score, expert, tok_offs, top_k, save: bool) -> (out, codes, index)
    backward(grad, x, codes, a, b, score, expert, index, tok_offs, top_k, needs) -> (dx, da, db, dscore)

codes and index are what the path wants to see again in its backward, of the shapes of `kept`: the dense path keeps
A_e x_n of all tokens and experts, the others the pairs in expert order. Nothing else is kept but the arguments. needs
says which of the four gradients are wanted; a path may give None for another.

Tensor letters: N tokens, I input width, O output width, E experts, r rank, P routed pairs.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from workbench.errors import InputError
from workbench.kernels import dispatch
from workbench.kernels.low_rank.order import unpack
from workbench.kernels.native import obstacle
from workbench.kernels.plan import RoutePlan, check_values

BACKENDS = ("reference", "dense", "cpu", "native", "triton")
NATIVE = Path(__file__).with_name("native.c")
GROUPED = "grouped"  # for backend: each pair alone, whichever path does that on this device
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The dense path costs one multiply-add a token, expert, rank and element of a row of x and y. In these, on CPUs:
GATHER = 40  # moving an element of the rows of a pair
CALLS = 2**21  # sorting the pairs, and calling a product for each expert, however little there is to do


def low_rank(
    x: Float[Tensor, "tokens d_in"],
    a: Float[Tensor, "experts rank d_in"],
    b: Float[Tensor, "experts d_out rank"],
    expert: Int[Tensor, " pairs"],
    score: Float[Tensor, " pairs"],
    *,
    top_k: int | None = None,
    tok_offs: Int[Tensor, " tokens_plus_1"] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "tokens d_out"]:
    """y_n = sum over the pairs of token n of score * B_e A_e x_n; differentiable once in x, a, b and score.

    Args:
        x: (N, I).
        a: (E, r, I).
        b: (E, O, r).
        expert: (P,) expert of each pair, token-major: the pairs of token 0 come first. On a CPU the values are
            checked; on other devices that would make the host wait for them, and it is the caller who sees to it.
        score: (P,) weight of each pair, float32 or the type of x.
        top_k: pairs of every token, where their number is fixed.
        tok_offs: (N + 1,) first pair of each token, where it is not. Exactly one of the two is given.
        backend: one of `BACKENDS`, or "grouped" for the one that takes each pair alone on this device and for this
            type. None chooses "native" where it can run, which is the faster one whatever the sizes, and otherwise by
            device and cost, see `cheaper_dense`. `dispatch.last_backend("low_rank")` says which one ran.

    Under `torch.autocast`, x, a and b are cast to its type, and score is not.

    Raises:
        InputError: names the argument that does not fit, or the backend that cannot do this.
    """
    if torch.is_autocast_enabled(x.device.type):
        half = torch.get_autocast_dtype(x.device.type)
        x, a, b = x.to(half), a.to(half), b.to(half)
    _check(x, a, b, expert, score, top_k, tok_offs)
    chosen = _choose(x, a, b, expert, backend)
    save = torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad or score.requires_grad)
    x, a, b, score, expert = x.contiguous(), a.contiguous(), b.contiguous(), score.contiguous(), expert.contiguous()
    if _plain(x, a, b, score):
        if not save and not dispatch.transformed():
            return _run(x, a, b, score, expert, tok_offs, top_k, chosen, save)[0]
        return _Direct.apply(x, a, b, score, expert, tok_offs, top_k, chosen)
    return _forward(x, a, b, score, expert, tok_offs, top_k, chosen, save)[0]


def cheaper_dense(n_tokens: int, n_pairs: int, a: Tensor, b: Tensor) -> bool:
    """Whether all experts for every token cost less than the routed pairs alone, whose rows must be gathered.

    The products of a pair are narrow, and run at half the rate of the dense ones.
    """
    n_experts, rank, width = a.shape
    width += b.shape[1]
    return n_experts * rank * n_tokens * width <= (2 * rank + GATHER) * n_pairs * width + CALLS


@torch.library.custom_op("workbench::low_rank", mutates_args=())
def _forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    score: Tensor,
    expert: Tensor,
    tok_offs: Tensor | None,
    top_k: int | None,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and what `kept` says."""
    _check(x, a, b, expert, score, top_k, tok_offs)
    dispatch.admit("low_rank", backend, x.device, BACKENDS, x.dtype)
    x, a, b, score, expert = (t.contiguous() for t in (x, a, b, score, expert))
    return _run(x, a, b, score, expert, tok_offs, top_k, backend, save)


def _run(x, a, b, score, expert, tok_offs, top_k, backend, save) -> tuple[Tensor, Tensor, Tensor]:
    backend = dispatch.begin("low_rank", backend, NATIVE)
    return _path(backend).forward(x, a, b, score, expert, tok_offs, top_k, save)


@_forward.register_fake
def _(x, a, b, score, expert, tok_offs, top_k, backend, save):
    codes, index = kept(x.shape[0], expert.shape[0], a.shape[0], a.shape[1], backend, save)
    return x.new_empty(x.shape[0], b.shape[1]), x.new_empty(codes), expert.new_empty(index, dtype=torch.int32)


def kept(n_tokens: int, n_pairs: int, n_experts: int, rank: int, backend: str, save: bool) -> tuple[tuple, tuple]:
    """Shapes of codes, in the type of x, and of index, int32 (see `order.pack`), that a path hands to its backward."""
    if not save:
        return (0,), (0,)
    return ((n_tokens, n_experts * rank), (0,)) if backend == "dense" else ((0,), (3 * n_pairs + n_experts + 1,))


@torch.library.custom_op("workbench::low_rank_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    a: Tensor,
    b: Tensor,
    score: Tensor,
    expert: Tensor,
    index: Tensor,
    tok_offs: Tensor | None,
    top_k: int | None,
    backend: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, a, b and score; an empty tensor for one that is not wanted."""
    _check(x, a, b, expert, score, top_k, tok_offs)
    dispatch.admit("low_rank", backend, x.device, BACKENDS, x.dtype)
    _check_kept(grad, x, codes, a, b, expert, index, tok_offs, top_k, backend, needs)
    tensors = grad, x, codes, a, b, score, expert, index
    grad, x, codes, a, b, score, expert, index = (tensor.contiguous() for tensor in tensors)
    backend = dispatch.begin("low_rank.backward", backend, NATIVE)
    grads = _path(backend).backward(grad, x, codes, a, b, score, expert, index, tok_offs, top_k, needs)
    return tuple(g if needed else x.new_empty(0) for g, needed in zip(grads, needs, strict=True))


@_backward.register_fake
def _(grad, x, codes, a, b, score, expert, index, tok_offs, top_k, backend, needs):
    likes = zip((x, a, b, score), needs, strict=True)
    return tuple(torch.empty_like(t) if needed else x.new_empty(0) for t, needed in likes)


def _setup(ctx, inputs, output) -> None:
    x, a, b, score, expert, tok_offs, ctx.top_k, ctx.backend, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], a, b, score, expert, output[2], tok_offs)


def _grads(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    needs = list(ctx.needs_input_grad[:4])
    grads = _backward(grad.contiguous(), *ctx.saved_tensors, ctx.top_k, ctx.backend, needs)
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *(None,) * 5


_forward.register_autograd(_grads, setup_context=_setup)


class _Direct(torch.autograd.Function):
    """The operator without torch's dispatcher, which takes longer than a path does for a few rows on a CPU."""

    @staticmethod
    def forward(ctx, x, a, b, score, expert, tok_offs, top_k, backend):
        out, codes, index = _run(x, a, b, score, expert, tok_offs, top_k, backend, True)
        ctx.top_k, ctx.backend = top_k, backend
        ctx.save_for_backward(x, codes, a, b, score, expert, index, tok_offs)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        backend = dispatch.begin("low_rank.backward", ctx.backend, NATIVE)
        needs = ctx.needs_input_grad[:4]
        grads = _path(backend).backward(grad.contiguous(), *ctx.saved_tensors, ctx.top_k, needs)
        return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *(None,) * 4


def _plain(*tensors: Tensor) -> bool:
    """Whether nobody looks on at what torch's dispatcher does: no compiler, no counter, no other kind of tensor."""
    return (
        tensors[0].device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


@register_flop_formula(torch.ops.workbench.low_rank)
def _forward_flops(x, a, b, score, expert, tok_offs, top_k, backend, *_, **__) -> int:
    """Two narrow products a pair; a token and expert on the dense path."""
    rows = x[0] * a[0] if backend == "dense" else expert[0]
    return 2 * rows * a[1] * (a[2] + b[1])


@register_flop_formula(torch.ops.workbench.low_rank_backward)
def _backward_flops(grad, x, codes, a, b, score, expert, index, tok_offs, top_k, backend, *_, **__) -> int:
    """Two products for each of the forward, all gradients counted, and off the dense path A_e x_n once more."""
    rows = x[0] * a[0] if backend == "dense" else expert[0]
    return 4 * rows * a[1] * (a[2] + b[1]) + (0 if backend == "dense" else 2 * rows * a[1] * a[2])


@cache
def _path(backend: str):
    """The module of a path, imported when it is used: importing an operator must not import triton."""
    return import_module(f"{__name__}.{backend}")


def _native(x: Tensor) -> bool:
    """Whether the native path takes x, as far as can be told: a function that is being compiled asks no C compiler."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return torch.compiler.is_compiling() or obstacle(NATIVE) is None


def _choose(x: Tensor, a: Tensor, b: Tensor, expert: Tensor, backend: str | None) -> str:
    if backend is None and not _native(x) and cheaper_dense(x.shape[0], expert.shape[0], a, b):
        return "dense"
    backend = None if backend == GROUPED else backend
    chosen = dispatch.choose("low_rank", backend, x.device, BACKENDS, x.dtype, NATIVE)
    if chosen != "triton":
        return chosen
    from workbench.kernels.low_rank.triton import refusal

    reason = refusal(x, a)
    if reason is not None and backend == "triton":
        raise InputError(f"backend is 'triton' but {reason}")
    return chosen if reason is None else "reference"


def _check(x, a, b, expert, score, top_k, tok_offs) -> None:
    if x.ndim != 2 or x.dtype not in DTYPES:
        raise InputError(
            f"x is {x.dtype} of shape {tuple(x.shape)} but must be (tokens, d_in) in one of "
            f"{', '.join(map(str, DTYPES))}"
        )
    if a.ndim != 3 or b.ndim != 3 or a.shape[::2] != (b.shape[0], x.shape[1]) or a.shape[1] != b.shape[2]:
        raise InputError(
            f"a and b have shapes {tuple(a.shape)} and {tuple(b.shape)} but must be (experts, rank, {x.shape[1]}) and "
            "(experts, d_out, rank)"
        )
    if expert.ndim != 1 or expert.dtype not in (torch.int32, torch.int64):
        raise InputError(f"expert is {expert.dtype} of shape {tuple(expert.shape)} but must be integers (pairs,)")
    if score.shape != expert.shape or score.dtype not in (torch.float32, x.dtype):
        raise InputError(
            f"score is {score.dtype} of shape {tuple(score.shape)} but must be {x.dtype} or float32, of shape "
            f"({expert.shape[0]},)"
        )
    if a.dtype != x.dtype or b.dtype != x.dtype:
        raise InputError(f"a and b are {a.dtype} and {b.dtype} but must be {x.dtype}, as x is")
    for name, tensor in (("a", a), ("b", b), ("expert", expert), ("score", score), ("tok_offs", tok_offs)):
        if tensor is not None and tensor.device != x.device:
            raise InputError(f"{name} is on {tensor.device} but must be where x is, on {x.device}")
    if (top_k is None) == (tok_offs is None):
        raise InputError(f"top_k is {top_k} and tok_offs {'not ' * (tok_offs is None)}given; give exactly one of them")
    if top_k is not None and (top_k < 1 or top_k * x.shape[0] != expert.shape[0]):
        raise InputError(f"top_k is {top_k} but {x.shape[0]} tokens have {expert.shape[0]} pairs")
    if tok_offs is not None and (
        tok_offs.shape != (x.shape[0] + 1,) or tok_offs.dtype not in (torch.int32, torch.int64)
    ):
        raise InputError(
            f"tok_offs is {tok_offs.dtype} of shape {tuple(tok_offs.shape)} but must be integers ({x.shape[0] + 1},)"
        )
    if expert.shape[0] >= 2**31:
        raise InputError(f"expert holds {expert.shape[0]} pairs but must hold fewer than 2**31, as they are int32")


def _check_kept(grad, x, codes, a, b, expert, index, tok_offs, top_k, backend, needs) -> None:
    """What a forward has made, where it may come from anywhere."""
    n_tokens, n_pairs, n_experts, width = x.shape[0], expert.shape[0], a.shape[0], b.shape[1]
    of_codes, of_index = kept(n_tokens, n_pairs, n_experts, a.shape[1], backend, True)
    wanted = {
        "grad": (grad, (n_tokens, width), x.dtype),
        "codes": (codes, of_codes, x.dtype),
        "index": (index, of_index, torch.int32),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != x.device:
            raise InputError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device} but must be {dtype} of "
                f"shape {shape} on {x.device}"
            )
    if len(needs) != 4:
        raise InputError(f"needs holds {len(needs)} values but must hold four, for x, a, b and score")
    check_values(expert, n_experts, tok_offs)
    if backend != "dense":
        plan = unpack(index.contiguous(), n_tokens, n_pairs, n_experts, tok_offs, top_k)
        plan.require()
        if x.device.type == "cpu" and (expert[plan.order] != _owners(plan)).any():
            raise InputError("index must be that of the pairs of expert")


def _owners(plan: RoutePlan) -> Tensor:
    """(P,) expert of each grouped row."""
    return torch.arange(plan.n_experts).repeat_interleave(plan.offs.diff(), output_size=plan.n_pairs)
