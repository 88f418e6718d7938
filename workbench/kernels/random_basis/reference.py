"""The meaning of `random_basis` and of its adjoint: the generator in torch's whole numbers, a part at a time."""

from collections.abc import Iterator

import torch
from jaxtyping import Int64
from torch import Tensor

WORD = 2**32 - 1
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
CHUNK = 2**18  # numbers at a time


def philox(counter: Int64[Tensor, "*n"], key: Int64[Tensor, ""]) -> Int64[Tensor, "*n 4"]:
    """Four words 0..2^32-1 for each 64-bit counter; the key is 64 bits as well."""
    c = [counter & WORD, counter >> 32 & WORD, torch.zeros_like(counter), torch.zeros_like(counter)]
    k = [key & WORD, key >> 32 & WORD]
    for _ in range(ROUNDS):
        # the product wraps round as a signed number, and its 64 bits are those of the unsigned one
        low, high = c[0] * MULTIPLIERS[0], c[2] * MULTIPLIERS[1]
        c = [(high >> 32 & WORD) ^ c[1] ^ k[0], high & WORD, (low >> 32 & WORD) ^ c[3] ^ k[1], low & WORD]
        k = [(part + step) & WORD for part, step in zip(k, WEYL, strict=True)]
    return torch.stack(c, -1)


def mix(coefficients: Tensor, seed: Tensor, numel: int, start: int) -> Tensor:
    """(numel,) sum_j c_j G_j."""
    out = coefficients.new_zeros(numel)
    for rows, columns, part in _parts(seed, len(coefficients), numel, start, coefficients.dtype):
        out[columns] += coefficients[rows] @ part
    return out


def products(x: Tensor, seed: Tensor, k: int, start: int) -> Tensor:
    """(k,) <G_j, x>."""
    out = x.new_zeros(k)
    for rows, columns, part in _parts(seed, k, len(x), start, x.dtype):
        out[rows] += part @ x[columns]
    return out


def _parts(seed: Tensor, k: int, numel: int, start: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """Some basis tensors whole, or a part of one: which, which of their elements, and these (tensors, elements)."""
    rows, width = max(1, CHUNK // max(1, numel)), max(1, min(numel, CHUNK))
    for row in range(0, k, rows):
        for column in range(0, numel, width):
            count, span = min(rows, k - row), min(width, numel - column)
            part = _uniform(seed, start + row * numel + column, count * span, dtype)
            yield slice(row, row + count), slice(column, column + span), part.view(count, span)


def _uniform(seed: Tensor, start: int, count: int, dtype: torch.dtype) -> Tensor:
    first, last = start // 4, (start + count + 3) // 4
    words = philox(torch.arange(first, last, device=seed.device), seed).view(-1)[start - 4 * first :][:count]
    return (words >> 8).to(dtype) * 2.0**-23 - 1
