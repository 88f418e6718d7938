"""MoBA: its limits, its causality, the convolution on keys, what it announces, and the theory of its choice."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.kernels import dispatch, native
from workbench.lib.attention import MoBA
from workbench.lib.attention.moba import (
    KeyShortConv,
    effective_gap,
    retrieval_fail_prob,
    simulate_retrieval,
    snr,
)
from workbench.lib.core.attention import Attention
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.routing import Context
from workbench.live.probes.find import blocks

D = 32


def moba(seed=0, **options):
    torch.manual_seed(seed)
    return MoBA(D, 4, **{"block_size": 8, "top_k": 3, "seq_len": 64} | options).double()


def tokens(*shape, seed=1):
    return torch.randn(*shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("length", [64, 37, 5])
def test_moba_with_every_block_is_dense_attention(rope, length):
    sparse = moba(top_k=8, rope=rope)
    plain = Attention(D, 4, causal=True, rope=rope).double()
    plain.load_state_dict(sparse.state_dict())
    x = tokens(2, length).requires_grad_()
    ours, theirs = sparse(x), plain(x)
    assert torch.allclose(ours, theirs, atol=1e-10)
    grads = [torch.autograd.grad(y.square().sum(), [x, *m.parameters()]) for y, m in ((ours, sparse), (theirs, plain))]
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*grads, strict=True))


def test_moba_sequences_of_a_batch_do_not_meet():
    layer, x = moba(), tokens(3, 50)
    assert torch.allclose(layer(x)[1], layer(x[1]), atol=1e-12)
    assert layer(x[:1]).shape == (1, 50, D) and layer(x[0]).shape == (50, D)


@pytest.mark.parametrize("options", [{}, {"kconv": 3}, {"kv_heads": 2, "rope": True, "kconv": 5}])
def test_moba_is_causal(options):
    layer, x = moba(**options), tokens(1, 60)
    if options.get("kconv"):
        nn.init.normal_(layer.kconv.weight)
    before = layer(x)
    x = x.clone()
    x[0, 37] += 10
    after = layer(x)
    assert torch.allclose(before[0, :37], after[0, :37], rtol=0, atol=1e-12)
    assert (before[0, 37] - after[0, 37]).abs().max() > 0.01


def test_moba_the_convolution_starts_as_plain_moba():
    plain, mixed = moba(), moba(kconv=3)
    mixed.load_state_dict(plain.state_dict(), strict=False)
    x = tokens(2, 40)
    assert torch.equal(plain(x), mixed(x))
    mixed(x).square().sum().backward()
    assert mixed.kconv.weight.grad.abs().max() > 0


def test_the_convolution_is_the_formula():
    conv = KeyShortConv(2, 4, 3).double()
    nn.init.normal_(conv.weight)
    k = torch.randn(2, 9, 2, 4, dtype=torch.float64)
    w = conv.weight[:, 0].view(2, 4, 3)
    for t in range(9):
        inner = sum(w[..., lag] * k[:, t - lag] for lag in range(3) if t >= lag)
        assert torch.allclose(conv(k)[:, t], k[:, t] + torch.nn.functional.silu(inner), atol=1e-12)


def test_moba_the_gate_sees_rotated_and_convolved_keys():
    layer, x = moba(kconv=3, rope=True, top_k=2), tokens(1, 64)
    nn.init.normal_(layer.kconv.weight)
    q, k, _ = layer.heads(x)
    means = k.view(8, 8, 4, 8).mean(1)
    index = layer.choose(q, k, None)
    for t in (20, 63):
        best = torch.einsum("hd,mhd->hm", q[t], means)[:, : t // 8].argmax(-1)
        assert torch.equal(index.blocks[t, :, 0].long(), best)


def test_moba_announces_its_blocks_as_experts():
    layer, x, seen = moba(top_k=3), tokens(2, 50), []
    layer(x)
    handle = layer.observe(lambda module, routing, context: seen.append((module, routing, context)))
    context = Context()
    layer(x, context)
    handle.remove()
    layer(x)
    ((module, routing, given),) = seen
    assert module is layer and given is context
    assert routing.n_experts == layer.n_experts == 8 and routing.n_tokens == 100 and routing.top_k is None
    q, k, _ = layer.heads(x)
    index = layer.choose(q, k, torch.tensor([0, 50, 100], dtype=torch.int32))
    share = torch.zeros(100, 8)
    for t in range(100):
        for head in range(4):
            for block in index.blocks[t, head].tolist():
                if block >= 0:
                    share[t, block - 7 * (t // 50)] += 0.25  # a sequence of 50 has 7 blocks
    assert torch.equal(routing.dense(), share) and torch.equal(routing.mask(), share > 0)
    own = torch.arange(100) % 50 // 8
    assert (share[torch.arange(100), own] == 1).all()


def test_a_language_model_with_moba_is_found_by_the_probes():
    model = DecoderLM(
        64, D, 2, 4, lambda _: GLU(D, D), 64, lambda _: MoBA(D, 4, block_size=8, top_k=2, seq_len=64, rope=True), False
    )
    assert [(block.name, block.n_experts, block.top_k) for block in blocks(model)] == [
        ("blocks.0.attention", 8, None),
        ("blocks.1.attention", 8, None),
    ]
    assert model(torch.randint(64, (2, 30))).shape == (2, 30, 64)
    assert dispatch.last_backend("block_sparse_attention") == ("native" if native.compiler() else "cpu")


def test_a_compiled_model_has_no_break():
    """In a process of its own, in which nothing checks shapes at run time: that is not for a compiler to trace."""
    code = """
import torch
from workbench.lib.attention.moba import example
layer, x = example(), torch.randn(2, 40, 32)
compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
assert torch.allclose(compiled(x), layer(x), atol=1e-6)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_token():
    layer = moba(kconv=3, rope=True)
    assert layer(tokens(1)).shape == (1, D) and layer(tokens(2, 1)).shape == (2, 1, D)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_size": 0}, "block_size is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"kv_heads": 3}, "kv_heads is 3 but must be at least 1 and divide n_heads = 4"),
        ({"kconv": 4}, "kconv is 4 but must be one of 0, 3, 5"),
    ],
)
def test_bad_numbers_are_named(options, message):
    with pytest.raises(InputError, match=message):
        moba(**options)


def test_bad_shapes_are_named():
    with pytest.raises(InputError, match="d_model is 30 but must be divisible by n_heads = 4"):
        MoBA(30, 4, block_size=8, top_k=2, seq_len=8)
    with pytest.raises(InputError, match="must be even with rope"):
        MoBA(12, 4, block_size=8, top_k=2, seq_len=8, rope=True)
    with pytest.raises(InputError, match="width is 0"):
        KeyShortConv(1, 4, 0)
    for x in (tokens(65), tokens(0), tokens(1, 2, 3)):
        with pytest.raises(InputError, match=r"x has shape .* with 1 to seq_len = 64 rows"):
            moba()(x)


# the theory


def test_the_ratio_is_the_formula():
    assert snr(0.8, 64, 64) == pytest.approx(0.8 * math.sqrt(64 / 128))
    assert snr(0.8, 64, 32) / snr(0.8, 64, 64) == pytest.approx(math.sqrt(2))
    assert effective_gap(0.8, 0.1) == pytest.approx(0.7)
    assert effective_gap(0.8, 0.1, m=3, mu_cluster=0.4) == pytest.approx(0.7 + 2 * 0.3)


def test_with_two_blocks_the_probability_is_that_of_the_normal_distribution():
    for ratio in (-0.5, 0.0, 0.5657, 2.0):
        assert retrieval_fail_prob(ratio) == pytest.approx(0.5 * math.erfc(ratio / math.sqrt(2)), abs=1e-9)


def test_the_probability_falls_with_the_ratio_and_the_number_taken():
    assert retrieval_fail_prob(1, 64, 4) > retrieval_fail_prob(2, 64, 4) > retrieval_fail_prob(2, 64, 8)
    assert retrieval_fail_prob(0, 10, 3) == pytest.approx(0.7, abs=1e-6)  # all orders equally likely
    assert retrieval_fail_prob(1, 5, 5) == 0 and retrieval_fail_prob(1, 1, 1) == 0


@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_moba_random_keys_agree_with_the_formula(block_size):
    generator = torch.Generator().manual_seed(0)
    found = simulate_retrieval((0.8,), 64, block_size, 4000, generator)
    assert found == pytest.approx(retrieval_fail_prob(snr(0.8, 64, block_size)), abs=0.015)


def test_related_keys_and_many_blocks_agree_with_the_formula():
    generator = torch.Generator().manual_seed(0)
    affinities = (0.8, 0.3, 0.3)
    ratio = snr(effective_gap(0.8, 0.0, 3, 0.3), 64, 64)
    found = simulate_retrieval(affinities, 64, 64, 4000, generator)
    assert found == pytest.approx(retrieval_fail_prob(ratio), abs=0.015)
    found = simulate_retrieval((0.8,), 64, 16, 2000, generator, n_blocks=16, top_k=3)
    assert found == pytest.approx(retrieval_fail_prob(snr(0.8, 64, 16), 16, 3), abs=0.03)


def test_theory_names_what_is_wrong():
    with pytest.raises(InputError, match="n_blocks is 0"):
        retrieval_fail_prob(1, 0)
    with pytest.raises(InputError, match="affinities is"):
        simulate_retrieval((2.0,), 4, 4, 1, torch.Generator())
