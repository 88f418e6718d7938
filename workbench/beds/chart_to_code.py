"""A small model that writes the script of a chart, see `charts`.

A picture becomes 16 tokens (a small convolutional encoder), the projector brings them to the width of a decoder, and
that writes the script in the language its first token names. The base has learned two things apart: to write a chart's
metadata, and, as any model of code has, what scripts look like, beside a blank picture.

Tensor letters: B batch, T time, D width, V vocabulary.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds import charts
from workbench.beds.charts import END, PAD, UNKNOWN, Apart, vocabulary
from workbench.beds.pretrained import pretrained
from workbench.lib.core.attention import Attention
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import Block
from workbench.lib.core.routing import Context
from workbench.lib.core.train import State, TrainConfig, train

WIDTH, PREFIX, LONGEST = 64, 16, 144


class ChartToCode(nn.Module):
    """Encoder, projector, decoder.

    Attributes:
        tell: a context for the projector's forward, given the language of each row (B,).
    """

    tell: Callable[[Tensor], AbstractContextManager] | None = None

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 24, 4, 4), nn.GELU(), nn.Conv2d(24, 48, 3, 2, 1), nn.GELU(), nn.Conv2d(48, WIDTH, 3, 2, 1)
        )
        self.projector = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.decoder = nn.ModuleDict(
            {
                "embedding": nn.Embedding(len(vocabulary()) + UNKNOWN + 1, WIDTH),
                "position": nn.Embedding(PREFIX + LONGEST, WIDTH),
                "blocks": nn.ModuleList(
                    Block(WIDTH, GLU(WIDTH, 2 * WIDTH), Attention(WIDTH, 4, causal=True)) for _ in range(2)
                ),
                "norm": nn.RMSNorm(WIDTH),
            }
        )
        for name in ("embedding", "position"):
            nn.init.normal_(self.decoder[name].weight, std=WIDTH**-0.5)

    def image_tokens(self, images: Tensor, language: Tensor) -> Tensor:
        """(B, 16, D) of pictures (B, 3, 64, 64) in 0..255."""
        h = self.encoder(images.float() / 127.5 - 1).flatten(2).transpose(1, 2)
        with self.tell(language) if self.tell else nullcontext():
            return self.projector(h)

    def forward(self, images: Tensor, tokens: Tensor, language: Tensor, context: Context | None = None) -> Tensor:
        """(B, T, V) logits of what follows each of the tokens (B, T)."""
        parts = self.decoder
        x = torch.cat([self.image_tokens(images, language), parts["embedding"](tokens)], 1)
        x = x + parts["position"].weight[: x.shape[1]]
        for block in parts["blocks"]:
            x = block(x, context or Context())
        return self._logits(x[:, PREFIX:])

    @torch.no_grad()
    def generate(self, images: Tensor, start: Tensor, language: Tensor) -> Tensor:
        """(B, at most LONGEST) the likeliest token each time, after the first ones start (B,)."""
        parts, kept = self.decoder, [None] * 2
        x = torch.cat([self.image_tokens(images, language), parts["embedding"](start)[:, None]], 1)
        at, found = 0, []
        done = torch.zeros_like(start, dtype=torch.bool)
        while at + x.shape[1] <= PREFIX + LONGEST and not done.all():
            x = x + parts["position"].weight[at : at + x.shape[1]]
            at += x.shape[1]
            for i, block in enumerate(parts["blocks"]):
                q, k, v = block.attention.heads(block.attention_norm(x))
                if kept[i] is not None:
                    k, v = torch.cat([kept[i][0], k], 2), torch.cat([kept[i][1], v], 2)
                kept[i] = k, v
                y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
                x = x + block.attention.out(y.transpose(1, 2).flatten(2))
                x = x + block.ffn(block.ffn_norm(x), Context())
            token = self._logits(x[:, -1]).argmax(-1).masked_fill(done, PAD)
            found.append(token)
            done |= token == END
            x = parts["embedding"](token)[:, None]
        return torch.stack(found, 1)

    def _logits(self, x: Tensor) -> Tensor:
        return self.decoder["norm"](x) @ self.decoder["embedding"].weight.T


def base(settings: Mapping[str, Any]) -> ChartToCode:
    """The model that reads pictures and knows the languages, not both at once: trained once, then from the cache."""
    task = Apart(settings["charts"])

    def build() -> nn.Module:
        torch.manual_seed(0)
        return ChartToCode()

    def teach(model: nn.Module) -> State:
        config = TrainConfig(settings["base_steps"], settings["base_batch"], weight_decay=0.01, eval_every=None)
        return train(model, task, config)

    recipe = {
        "steps": settings["base_steps"],
        "batch": settings["base_batch"],
        "data": task.manifest,
        "task": task.name,
    }
    return pretrained("charts-base", recipe, build, teach, [charts, sys.modules[__name__]])
