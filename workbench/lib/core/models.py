"""Two small models that take any feed-forward block per layer: a decoder-only language model, a vision classifier.

Tensor letters: B batch, T time (or patches), D model width, V vocabulary, C classes.
"""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.attention import Attention
from workbench.lib.core.routing import Context

MakeFFN = Callable[[int], nn.Module]
"""Gives the feed-forward block of layer l: a module called as `block(x (B, T, D), context)`."""

MakeAttention = Callable[[int], nn.Module]
"""Gives the attention of layer l, called likewise."""


class Block(nn.Module):
    """Pre-norm transformer block around any attention and any feed-forward part."""

    def __init__(self, d_model: int, ffn: nn.Module, attention: nn.Module):
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model)
        self.attention = attention
        self.ffn_norm = nn.RMSNorm(d_model)
        self.ffn = ffn

    def forward(self, x: Float[Tensor, "batch time dim"], context: Context) -> Float[Tensor, "batch time dim"]:
        x = x + self.attention(self.attention_norm(x), context)
        return x + self.ffn(self.ffn_norm(x), context)


class ResidualStack(nn.Module):
    """Layers one after the other, x + layer(norm(x)), in one context: (..., D) -> (..., D)."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Float[Tensor, "*batch dim"], context: Context | None = None) -> Float[Tensor, "*batch dim"]:
        context = context if context is not None else Context()
        for layer in self.layers:
            x = x + layer(F.rms_norm(x, x.shape[-1:]), context)
        return x


class DecoderLM(nn.Module):
    """Decoder-only transformer: pre-norm blocks, tied embedding and output matrix.

    With a `prefix` in its context it is a prefix language model: the head of each row is read in both directions.

    Args:
        vocab: V.
        ffn: gives the feed-forward block of each layer, see `MakeFFN`.
        seq_len: longest T.
        attention: gives the attention of each layer; None for dense causal attention.
        learned_positions: add a learned vector for each position; without it the attention must know positions itself.
    """

    def __init__(
        self,
        vocab: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        ffn: MakeFFN,
        seq_len: int,
        attention: MakeAttention | None = None,
        learned_positions: bool = True,
    ):
        super().__init__()
        attention = attention or (lambda layer: Attention(d_model, n_heads, causal=True))
        self.seq_len = seq_len
        self.embedding = nn.Embedding(vocab, d_model)
        self.position = nn.Parameter(torch.empty(seq_len, d_model)) if learned_positions else None
        self.blocks = nn.ModuleList(Block(d_model, ffn(layer), attention(layer)) for layer in range(n_layers))
        self.norm = nn.RMSNorm(d_model)
        # Rows of unit norm: the residual stream starts as large as what the blocks add to it, and the logits of the
        # tied output have unit variance. With the usual 0.02 the first block drowns the token (0.3 bits/byte worse).
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        if self.position is not None:
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
        if context.prefix is not None:
            self._check_prefix(tokens, context.prefix)
        x = self.embedding(tokens)
        if self.position is not None:
            x = x + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, context)
        return self.norm(x) @ self.embedding.weight.T

    def _check_prefix(self, tokens: Tensor, prefix: Tensor) -> None:
        """Another attention would not read the prefix, and be causal without a word."""
        if prefix.shape != tokens.shape[:1]:
            raise InputError(f"context.prefix has shape {tuple(prefix.shape)} but must have one of {len(tokens)} rows")
        for layer, block in enumerate(self.blocks):
            found = getattr(block, "attention", block)
            if type(found) is not Attention or not found.causal:
                raise InputError(
                    f"context.prefix is given but layer {layer} has {type(found).__name__}: only "
                    "Attention(causal=True) knows a prefix"
                )


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
        self.blocks = nn.ModuleList(
            Block(d_model, ffn(layer), Attention(d_model, n_heads, causal=False)) for layer in range(n_layers)
        )
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
