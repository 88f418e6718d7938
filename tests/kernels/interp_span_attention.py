"""Span attention's Triton kernels under the interpreter; run by test_interpreter in a process of its own."""

import pytest
import torch

from workbench.kernels import dispatch
from workbench.kernels.span_attention import reference, span_attention, span_decode
from workbench.kernels.span_attention.triton import PIECE, PIECES, TILES

DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3}
dtypes = pytest.mark.parametrize("dtype", list(DTYPES), ids=str)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heads(n, d=16, dtype=torch.float32, batch=1, hq=2, hkv=1):
    return (
        draw(batch, hq, n, d, dtype=dtype),
        draw(batch, hkv, n, d, dtype=dtype, seed=1),
        draw(batch, hkv, n, d, dtype=dtype, seed=2),
    )


def close(result, q, k, v, spans, sink):
    expected = reference.span_attention(q.double(), k.double(), v.double(), spans, sink)
    scale = expected.abs().amax(-1, keepdim=True).clamp_min(1)
    return ((result - expected).abs() / scale).max() <= DTYPES[q.dtype]


@dtypes
@pytest.mark.parametrize("n", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("sink", [0, 1, 33])
def test_prefill_equals_the_reference(dtype, n, sink):
    q, k, v = heads(n, dtype=dtype)
    for spans in ([1, 40], [64, 300]):
        result = span_attention(q, k, v, spans, sink, backend="triton")
        assert result.dtype == dtype and close(result, q, k, v, spans, sink)
    assert dispatch.last_backend("span_attention") == "triton"


@dtypes
def test_the_edges_of_the_tiles(dtype):
    block_m, block_n = TILES[dtype.itemsize, False][:2]
    for n in (block_m - 1, block_m + 1):
        q, k, v = heads(n, dtype=dtype)
        for spans in ([block_n - 1, block_n], [block_n + 1, block_m]):
            for sink in (block_n, block_n + 1):
                assert close(span_attention(q, k, v, spans, sink, backend="triton"), q, k, v, spans, sink)


@pytest.mark.parametrize("d", [32, 64])
def test_other_widths(d):
    q, k, v = heads(70, d)
    assert close(span_attention(q, k, v, [5, 50], 3, backend="triton"), q, k, v, [5, 50], 3)


def test_strided_inputs():
    q, k, v = heads(70, 32, batch=2)
    packed = torch.stack([q, k.expand_as(q), v.expand_as(q)], 3)  # (B, H, N, 3, d)
    q, k, v = packed.unbind(3)
    assert q.stride(2) == 3 * 32
    assert close(span_attention(q, k, v, [5, 50], 3, backend="triton"), q, k, v, [5, 50], 3)
    q, k, v = (x.mT.contiguous().mT for x in (q, k, v))  # the last stride is not 1
    assert close(span_attention(q, k, v, [5, 50], 3, backend="triton"), q, k, v, [5, 50], 3)


def test_two_runs_are_bit_equal_and_the_end_is_not_read():
    n = 70
    big = [torch.cat([x, torch.full_like(x, float("nan"))], 2) for x in heads(n)]
    first = span_attention(*(x[:, :, :n] for x in big), [5, 50], 3, backend="triton")
    second = span_attention(*heads(n), [5, 50], 3, backend="triton")
    assert torch.equal(first, second)


@dtypes
def test_decode_equals_the_reference_over_pieces_of_the_cache(dtype):
    lengths = [1, PIECE, PIECE + 1, 2 * PIECE + 3]
    start = [0, 1, 1 + PIECE, 2 + 2 * PIECE]
    q = draw(1, 8, 16, dtype=dtype)
    k, v = (draw(1, start[-1] + lengths[-1] + 5, 16, dtype=dtype, seed=seed) for seed in (1, 2))
    k[:, -5:] = v[:, -5:] = float("nan")  # slots that are not in use
    result = span_decode(q, k, v, start, lengths, backend="triton")
    expected = reference.span_decode(q.double(), k.double(), v.double(), start, lengths)
    assert (result - expected).abs().max() <= DTYPES[dtype]
    assert torch.equal(result, span_decode(q, k, v, start, lengths, backend="triton"))


def test_decode_joins_more_pieces_than_one_step_takes():
    length = PIECE * (PIECES + 1) + 1
    q, k, v = draw(1, 1, 16), draw(1, length, 16, seed=1), draw(1, length, 16, seed=2)
    result = span_decode(q, k, v, [0], [length], backend="triton")
    expected = reference.span_decode(q.double(), k.double(), v.double(), [0], [length])
    assert (result - expected).abs().max() <= 1e-5
