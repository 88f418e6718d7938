"""The router's last step: the K largest logits of each token and their weights.

Paths: "reference", "cpu" and "triton", each a module with

    topk_softmax(logits, k, renormalize) -> (score, index)

logits (T, E), score (T, K) float32 (float64 for float64 logits), index (T, K) of any integer type; by falling logit,
and of equal logits the first.
"""

from importlib import import_module

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels import dispatch

BACKENDS = ("reference", "cpu", "triton")


def topk_softmax(
    logits: Float[Tensor, "tokens experts"], k: int, *, renormalize: bool = True, backend: str | None = None
) -> tuple[Float[Tensor, "tokens k"], Int64[Tensor, "tokens k"]]:
    """Scores and indices of the K largest logits of each row; scores are differentiable in the logits.

    Args:
        logits: (T, E).
        k: 1..E.
        renormalize: softmax over the K chosen logits, so that scores sum to 1; False: over all E.
        backend: one of `BACKENDS`; None chooses by device.

    Returns:
        score (T, K), float32 or wider whatever the type of the logits, and index (T, K). The largest logit comes
        first; of equal ones that of the lowest index.

    Raises:
        InputError: names the argument that does not fit, or the backend that cannot do this.
    """
    _check(logits, k)
    chosen = dispatch.choose("topk_softmax", backend, logits.device, BACKENDS)
    return _forward(logits, k, renormalize, chosen)


@torch.library.custom_op("workbench::topk_softmax", mutates_args=())
def _forward(logits: Tensor, k: int, renormalize: bool, backend: str) -> tuple[Tensor, Tensor]:
    _check(logits, k)
    dispatch.admit("topk_softmax", backend, logits.device, BACKENDS)
    dispatch.begin("topk_softmax", backend)
    score, index = import_module(f"{__name__}.{backend}").topk_softmax(logits, k, renormalize)
    return score, index.to(torch.int64)


@_forward.register_fake
def _(logits, k, renormalize, backend):
    score = logits.new_empty(logits.shape[0], k, dtype=torch.promote_types(logits.dtype, torch.float32))
    return score, torch.empty_like(score, dtype=torch.int64)


def _setup(ctx, inputs, output) -> None:
    logits, _, ctx.renormalize, _ = inputs
    score, index = output
    ctx.mark_non_differentiable(index)
    ctx.dtype, ctx.n_experts = logits.dtype, logits.shape[1]
    ctx.save_for_backward(score, index, None if ctx.renormalize else logits)


def _grads(ctx, grad, _):
    """Over the K: s * (g - <g, s>), scattered into zeros. Over all E: the same with the full distribution p."""
    score, index, logits = ctx.saved_tensors
    inner = (grad * score).sum(1, keepdim=True)
    if ctx.renormalize:
        zeros = score.new_zeros(score.shape[0], ctx.n_experts)
        return zeros.scatter(1, index, score * (grad - inner)).to(ctx.dtype), None, None, None
    probs = logits.to(score.dtype).softmax(1)
    return (probs * (torch.zeros_like(probs).scatter(1, index, grad) - inner)).to(ctx.dtype), None, None, None


_forward.register_autograd(_grads, setup_context=_setup)


def _check(logits: Tensor, k: int) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise InputError(
            f"logits is {logits.dtype} of shape {tuple(logits.shape)} but must be floating point (tokens, experts)"
        )
    if not 1 <= k <= logits.shape[1]:
        raise InputError(f"k is {k} but must be between 1 and the number of experts, {logits.shape[1]}")
