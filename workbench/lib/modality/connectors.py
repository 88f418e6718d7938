"""Connectors: what an encoder says of a signal, as soft tokens that a language model reads.

Tensor letters: B rows, S states of an encoder, F their width, Q soft tokens, D model width.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.attention import Attention


def check_states(states: Tensor, mask: Tensor | None, d_enc: int) -> None:
    """Raise `InputError` unless states are (B, S, F), and the mask, if there is one, is bool (B, S)."""
    if states.ndim != 3 or states.shape[2] != d_enc:
        raise InputError(f"states has shape {tuple(states.shape)} but must be (batch, states, {d_enc})")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != states.shape[:2]):
        raise InputError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)} but must be bool {tuple(states.shape[:2])}"
        )


class LinearConnector(nn.Module):
    """A soft token for each state: Linear, GELU, Linear. (B, S, F) -> (B, S, D).

    Attributes:
        projection: all of it, trained in every stage.
    """

    def __init__(self, d_enc: int, d_model: int):
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(d_enc, d_model), nn.GELU(), nn.Linear(d_model, d_model))

    def forward(
        self, states: Float[Tensor, "batch states d_enc"], mask: Bool[Tensor, "batch states"] | None = None
    ) -> Float[Tensor, "batch states dim"]:
        """Raises `InputError` where states are masked: each is a token, so all rows have as many."""
        check_states(states, mask, self.projection[0].in_features)
        if mask is not None and not mask.all():
            raise InputError(f"mask leaves out {int((~mask).sum())} states but a LinearConnector has a token for each")
        return self.projection(states)


class QFormerConnector(nn.Module):
    """Q soft tokens for any number of states: learned queries that look at them. (B, S, F) -> (B, Q, D).

    Each layer: the queries among themselves, then at the states, then a perceptron; norms before, residuals around. The
    states have no order here unless they carry their positions.

    Attributes:
        queries: (Q, D).
        projection: the last linear layer, trained in every stage; all else in the first alone.

    Args:
        d_enc: F.
        n_query: Q.
    """

    def __init__(self, d_enc: int, d_model: int, n_query: int = 16, n_layers: int = 4, n_heads: int = 4):
        super().__init__()
        if min(d_enc, n_query, n_layers) < 1:
            raise InputError(f"d_enc, n_query, n_layers are {d_enc}, {n_query}, {n_layers} but must be at least 1")
        self.queries = nn.Parameter(torch.randn(n_query, d_model))
        self.layers = nn.ModuleList(QFormerLayer(d_enc, d_model, n_heads) for _ in range(n_layers))
        self.norm = nn.RMSNorm(d_model)
        self.projection = nn.Linear(d_model, d_model)

    def forward(
        self, states: Float[Tensor, "batch states d_enc"], mask: Bool[Tensor, "batch states"] | None = None
    ) -> Float[Tensor, "batch queries dim"]:
        """mask: False where a state is padding.

        Raises:
            InputError: a row has no states, or they or the mask do not fit.
        """
        check_states(states, mask, self.layers[0].across.kdim)
        if states.shape[1] == 0 or (mask is not None and not mask.any(1).all()):
            raise InputError(f"states has shape {tuple(states.shape)} but every row must have a state that is unmasked")
        x = self.queries.expand(len(states), -1, -1)
        for layer in self.layers:
            x = layer(x, states, mask)
        return self.projection(self.norm(x))


class QFormerLayer(nn.Module):
    """One layer of a `QFormerConnector`: (B, Q, D) and states (B, S, F) -> (B, Q, D)."""

    def __init__(self, d_enc: int, d_model: int, n_heads: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in range(3))
        self.among = Attention(d_model, n_heads, causal=False)
        self.across = nn.MultiheadAttention(d_model, n_heads, kdim=d_enc, vdim=d_enc, batch_first=True)
        self.perceptron = nn.Sequential(nn.Linear(d_model, 2 * d_model), nn.GELU(), nn.Linear(2 * d_model, d_model))

    def forward(self, x: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        among, across, perceptron = self.norms
        x = x + self.among(among(x))
        hidden = None if mask is None else ~mask
        x = x + self.across(across(x), states, states, key_padding_mask=hidden, need_weights=False)[0]
        return x + self.perceptron(perceptron(x))
