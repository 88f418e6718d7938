"""Span attention: every path equals dense attention under the mask, and bad input is named."""

from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.draws import draw
from workbench.errors import InputError
from workbench.kernels import dispatch
from workbench.kernels.span_attention import cpu, reference, span_attention, span_decode

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SPANS = [1, 7, 64, 65, 300, 7, 1, 64]


def heads(n, d=16, dtype=torch.float32, batch=2, hq=8, hkv=8) -> tuple[Tensor, Tensor, Tensor]:
    return draw(batch, hq, n, d, dtype=dtype), *(draw(batch, hkv, n, d, dtype=dtype, seed=s) for s in (1, 2))


def naive(q, k, v, spans, sink):
    """Query by query, from the definition alone."""
    output, group = torch.zeros_like(q), q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                seen = [j for j in range(i + 1) if j < sink or i - j < spans[h]]
                keys, values = k[b, h // group, seen], v[b, h // group, seen]
                output[b, h, i] = (keys @ q[b, h, i] / q.shape[-1] ** 0.5).softmax(0) @ values
    return output


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("sink", [0, 1, 4, 30])
def test_every_path_is_the_definition(backend, sink):
    q, k, v = heads(20, 4, torch.float64, hq=4, hkv=2)
    spans = [1, 5, 20, 100]
    assert torch.allclose(
        span_attention(q, k, v, spans, sink, backend=backend), naive(q, k, v, spans, sink), atol=1e-12
    )
    assert dispatch.last_backend("span_attention") == backend


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("n", [1, cpu.TILE - 1, cpu.TILE, cpu.TILE + 1, 3 * cpu.TILE + 5])
@pytest.mark.parametrize("sink", [0, 3, cpu.TILE + 2])
@pytest.mark.parametrize("hkv", [8, 2])
def test_outputs_and_gradients_are_those_of_the_reference_in_float64(dtype, n, sink, hkv):
    inputs = [x.requires_grad_() for x in heads(n, dtype=dtype, hkv=hkv)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    output = span_attention(*inputs, SPANS, sink)
    assert dispatch.last_backend("span_attention") == "cpu" and output.is_contiguous() and output.dtype == dtype
    expected = span_attention(*exact, SPANS, sink, backend="reference")
    grad = draw(*output.shape, dtype=dtype, seed=5)
    gradients = torch.autograd.grad(output, inputs, grad)
    assert dispatch.last_backend("span_attention.backward") == "cpu"
    for value, wanted in zip(
        (output, *gradients), (expected, *torch.autograd.grad(expected, exact, grad.double())), strict=True
    ):
        scale = wanted.abs().amax().clamp_min(1)
        assert (value - wanted).abs().max() / scale <= TOLERANCE[dtype]


def test_the_reference_gradient_is_autograds():
    q, k, v = (x.requires_grad_() for x in heads(9, 4, torch.float64, hq=2, hkv=1))
    spans, grad = [2, 5], draw(2, 2, 9, 4, dtype=torch.float64, seed=7)
    plain = reference.span_attention(q, k, v, spans, 1)
    by_hand = reference.span_attention_backward(grad, q, k, v, spans, 1)
    for one, other in zip(by_hand, torch.autograd.grad(plain, (q, k, v), grad), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend):
    inputs = [x.requires_grad_() for x in heads(70, 2, torch.float64, batch=1, hq=2, hkv=1)]
    assert torch.autograd.gradcheck(lambda *x: span_attention(*x, [3, 68], 2, backend=backend), inputs, fast_mode=True)


def test_a_span_of_the_whole_length_is_dense_attention():
    q, k, v = heads(130)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for spans, sink in (([130] * 8, 0), ([10**9] * 8, 3), ([1] * 8, 130)):
        assert torch.equal(span_attention(q, k, v, spans, sink), dense)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_repetition_is_bit_equal(name):
    inputs = [x.requires_grad_() for x in heads(150, hkv=2)]
    runs = []
    for _ in range(2):
        output = span_attention(*inputs, SPANS, 3, backend=name)
        runs.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_strided_inputs_and_tensors_of_spans():
    packed = draw(2, 100, 3, 8, 16)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    assert not q.is_contiguous()
    expected = span_attention(q.contiguous(), k.contiguous(), v.contiguous(), SPANS, 2)
    assert torch.allclose(span_attention(q, k, v, SPANS, 2), expected, atol=1e-6)
    transposed = (x.mT.contiguous().mT for x in (q, k, v))
    assert torch.allclose(span_attention(*transposed, torch.tensor(SPANS), 2), expected, atol=1e-6)


def test_what_no_query_sees_is_not_read():
    """Between the sink and the band of the last tile, on the path that is meant not to touch it."""
    q, k, v = heads(4 * cpu.TILE, hq=1, hkv=1)
    expected = span_attention(q, k, v, [9], 2)
    k[:, :, 2 : 2 * cpu.TILE] = v[:, :, 2 : 2 * cpu.TILE] = float("nan")
    result = span_attention(q, k, v, [9], 2)
    assert torch.equal(result[:, :, 3 * cpu.TILE :], expected[:, :, 3 * cpu.TILE :])


@pytest.mark.parametrize("shape", [(0, 8, 5, 16), (2, 8, 0, 16)])
def test_empty_input_gives_empty_output(shape):
    q = torch.zeros(shape, requires_grad=True)
    output = span_attention(q, q, q, SPANS, 2)
    assert output.shape == shape
    output.sum().backward()
    assert q.grad.shape == shape


def test_the_operators_pass_opcheck():
    q, k, v = (x.requires_grad_() for x in heads(70, batch=1, hq=4, hkv=2))
    torch.library.opcheck(torch.ops.workbench.span_attention.default, (q, k, v, [1, 70, 3, 3], 2, "cpu"))
    plain = [x.detach() for x in (q, q, k, v)]
    torch.library.opcheck(torch.ops.workbench.span_attention_backward.default, (*plain, [1, 70, 3, 3], 2, "cpu"))
    cache = draw(1, 40, 16)
    torch.library.opcheck(
        torch.ops.workbench.span_decode.default, (draw(1, 4, 16), cache, cache, [0, 10], [10, 30], "cpu")
    )


def test_a_compiled_function_has_no_graph_break():
    inputs = [x.requires_grad_() for x in heads(70)]
    function = torch.compile(lambda *x: span_attention(*x, SPANS, 2) * 2, fullgraph=True, backend="aot_eager")
    eager = span_attention(*inputs, SPANS, 2) * 2
    assert torch.allclose(function(*inputs), eager)
    compiled = torch.autograd.grad(function(*inputs).sum(), inputs)
    assert all(torch.allclose(a, b) for a, b in zip(compiled, torch.autograd.grad(eager.sum(), inputs), strict=True))


def test_meta_tensors_give_shapes_without_memory():
    q = torch.empty(2, 4, 2**22, 128, device="meta", dtype=torch.float16)
    assert span_attention(q, q[:, :2], q[:, :2], [64] * 4, 4).shape == q.shape


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "start, length",
    [([0, 40, 80], [40, 40, 40]), ([0, 10, 50], [10, 7, 1]), ([80, 0, 30], [40, 5, 5]), ([5, 5, 5], [9, 9, 9])],
)
def test_decode_attends_to_the_slots_of_each_head(backend, dtype, start, length):
    q, k, v = draw(2, 6, 16, dtype=dtype), draw(2, 120, 16, dtype=dtype, seed=1), draw(2, 120, 16, dtype=dtype, seed=2)
    output = span_decode(q, k, v, start, length, backend=backend)
    for h in range(6):
        slots = slice(start[h // 2], start[h // 2] + length[h // 2])
        keys, values = k[:, slots].double(), v[:, slots].double()
        weights = (torch.einsum("bd,bsd->bs", q[:, h].double(), keys) / 4).softmax(-1)
        wanted = torch.einsum("bs,bsd->bd", weights, values)
        assert (output[:, h] - wanted).abs().max() <= TOLERANCE[dtype]
    assert dispatch.last_backend("span_decode") == backend


def test_decode_on_a_strided_cache():
    packed = draw(2, 120, 2, 16)
    k, v = packed.unbind(2)
    q = draw(2, 3, 16, seed=3)
    result = span_decode(q, k, v, [0, 40, 80], [30, 30, 30])
    assert torch.allclose(result, span_decode(q, k, v, [0, 40, 80], [30, 30, 30], backend="reference"), atol=1e-6)


def bad(message: str, *, q=None, k=None, v=None, spans=None, sink=2, backend=None):
    a, b, c = heads(10)
    with pytest.raises(InputError, match=message):
        span_attention(
            a if q is None else q,
            b if k is None else k,
            c if v is None else v,
            SPANS if spans is None else spans,
            sink,
            backend=backend,
        )


def test_bad_input_is_named():
    q, _, _ = heads(10)
    bad(r"q has shape \(8, 10, 16\) but must be \(batch, heads, tokens, width\)", q=q[0])
    bad(r"k has shape \(2, 8, 10\)", k=q[..., 0])
    bad("k is torch.float64 but must be torch.float32 as q is", k=q.double())
    bad("q is torch.int64 but must be float16", q=q.long())
    bad(r"v has shape \(2, 8, 9, 16\) but must be \(2, 8, 10, 16\) as k has", v=q[:, :, 1:])
    bad("must have the batch 2 and the width 16 of q", k=q[:1], v=q[:1])
    bad("k has 9 tokens but must have as many as q, 10", k=q[:, :, 1:], v=q[:, :, 1:])
    bad("k has 3 heads but their number must divide the 8 heads of q", k=q[:, :3], v=q[:, :3])
    bad("spans has 3 entries but must have one for each query head, 8", spans=[1, 2, 3])
    bad("spans holds 0 but must be at least 1", spans=[0] * 8)
    bad("spans holds 1.5 but must hold integers", spans=[1.5] * 8)
    bad(r"spans is torch.float32 of shape \(8,\)", spans=torch.ones(8))
    bad("sink is -1 but must be a number of tokens, at least 0", sink=-1)
    bad("sink is 1.5", sink=1.5)
    bad("backend of span_attention 'grouped_mm' is unknown", backend="grouped_mm")
    bad("q has shape .* but its width must be at least 1", q=q[..., :0], k=q[..., :0], v=q[..., :0])


def test_a_path_that_cannot_do_the_job_says_so(monkeypatch):
    q, k, v = heads(10, 24)
    with pytest.raises(InputError, match="backend is 'triton'"):
        span_attention(q, k, v, SPANS, 2, backend="triton")
    # imported before it is said to be interpreted, so that this process can still compile it
    pytest.importorskip("triton")
    import_module("workbench.kernels.span_attention.triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InputError, match="q has head width 24 but the triton path takes 16, 32, 64, 128"):
        span_attention(q, k, v, SPANS, 2, backend="triton")
    q, k, v = heads(10, dtype=torch.float64)
    with pytest.raises(InputError, match=r"q is torch\.float64 but the triton path takes"):
        span_attention(q, k, v, SPANS, 2, backend="triton")
    q, k, v = heads(10)
    with pytest.raises(InputError, match="v requires a gradient but span_attention on the triton path has none"):
        span_attention(q, k, v.requires_grad_(), SPANS, 2, backend="triton")


def test_bad_input_of_decode_is_named():
    q, k = draw(2, 4, 16), draw(2, 30, 16)
    for message, arguments in {
        r"q has shape \(4, 16\) but must be \(batch, heads, width\)": (q[0], k, k, [0], [1]),
        r"k has shape \(30, 16\) but must be \(batch, slots, width\)": (q, k[0], k, [0], [1]),
        "start has 3 entries but their number must divide the 4 heads of q": (q, k, k, [0, 1, 2], [1, 1, 1]),
        "length has 1 entries but must have one for each key head, 2": (q, k, k, [0, 1], [1]),
        "length holds 0 but must be at least 1": (q, k, k, [0, 1], [0, 1]),
        "start 20 and length 11 reach slot 31 but k has 30 slots": (q, k, k, [0, 20], [1, 11]),
        "q requires a gradient but span_decode has none": (q.clone().requires_grad_(), k, k, [0], [1]),
    }.items():
        with pytest.raises(InputError, match=message):
            span_decode(*arguments)


def test_operations_are_counted_as_for_dense_attention():
    q, k, v = (x.requires_grad_() for x in heads(100, hkv=2))
    query, cache = draw(2, 8, 16), draw(2, 100, 16)

    def count(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    dense = 4 * 2 * 8 * 100 * 100 * 16
    assert count(lambda: span_attention(q, k, v, [100] * 8)) == dense
    assert count(lambda: span_attention(q, k, v, [20, 30] * 4, 5)) == dense * 30 // 100
    assert count(lambda: span_attention(q, k, v, [45] * 8, 5).sum().backward()) == dense // 2 * 7 // 2
    assert count(lambda: span_decode(query, cache, cache, [0, 20], [20, 80])) == 4 * 2 * 16 * (4 * 20 + 4 * 80)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("hkv", [8, 2])
def test_triton_on_a_gpu(dtype, d, hkv):
    q, k, v = (x.cuda() for x in heads(1000, d, dtype, hkv=hkv))
    result = span_attention(q, k, v, SPANS, 5)
    assert dispatch.last_backend("span_attention") == "triton"
    wanted = reference.span_attention(q.double(), k.double(), v.double(), SPANS, 5)
    assert (result - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()
    cache = [draw(2, 3000, d, dtype=dtype, seed=s).cuda() for s in (3, 4)]
    start, length = [0, 1500], [1500, 700]
    decoded = span_decode(q[:, :, 0], *cache, start, length)
    wanted = reference.span_decode(q[:, :, 0].double(), *(x.double() for x in cache), start, length)
    assert (decoded - wanted).abs().max() <= TOLERANCE[dtype]
