"""Multi-head self-attention, dense, and the rotary position code.

Tensor letters: B batch, H heads, T time, D model width, d head width.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.routing import Context


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D); a single sequence (T, D) is a batch of one.

    Args:
        n_heads: H; divides `d_model`.
        causal: whether a token sees only itself and what comes before it, and where it stands in a prefix that the
            context names (`Context.prefix`), all of that.
        rope: rotate queries and keys by their position, see `rope`.
    """

    def __init__(self, d_model: int, n_heads: int, causal: bool, rope: bool = False):
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise InputError(f"d_model is {d_model} but must be divisible by n_heads = {n_heads}, which is at least 1")
        if rope and d_model // n_heads % 2:
            raise InputError(f"d_model / n_heads is {d_model // n_heads} but must be even with rope")
        self.n_heads, self.causal, self.rope = n_heads, causal, rope
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def heads(
        self, x: Float[Tensor, "*batch time dim"], positions: Int64[Tensor, "*batch time"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every head, each (..., H, T, d), rotated where this attention has `rope`.

        positions: of the rows in their text, where they are not all of it; None for 0, 1, 2, ...
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).movedim(-3, 0).transpose(-3, -2)
        return (self._turned(q, positions), self._turned(k, positions), v)

    def queries(
        self, x: Float[Tensor, "*batch time dim"], positions: Int64[Tensor, "*batch time"] | None = None
    ) -> Float[Tensor, "*batch heads time head"]:
        """The queries of `heads` alone, at a third of the cost: for keys and values that are there already."""
        q = F.linear(x, self.qkv.weight[: x.shape[-1]]).unflatten(-1, (self.n_heads, -1)).transpose(-3, -2)
        return self._turned(q, positions)

    def _turned(self, x: Tensor, positions: Tensor | None) -> Tensor:
        if not self.rope:
            return x
        return rope(x, positions=None if positions is None else positions.unsqueeze(-2))

    def forward(
        self, x: Float[Tensor, "*batch time dim"], context: Context | None = None
    ) -> Float[Tensor, "*batch time dim"]:
        if self.causal and context is not None and context.prefix is not None:
            mask = prefix_mask(context.prefix, x.shape[-2])
            y = F.scaled_dot_product_attention(*self.heads(x), attn_mask=mask)
        else:
            y = F.scaled_dot_product_attention(*self.heads(x), is_causal=self.causal)
        return self.out(y.transpose(-3, -2).flatten(-2))


def prefix_mask(prefix: Int64[Tensor, " batch"], time: int) -> Bool[Tensor, "batch 1 time time"]:
    """Who sees whom in a prefix language model: True where a row's token (third axis) sees another (fourth).

    The first `prefix` tokens of a row see each other; what comes after them sees itself and all before it. A prefix of
    0 or 1 is causal attention.

    Raises:
        InputError: a prefix is below 0 or above `time`.
    """
    if prefix.ndim != 1 or bool(((prefix < 0) | (prefix > time)).any()):
        raise InputError(
            f"prefix has shape {tuple(prefix.shape)} and values {prefix.flatten().tolist()[:8]} but must be one number "
            f"a row, between 0 and its {time} tokens"
        )
    place = torch.arange(time, device=prefix.device)
    return ((place <= place[:, None]) | (place < prefix[:, None, None]))[:, None]


def rope(
    x: Float[Tensor, "*batch time head"],
    offset: int = 0,
    base: float = 10000.0,
    positions: Int64[Tensor, "*some time"] | None = None,
) -> Tensor:
    """Rotary position code (Su et al. 2021, 2104.09864): pair i of position t turns by t base^(-2i/d).

    The pairs are the two halves of a head, as in Llama. Position 0 is the first row, or `offset` where the rows
    continue a sequence, as in decoding. Rows that were picked out of one have `positions` of their own, which broadcast
    against the leading dimensions.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    if positions is None:
        positions = torch.arange(offset, offset + x.shape[-2], device=x.device)
    angle = positions.double()[..., None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
