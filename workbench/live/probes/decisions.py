"""A routing decision, read out of what somebody else's router returns or experts are given.

What a tensor means is told from its type, its shape and its values, never from its place: (weights, indices),
(indices, weights), (weights, indices, counts), (logits, weights, indices), a map of the experts and others.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.lib.core.routing import Routing

TOLERANCE = 1e-2
"""Error of a token's shares up to which weights are what a rule makes of the logits: they may be rounded."""


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a module is given or returns."""
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def described(parts: Iterable[Tensor]) -> str:
    """Types and shapes in words."""
    return ", ".join(f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}" for part in parts) or "no tensor"


def read(
    parts: Iterable[Tensor], n_tokens: int, n_experts: int, top_k: int | None, scores: Iterable[Tensor] = ()
) -> Routing | None:
    """The decision in `parts`; None where there is none to be read.

    Args:
        parts: tensors over N tokens, in any order: integer indices (N, K), where E stands for no expert; a map of the
            experts, boolean or 0 and 1, (N, E) or (N, K, E); weights (N, K), or (N, E) with 0 where an expert is
            not chosen; logits or probabilities (N, E). The tokens may have several axes. What is no such tensor is
            passed over.
        n_tokens: N.
        n_experts: E.
        top_k: K, None where it is not known. It is needed where there are logits only: then the K largest are chosen.
        scores: logits or probabilities (N, E) of the same tokens from elsewhere.

    The weights are those in `parts`, else the probabilities. These are what fits the weights: the softmax of the logits
    or their normalised sigmoids, or scores whose rows sum to one; without weights the softmax.
    """
    parts = list(parts)
    rows = [flat for part in parts if (flat := _rows(part, n_tokens)) is not None]
    floats = [flat for flat in rows if flat.is_floating_point()]
    whole = [flat for flat in floats if flat.shape[1] == n_experts]
    sparse = [flat for flat in whole if _is_sparse(flat, top_k)]
    logits = [flat for flat in (*whole, *scores) if not any(flat is dense for dense in sparse)]
    chosen = next(_maps(parts, rows, n_tokens, n_experts, top_k), None)
    if chosen is not None or sparse:
        if sparse:  # a map of the first choices may stand beside the weights of all
            chosen = sparse[0] > 0 if chosen is None else chosen | (sparse[0] > 0)
        weights = sparse[0] if sparse else next((flat for flat in floats if flat.shape[1] == 1), None)
        return _of_map(chosen, weights, logits)
    indices = next(_indices(rows, n_experts, top_k), None)
    if indices is not None:
        same = [flat for flat in floats if flat.shape == indices.shape]
        if indices.shape[1] == n_experts:  # logits and weights have one shape: weights are not negative
            same = [flat for flat in same if bool((flat >= 0).all())][-1:] if len(same) > 1 else []
            logits = [flat for flat in logits if not any(flat is weight for weight in same)]
        return _of_indices(indices, same[0] if same else None, logits, n_experts)
    if logits and top_k is not None and top_k <= n_experts:
        best = _logits(logits).topk(top_k, dim=-1).indices
        return _of_indices(best, None, logits, n_experts)
    return None


def _rows(part: Tensor, n_tokens: int) -> Tensor | None:
    """(N, C), of one number a token (N, 1); None where it is not over the tokens."""
    flat = part[:, None] if part.ndim == 1 else part.flatten(0, -2) if part.ndim else None
    return flat if flat is not None and len(flat) == n_tokens and flat.shape[1] else None


def _is_sparse(flat: Tensor, top_k: int | None) -> bool:
    """Whether (N, E) numbers are weights with an exact zero for what is not chosen."""
    chosen = (flat != 0).sum(1)
    few = top_k if top_k is not None else flat.shape[1] - 1
    return flat.shape[1] > 1 and bool((flat >= 0).all()) and bool((chosen <= few).all()) and few < flat.shape[1]


def _maps(parts: list[Tensor], rows: list[Tensor], n: int, n_experts: int, top_k: int | None) -> Iterator[Tensor]:
    """Boolean maps (N, E). With two experts, 0 and 1 may be indices: they are a map where K is not 2."""
    for part in parts:
        if part.ndim == 3 and part.shape[::2] == (n, n_experts) and _is_binary(part):
            yield part.bool().any(1)
    for flat in rows:
        clear = flat.dtype == torch.bool or n_experts > 2 or top_k == 1
        if flat.shape[1] == n_experts > 1 and clear and _is_binary(flat):
            yield flat.bool()


def _is_binary(part: Tensor) -> bool:
    return part.dtype == torch.bool or bool(((part == 0) | (part == 1)).all())


def _indices(rows: list[Tensor], n_experts: int, top_k: int | None) -> Iterator[Tensor]:
    """Integers (N, K); one a token only where nothing else could be meant by it."""
    whole = [flat for flat in rows if not flat.is_floating_point() and flat.dtype != torch.bool]
    for flat in sorted(whole, key=lambda flat: flat.shape[1] != top_k):
        lonely = flat.shape[1] > 1 or len(whole) == 1
        if lonely and flat.shape[1] <= n_experts and bool(((flat >= 0) & (flat <= n_experts)).all()):
            yield flat.long()


def _of_indices(indices: Tensor, weights: Tensor | None, logits: list[Tensor], n_experts: int) -> Routing:
    real = indices < n_experts
    if not bool(real.all()):  # a mark for "no expert", or "not here"
        shape = len(indices), n_experts + 1
        places = indices.new_zeros(shape, dtype=torch.bool).scatter_(1, indices, True)[:, :-1]
        dense = None if weights is None else weights.new_zeros(shape).scatter_(1, indices, weights)[:, :-1]
        return _of_map(places, dense, logits)
    token = torch.arange(len(indices), device=indices.device)[:, None].expand_as(indices)
    probs = _probs(logits, token, indices, weights)
    if weights is None:
        weights = torch.ones(indices.shape, device=indices.device) if probs is None else probs.gather(1, indices)
    return Routing.fixed(indices, weights.float(), n_experts, probs=probs, logits=_logits(logits))


def _of_map(chosen: Tensor, weights: Tensor | None, logits: list[Tensor]) -> Routing:
    token, expert = chosen.nonzero(as_tuple=True)
    dense = None if weights is None else weights.float().expand(chosen.shape)
    probs = _probs(logits, token, expert, None if dense is None else dense[token, expert])
    dense = dense if dense is not None else chosen.float() if probs is None else probs
    return Routing.ragged(chosen, dense, probs=probs, logits=_logits(logits))


def _logits(scores: list[Tensor]) -> Tensor | None:
    """Of several scores those that are not all positive, which are the logits."""
    return next((s for s in scores if bool((s < 0).any()) and bool(s.isfinite().all())), scores[0] if scores else None)


def _probs(scores: list[Tensor], token: Tensor, expert: Tensor, weights: Tensor | None) -> Tensor | None:
    """(N, E) the distribution that the weights of the chosen come from; None where none of those known fits."""
    found = [s.float() for s in scores if bool(s.isfinite().all())]
    given = [s for s in found if bool((s >= 0).all()) and torch.allclose(s.sum(1), s.new_ones(()), atol=1e-2)]
    if given:
        return given[0]
    logits = _logits(found)
    if logits is None:
        return None
    for scored in (logits.softmax(-1), logits.sigmoid()):
        if weights is None or _fits(weights.float().flatten(), scored, token.flatten(), expert.flatten()):
            return scored / scored.sum(1, keepdim=True)
    return None


def _fits(weights: Tensor, scored: Tensor, token: Tensor, expert: Tensor) -> bool:
    """Whether the weights of each token are in the proportions of its scores."""
    scores = scored[token, expert]
    if len(token.unique()) == len(token):  # one expert a token has no proportions: the weights of all tokens have
        token = torch.zeros_like(token)
        if bool((weights == 1).all()):
            return True
    sums = [scored.new_zeros(len(scored)).index_add_(0, token, each)[token] for each in (weights, scores)]
    shares = [each / total.clamp(min=1e-20) for each, total in zip((weights, scores), sums, strict=True)]
    scale = 1 if not len(token) or int(token.max()) else 1 / len(token)
    return bool(((shares[0] - shares[1]).abs() <= TOLERANCE * scale).all())
