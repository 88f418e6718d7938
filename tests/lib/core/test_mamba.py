"""The Mamba block: that of transformers to 1e-5, decoding equal to the whole, causality, initialisation, refusals."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.experts import GLU
from workbench.lib.core.mamba import MambaBlock, Projection
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.optim.matrix import parameter_groups
from workbench.lib.core.routing import Context
from workbench.lib.core.train import TrainConfig, make_optimizer


def block(d_model=24, dtype=torch.float32, seed=0, **sizes):
    torch.manual_seed(seed)
    return MambaBlock(d_model, **sizes).to(dtype)


def rows(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def peer(ours: MambaBlock, d_model: int):
    """The mixer of transformers with the same weights."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    channels, states = ours.A_log.shape
    config = transformers.MambaConfig(
        hidden_size=d_model,
        state_size=states,
        expand=channels // d_model,
        conv_kernel=ours.conv1d.kernel_size[0],
        time_step_rank=ours.sizes[0],
        num_hidden_layers=1,
        use_mambapy=False,
    )
    theirs = MambaMixer(config, 0)
    theirs.load_state_dict(ours.state_dict())
    return theirs, config


@pytest.mark.parametrize("sizes", [{}, {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 4}])
@pytest.mark.parametrize("length", [1, 2, 70])
def test_outputs_and_gradients_are_those_of_transformers(sizes, length):
    ours, u = block(**sizes), rows(3, length, 24).requires_grad_()
    theirs, _ = peer(ours, 24)
    grad = rows(3, length, 24, seed=2)
    found, wanted = [], []
    for module, to in ((ours, found), (theirs, wanted)):
        out = module(u)
        to += [out, *torch.autograd.grad(out, [u, *(p for _, p in sorted(module.named_parameters()))], grad)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.detach().abs().max())))


def test_cached_decoding_is_that_of_transformers():
    from transformers import DynamicCache

    ours, u = block(), rows(2, 9, 24)
    theirs, config = peer(ours, 24)
    kept = DynamicCache(config=config)
    with torch.no_grad():
        first, cache = ours.prefill(u[:, :5])
        torch.testing.assert_close(first, theirs(u[:, :5], kept), rtol=1e-5, atol=1e-5)
        for t in range(5, 9):
            out, cache = ours.step(u[:, t], cache)
            torch.testing.assert_close(out, theirs(u[:, t : t + 1], kept)[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cache.state, kept.get_recurrent_state(0, state_idx=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("parts", [[1] * 9, [2, 1, 6], [8, 1], [70, 3, 66]])
def test_any_division_of_a_text_gives_the_whole(dtype, parts):
    """Also parts shorter than the convolution, and parts on either side of what the scan keeps."""
    ours, u, cache, outs = block(dtype=dtype), rows(2, sum(parts), 24, dtype=dtype), None, []
    for part in u.split(parts, 1):
        before = None if cache is None else (cache.conv.clone(), cache.state.clone())
        kept, (out, cache) = cache, ours.prefill(part, cache=cache)
        outs.append(out)
        assert kept is None or (torch.equal(kept.conv, before[0]) and torch.equal(kept.state, before[1]))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(torch.cat(outs, 1), ours(u), rtol=tolerance, atol=tolerance)
    step, _ = ours.step(u[:, 0], cache)
    torch.testing.assert_close(step, ours(torch.cat([u, u[:, :1]], 1))[:, -1], rtol=tolerance, atol=tolerance)


def test_a_convolution_of_one_keeps_nothing():
    ours, u = block(d_conv=1), rows(2, 4, 24)
    _, cache = ours.prefill(u[:, :3])
    assert cache.conv.shape == (2, 48, 0)
    torch.testing.assert_close(ours.step(u[:, 3], cache)[0], ours(u)[:, 3], rtol=1e-5, atol=1e-5)


def test_it_is_causal_and_carries_what_was_before():
    ours, u = block(dtype=torch.float64), rows(1, 12, 24, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(ours(u)[0, 7].sum(), u)
    assert (grad[0, 8:] == 0).all()
    assert (grad[0, :8].abs().sum(1) > 0).all()  # further back than the convolution reaches, too


def test_a_cache_is_as_large_after_any_number_of_tokens():
    made = block()
    with torch.no_grad():
        caches = [made.prefill(rows(2, length, 24))[1] for length in (1, 500)]
    for part in ("conv", "state"):
        one, many = (getattr(cache, part).untyped_storage().nbytes() for cache in caches)
        assert one == many


def test_gradients_pass_through_a_cache():
    ours, u = block(dtype=torch.float64), rows(2, 10, 24, dtype=torch.float64).requires_grad_()
    grad = rows(2, 10, 24, dtype=torch.float64, seed=2)
    first, cache = ours.prefill(u[:, :6])
    second, _ = ours.prefill(u[:, 6:], cache=cache)
    for found, wanted in zip(
        torch.autograd.grad(torch.cat([first, second], 1), [u, *ours.parameters()], grad),
        torch.autograd.grad(ours(u), [u, *ours.parameters()], grad),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_the_initialisation():
    ours = block(64, d_state=7)
    steps = nn.functional.softplus(ours.dt_proj.bias)
    assert 1e-3 * 0.999 <= steps.min() < 3e-3 and 3e-2 < steps.max() <= 0.1 * 1.001
    torch.testing.assert_close(ours.A_log.exp(), torch.arange(1.0, 8).expand(128, 7))
    assert (ours.D == 1).all() and ours.sizes == (4, 7, 7)
    assert 0.45 < ours.dt_proj.weight.abs().max() <= 0.5
    assert [p.bias is None for p in (ours.in_proj, ours.x_proj, ours.dt_proj, ours.out_proj)] == [
        True,
        True,
        False,
        True,
    ]
    channels, rank, k, n = 128, 4, 4, 7
    wanted = 3 * channels * 64 + channels * (rank + 2 * n) + rank * channels + channels + channels * (k + 1 + n + 1)
    assert sum(p.numel() for p in ours.parameters()) == wanted


def test_weight_decay_leaves_the_rates_alone():
    made = nn.Sequential(block(), nn.Linear(24, 24))
    for model in (made, copy.deepcopy(made)):
        for groups in (make_optimizer(model, TrainConfig(steps=1)).param_groups, parameter_groups(model, 0.1)):
            decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
            spared = {name for name, p in model.named_parameters() if id(p) not in decayed}
            assert spared == {"0.A_log", "0.D", "0.conv1d.bias", "0.dt_proj.bias", "1.bias"}


def test_projections_are_replaceable_and_see_the_context():
    seen = []

    class Other(Projection):
        def forward(self, x, context=None):
            seen.append((self.in_features, self.out_features, tuple(x.shape), context))
            return super().forward(x)

    torch.manual_seed(0)
    ours = MambaBlock(
        24, projection=lambda name, *widths: Other(*widths) if name in ("x", "out") else Projection(*widths)
    )
    context, u = Context(), rows(2, 3, 24)
    out = ours(u, context)
    assert seen == [(48, 34, (2, 3, 48), context), (48, 24, (2, 3, 48), context)]
    assert torch.equal(out, block()(u))


def test_a_dt_projection_of_parts_has_each_part_initialised():
    class Parts(nn.Module):
        def __init__(self, d_in, d_out, bias):
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(d_in, d_out, bias) for _ in range(2))

    torch.manual_seed(0)
    ours = MambaBlock(24, projection=lambda name, *widths: (Parts if name == "dt" else Projection)(*widths))
    steps = [nn.functional.softplus(part.bias) for part in ours.dt_proj.parts]
    assert all((step > 9e-4).all() and (step < 0.11).all() for step in steps) and not torch.equal(*steps)


def test_a_decoder_takes_it_by_one_argument():
    torch.manual_seed(0)
    model = DecoderLM(32, 24, 2, 2, lambda layer: GLU(24, 16), 20, attention=lambda layer: MambaBlock(24, d_state=4))
    tokens = torch.randint(32, (2, 20))
    changed = tokens.clone()
    changed[:, 12:] = 7
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-3)
    model(tokens).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_half_precision_and_autocast():
    ours, u = block(), rows(2, 6, 24)
    exact = ours(u)
    with torch.autocast("cpu", torch.bfloat16):
        half, cache = ours.prefill(u)
        assert half.dtype == cache.conv.dtype == torch.bfloat16 and cache.state.dtype == torch.float32
        ours.step(u[:, 0], cache)
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.02)
    torch.testing.assert_close(ours.bfloat16()(u.bfloat16()).float(), exact, rtol=0.1, atol=0.02)


def test_wrong_input_is_named():
    ours, u = block(), rows(2, 5, 24)
    _, cache = ours.prefill(u)
    other = replace(cache, conv=cache.conv[:, :, 1:])
    for call, message in [
        (lambda: ours(u[0]), r"u has shape \(5, 24\) but must be \(batch, time, dim\)"),
        (lambda: ours(u[:, :, 1:]), r"u has shape \(2, 5, 23\) but must be .* dim 24"),
        (lambda: ours(u[:, :0]), r"u has shape \(2, 0, 24\)"),
        (lambda: ours.step(u[:1, 0], cache), r"cache.conv is torch.float32 of shape \(2, 48, 3\) .* \(1, 48, 3\)"),
        (lambda: ours.step(u[:, 0], other), r"cache.conv is .*\(2, 48, 2\)"),
        (lambda: ours.step(u[:, 0], replace(cache, state=cache.state.double())), "cache.state is torch.float64"),
        (lambda: block(dtype=torch.float64).step(u[:, 0].double(), cache), "cache.conv is torch.float32"),
        (lambda: block(d_state=3).step(u[:, 0], cache), r"cache.state .* must be torch.float32 of shape \(2, 48, 3\)"),
        (lambda: MambaBlock(24, d_state=0), "d_state is 0 but must be at least 1"),
        (lambda: MambaBlock(24, dt_rank=-1), "dt_rank is -1"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    assert ours(u[:0]).shape == (0, 5, 24)  # an empty batch is one
