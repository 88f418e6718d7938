"""A small denoiser of the scenes of `glyph_scenes`, and its base, which lacks the details of the parts.

Tensor letters: B batch, C channels.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds import glyph_scenes
from workbench.beds.glyph_scenes import CLASSES, GlyphScenes
from workbench.beds.pretrained import pretrained
from workbench.lib.core.attention import Attention
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import Block
from workbench.lib.core.routing import Context
from workbench.lib.core.train import TrainConfig, train

TARGETS = ("*.attention.*", "*.ffn.*")
"""The linear layers of the denoiser's transformer blocks."""


class Residual(nn.Module):
    """Two convolutions with the embedding of level and condition added in between."""

    def __init__(self, channels: int, d_embedding: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels) for _ in range(2))
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.shift = nn.Linear(d_embedding, channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.first(F.silu(self.norms[0](x))) + self.shift(embedding)[:, :, None, None]
        return x + self.second(F.silu(self.norms[1](h)))


class Denoiser(nn.Module):
    """A U-Net with self-attention at 12 x 12 and 6 x 6 that predicts the noise of an image.

    Args:
        channels: at 24 x 24, 12 x 12 and 6 x 6; each divisible by 4, the last two by `n_heads`.
    """

    def __init__(self, channels: tuple[int, int, int] = (16, 32, 48), d_embedding: int = 64, n_heads: int = 4):
        super().__init__()
        high, middle, low = channels
        self.d_embedding = d_embedding
        self.time = nn.Sequential(nn.Linear(32, d_embedding), nn.SiLU(), nn.Linear(d_embedding, d_embedding))
        self.condition = nn.Embedding(2 * (CLASSES + 1), d_embedding)
        self.stem = nn.Conv2d(1, high, 3, padding=1)
        self.residuals = nn.ModuleList(Residual(c, d_embedding) for c in (high, middle, low, middle, high))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in ((high, middle), (middle, low)))
        self.up = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((low, middle), (middle, high)))
        self.blocks = nn.ModuleList(
            Block(c, GLU(c, 2 * c), Attention(c, n_heads, causal=False)) for c in (middle, low, middle)
        )
        self.places = nn.ParameterList(torch.randn(n, c) * 0.1 for n, c in ((144, middle), (36, low)))
        self.norm = nn.GroupNorm(4, high)
        self.out = nn.Conv2d(high, 1, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor, context: Context | None = None) -> Tensor:
        context = context if context is not None else Context()
        e = F.silu(self.time(_waves(time)) + self.condition(condition + torch.tensor([0, CLASSES + 1])).sum(1))
        high = self.residuals[0](self.stem(x), e)
        middle = self._block(0, self.residuals[1](self.down[0](high), e), context)
        low = self._block(1, self.residuals[2](self.down[1](middle), e), context)
        middle = self._block(2, self.residuals[3](middle + self.up[0](_twice(low)), e), context)
        high = self.residuals[4](high + self.up[1](_twice(middle)), e)
        return self.out(F.silu(self.norm(high)))

    def _block(self, i: int, x: Tensor, context: Context) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2) + self.places[i % 2]
        return self.blocks[i](tokens, context).transpose(1, 2).unflatten(2, x.shape[2:])


def _waves(time: Tensor) -> Tensor:
    """(B, 32) sines and cosines of the level."""
    angles = time[:, None] * torch.exp(torch.linspace(0, -math.log(1000), 16, device=time.device))
    return torch.cat([angles.sin(), angles.cos()], 1)


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def base(settings: Mapping[str, Any]) -> nn.Module:
    """The denoiser pre-trained on blurred scenes of few handwritings; from the cache where it is."""
    channels, steps = tuple(settings["channels"]), settings["base_steps"]

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Denoiser(channels)

    def teach(model: nn.Module) -> None:
        train(model, GlyphScenes("pretraining"), TrainConfig(steps, 32, weight_decay=0.0, eval_every=None))

    recipe = {"steps": steps, "channels": list(channels), "data": GlyphScenes("pretraining").manifest}
    return pretrained("glyph-denoiser", recipe, build, teach, [glyph_scenes, sys.modules[__name__]])
