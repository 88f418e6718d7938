"""Block-sparse attention against dense causal attention: 8 heads of 64, eight blocks a query, the gate included.

The bound of a case is the time that torch takes for matrix products of as many operations as the blocks that are
visited need: products (1024, d) x (d, B), with one memory for all results. A path in C can come near it or fall below
it: it multiplies a query's own block only as far as the query sees. All lengths are timed forward, those up to 8,192
also with the backward; with two rounds that count, the default, a run at one and at two threads takes some three
minutes, of which one goes to dense attention at 32,768.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.bench.core import BOTH, FORWARD, LIMIT, OURS, Case, Contestants
from workbench.kernels.block_sparse_attention import block_gate_topk, block_sparse_attention

REPEATS = 2
HEADS, WIDTH, TOP_K = 8, 64, 8
SDPA = "torch/sdpa"
ROWS = 1024  # of a product of the bound

#: (tokens, block size, directions)
SHAPES = (
    (2048, 64, (FORWARD, BOTH)),
    (4096, 64, (FORWARD, BOTH)),
    (8192, 64, (FORWARD, BOTH)),
    (8192, 128, (FORWARD, BOTH)),
    (16384, 64, (FORWARD,)),
    (32768, 64, (FORWARD,)),
)


QUICK = ((512, 64, (FORWARD, BOTH)), (1024, 64, (FORWARD, BOTH)))


def cases(quick: bool = False) -> list[Case]:
    return [case(*shape) for shape in (QUICK if quick else SHAPES)]


def case(tokens: int, block_size: int, directions: tuple[str, ...] = (FORWARD, BOTH)) -> Case:
    """One length and block size."""
    name = f"T={tokens} H={HEADS} d={WIDTH} block={block_size} top_k={TOP_K}"
    return Case(name, lambda direction: contestants(tokens, block_size, direction), directions)


def contestants(tokens: int, block_size: int, direction: str) -> Contestants:
    """Both attentions on the same tensors, and the bound."""
    generator = torch.Generator().manual_seed(0)
    both = direction == BOTH
    q, k, v = (
        torch.randn(1, HEADS, tokens, WIDTH, generator=generator).requires_grad_(both) for _ in range(3)
    )  # the layout that dense attention likes best; the other reads it through strides
    grad = torch.randn(1, HEADS, tokens, WIDTH, generator=generator)

    def sparse() -> Tensor:
        by_token = [x[0].transpose(0, 1) for x in (q, k, v)]
        index = block_gate_topk(*by_token[:2], block_size, TOP_K)
        return block_sparse_attention(*by_token, index).transpose(0, 1)[None]

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def run(attention):
        def once() -> None:
            out = attention()
            if both:
                torch.autograd.grad(out, (q, k, v), grad)

        return once

    return {OURS: run(sparse), SDPA: run(dense), LIMIT: bound(tokens, block_size, both)}


def bound(tokens: int, block_size: int, both: bool):
    """Products of as many operations as the visited blocks take: two forward, five more for the gradients."""
    blocks = -(-tokens // block_size)
    visited = HEADS * block_size * sum(min(TOP_K, block + 1) for block in range(blocks))
    products = (7 if both else 2) * visited // ROWS
    rows, keys, out = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, block_size), torch.empty(ROWS, block_size)

    def once() -> None:
        for _ in range(products):
            torch.mm(rows, keys, out=out)

    return once
