"""The Mamba-1 block (Gu and Dao 2023, arXiv:2312.00752): a selective state space in the place of attention.

Parameters have the names that they have in `transformers` and in the authors' code, so a state dict of either loads.

Tensor letters: B batch, T time, D model width, I channels = expand D, N states of a channel, R rank of the step, k
length of the convolution.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.kernels.selective_scan import selective_scan
from workbench.lib.core.routing import Context

STEPS = (1e-3, 1e-1)
"""Range of softplus(bias of the step) at initialisation, where it is log-uniform."""

MakeProjection = Callable[[str, int, int, bool], nn.Module]
"""Gives a projection from its name ("in", "x", "dt", "out"), its widths in and out and whether it has a bias: a module
called as `projection(x (B, T, in), context) -> (B, T, out)`."""


class Projection(nn.Linear):
    """A linear layer that asks for no context."""

    def forward(self, x: Float[Tensor, "*batch d_in"], context: Context | None = None) -> Tensor:
        return super().forward(x)


@dataclass(frozen=True)
class MambaCache:
    """What a block has to know of the tokens before: of any number of them, as much. It is not written to.

    Attributes:
        conv: (B, I, k - 1) last inputs of the convolution, zeros before the first token.
        state: (B, I, N) last state, in float32 or wider.
    """

    conv: Float[Tensor, "batch channels before"]
    state: Float[Tensor, "batch channels states"]


class MambaBlock(nn.Module):
    """(B, T, D) -> (B, T, D), causal; stands for the attention of a layer, `DecoderLM(attention=...)`, or its FFN.

    [x, z] = W_in u; x = SiLU(conv(x)); [r, b, c] = W_x x;
    y = selective_scan(x, W_dt r + bias, -exp(A_log), b, c, D, z); out = W_out y. A token costs the same at any time.

    Args:
        d_state: N.
        d_conv: k.
        expand: I / D.
        dt_rank: R; None for D / 16, rounded up.
        projection: gives the four projections, see `MakeProjection`; None for `Projection`. Every `nn.Linear` in that
            of "dt" is initialised as the step needs it.

    Attributes:
        undecayed: names of the parameters that weight decay must leave alone.
    """

    undecayed = ("A_log", "D")

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        projection: MakeProjection | None = None,
    ):
        super().__init__()
        rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        sizes = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": rank}
        if wrong := [name for name, size in sizes.items() if size < 1]:
            raise InputError(f"{wrong[0]} is {sizes[wrong[0]]} but must be at least 1")
        make = projection or (lambda name, d_in, d_out, bias: Projection(d_in, d_out, bias))
        self.d_model, channels = d_model, expand * d_model
        self.sizes = rank, d_state, d_state  # of what x_proj gives
        self.in_proj = make("in", d_model, 2 * channels, False)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels)
        self.x_proj = make("x", channels, sum(self.sizes), False)
        self.dt_proj = make("dt", rank, channels, True)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1).float().log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        self.out_proj = make("out", channels, d_model, False)
        for part in self.dt_proj.modules():
            if isinstance(part, nn.Linear):
                initialise_step(part)

    def forward(
        self, u: Float[Tensor, "*batch time dim"], context: Context | None = None
    ) -> Float[Tensor, "*batch time dim"]:
        return self.prefill(u, context)[0]

    def prefill(
        self, u: Float[Tensor, "*batch time dim"], context: Context | None = None, cache: MambaCache | None = None
    ) -> tuple[Float[Tensor, "*batch time dim"], MambaCache]:
        """The outputs, and the cache for the tokens that follow; `cache` where other tokens have gone before.

        Raises:
            InputError: u is no (B, T, D) with T of at least 1, or the cache is of another batch, block or type.
        """
        if u.ndim != 3 or u.shape[1] == 0 or u.shape[2] != self.d_model:
            raise InputError(
                f"u has shape {tuple(u.shape)} but must be (batch, time, dim) with one token at least and dim "
                f"{self.d_model}"
            )
        x, z = self.in_proj(u, context).transpose(1, 2).chunk(2, 1)
        before = self._before(x, cache)
        line = torch.cat([before, x], 2)
        x = F.silu(self.conv1d(line))
        step, b, c = self.x_proj(x.transpose(1, 2), context).split(self.sizes, -1)
        delta = self.dt_proj(step, context).transpose(1, 2)
        a = -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()
        state = None if cache is None else cache.state
        y, state = selective_scan(x, delta, a, b.transpose(1, 2), c.transpose(1, 2), self.D, z, state)
        out = self.out_proj(y.transpose(1, 2), context)
        kept = line[:, :, line.shape[2] - before.shape[2] :].clone()  # a view would hold the line of all tokens
        return out, MambaCache(kept, state)

    def step(
        self, u: Float[Tensor, "batch dim"], cache: MambaCache, context: Context | None = None
    ) -> tuple[Float[Tensor, "batch dim"], MambaCache]:
        """One token of each sequence after those of the cache: its outputs, and the cache for the next. Raises as
        `prefill`; the context is that of these tokens alone.
        """
        out, cache = self.prefill(u.unsqueeze(1), context, cache)
        return out.squeeze(1), cache

    def _before(self, x: Tensor, cache: MambaCache | None) -> Tensor:
        """(B, I, k - 1) what the convolution sees before x."""
        batch, channels, _ = x.shape
        shapes = {"conv": (batch, channels, self.conv1d.kernel_size[0] - 1), "state": (batch, *self.A_log.shape)}
        if cache is None:
            return x.new_zeros(shapes["conv"])
        types = {"conv": x.dtype, "state": torch.promote_types(x.dtype, torch.float32)}
        for name, shape in shapes.items():
            kept = getattr(cache, name)
            if tuple(kept.shape) != shape or kept.dtype != types[name] or kept.device != x.device:
                raise InputError(
                    f"cache.{name} is {kept.dtype} of shape {tuple(kept.shape)} on {kept.device} but must be "
                    f"{types[name]} of shape {shape} on {x.device}, as these tokens want it"
                )
        return cache.conv


@torch.no_grad()
def initialise_step(linear: nn.Linear) -> None:
    """Weights U(-R^-1/2, R^-1/2), and a bias whose softplus is log-uniform in `STEPS`."""
    bound = linear.in_features**-0.5
    nn.init.uniform_(linear.weight, -bound, bound)
    low, high = (math.log(end) for end in STEPS)
    step = torch.empty_like(linear.bias).uniform_(low, high).exp()
    linear.bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus backwards
