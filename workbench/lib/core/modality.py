"""Tokens by kind: each token goes through the part of its own modality, and comes back to its place.

There is no router: the modality of a token is known (`Context.modality`), so every token costs what it costs in a model
with one part, and the model holds as many parts as there are modalities.

Tensor letters: N tokens, M modalities, D input width, O output width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.routing import Context

IDS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class ByModality:
    """Which tokens are of which modality: sorted once, used by every layer that needs it.

    Attributes:
        order: (N,) the tokens of modality 0, then those of 1, ...; among themselves in the order of the batch.
        counts: how many tokens each modality has.
    """

    order: Int64[Tensor, " tokens"]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, modality: Int64[Tensor, " tokens"] | None, n_modalities: int) -> "ByModality":
        """From the modality of each token.

        Raises:
            InputError: there are no ids, they are not (N,) whole numbers, or one is not 0 to M - 1.
        """
        if modality is None:
            raise InputError("modality is None but must be the modality of each token: Context(modality=...)")
        if modality.ndim != 1 or modality.dtype not in IDS:
            raise InputError(
                f"modality is {modality.dtype} of shape {tuple(modality.shape)} but must be the id of each token, "
                "(tokens,) whole numbers; of a batch (rows, time) it is modality.flatten()"
            )
        low, high = (int(end) for end in modality.aminmax()) if modality.numel() else (0, 0)
        if low < 0 or high >= n_modalities:
            wrong = low if low < 0 else high
            raise InputError(f"modality holds {wrong} but every id must be 0 to {n_modalities - 1}")
        counts = torch.bincount(modality, minlength=n_modalities).tolist()
        return cls(modality.argsort(stable=True), tuple(counts))

    @classmethod
    def told(cls, context: Context, n_modalities: int) -> "ByModality":
        """From what the context tells, sorted once in a forward pass for all layers that ask. Raises as `of`."""
        modality, groups = context.notes.get((cls, n_modalities), (None, None))
        if groups is None or modality is not context.modality:
            groups = cls.of(context.modality, n_modalities)
            context.notes[cls, n_modalities] = context.modality, groups
        return groups

    @property
    def present(self) -> tuple[int, ...]:
        """The modalities that have tokens."""
        return tuple(m for m, count in enumerate(self.counts) if count)


def modality_of(masks: Bool[Tensor, "modalities tokens"]) -> Int64[Tensor, " tokens"]:
    """The modality of each token from a mask for each modality.

    Raises:
        InputError: a token is in no mask, or in more than one; or they are no (M, N) of True and False.
    """
    if masks.ndim != 2 or masks.dtype != torch.bool:
        raise InputError(f"masks is {masks.dtype} of shape {tuple(masks.shape)} but must be bool (modalities, tokens)")
    times = masks.sum(0)
    for wrong, what in ((times > 1, "more than one"), (times == 0, "none")):
        if wrong.any():
            tokens = wrong.nonzero().flatten().tolist()
            raise InputError(
                f"masks hold token {tokens[0]} in {what} of {len(masks)} modalities ({len(tokens)} such tokens) but "
                "must hold every token exactly once"
            )
    return masks.long().argmax(0)


def by_modality(
    x: Float[Tensor, "tokens dim"],
    modality: Int64[Tensor, " ids"] | ByModality | None,
    parts: Sequence[Callable[[Tensor], Tensor]] | nn.ModuleList,
) -> Float[Tensor, "tokens out"]:
    """Each token through the part of its modality: gathered, computed group by group, scattered back.

    A part that no token has is not called, and so gets no gradient (None, not zeros: an optimizer leaves it alone).

    Args:
        modality: of each token, 0 to M - 1 for M parts; or those sorted already.
        parts: (n, D) -> (n, out) each, with one width out for all.

    Raises:
        InputError: the ids are absent, out of range, or not as many as tokens or parts.
    """
    groups = modality if isinstance(modality, ByModality) else ByModality.of(modality, len(parts))
    if len(groups.counts) != len(parts):
        raise InputError(f"modality is sorted by {len(groups.counts)} modalities but there are {len(parts)} parts")
    if groups.order.numel() != x.shape[0]:
        raise InputError(f"modality has {groups.order.numel()} ids but must have one for each of {x.shape[0]} tokens")
    if len(groups.present) <= 1:  # nothing to sort, and an empty batch still has a width
        return parts[groups.present[0] if groups.present else 0](x)
    rows = x.index_select(0, groups.order).split(groups.counts)
    y = torch.cat([parts[m](rows[m]) for m in groups.present])
    return torch.empty_like(y).index_copy(0, groups.order, y)


class ModalityLinear(nn.Module):
    """A linear layer for each modality: y_n = W_{m(n)} x_n [+ b_{m(n)}]. M O D [+ M O] parameters, O D used by a token.

    Attributes:
        parts: the layer of each modality, each drawn for itself as `nn.Linear` is.
    """

    def __init__(self, d_in: int, d_out: int, n_modalities: int, bias: bool = True):
        super().__init__()
        if min(d_in, d_out, n_modalities) < 1:
            raise InputError(
                f"d_in, d_out, n_modalities are {d_in}, {d_out}, {n_modalities} but must all be at least 1"
            )
        self.parts = nn.ModuleList(nn.Linear(d_in, d_out, bias) for _ in range(n_modalities))

    def forward(
        self, x: Float[Tensor, "*batch d_in"], modality: Int64[Tensor, " ids"] | ByModality | None
    ) -> Float[Tensor, "*batch d_out"]:
        """x (..., D) for N tokens in all, and their modality (N,): as in `by_modality`."""
        y = by_modality(x.reshape(-1, x.shape[-1]), modality, self.parts)
        return y.view(*x.shape[:-1], y.shape[-1])


class InTurns(nn.Module):
    """A layer that knows modalities, as one of tokens alone: some of the first, some of the second, and so on again.

    (N, D) -> (N, D), one sequence for the layer: `layer(x (1, N, D), context)`. For inputs that come without
    modalities, such as those of the catalogue's examples.

    Args:
        run: tokens of a modality that follow each other.
    """

    def __init__(self, layer: nn.Module, n_modalities: int, run: int = 4):
        super().__init__()
        self.layer, self.n_modalities, self.run = layer, n_modalities, run

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        modality = torch.arange(len(x), device=x.device) // self.run % self.n_modalities
        return self.layer(x[None], Context(modality=modality))[0]
