"""Every operator's Triton path on a GPU in bfloat16, against its meaning in float64: outputs, gradients, repetition."""

import pytest
import torch
from torch import Tensor

from workbench.kernels import (
    Lookups,
    RoutePlan,
    block_sparse_attention,
    column_topk,
    dct2_rows,
    dct3_rows,
    dequantise_planes,
    dispatch,
    e3m0_pack,
    e3m0_unpack,
    gather_sum,
    haar_dwt2,
    haar_idwt2,
    hashed_lookup,
    magnitude_threshold,
    moe_mlp,
    newton_schulz,
    pack_planes,
    pcb_merge,
    random_basis,
    random_basis_adjoint,
    selective_scan,
    shared_linear,
    shared_weight,
    span_attention,
    topk_softmax,
    trim_elect_merge,
    unpack_planes,
    walsh_hadamard,
)
from workbench.kernels.block_sparse_attention import block_gate_topk
from workbench.kernels.random_basis import uniform

pytestmark = pytest.mark.gpu
EXPERTS = 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    """bfloat16 values around 0."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(torch.bfloat16).cuda()


def plan_of(kind: str, n_tokens: int = 301) -> RoutePlan:
    """Two experts for every token; or any number of them, none for some tokens; nobody chooses the last expert."""
    scores = torch.rand(n_tokens, EXPERTS - 1, generator=torch.Generator().manual_seed(0))
    if kind == "fixed":
        return RoutePlan.build(scores.argsort(1)[:, :2].reshape(-1).cuda(), EXPERTS, top_k=2)
    mask = scores < 0.4
    offs = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    return RoutePlan.build(mask.nonzero()[:, 1].cuda(), EXPERTS, tok_offs=offs.cuda())


def check(op: str, function, *inputs: Tensor, differentiable: bool = True) -> None:
    """`function(backend, *inputs)` by Triton, twice, is within 3 % of the largest value of the reference in float64."""

    def run(backend, tensors):
        tensors = [t.detach().clone().requires_grad_(differentiable) for t in tensors]
        out = function(backend, *tensors)
        if not differentiable:
            return [out]
        grad = draw(*out.shape, seed=99).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, tensors, grad)]

    found, again = run(None, inputs), run(None, inputs)
    assert dispatch.last_backend(op) == "triton"
    for ours, repeated, exact in zip(found, again, run("reference", [t.double() for t in inputs]), strict=True):
        assert torch.equal(ours, repeated)
        assert (ours - exact).abs().max() <= 0.03 * exact.abs().max()


@pytest.mark.parametrize("kind", ["fixed", "ragged"])
@pytest.mark.parametrize("activation, up", [("swiglu", 2), ("relu", 1)])
def test_moe_mlp(kind, activation, up):
    plan, dim, hidden = plan_of(kind), 192, 96
    check(
        "moe_mlp",
        lambda backend, x, w1, w2, score, b1, b2: moe_mlp(
            x, w1, w2, plan, score, b1, b2, activation=activation, backend=backend
        ),
        draw(plan.n_tokens, dim),
        draw(EXPERTS, up * hidden, dim, seed=1) / dim**0.5,
        draw(EXPERTS, dim, hidden, seed=2) / hidden**0.5,
        draw(plan.n_pairs, seed=3).float(),
        draw(EXPERTS, up * hidden, seed=4),
        draw(EXPERTS, dim, seed=5),
    )


@pytest.mark.parametrize("kind", ["fixed", "ragged"])
@pytest.mark.parametrize("dim", [40, 768])
def test_gather_sum(kind, dim):
    plan = plan_of(kind)
    y, weight = draw(plan.n_pairs, dim), draw(plan.n_pairs, seed=1).float()
    check("gather_sum", lambda backend, y, w: gather_sum(y, plan, w, backend=backend), y, weight)
    check("gather_sum", lambda backend, y: gather_sum(y, plan, backend=backend), y)


@pytest.mark.parametrize("n_experts, k", [(5, 1), (64, 8), (200, 8), (2000, 3)])
@pytest.mark.parametrize("renormalize", [True, False])
def test_topk_softmax(n_experts, k, renormalize):
    logits = draw(301, n_experts)  # bfloat16 has few values: many rows hold equal logits
    logits[0, 3] = float("nan")
    score, index = topk_softmax(logits, k, renormalize=renormalize)
    assert dispatch.last_backend("topk_softmax") == "triton"
    exact, expected = topk_softmax(logits.double(), k, renormalize=renormalize, backend="reference")
    assert torch.equal(index, expected)
    assert torch.allclose(score.double(), exact, atol=1e-5, equal_nan=True)
    check(
        "topk_softmax", lambda backend, x: topk_softmax(x, k, renormalize=renormalize, backend=backend)[0], logits[1:]
    )


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_block_sparse_attention(d, kv_heads):
    q, k, v = draw(600, 4, d), draw(600, kv_heads, d, seed=1), draw(600, kv_heads, d, seed=2)
    sequences = torch.tensor([0, 130, 600], dtype=torch.int32).cuda()
    index = block_gate_topk(q, k, 64, 3, sequences)
    assert dispatch.last_backend("block_gate_topk") == "triton"
    exact = block_gate_topk(q.double(), k.double(), 64, 3, sequences, backend="reference")
    assert (index.blocks == exact.blocks).double().mean() > 0.99  # blocks may score equally but for rounding
    check(
        "block_sparse_attention",
        lambda backend, q, k, v: block_sparse_attention(q, k, v, index, backend=backend),
        q,
        k,
        v,
    )


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_span_attention(d, kv_heads):
    q, k, v = draw(2, 4, 600, d), draw(2, kv_heads, 600, d, seed=1), draw(2, kv_heads, 600, d, seed=2)
    check(
        "span_attention",
        lambda backend, q, k, v: span_attention(q, k, v, [1, 64, 65, 700], 3, backend=backend),
        q,
        k,
        v,
        differentiable=False,
    )


@pytest.mark.parametrize("shape", [(8, 4096), (7, 33)])
@pytest.mark.parametrize("k", [3, 700])
def test_random_basis(shape, k):
    seed = torch.tensor(-0x0123456789ABCDEF)
    numbers = uniform(seed, 2**34 + 3, 5001)
    assert torch.equal(uniform(seed.cuda(), 2**34 + 3, 5001).cpu(), numbers)
    assert dispatch.last_backend("random_basis") == "triton"
    seed = seed.cuda()
    check("random_basis", lambda backend, c: random_basis(c, seed, shape, backend=backend), draw(k).float())
    check("random_basis", lambda backend, x: random_basis_adjoint(x, seed, k, backend=backend), draw(*shape).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elect", [None, "values", "weighted"])
def test_trim_elect_merge(dtype, elect):
    """Bit for bit as on a processor: products and sums are rounded apart, quotients once."""
    experts, base = draw(5, 10_001).to(dtype), draw(10_001, seed=1).to(dtype)
    how = {"weights": [0.3, 1.0, -0.2, 0.7, 0.1], "thresholds": [0.4, 0.0, 0.9, 0.2, 1.1], "elect": elect}
    for divide in (None, "count", "weights"):
        ours = trim_elect_merge(experts, base, **how, divide=divide, scale=0.7)
        assert dispatch.last_backend("trim_elect_merge") == "triton"
        theirs = trim_elect_merge(experts.cpu(), base.cpu(), **how, divide=divide, scale=0.7, backend="reference")
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_threshold(dtype):
    x = draw(300_001).to(dtype)
    falling = x.float().abs().sort(descending=True).values.tolist()
    for k in (1, 60_000, len(x)):
        assert magnitude_threshold(x, k) == falling[k - 1]
    assert dispatch.last_backend("magnitude_threshold") == "triton"


def test_pcb_merge():
    """All but the few parameters whose scores are next to the one that drops."""
    tau, base = draw(4, 20_000).float(), draw(20_000, seed=1).float()
    how = {"clip": (200, 19_799), "drop": 16_000}
    ours = pcb_merge(tau + base, base, **how)
    assert dispatch.last_backend("pcb_merge") == "triton"
    exact = pcb_merge((tau + base).double(), base.double(), **how)
    assert dispatch.last_backend("pcb_merge") == "reference"
    assert torch.equal(pcb_merge(tau + base, base, **how), ours)
    assert ((ours - exact).abs() < 1e-4 * tau.abs().max()).double().mean() > 0.99


@pytest.mark.parametrize("length", [1, 64, 4096, 2**17])
def test_walsh_hadamard(length):
    check("walsh_hadamard", lambda backend, x: walsh_hadamard(x, backend=backend), draw(3, length))
    wide = draw(3, length).float()
    assert torch.equal(walsh_hadamard(wide).cpu(), walsh_hadamard(wide.cpu(), backend="reference"))


@pytest.mark.parametrize("size", [(2, 2), (32, 34), (224, 224)])
def test_haar(size):
    wide = draw(2, 3, *size).float()
    bands = haar_dwt2(wide.cpu(), backend="reference")
    check("haar", lambda backend, x: haar_dwt2(x, backend=backend), draw(2, 3, *size))
    assert torch.equal(haar_dwt2(wide).cpu(), bands)
    assert torch.equal(haar_idwt2(bands.cuda()).cpu(), haar_idwt2(bands, backend="reference"))


@pytest.mark.parametrize("dim", [5, 16, 200])
def test_hashed_lookup(dim):
    fields = (0, 1, 2)
    lookups = Lookups((0, 1, 0), (0, 0, 3), (700, 90, 600), (0, 5, 2**40), fields, (0, 0, 1))
    ids = torch.randint(2**62, (301, 3), generator=torch.Generator().manual_seed(0)).cuda()
    tables = draw(700, dim), draw(90, dim, seed=1)

    def function(backend, *given):
        return hashed_lookup(given, ids, lookups, mean=True, backend=backend)

    check("hashed_lookup", function, *tables)
    wide = [table.float() for table in tables]
    assert torch.equal(function(None, *wide), function("reference", *wide))
    moved = [table.clone().requires_grad_() for table in wide]
    hashed_lookup(moved, ids, lookups, mean=True, lr=0.5).sum().backward()
    own = [table.clone().requires_grad_() for table in wide]
    function("reference", *own).sum().backward()
    for after, before in zip(moved, own, strict=True):
        torch.testing.assert_close(after.detach(), (before - 0.5 * before.grad).detach())


@pytest.mark.parametrize("shape", [(1, 7), (100, 100), (3, 129, 500), (700, 260)])
def test_newton_schulz(shape):
    """In bfloat16 as close to the meaning as torch's own products come, where not a singular value is small."""
    check("newton_schulz", lambda backend, x: newton_schulz(x, backend=backend), draw(*shape), differentiable=False)
    wide = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    exact = newton_schulz(wide.double())
    assert (newton_schulz(wide.cuda()).cpu() - exact).abs().max() < 1e-4


@pytest.mark.parametrize("m", [48, 1000, 4096])
def test_cosine_transforms(m):
    check("dct_rows", lambda backend, x: dct2_rows(x, backend=backend), draw(70, m))
    check("dct_rows", lambda backend, x: dct3_rows(x, backend=backend), draw(70, m))


@pytest.mark.parametrize("norm", [1, 2])
def test_columns_of_the_largest_norm(norm):
    x = draw(2, 700, 300).float()
    found = column_topk(x, 40, norm=norm)
    assert dispatch.last_backend("column_topk") == "triton"
    for ours, exact in zip(found, column_topk(x.double().cpu(), 40, norm=norm), strict=True):
        assert torch.equal(ours.cpu(), exact.to(ours.dtype))


@pytest.mark.parametrize("cols", [64, 1000])
def test_bit_planes(cols):
    codes = torch.randint(256, (3, 70, cols), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    planes = pack_planes(codes.cuda())
    assert dispatch.last_backend("pack_planes") == "triton"
    assert torch.equal(planes.cpu(), pack_planes(codes))
    scale, offset = draw(3, 70, -(-cols // 64)).float(), draw(3, 70, -(-cols // 64), seed=1).float()
    for bits in (1, 3, 8):
        assert torch.equal(unpack_planes(planes[:, :bits], cols).cpu(), codes >> (8 - bits))
        made = dequantise_planes(planes[:, :bits], scale, offset, cols, 64).cpu()
        exact = dequantise_planes(planes[:, :bits].cpu(), scale.double().cpu(), offset.double().cpu(), cols, 64)
        assert (made - exact).abs().max() < 1e-6 * exact.abs().max()


@pytest.mark.parametrize(("m", "offset"), [(31, 5), (6_000, 2**40 + 3)])
def test_shared_store(m, offset):
    """The weights bit for bit as on a processor."""
    seed, scale, memory = torch.tensor(-0x0123456789ABCDEF), torch.tensor(0.37), draw(m).float()
    made = shared_weight(memory, seed.cuda(), scale.cuda(), (300, 200), offset=offset)
    assert dispatch.last_backend("shared_store") == "triton"
    assert torch.equal(made.cpu(), shared_weight(memory.cpu(), seed, scale, (300, 200), offset=offset))

    def product(backend, x, memory):
        how = {"offset": offset, "backend": backend}
        return shared_linear(x, memory, seed.cuda(), scale.cuda().to(memory.dtype), 300, **how)

    check("shared_store", product, draw(70, 200).float(), memory)


@pytest.mark.parametrize("shape", [(2, 100, 16, 300), (1, 33, 5, 64), (3, 40, 20, 1)], ids=str)
def test_selective_scan(shape):
    """The outputs of some parts of a sequence, each from the state of the one before."""
    batch, channels, states, steps = shape
    rows, lines = (batch, channels, steps), (batch, states, steps)

    def scan(backend, x, delta, a, b, c, d, z, state):
        first, second = (
            [t[..., at] for t in (x, delta, b, c, z)] for at in (slice(steps // 2), slice(steps // 2, None))
        )
        outs = []
        for x, delta, b, c, z in (first, second):
            y, state = selective_scan(x, delta, -a.exp(), b, c, d, z, state, backend=backend)
            outs.append(y)
        return torch.cat([torch.cat(outs, -1), state.to(outs[0].dtype)], -1)

    check(
        "selective_scan",
        scan,
        *(draw(*rows, seed=seed) for seed in (0, 1)),
        draw(channels, states, seed=2),
        *(draw(*lines, seed=seed) for seed in (3, 4)),
        draw(channels, seed=5),
        draw(*rows, seed=6),
        draw(batch, channels, states, seed=7),
    )


@pytest.mark.parametrize("block", [64, 128])
def test_e3m0(block):
    """What it packs and unpacks has the bits of the reference on a processor."""
    x = draw(2**16 + 7).float() * draw(2**16 + 7, seed=1).float()
    codes, scales = e3m0_pack(x, block)
    unpacked = e3m0_unpack(codes, scales, len(x), block)
    assert dispatch.last_backend("e3m0_pack") == dispatch.last_backend("e3m0_unpack") == "triton"
    expected = e3m0_pack(x.cpu(), block, backend="reference")
    assert torch.equal(codes.cpu(), expected[0]) and torch.equal(scales.cpu(), expected[1])
    assert torch.equal(unpacked.cpu(), e3m0_unpack(*expected, len(x), block, backend="reference"))
