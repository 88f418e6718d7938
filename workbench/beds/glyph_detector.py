"""A small detector of the scenes of `glyph_detection`, with the parts of Grounding DINO 1.5 Edge.

Convolutions, a text encoder over characters, image features that attend to the texts (the enhancer), a text-guided
choice of queries, decoder layers of self-attention, cross-attention and a feed-forward block, each with a box
correction; one-to-one matching after each.

Tensor letters: B batch, T and S time, C texts, D model width.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds import glyph_detection
from workbench.beds.glyph_detection import SIZE, TEXTS, GlyphDetection
from workbench.beds.pretrained import pretrained
from workbench.lib.core.attention import Attention
from workbench.lib.core.routing import Context
from workbench.lib.core.train import TrainConfig, train

CELLS = SIZE // 4
TARGETS = ("layers.*.ffn.*", "enhancer.*", "class_head", "box_head")
"""What is tuned: the decoder's blocks, the enhancer's cross-attention, the heads."""


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, T, D) to another sequence (B, S, D)."""

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.q, self.kv, self.out = (nn.Linear(d_model, n * d_model) for n in (1, 2, 1))

    def forward(self, x: Float[Tensor, "batch time dim"], other: Float[Tensor, "batch source dim"]) -> Tensor:
        q = self.q(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        k, v = self.kv(other).unflatten(-1, (2, self.n_heads, -1)).movedim(-3, 0).transpose(2, 3)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class DecoderLayer(nn.Module):
    """Self-attention of the queries, cross-attention to the image, a feed-forward block; pre-norm."""

    def __init__(self, d_model: int, d_hidden: int, n_heads: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(3))
        self.attention, self.cross = Attention(d_model, n_heads, causal=False), CrossAttention(d_model, n_heads)
        self.ffn = nn.Sequential(nn.Linear(d_model, d_hidden), nn.ReLU(), nn.Linear(d_hidden, d_model))

    def forward(self, x: Tensor, place: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x) + place)
        x = x + self.cross(self.norms[1](x) + place, memory)
        return x + self.ffn(self.norms[2](x))


class GlyphDetector(nn.Module):
    """Images (B, 3, 32, 32) -> after the choice of queries and after each layer, logits (., C) and boxes (., 4).

    The first stage has all 64 cells of the image as its queries, the others the chosen ones.
    """

    def __init__(self, d_model: int = 64, d_hidden: int = 128, n_layers: int = 3, n_heads: int = 4, queries: int = 20):
        super().__init__()
        self.queries = queries
        self.backbone = nn.Sequential(
            *(nn.Conv2d(3, d_model // 2, 3, 2, 1), nn.GroupNorm(4, d_model // 2), nn.ReLU()),
            *(nn.Conv2d(d_model // 2, d_model, 3, 2, 1), nn.GroupNorm(4, d_model), nn.ReLU()),
            *(nn.Conv2d(d_model, d_model, 3, padding=1), nn.GroupNorm(4, d_model), nn.ReLU()),
            nn.Conv2d(d_model, d_model, 3, padding=1),
        )
        self.cell = nn.Parameter(torch.randn(CELLS * CELLS, d_model) * 0.1)
        self.letters = nn.Embedding(27, d_model)
        self.text = nn.Sequential(
            *(nn.Conv1d(d_model, d_model, 3, padding=1), nn.ReLU(), nn.Conv1d(d_model, d_model, 3, padding=1))
        )
        self.text_norm = nn.LayerNorm(d_model)
        self.enhancer, self.norm = CrossAttention(d_model, n_heads), nn.LayerNorm(d_model)
        self.query, self.place = nn.Linear(d_model, d_model), nn.Linear(4, d_model)
        self.layers = nn.ModuleList(DecoderLayer(d_model, d_hidden, n_heads) for _ in range(n_layers))
        self.head_norm = nn.LayerNorm(d_model)
        self.class_head, self.box_head = nn.Linear(d_model, d_model), nn.Linear(d_model, 4)
        self.prior = nn.Parameter(torch.tensor(-4.0))
        nn.init.zeros_(self.box_head.weight), nn.init.zeros_(self.box_head.bias)
        width = max(map(len, TEXTS))
        letters = [[0 if a == " " else ord(a) - 96 for a in text.ljust(width)] for text in TEXTS]
        self.register_buffer("spelling", torch.tensor(letters))
        at = (torch.arange(CELLS) + 0.5) / CELLS
        centres = torch.stack([at.repeat(CELLS), at.repeat_interleave(CELLS)], 1)
        self.register_buffer("anchors", torch.cat([centres, torch.full_like(centres, 8.5 / SIZE)], 1))

    def forward(self, images: Tensor, context: Context | None = None) -> list[tuple[Tensor, Tensor]]:
        texts = self.text_norm(self.text(self.letters(self.spelling).transpose(1, 2)).amax(2))  # (C, D)
        memory = self.backbone(images).flatten(2).transpose(1, 2) + self.cell
        memory = memory + self.enhancer(self.norm(memory), texts.expand(len(images), -1, -1))
        logits, boxes = self.heads(memory, texts, self.anchors)
        stages = [(logits, boxes)]
        chosen = logits.amax(2).topk(self.queries, dim=1).indices[..., None]
        x = self.query(memory.gather(1, chosen.expand(-1, -1, memory.shape[2])))
        boxes = boxes.gather(1, chosen.expand(-1, -1, 4))
        for layer in self.layers:
            boxes = boxes.detach()
            x = layer(x, self.place(boxes), memory)
            logits, boxes = self.heads(x, texts, boxes)
            stages.append((logits, boxes))
        return stages

    def heads(self, x: Tensor, texts: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the texts, and the boxes corrected."""
        x = self.head_norm(x)
        logits = self.class_head(x) @ texts.T / math.sqrt(x.shape[2]) + self.prior
        return logits, (torch.logit(boxes, eps=1e-4) + self.box_head(x)).sigmoid()


def base(settings: Mapping[str, Any]) -> GlyphDetector:
    """The dense detector all arms start from: trained once, then from the cache."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return GlyphDetector(n_layers=settings["layers"])

    task = GlyphDetection(settings["held_out"])

    def teach(model: nn.Module) -> None:
        config = TrainConfig(
            settings["base_steps"], settings["batch_size"], lr=2e-3, weight_decay=1e-4, eval_every=None
        )
        train(model, task, config)

    recipe = {name: settings[name] for name in ("base_steps", "batch_size", "layers")}
    recipe["data"] = {key: value for key, value in task.manifest.items() if key != "held_out"}
    return pretrained("glyph-detector", recipe, build, teach, [glyph_detection, sys.modules[__name__]])
