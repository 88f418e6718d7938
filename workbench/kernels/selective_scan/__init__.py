"""The selective scan of a state-space layer (Mamba, Gu and Dao 2023, arXiv:2312.00752) as one fused operator.

With D_t = softplus(delta_t), for every channel i with its N states

    h_t = exp(D_t a) h_{t-1} + D_t x_t b_t,        y_t = (c_t . h_t + d x_t) silu(z_t)

Paths: "reference", "native" (float32; without a C compiler the reference runs) and "triton" (all but float64). What a
path provides, as functions of its module:

    forward(x, delta, a, b, c, d, z, state, save: bool) -> (y, last, kept)
    backward(grad, grad_last, x, delta, a, b, c, d, z, kept) -> the gradients of x, delta, a, b, c, d, z and state

kept (B, ceil(L / CHUNK), N, I) holds the states before every `CHUNK` steps, () where nothing is saved; the states in
between are made anew in the backward, so that nothing of B I N L numbers is kept. States are float32 or wider.

Tensor letters: B batch, I channels, N states of a channel, L steps.
"""

from importlib import import_module
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels import dispatch
from workbench.kernels.selective_scan.reference import CHUNK

BACKENDS = ("reference", "native", "triton")
NATIVE = Path(__file__).with_name("native.c")
REFUSED = "backend is 'triton' but x is torch.float64, and it computes in float32"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def selective_scan(
    x: Float[Tensor, "batch channels steps"],
    delta: Float[Tensor, "batch channels steps"],
    a: Float[Tensor, "channels states"],
    b: Float[Tensor, "batch states steps"],
    c: Float[Tensor, "batch states steps"],
    d: Float[Tensor, " channels"],
    z: Float[Tensor, "batch channels steps"],
    state: Float[Tensor, "batch channels states"] | None = None,
    *,
    backend: str | None = None,
) -> tuple[Float[Tensor, "batch channels steps"], Float[Tensor, "batch channels states"]]:
    """The gated outputs y and the last state; differentiable once in all arguments, in backward mode.

    A sequence may be given in parts, each with the last state of the one before it: the outputs are the same.

    Args:
        x, delta, z: (B, I, L) input, step before the softplus with its bias added, and gate before the SiLU. Any
            strides: a transposed (B, L, I) is not copied.
        a: (I, N) rates, negative where states decay.
        b, c: (B, N, L) what goes into and comes out of the states, in the type of x as delta and z are.
        d: (I,) weight of the input itself.
        state: (B, I, N) before the first step; None for zeros.
        backend: one of `BACKENDS`; None chooses by device and type.

    a, d and state are taken in float32, or float64 where x is; so is the last state.

    Raises:
        InputError: names the argument that does not fit, or the backend that cannot do this.
    """
    _check(x, delta, a, b, c, d, z, state)
    dispatch.no_tangents("selective_scan", x=x, delta=delta, a=a, b=b, c=c, d=d, z=z, state=state)
    chosen = _choose(x, backend)
    wide = torch.promote_types(x.dtype, torch.float32)
    a, d = a.to(wide), d.to(wide)
    state = x.new_zeros(x.shape[0], *a.shape, dtype=wide) if state is None else state.to(wide)
    tensors = (x, delta, a, b, c, d, z, state)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return (_run if dispatch.unseen(x) else _forward)(*tensors, chosen, save)[:2]


@torch.library.custom_op("workbench::selective_scan", mutates_args=())
def _forward(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    z: Tensor,
    state: Tensor,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, in the layout of x, the last state, and what the backward wants to see again."""
    _check(x, delta, a, b, c, d, z, state)
    _check_wide(x, a=a, d=d, state=state)
    _admit(x, backend)
    return _run(x, delta, a, b, c, d, z, state, backend, save)


def _run(x, delta, a, b, c, d, z, state, backend, save) -> tuple[Tensor, Tensor, Tensor]:
    path = _path(dispatch.begin("selective_scan", backend, NATIVE))
    return path.forward(x, delta, a, b, c, d, z, state, save)


@_forward.register_fake
def _(x, delta, a, b, c, d, z, state, backend, save):
    return torch.empty_like(x), state.new_empty(state.shape), a.new_empty(kept_shape(x, a) if save else (0,))


def kept_shape(x: Tensor, a: Tensor) -> tuple[int, int, int, int]:
    return x.shape[0], -(-x.shape[2] // CHUNK), a.shape[1], a.shape[0]


@torch.library.custom_op("workbench::selective_scan_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_last: Tensor,
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    z: Tensor,
    kept: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, a, b, c, d, z and state."""
    _check(x, delta, a, b, c, d, z, grad_last, "grad_last")
    _check_wide(x, a=a, d=d, grad_last=grad_last)
    _admit(x, backend)
    for name, tensor, shape, dtype in (("grad", grad, x.shape, x.dtype), ("kept", kept, kept_shape(x, a), a.dtype)):
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device:
            raise InputError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device} but must be {dtype} of "
                f"shape {tuple(shape)} on {x.device}"
            )
    path = _path(dispatch.begin("selective_scan.backward", backend, NATIVE))
    return path.backward(grad, grad_last, x, delta, a, b, c, d, z, kept)


@_backward.register_fake
def _(grad, grad_last, x, delta, a, b, c, d, z, kept, backend):
    return tuple(torch.empty_like(t) for t in (x, delta, a, b, c, d, z, grad_last))


def _setup(ctx, inputs, output) -> None:
    *tensors, _, ctx.backend, _ = inputs
    _, last, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)
    ctx.like = last.shape, last.dtype
    ctx.save_for_backward(*tensors, kept)


def _grads(ctx, grad, grad_last, _):
    if grad is None and grad_last is None:
        return (None,) * 10
    x, *rest = ctx.saved_tensors
    shape, dtype = ctx.like
    grad = torch.zeros_like(x) if grad is None else grad
    grad_last = x.new_zeros(shape, dtype=dtype) if grad_last is None else grad_last
    return *_backward(grad, grad_last, x, *rest, ctx.backend), None, None


_forward.register_autograd(_grads, setup_context=_setup)


def _choose(x: Tensor, backend: str | None) -> str:
    chosen = dispatch.choose("selective_scan", backend, x.device, BACKENDS, x.dtype, NATIVE)
    if chosen != "triton" or x.dtype != torch.float64:
        return chosen
    if backend is None:
        return "reference"
    raise InputError(REFUSED)


def _admit(x: Tensor, backend: str) -> None:
    dispatch.admit("selective_scan", backend, x.device, BACKENDS, x.dtype)
    if backend == "triton" and x.dtype == torch.float64:
        raise InputError(REFUSED)


def _path(backend: str):
    """The module of a path, imported when it is used: importing an operator must not import triton."""
    return import_module(f"{__name__}.{'reference' if backend == 'cpu' else backend}")


def _check(x, delta, a, b, c, d, z, state, called: str = "state") -> None:
    if x.ndim != 3 or x.dtype not in DTYPES:
        raise InputError(
            f"x is {x.dtype} of shape {tuple(x.shape)} but must be (batch, channels, steps) in one of "
            f"{', '.join(map(str, DTYPES))}"
        )
    batch, channels, steps = x.shape
    if a.ndim != 2 or a.shape[0] != channels or a.shape[1] < 1:
        raise InputError(f"a has shape {tuple(a.shape)} but must be ({channels}, states), with one state at least")
    states = a.shape[1]
    for name, tensor, shape in (
        ("delta", delta, (batch, channels, steps)),
        ("b", b, (batch, states, steps)),
        ("c", c, (batch, states, steps)),
        ("d", d, (channels,)),
        ("z", z, (batch, channels, steps)),
        (called, state, (batch, channels, states)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)} but must be {shape}")
    for name, tensor in (("delta", delta), ("b", b), ("c", c), ("z", z)):
        if tensor.dtype != x.dtype:
            raise InputError(f"{name} is {tensor.dtype} but must be {x.dtype}, as x is")
    for name, tensor in (("a", a), ("d", d), (called, state)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise InputError(f"{name} is {tensor.dtype} but must be one of {', '.join(map(str, DTYPES))}")
    for name, tensor in (("delta", delta), ("a", a), ("b", b), ("c", c), ("d", d), ("z", z), (called, state)):
        if tensor is not None and tensor.device != x.device:
            raise InputError(f"{name} is on {tensor.device} but must be where x is, on {x.device}")


def _check_wide(x: Tensor, **tensors: Tensor) -> None:
    """What the public function has cast, where it may come from anywhere."""
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, tensor in tensors.items():
        if tensor.dtype != wide:
            raise InputError(f"{name} is {tensor.dtype} but must be {wide} where x is {x.dtype}")
