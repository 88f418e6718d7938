"""A fixed random basis that is known by its seed alone: sums over it are made, and differentiated, without storing it.

Element n of basis tensor j is a function of the seed and of m = j * numel + n: word m % 4 of Philox-4x32-10 (Salmon et
al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") at the counter m // 4, its upper 24 bits taken to [-1, 1). The
generator is made of whole numbers and the last step is exact in float32, so the numbers are the same on every device,
in whatever pieces they are asked for, and torch's own generator is neither used nor moved.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

WORD = 2**32 - 1
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


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


def uniform(seed: Int64[Tensor, ""], start: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(count,) numbers `start`, `start + 1`, ... of a seed, from U[-1, 1), on the seed's device."""
    first, last = start // 4, (start + count + 3) // 4
    words = philox(torch.arange(first, last, device=seed.device), seed).view(-1)[start - 4 * first :][:count]
    return (words >> 8).to(dtype) * 2.0**-23 - 1


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, coefficients, seed, shape, chunk):
        ctx.save_for_backward(seed)
        ctx.shape, ctx.chunk, ctx.k = shape, chunk, len(coefficients)
        mixed = coefficients.new_zeros(math.prod(shape))
        for first, part in _parts(seed, ctx.k, shape, chunk, coefficients.dtype):
            mixed += coefficients[first : first + len(part)] @ part
        return mixed.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (seed,) = ctx.saved_tensors
        flat = gradient.reshape(-1)
        parts = _parts(seed, ctx.k, ctx.shape, ctx.chunk, gradient.dtype)
        return torch.cat([part @ flat for _, part in parts]), None, None, None


def _parts(seed: Tensor, k: int, shape: tuple[int, ...], chunk: int, dtype: torch.dtype):
    numel = math.prod(shape)
    for first in range(0, k, chunk):
        count = min(chunk, k - first)
        yield first, uniform(seed, first * numel, count * numel, dtype).view(count, numel)


def random_basis(
    coefficients: Float[Tensor, " k"], seed: Int64[Tensor, ""], shape: tuple[int, ...], chunk: int = 64
) -> Tensor:
    """sum_j c_j G_j in `shape`, G_j from U[-1, 1); no more than `chunk` of the G_j are in memory at a time.

    The backward pass makes them again. It is differentiable in the coefficients, once.
    """
    return _Mix.apply(coefficients, seed, tuple(shape), chunk)
