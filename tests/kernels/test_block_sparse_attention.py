"""Block-sparse attention: every path on a CPU means the same, and the index is what it says.

The Triton path has the same cases in interp_block_sparse_attention.py.
"""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.flop_counter import FlopCounterMode

from workbench.errors import InputError
from workbench.kernels import block_gate_topk, block_sparse_attention, dispatch, memory
from workbench.kernels.block_sparse_attention import _attend, _gate, cpu, gate, index, reference
from workbench.kernels.block_sparse_attention.index import BlockIndex, invert

operator = importlib.import_module("workbench.kernels.block_sparse_attention")
PATHS = ("reference", "cpu")  # of any type
ALL = (*PATHS, "native")
paths = pytest.mark.parametrize("backend", ALL)
VARLEN = torch.tensor([0, 1, 40, 40, 47, 100], dtype=torch.int32)


def tensors(n, heads=4, kv_heads=2, d=16, dtype=torch.float64, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, heads, d), (n, kv_heads, d), (n, kv_heads, d))
    made = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.requires_grad_(grad) for x in made]


def exact(backend):
    """The widest type of a path, and how far two ways of adding up differ in it."""
    return (torch.float32, 1e-5) if backend == "native" else (torch.float64, 1e-11)


def dense(q, k, v, scale=None):
    """Causal attention of one sequence by torch."""
    group = q.shape[1] // k.shape[1]
    heads = [x.transpose(0, 1)[None] for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))]
    return F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale)[0].transpose(0, 1)


def with_grads(attention, q, k, v, seed=9):
    out = attention(q, k, v)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    return out, *torch.autograd.grad(out, (q, k, v), grad)


def close(a, b, tolerance):
    return all(
        torch.allclose(x.double(), y.double(), rtol=tolerance, atol=tolerance) for x, y in zip(a, b, strict=True)
    )


# what it equals


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("n, block, top_k", [(100, 8, 13), (100, 8, 40), (37, 64, 1), (23, 1, 23), (64, 16, 4)])
def test_moba_with_every_block_is_dense_attention(backend, dtype, tolerance, n, block, top_k):
    q, k, v = tensors(n, dtype=dtype, grad=True)
    chosen = block_gate_topk(q, k, block, top_k, backend=backend)
    sparse = with_grads(lambda *qkv: block_sparse_attention(*qkv, chosen, backend=backend), q, k, v)
    assert close(sparse, with_grads(dense, q, k, v), tolerance)
    if dtype == torch.float32:
        sparse = with_grads(lambda *qkv: block_sparse_attention(*qkv, chosen, backend="native"), q, k, v)
        assert close(sparse, with_grads(dense, q, k, v), tolerance)


@paths
def test_moba_with_one_block_is_attention_within_blocks(backend):
    dtype, tolerance = exact(backend)
    q, k, v = tensors(50, dtype=dtype)
    out = block_sparse_attention(q, k, v, block_gate_topk(q, k, 16, 1, backend=backend), backend=backend)
    parts = [dense(*(x[start : start + 16] for x in (q, k, v))) for start in range(0, 50, 16)]
    assert torch.allclose(out, torch.cat(parts), atol=tolerance)


CASES = [
    {"n": 100, "block": 8, "top_k": 3},
    {"n": 100, "block": 8, "top_k": 3, "sequences": VARLEN},
    {"n": 300, "block": 16, "top_k": 4, "heads": 2, "kv_heads": 1},
    {"n": 64, "block": 16, "top_k": 2, "heads": 3, "kv_heads": 3, "d": 5},
    {"n": 5, "block": 64, "top_k": 8},
    {"n": 1, "block": 4, "top_k": 2},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("loud", [1.0, 40.0], ids=["plain", "large scores"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_moba_paths_agree(case, loud, dtype, tolerance, monkeypatch):
    """Output and gradients; large scores take the way that finds each query's maximum, small tiles split columns."""
    q, k, v = tensors(case["n"], *(case.get(x, y) for x, y in (("heads", 4), ("kv_heads", 2), ("d", 16))))
    q, v = (q * loud).to(dtype).requires_grad_(), v.to(dtype).requires_grad_()
    k = k.to(dtype).requires_grad_()
    chosen = [
        block_gate_topk(q, k, case["block"], case["top_k"], case.get("sequences"), backend=path)
        for path in (ALL if dtype == torch.float32 else PATHS)
    ]
    for other in chosen[1:]:
        assert all(map(torch.equal, chosen[0].tensors(), other.tensors()))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = with_grads(lambda *qkv: block_sparse_attention(*qkv, chosen[0], backend="reference"), *wide)
    scale = max(1.0, max(float(x.detach().abs().max()) for x in expected))
    for room in (cpu.CACHE, 600):
        monkeypatch.setattr(cpu, "CACHE", room)
        found = with_grads(lambda *qkv: block_sparse_attention(*qkv, chosen[0], backend="cpu"), q, k, v)
        assert close([x / scale for x in found], [x / scale for x in expected], tolerance * loud)
    if dtype == torch.float32:
        found = with_grads(lambda *qkv: block_sparse_attention(*qkv, chosen[0], backend="native"), q, k, v)
        assert close([x / scale for x in found], [x / scale for x in expected], tolerance * loud)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_moba_equals_flex_attention():
    """A reference that is not ours: torch's flex attention with the same blocks."""
    q, k, v = tensors(64, 2, 2, dtype=torch.float32)
    chosen = block_gate_topk(q, k, 8, 3)
    allowed = reference.mask(chosen)

    def mask_mod(b, h, i, j):
        return allowed[i, h, j]

    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
    mask = create_block_mask(mask_mod, 1, 2, 64, 64, device="cpu")
    expected = flex_attention(*heads, block_mask=mask)[0].transpose(0, 1)
    assert torch.allclose(block_sparse_attention(q, k, v, chosen), expected, atol=1e-5)


def test_gradients_of_the_formula():
    q, k, v = tensors(20, 2, 1, 4, grad=True)
    chosen = block_gate_topk(q, k, 4, 3)
    for backend in PATHS:
        assert torch.autograd.gradcheck(
            lambda *qkv, path=backend: block_sparse_attention(*qkv, chosen, backend=path), (q, k, v), fast_mode=True
        )


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_accumulates_in_float32(dtype, tolerance):
    q, k, v = tensors(100, dtype=dtype, grad=True)
    chosen = block_gate_topk(q, k, 8, 4)
    found = with_grads(lambda *qkv: block_sparse_attention(*qkv, chosen), q, k, v)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = with_grads(lambda *qkv: block_sparse_attention(*qkv, chosen, backend="reference"), *wide)
    assert all(x.dtype == dtype for x in found) and close(found, expected, tolerance)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=7),
    block=st.integers(1, 20),
    top_k=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_moba_over_packed_sequences_is_moba_over_each(lengths, block, top_k, seed):
    n = sum(lengths)
    if n == 0:
        return
    q, k, v = tensors(n, 2, 1, 8, seed=seed)
    sequences = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    out = block_sparse_attention(q, k, v, block_gate_topk(q, k, block, top_k, sequences))
    parts = []
    for start, end in zip(sequences[:-1].tolist(), sequences[1:].tolist(), strict=True):
        if end > start:
            one = [x[start:end] for x in (q, k, v)]
            parts.append(block_sparse_attention(*one, block_gate_topk(*one[:2], block, top_k)))
    assert torch.allclose(out, torch.cat(parts), atol=1e-11)


# what it must not do


@paths
def test_moba_is_causal_through_the_means_as_well(backend):
    dtype, tolerance = exact(backend)
    q, k, v = tensors(60, dtype=dtype)
    at = 37

    def run(k, v):
        return block_sparse_attention(q, k, v, block_gate_topk(q, k, 8, 3, backend=backend), backend=backend)

    before = run(k, v)
    k, v = k.clone(), v.clone()
    k[at] += 100
    v[at] += 100
    after = run(k, v)
    assert torch.allclose(before[:at], after[:at], rtol=0, atol=tolerance)
    assert (before[at:] - after[at:]).abs().max() > 1


def test_no_numbers_stay_where_they_are():
    """A NaN in a key or value reaches the queries that attend to its block, and padding does not spread it."""
    q, k, v = tensors(60, 2, 1)
    at = 56  # the first token of the last block, which is shorter than the others
    v[at] = torch.nan
    chosen = block_gate_topk(q, k, 8, 3)
    out = block_sparse_attention(q, k, v, chosen)
    assert torch.equal(out.isnan().any(-1).any(-1).nonzero()[:, 0], torch.arange(at, 60))
    k[at] = torch.nan
    assert block_gate_topk(q, k, 8, 3).blocks[:at].equal(chosen.blocks[:at])


def test_nothing_but_inputs_output_sums_and_index_is_kept():
    q, k, v = tensors(64, grad=True)
    chosen = block_gate_topk(q, k, 8, 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = block_sparse_attention(q, k, v, chosen)
    addresses = {x.data_ptr() for x in (q, k, v, out, *chosen.tensors())}
    others = [x for x in kept if x.data_ptr() not in addresses]
    assert [tuple(x.shape) for x in others] == [(64, 4)]  # the logarithms of sums


def test_runs_repeat_bit_by_bit():
    q, k, v = tensors(300, dtype=torch.float32, grad=True)

    def run(*qkv):
        return block_sparse_attention(*qkv, block_gate_topk(*qkv[:2], 16, 4))

    assert all(torch.equal(a, b) for a, b in zip(with_grads(run, q, k, v), with_grads(run, q, k, v), strict=True))


def test_threads_change_nothing():
    """Each thread takes whole heads, so their number does not show in the result. In a process of its own."""
    code = """
import torch
from workbench.kernels import block_gate_topk, block_sparse_attention, native
q, k, v = (torch.randn(200, h, 16, generator=torch.Generator().manual_seed(h)).requires_grad_() for h in (4, 2, 2))
for path in ("cpu", "native") if native.compiler() else ("cpu",):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = block_sparse_attention(q, k, v, block_gate_topk(q, k, 16, 3, backend=path), backend=path)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for one, two in zip(*found):
        assert torch.equal(one, two) if path == "native" else torch.allclose(one, two, atol=1e-6), path
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# the index


@paths
@given(n=st.integers(1, 70), block=st.integers(1, 20), top_k=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_moba_index_is_complete(backend, n, block, top_k, seed):
    q, k, _ = tensors(n, 2, 1, 4, dtype=exact(backend)[0], seed=seed)
    chosen = block_gate_topk(q, k, block, top_k, backend=backend)
    own = torch.arange(n) // block
    counts = (chosen.blocks >= 0).sum(-1)
    assert torch.equal(counts, (own + 1).clamp(max=top_k)[:, None].expand(-1, 2))
    assert (chosen.blocks == own[:, None, None]).sum(-1).eq(1).all()
    assert (chosen.blocks <= own[:, None, None]).all()
    assert chosen.col_nnz.sum() == counts.sum() == (chosen.rows >= 0).sum()
    for column in range(2 * chosen.n_blocks):
        rows = chosen.rows[chosen.col_offs[column] : chosen.col_offs[column + 1]]
        assert rows.diff().gt(0).all()
        assert (chosen.blocks[rows.long(), column // chosen.n_blocks] == column % chosen.n_blocks).any(-1).all()
    valid = chosen.pair >= 0
    assert torch.equal(valid, chosen.blocks >= 0)
    query = torch.arange(n)[:, None, None].expand_as(valid)
    assert torch.equal(chosen.rows[chosen.pair[valid].long()].long(), query[valid])
    assert torch.equal(chosen.pair[valid].long().sort().values, torch.arange(int(valid.sum())))


def test_the_choice_is_that_of_the_largest_mean_scores():
    q, k, _ = tensors(64, 1, 1)
    chosen = block_gate_topk(q, k, 8, 3)
    means = k.view(8, 8, 1, 16).mean(1)
    for t in range(64):
        own = t // 8
        best = (means[:own, 0] @ q[t, 0]).topk(min(2, own)).indices.sort().values
        assert chosen.blocks[t, 0].tolist() == [*best.tolist(), own] + [-1] * max(0, 2 - own)


@paths
def test_ties_take_the_first_block(backend):
    q, k = torch.ones(40, 1, 4), torch.ones(40, 1, 4)
    chosen = block_gate_topk(q, k, 4, 3, backend=backend)
    assert chosen.blocks[36, 0].tolist() == [0, 1, 9]
    zeros = block_gate_topk(q, torch.zeros_like(k), 4, 3, backend=backend)
    assert torch.equal(zeros.blocks, chosen.blocks)


@pytest.mark.parametrize("backend", ["cpu", "native"])
def test_scores_that_are_no_numbers_still_give_whole_rows(backend):
    q, k, _ = tensors(40, 1, 1, dtype=torch.float32)
    q[20:] = torch.nan
    q[16:20] = torch.inf
    chosen = block_gate_topk(q, k, 4, 3, backend=backend)
    assert torch.equal(chosen.blocks[:16], block_gate_topk(q, k, 4, 3, backend="reference").blocks[:16])
    assert ((chosen.blocks >= 0).sum(-1) == (torch.arange(40)[:, None] // 4 + 1).clamp(max=3)).all()


def test_the_fast_inversion_is_the_plain_one():
    q, k, _ = tensors(100)
    for sequences in (None, VARLEN):
        for chosen in (
            block_gate_topk(q, k, 8, 3, sequences, backend="cpu"),
            block_gate_topk(q.float(), k.float(), 8, 3, sequences, backend="native"),
        ):
            plain = invert(chosen.blocks, chosen.n_blocks)
            assert all(map(torch.equal, (chosen.rows, chosen.col_offs, chosen.pair), plain))


@pytest.mark.parametrize("sequences", [None, VARLEN], ids=["one sequence", "packed"])
def test_the_choice_does_not_depend_on_the_slices_it_is_made_in(sequences, monkeypatch):
    q, k, _ = tensors(100)
    whole = block_gate_topk(q, k, 8, 3, sequences)
    monkeypatch.setattr(gate, "SCORES", 300)
    sliced = block_gate_topk(q, k, 8, 3, sequences)
    assert all(map(torch.equal, whole.tensors(), sliced.tensors()))


def test_memory_that_is_kept_is_never_seen():
    """What an earlier call left in the workspaces does not show, and nothing that is returned lies in them."""
    q, k, v = tensors(100, dtype=torch.float32, grad=True)

    def attention(*qkv):
        chosen = block_gate_topk(*qkv[:2], 8, 3, backend="cpu")
        return block_sparse_attention(*qkv, chosen, backend="cpu")

    def run():
        return with_grads(attention, q, k, v)

    memory.release()
    clean = run()
    spaces = [space for several in memory._threads.workspaces.values() for space in several]
    assert spaces and all(space.n_bytes for space in spaces)
    for space in spaces:
        for buffer in space.buffers.values():
            buffer.fill_(torch.nan)
    again = run()
    assert all(map(torch.equal, clean, again))
    for space in spaces:
        for buffer in space.buffers.values():
            buffer.fill_(torch.nan)
    assert not any(x.isnan().any() for x in again)


@pytest.mark.usefixtures("compiler")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc fills fresh memory on request")
def test_memory_of_the_native_path_is_never_seen():
    """The same sums where the C library fills fresh memory with numbers near the largest there are, as without."""
    code = """
import torch
from workbench.kernels import block_gate_topk, block_sparse_attention
torch.manual_seed(0)
for block in (8, 16, 37):
    q, k, v = (torch.randn(150, heads, 12, requires_grad=True) for heads in (4, 2, 2))
    out = block_sparse_attention(q, k, v, block_gate_topk(q, k, block, 3, backend="native"), backend="native")
    print([x.double().sum().item() for x in (out, *torch.autograd.grad(out.sin().sum(), (q, k, v)))])
"""
    clean, filled = (
        subprocess.run(
            [sys.executable, "-c", code],
            check=True, capture_output=True, text=True, env={**os.environ, **more},
        ).stdout
        for more in ({}, {"MALLOC_PERTURB_": "128"})
    )  # fmt: skip
    assert clean == filled and "nan" not in clean


def test_any_choice_of_blocks_can_be_given():
    q, k, v = tensors(32, 1, 1)
    own = torch.arange(32)[:, None, None] // 8
    blocks = torch.where(own > 0, torch.cat([own, torch.zeros_like(own)], -1), torch.tensor([0, -1])).int()
    chosen = BlockIndex.from_blocks(blocks, 8, None)
    out = block_sparse_attention(q, k, v, chosen)
    assert torch.allclose(out, block_sparse_attention(q, k, v, chosen, backend="reference"), atol=1e-12)
    assert chosen.blocks[31, 0].tolist() == [0, 3]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b + 1, "own and earlier"),
        (lambda b: b.clamp(max=0), "own block"),
        (lambda b: b.repeat(1, 1, 2), "once"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(change, message):
    blocks = (torch.arange(32)[:, None, None] // 8).int()
    with pytest.raises(InputError, match=message):
        BlockIndex.from_blocks(change(blocks), 8, None)


def test_merging_parts_in_any_order_gives_the_same():
    """The reference over the union equals parts joined by their logarithms of sums, in two orders."""
    q, k, v = tensors(24, 1, 1)
    chosen = block_gate_topk(q, k, 4, 3)
    out, lse = reference.attention(q, k, v, chosen, 0.25)
    allowed = reference.mask(chosen)[:, 0]
    scores = (0.25 * q[:, 0] @ k[:, 0].T).masked_fill(~allowed, -torch.inf)
    for order in (range(6), reversed(range(6))):
        total, joined = torch.full((24,), -torch.inf, dtype=torch.float64), torch.zeros(24, 16, dtype=torch.float64)
        for block in order:
            part = scores[:, 4 * block : 4 * block + 4]
            log = part.logsumexp(-1)
            new = torch.logaddexp(total, log)
            weight = (part - new[:, None]).exp()
            joined = (
                joined * (total - new).exp().nan_to_num()[:, None]
                + weight.nan_to_num() @ v[4 * block : 4 * block + 4, 0]
            )
            total = new
        assert torch.allclose(joined, out[:, 0], atol=1e-12) and torch.allclose(total, lse[:, 0], atol=1e-12)


# the operator


@pytest.mark.parametrize("sequences", [None, VARLEN], ids=["one sequence", "packed"])
def test_registration_is_sound(sequences):
    q, k, v = tensors(100, dtype=torch.float32, grad=True)
    by_head = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (q, k, v)]
    for backend in ("cpu", "native"):
        torch.library.opcheck(_gate, (q.detach(), k.detach(), 8, 3, sequences, backend))
        chosen = block_gate_topk(q, k, 8, 3, sequences, backend=backend)
        torch.library.opcheck(_attend, (q, k, v, *chosen.tensors(), 8, 0.25, backend))
        torch.library.opcheck(_attend, (*by_head, *chosen.tensors(), 8, 0.25, backend))


@pytest.mark.parametrize("sequences", [None, VARLEN], ids=["one sequence", "packed"])
def test_a_compiled_model_has_no_break(sequences):
    q, k, v = tensors(100, dtype=torch.float32, grad=True)

    def attention(*qkv):
        return block_sparse_attention(*qkv, block_gate_topk(*qkv[:2], 8, 3, sequences))

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert close(with_grads(compiled, q, k, v), with_grads(attention, q, k, v), 1e-6)


@paths
def test_the_record_says_which_path_ran(backend):
    q, k, v = tensors(20, dtype=torch.float32, grad=True)
    with dispatch.recording() as seen:
        block_sparse_attention(q, k, v, block_gate_topk(q, k, 4, 2, backend=backend), backend=backend).sum().backward()
    assert seen[:2] == [("block_gate_topk", backend), ("block_sparse_attention", backend)]
    if backend != "reference":
        assert seen[2] == ("block_sparse_attention.backward", backend)


def test_operations_are_counted():
    q, k, v = tensors(64, 2, 2, 8, grad=True)
    chosen = block_gate_topk(q, k, 8, 3)
    with FlopCounterMode(display=False) as counter:
        block_sparse_attention(q, k, v, chosen).sum().backward()
    choices = int((chosen.blocks >= 0).sum())
    assert counter.get_total_flops() == 7 * 2 * choices * 8 * 8


def test_strides_do_not_matter():
    q, k, v = tensors(64, dtype=torch.float32)
    wide = torch.stack([q, q])[1].transpose(0, 1).contiguous().transpose(0, 1)
    holes = torch.zeros(64, 2, 32)[..., ::2].copy_(k), torch.zeros(64, 4, 16)[:, ::2].copy_(v)
    by_width = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)]
    for backend in ("cpu", "native"):

        def attention(*qkv, path=backend):
            return block_sparse_attention(*qkv, block_gate_topk(*qkv[:2], 8, 3, backend=path), backend=path)

        plain = with_grads(attention, *(x.requires_grad_() for x in (q, k, v)))
        for spread in ((wide, *holes), by_width):
            found = with_grads(attention, *(x.detach().requires_grad_() for x in spread))
            assert all(map(torch.equal, found, plain))


@paths
def test_no_tokens(backend):
    q, k, v = tensors(0, dtype=torch.float32, grad=True)
    chosen = block_gate_topk(q, k, 8, 3, backend="cpu")
    out = block_sparse_attention(q, k, v, chosen, backend=backend)
    out.sum().backward()
    assert out.shape == (0, 4, 16) and q.grad.shape == q.shape and chosen.blocks.shape == (0, 4, 3)


def test_importing_the_operator_does_not_import_triton():
    code = "import sys, workbench.kernels.block_sparse_attention, torch; print('triton.language' in sys.modules)"
    plain = "import sys, torch.utils.flop_counter; print('triton.language' in sys.modules)"
    found, before = (
        subprocess.run([sys.executable, "-c", c], check=True, capture_output=True, text=True).stdout
        for c in (code, plain)
    )
    assert found == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": lambda q: q[0]}, r"q has shape \(4, 16\) but must be \(tokens, heads, width\)"),
        ({"k": lambda k: k.float()}, "k is torch.float32 but must be torch.float64, as q is"),
        ({"q": lambda q: q.int()}, "q is torch.int32 but must be one of"),
        ({"k": lambda k: k[:10]}, "k has shape .* must have the tokens and the width of q"),
        ({"k": lambda k: k[..., :8]}, "k has shape .* must have the tokens and the width of q"),
        ({"v": lambda v: v[:, :1]}, "v has shape .* but must be"),
        ({"q": lambda q: q[:, :3]}, "k has 2 heads but their number must divide the 3 heads of q"),
    ],
)
def test_bad_tensors_are_named(change, message):
    made = dict(zip("qkv", tensors(20), strict=True))
    chosen = block_gate_topk(made["q"], made["k"], 4, 2)
    for name, of in change.items():
        made[name] = of(made[name])
    with pytest.raises(InputError, match=message):
        block_sparse_attention(*made.values(), chosen)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 2), "block_size is 0 but must be from 1 to 65536"),
        ((4, 0), "top_k is 0 but must be from 1 to 1024"),
        ((4, 2, torch.tensor([0, 20])), "cu_seqlens is torch.int64"),
        (
            (4, 2, torch.tensor([0, 19], dtype=torch.int32)),
            "cu_seqlens is .* must rise from 0 to the number of tokens, 20",
        ),
        ((4, 2, torch.tensor([0, 9, 5, 20], dtype=torch.int32)), "must rise"),
    ],
)
def test_bad_numbers_are_named(arguments, message):
    q, k, _ = tensors(20)
    with pytest.raises(InputError, match=message):
        block_gate_topk(q, k, *arguments)


def test_an_index_of_other_tokens_is_refused():
    q, k, v = tensors(20)
    chosen = block_gate_topk(q[:10], k[:10], 4, 2)
    with pytest.raises(InputError, match=r"index.blocks is .* \(10, 4, 2\) .* for 20 tokens and 4 heads of q"):
        block_sparse_attention(q, k, v, chosen)


def test_a_path_that_cannot_is_an_error(monkeypatch):
    q, k, v = tensors(20, d=24, dtype=torch.float32)
    chosen = block_gate_topk(q, k, 4, 2)
    with pytest.raises(InputError, match="backend"):
        block_sparse_attention(q, k, v, chosen, backend="triton")  # no GPU, no interpreter
    with pytest.raises(InputError, match="grouped_mm"):
        block_sparse_attention(q, k, v, chosen, backend="grouped_mm")
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    with pytest.raises(InputError, match="q has head width 24 but the triton path takes 16, 32, 64, 128"):
        block_sparse_attention(q, k, v, chosen, backend="triton")
    q, k, v = tensors(20)
    with pytest.raises(InputError, match="float64 but the triton path takes"):
        block_sparse_attention(q, k, v, block_gate_topk(q, k, 4, 2), backend="triton")
    with pytest.raises(InputError, match="top_k is 17 but the triton path takes at most 16"):
        block_gate_topk(q.float(), k.float(), 4, 17, backend="triton")


def test_huge_sizes_on_meta_tensors():
    """Shapes alone: 2**40 numbers would not fit, and nothing of their size is looked at."""
    q, k, v = (torch.empty(2**22, heads, 128, device="meta") for heads in (64, 8, 8))
    chosen = block_gate_topk(q, k, 128, 8, backend="cpu")
    assert chosen.rows.shape == (2**22 * 64 * 8,) and chosen.n_blocks == 2**15
    assert block_sparse_attention(q, k, v, chosen, backend="cpu").shape == q.shape


def test_columns_are_numbered_in_64_bits():
    assert block_gate_topk(*tensors(20)[:2], 4, 2).col_offs.dtype == torch.int64
    assert index.block_table(20, 4, None, torch.device("cpu"))[0].tolist() == [0, 4, 8, 12, 16]
