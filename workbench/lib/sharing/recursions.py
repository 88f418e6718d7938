"""One block of layers applied several times: which layers are shared, what a recursion attends to, its cache, its cost.

Tokens that take part in a recursion are gathered out of their sequences, in order, with the positions they have there.
So the rows and columns of the causal mask that belong to them are a causal mask again.

Tensor letters: B batch, T time, k gathered tokens of a sequence, D model width, H heads, d head width, R recursions,
V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from workbench.errors import InputError, unknown
from workbench.lib.core.attention import Attention
from workbench.lib.core.models import Block, DecoderLM
from workbench.lib.core.routing import Context

SHARINGS = ("cycle", "sequence", "middle-cycle")
KV = ("cache", "share")

Attend = Callable[[int, Attention, Tensor, Tensor], Tensor]
"""(number of the layer in the block, its attention, normed tokens (B, k, D), positions (B, k)) -> (B, H, k, d)."""


def shared_layers(sharing: str, n_layers: int, n_recursions: int) -> list[int]:
    """(n_layers,) which of the unique layers stands at each depth.

    "cycle" repeats a block, 0 1 0 1 0 1; "sequence" each layer, 0 0 0 1 1 1; "middle-cycle" has a first and a last
    layer that are not shared, 0 1 2 1 2 1 2 3.

    Raises:
        InputError: the layers that are shared are no multiple of `n_recursions`.
    """
    if sharing not in SHARINGS:
        raise unknown("sharing", sharing, SHARINGS)
    ends = int(sharing == "middle-cycle")
    shared = n_layers - 2 * ends
    if n_recursions < 1 or shared < 1 or shared % n_recursions:
        raise InputError(
            f"n_layers is {n_layers} but must be {2 * ends} and a multiple of n_recursions = {n_recursions}, which is "
            "at least 1"
        )
    base = shared // n_recursions
    middle = [depth // n_recursions if sharing == "sequence" else depth % base for depth in range(shared)]
    return [0, *(1 + layer for layer in middle), base + 1] if ends else middle


class SharedStack(nn.Module):
    """Layers in a given order, any of them several times: the recursive Transformer without a router.

    Args:
        layers: the unique ones.
        order: which of them stands at each depth, see `shared_layers`.
    """

    def __init__(self, layers: Sequence[nn.Module], order: Sequence[int]):
        super().__init__()
        if sorted(set(order)) != list(range(len(layers))):
            raise InputError(f"order is {list(order)} but must use each of the {len(layers)} layers, and no other")
        self.layers, self.order = nn.ModuleList(layers), list(order)

    def forward(self, x: Float[Tensor, "batch time dim"], context: Context) -> Float[Tensor, "batch time dim"]:
        for layer in self.order:
            x = self.layers[layer](x, context)
        return x


class RecursiveBlock(nn.Module):
    """f: the layers that every recursion shares, for tokens that were gathered out of their sequences.

    Args:
        layers: blocks with causal attention; their feed-forward part may be anything.
    """

    def __init__(self, layers: Sequence[Block]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if not len(self.layers):
            raise InputError("layers is empty but must hold at least one block")
        for layer in self.layers:
            attention = getattr(layer, "attention", None)
            if type(attention) is not Attention or not attention.causal:
                raise InputError(
                    f"layers holds a {type(layer).__name__} with {type(attention).__name__} but must hold blocks with "
                    "causal, dense Attention"
                )

    @property
    def width(self) -> int:
        """D."""
        return self.layers[0].attention.qkv.in_features

    def forward(
        self,
        x: Float[Tensor, "batch k dim"],
        context: Context,
        positions: Int64[Tensor, "batch k"],
        attend: Attend,
    ) -> Float[Tensor, "batch k dim"]:
        for index, layer in enumerate(self.layers):
            y = attend(index, layer.attention, layer.attention_norm(x), positions)
            x = x + layer.attention.out(y.transpose(-3, -2).flatten(-2))
            x = x + layer.ffn(layer.ffn_norm(x), context)
        return x


# -- what is gathered


def gathered(
    active: Bool[Tensor, "batch time"],
) -> tuple[Int64[Tensor, "batch k"], Bool[Tensor, "batch k"] | None]:
    """The places of the active tokens, ascending, and which of these are real: None where all sequences have k.

    A sequence with fewer has other places of its own behind them.
    """
    counts = active.sum(1)
    longest = int(counts.max())
    order = torch.argsort(active.logical_not().byte(), dim=1, stable=True)[:, :longest]
    real = torch.arange(longest, device=active.device) < counts[:, None]
    return order, None if bool(real.all()) else real


def narrowed(context: Context, places: Int64[Tensor, "batch k"], real: Tensor | None, time: int) -> Context:
    """What is known of the gathered tokens, with an account of losses of its own."""
    rows = (torch.arange(len(places), device=places.device)[:, None] * time + places).flatten()
    facts = {name: getattr(context, name) for name in ("token_ids", "domain", "modality")}
    own = {name: None if fact is None else fact.to(rows.device)[rows] for name, fact in facts.items()}
    return replace(context, **own, mask=None if real is None else real.flatten(), aux=0.0, calls={}, state=None)


# -- what it attends to


class OwnKeys:
    """Recursion-wise keys: a token sees those that are active in the same recursion, up to itself."""

    length = 0  # tokens of the text before these

    def attend(self, recursion: int, real: Tensor | None) -> Attend:
        # places that are not real come last, so that no real token sees them
        return lambda index, attention, x, positions: F.scaled_dot_product_attention(
            *attention.heads(x, positions), is_causal=True
        )


class SharedKeys:
    """Recursive sharing: every recursion sees the keys and values of all tokens as the first one made them."""

    length = 0

    def __init__(self):
        self._kept: list[tuple[Tensor, Tensor]] = []

    def attend(self, recursion: int, real: Tensor | None) -> Attend:
        def first(index: int, attention: Attention, x: Tensor, positions: Tensor) -> Tensor:
            q, k, v = attention.heads(x, positions)
            self._kept.append((k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def later(index: int, attention: Attention, x: Tensor, positions: Tensor) -> Tensor:
            k, v = self._kept[index]
            seen = torch.arange(k.shape[-2], device=x.device) <= positions[..., None]
            return F.scaled_dot_product_attention(attention.queries(x, positions), k, v, attn_mask=seen[:, None])

        return later if recursion else first


class MoRCache:
    """Keys and values of a text that grows, of the tokens that a recursion has, and of no others.

    Args:
        policy: "cache" keeps for each recursion those of its own tokens; "share" those of the first recursion for all.
        n_recursions: R.
        base_depth: layers of the shared block.

    Attributes:
        length: tokens of the text so far.
    """

    def __init__(self, policy: str, n_recursions: int, base_depth: int):
        if policy not in KV:
            raise unknown("policy", policy, KV)
        if min(n_recursions, base_depth) < 1:
            raise InputError(f"n_recursions, base_depth are {n_recursions}, {base_depth} but must both be at least 1")
        self.policy, self.n_recursions, self.base_depth = policy, n_recursions, base_depth
        self.length = 0
        self._rows: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = {}

    def append(
        self,
        recursion: int,
        layer: int,
        k: Float[Tensor, "..."],
        v: Float[Tensor, "..."],
        positions: Int64[Tensor, "..."],
        real: Bool[Tensor, "batch new"] | None = None,
    ) -> None:
        """Take up keys and values (B, H, new, d) of tokens at their positions (B, new), real ones alone; None: all."""
        place = self._place(recursion, layer)
        if place[0] != recursion:
            raise InputError(f"recursion is {recursion} but must be 0: the others share what the first one made")
        if k.ndim != 4 or k.shape != v.shape or positions.shape != (k.shape[0], k.shape[2]):
            raise InputError(
                f"k, v and positions have shapes {tuple(k.shape)}, {tuple(v.shape)} and {tuple(positions.shape)} but "
                "must be (batch, heads, new, d), the same, and (batch, new)"
            )
        parts = (k.detach().transpose(1, 2), v.detach().transpose(1, 2), positions)
        new = [tuple(p[row] if real is None else p[row][real[row]] for p in parts) for row in range(len(k))]
        held = self._rows.setdefault(place, [tuple(p[:0] for p in row) for row in new])
        if len(held) != len(new):
            raise InputError(f"k holds {len(new)} sequences but the cache holds {len(held)}")
        self._rows[place] = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in zip(held, new, strict=True)]

    def read(
        self, recursion: int, layer: int
    ) -> tuple[Float[Tensor, "batch heads n d"], Float[Tensor, "batch heads n d"], Int64[Tensor, "batch n"]]:
        """Keys, values and positions that a recursion sees; shorter sequences are filled up at position -1."""
        place = self._place(recursion, layer)
        if place not in self._rows:
            raise InputError(f"the cache holds nothing of layer {layer} at recursion {recursion}: append to it first")
        k, v, positions = zip(*self._rows[place], strict=True)
        k, v = (pad_sequence(list(part), batch_first=True).transpose(1, 2) for part in (k, v))
        return k, v, pad_sequence(list(positions), batch_first=True, padding_value=-1)

    def bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(part.nbytes for rows in self._rows.values() for row in rows for part in row[:2])

    def attend(self, recursion: int, real: Bool[Tensor, "batch k"] | None) -> Attend:
        def look(index: int, attention: Attention, x: Tensor, positions: Tensor) -> Tensor:
            if self.policy == "share" and recursion:
                q = attention.queries(x, positions)
            else:
                q, k, v = attention.heads(x, positions)
                self.append(recursion, index, k, v, positions, real)
            k, v, at = self.read(recursion, index)
            seen = (at >= 0)[:, None] & (at[:, None] <= positions[..., None])
            if real is not None:
                seen = seen | ~real[..., None]  # what is not real would otherwise see nothing, and be NaN
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])

        return look

    def _place(self, recursion: int, layer: int) -> tuple[int, int]:
        if not (0 <= recursion < self.n_recursions and 0 <= layer < self.base_depth):
            raise InputError(
                f"recursion, layer are {recursion}, {layer} but must be below {self.n_recursions}, {self.base_depth}"
            )
        return (0 if self.policy == "share" else recursion), layer


Memory = OwnKeys | SharedKeys | MoRCache
"""Where a recursion finds keys and values."""


class Decoding:
    """A decoder and a text that grows: each part of the model keeps what it needs of the tokens before.

    Args:
        model: its blocks are plain ones and mixtures of recursions (what has a `step` and makes its `cache`).
    """

    def __init__(self, model: DecoderLM):
        self.model, self.length = model, 0
        self._parts = [
            (part, part.cache()) if hasattr(part, "step") else (RecursiveBlock([part]), MoRCache("cache", 1, 1))
            for part in model.blocks
        ]

    @torch.no_grad()
    def step(self, tokens: Int64[Tensor, "batch new"]) -> Float[Tensor, "batch new vocab"]:
        """The logits at new tokens that continue the text."""
        model, new = self.model, tokens.shape[1]
        if not 1 <= new <= model.seq_len - self.length:
            raise InputError(f"tokens brings {new} tokens to {self.length} but seq_len is {model.seq_len}")
        x = model.embedding(tokens)
        if model.position is not None:
            x = x + model.position[self.length : self.length + new]
        positions = torch.arange(self.length, self.length + new, device=x.device).expand(len(x), -1)
        for part, cache in self._parts:
            if isinstance(part, RecursiveBlock):
                x = part(x, Context(token_ids=tokens.flatten()), positions, cache.attend(0, None))
            else:
                x = part.step(x, cache, Context(token_ids=tokens.flatten()))
        self.length += new
        return model.norm(x) @ model.embedding.weight.T

    def bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(cache.bytes() for _, cache in self._parts)


def mor_flops(mor: nn.Module, active: Int64[Tensor, "recursions batch"], length: int) -> int:
    """Floating-point operations of a forward in which so many tokens of each sequence took part in each recursion.

    What the padding of unequal sequences costs is not counted. A forward and backward pass are three times as many.

    Args:
        mor: an `ExpertChoiceMoR` or a `TokenChoiceMoR`.
        active: `MoRStats.active.sum(-1)`.
        length: T.

    Raises:
        InputError: `active` has another shape or other values; or a shared layer has matrices that are no `nn.Linear`,
            whose cost is not known here.
    """
    if active.ndim != 2 or len(active) != mor.n_recursions or int(active.min()) < 0 or int(active.max()) > length:
        raise InputError(
            f"active has shape {tuple(active.shape)} and values up to {int(active.max())} but must be "
            f"({mor.n_recursions}, batch), of 0 to length = {length} tokens"
        )
    routers = sum(p.numel() for name, p in mor.named_parameters() if not name.startswith("block."))
    total = 2 * routers * length * active.shape[1]
    for r, counts in enumerate(active.tolist()):
        first, share = r == 0, mor.kv == "share"
        for layer in mor.block.layers:
            linear = {id(m.weight): m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear)}
            if any(p.ndim > 1 and id(p) not in linear for p in layer.parameters()):
                raise InputError("mor.block has a layer with matrices that are no nn.Linear: count by running it")
            width, weights = mor.block.width, sum(linear.values())
            if share and not first:  # queries only, for the keys of all tokens
                total += sum(2 * k * (weights - 2 * width * width) + 4 * width * k * length for k in counts)
            else:
                total += sum(2 * k * weights + 4 * width * k * k for k in ([length] * len(counts) if share else counts))
    return total
