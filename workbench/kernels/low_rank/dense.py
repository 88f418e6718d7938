"""All experts for every token, and gates that are zero where a token has no pair: two large products, on any device.

A bank with gates g is one update of rank E r whose rank vector is multiplied by g, each gate repeated r times. Nothing
is wider than (N, E r) beside input and output. The formulas are those of `reference`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.kernels.low_rank.reference import inner, weighted
from workbench.kernels.plan import check_values


def forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    score: Tensor,
    expert: Tensor,
    tok_offs: Tensor | None,
    top_k: int | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`; codes are U (N, E r) of all experts, and there is no index."""
    n_experts, rank = a.shape[:2]
    gates = _gates(score, expert, x.shape[0], n_experts, tok_offs, top_k)
    codes = x @ a.flatten(0, 1).T
    out = weighted(codes.view(*gates.shape, rank), gates).flatten(1) @ _flat(b)
    return out, codes if save else x.new_empty(0), expert.new_empty(0, dtype=torch.int32)


def backward(
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    a: Tensor,
    b: Tensor,
    score: Tensor,
    expert: Tensor,
    index: Tensor,
    tok_offs: Tensor | None,
    top_k: int | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """As `reference.backward`, of what is wanted."""
    n_experts, rank = a.shape[:2]
    gates = _gates(score, expert, x.shape[0], n_experts, tok_offs, top_k)
    codes = codes.view(*gates.shape, rank)
    dv = (grad @ _flat(b).T).view(*gates.shape, rank)
    du = weighted(dv, gates).flatten(1)
    dx = du @ a.flatten(0, 1) if needs[0] else None
    da = (du.T @ x).view_as(a) if needs[1] else None
    db = dscore = None
    if needs[2]:
        db = (weighted(codes, gates).flatten(1).T @ grad).view(n_experts, rank, -1).transpose(1, 2).contiguous()
    if needs[3]:
        dgates = inner(codes, dv)
        if top_k is None:
            dscore = dgates[_token(expert, tok_offs), expert]
        else:
            dscore = dgates.gather(1, expert.view(-1, top_k).long()).flatten()
        dscore = dscore.to(score.dtype)
    return dx, da, db, dscore


def _flat(b: Tensor) -> Tensor:
    """(E r, O)"""
    return b.transpose(1, 2).reshape(-1, b.shape[1])


def _token(expert: Tensor, tok_offs: Tensor) -> Tensor:
    """(P,) token of each pair."""
    tokens = torch.arange(tok_offs.shape[0] - 1, device=expert.device)
    return tokens.repeat_interleave(tok_offs.diff(), output_size=expert.shape[0])


def _gates(
    score: Tensor, expert: Tensor, n_tokens: int, n_experts: int, tok_offs: Tensor | None, top_k: int | None
) -> Tensor:
    """(N, E) weights, 0 where a token has no pair; a pair that is there twice counts twice.

    Raises:
        InputError: an expert, or the first pair of a token, is out of range, on a CPU.
    """
    check_values(expert, n_experts, tok_offs)
    gates, expert = score.new_zeros(n_tokens, n_experts), expert.long()
    if top_k is None:
        return gates.index_put_((_token(expert, tok_offs), expert), score, accumulate=True)
    return gates.scatter_add_(1, expert.view(n_tokens, top_k), score.view(n_tokens, top_k))
