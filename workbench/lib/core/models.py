"""Two small models that take any feed-forward block per layer: a decoder-only language model, a vision classifier.

Tensor letters: B batch, T time (or patches), D model width, V vocabulary, C classes.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.routing import Context

MakeFFN = Callable[[int], nn.Module]
"""Gives the feed-forward block of layer l: a module called as `block(x (B, T, D), context)`."""


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D)."""

    def __init__(self, d_model: int, n_heads: int, causal: bool):
        super().__init__()
        if d_model % n_heads:
            raise InputError(f"d_model is {d_model} but must be divisible by n_heads = {n_heads}")
        self.n_heads, self.causal = n_heads, causal
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block around any feed-forward part."""

    def __init__(self, d_model: int, n_heads: int, ffn: nn.Module, causal: bool):
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model)
        self.attention = Attention(d_model, n_heads, causal)
        self.ffn_norm = nn.RMSNorm(d_model)
        self.ffn = ffn

    def forward(self, x: Float[Tensor, "batch time dim"], context: Context) -> Float[Tensor, "batch time dim"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x), context)


class DecoderLM(nn.Module):
    """Decoder-only transformer: learned positions, pre-norm blocks, tied embedding and output matrix.

    Args:
        vocab: V.
        ffn: gives the feed-forward block of each layer, see `MakeFFN`.
        seq_len: longest T.
    """

    def __init__(self, vocab: int, d_model: int, n_layers: int, n_heads: int, ffn: MakeFFN, seq_len: int):
        super().__init__()
        self.seq_len = seq_len
        self.embedding = nn.Embedding(vocab, d_model)
        self.position = nn.Parameter(torch.empty(seq_len, d_model))
        self.blocks = nn.ModuleList(Block(d_model, n_heads, ffn(layer), causal=True) for layer in range(n_layers))
        self.norm = nn.RMSNorm(d_model)
        # Rows of unit norm: the residual stream starts as large as what the blocks add to it, and the logits of the
        # tied output have unit variance. With the usual 0.02 the first block drowns the token (0.3 bits/byte worse).
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        nn.init.normal_(self.position, std=d_model**-0.5)

    def forward(
        self, tokens: Int64[Tensor, "batch time"], context: Context | None = None
    ) -> Float[Tensor, "batch time vocab"]:
        if not 1 <= tokens.shape[1] <= self.seq_len or tokens.shape[0] == 0:
            raise InputError(
                f"tokens has shape {tuple(tokens.shape)} but must be (batch, time) with at least one row and "
                f"1 to seq_len = {self.seq_len} columns"
            )
        context = context if context is not None else Context()
        if context.token_ids is None:
            context.token_ids = tokens.flatten()
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, context)
        return self.norm(x) @ self.embedding.weight.T


class VisionClassifier(nn.Module):
    """Small vision transformer: square patches, learned positions, mean over patches, linear head.

    Args:
        image_shape: (channels, height, width); height and width divisible by `patch`.
        ffn: gives the feed-forward block of each layer, see `MakeFFN`.
        n_classes: C.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        patch: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        ffn: MakeFFN,
        n_classes: int,
    ):
        super().__init__()
        channels, height, width = image_shape
        if height % patch or width % patch:
            raise InputError(f"patch is {patch} but must divide the height and width of image_shape = {image_shape}")
        self.image_shape, self.patch = tuple(image_shape), patch
        self.embedding = nn.Linear(channels * patch * patch, d_model)
        self.position = nn.Parameter(torch.empty((height // patch) * (width // patch), d_model))
        self.blocks = nn.ModuleList(Block(d_model, n_heads, ffn(layer), causal=False) for layer in range(n_layers))
        self.norm = nn.RMSNorm(d_model)
        self.head = nn.Linear(d_model, n_classes)
        nn.init.normal_(self.position, std=0.02)

    def forward(
        self, images: Float[Tensor, "batch channels height width"], context: Context | None = None
    ) -> Float[Tensor, "batch classes"]:
        if images.shape[0] == 0 or tuple(images.shape[1:]) != self.image_shape:
            raise InputError(
                f"images has shape {tuple(images.shape)} but must be (batch, {', '.join(map(str, self.image_shape))}) "
                "with at least one row"
            )
        context = context if context is not None else Context()
        patches = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        x = self.embedding(patches) + self.position
        for block in self.blocks:
            x = block(x, context)
        return self.head(self.norm(x).mean(1))
