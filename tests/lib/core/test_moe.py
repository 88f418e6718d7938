"""The MoE layer and the dense expert bank against a plain loop over tokens and experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.expert_choice import ExpertChoiceRouter
from workbench.lib.core.experts import GLU, GLUExperts
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context, Routing


def naive(bank: GLUExperts, x: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """sum_e dense[n, e] expert_e(x_n), one token and one expert at a time."""
    y = torch.zeros_like(x)
    for n in range(x.shape[0]):
        for e in range(bank.n_experts):
            if dense[n, e] != 0:
                gate, up = (bank.gate_up[e] @ x[n]).chunk(2)
                y[n] = y[n] + dense[n, e] * (bank.down[e] @ (F.silu(gate) * up))
    return y


@settings(max_examples=25, deadline=None)
@given(
    n_tokens=st.integers(1, 13),
    n_experts=st.integers(1, 6),
    top_k=st.integers(1, 6),
    d_hidden=st.sampled_from([1, 3, 4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_bank_equals_the_naive_loop_in_output_and_gradients(n_tokens, n_experts, top_k, d_hidden, dtype, seed):
    """Any token count, experts without tokens, widths grouped_mm cannot take, both dtypes."""
    top_k = min(top_k, n_experts)
    torch.manual_seed(seed)
    bank = GLUExperts(n_experts, 8, d_hidden).to(dtype)
    x = torch.randn(n_tokens, 8, dtype=dtype, requires_grad=True)
    indices = torch.rand(n_tokens, n_experts).argsort(-1)[:, :top_k]
    routing = Routing.fixed(indices, torch.rand(n_tokens, top_k, dtype=dtype), n_experts)
    y, expected = bank(x, routing), naive(bank, x, routing.dense())
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert torch.allclose(y, expected, atol=tolerance)
    inputs = [x, *bank.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(y.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=tolerance * 10)


def test_ragged_routing_and_experts_without_tokens():
    torch.manual_seed(0)
    bank = GLUExperts(4, 8, 4)
    x = torch.randn(6, 8)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 1]]).bool()
    routing = Routing.ragged(mask, torch.rand(6, 4))
    y = bank(x, routing)
    assert torch.allclose(y, naive(bank, x, routing.dense()), atol=1e-6)
    assert torch.equal(y[2], torch.zeros(8))
    y.sum().backward()
    assert torch.equal(bank.down.grad[2], torch.zeros(8, 4))


def test_gradcheck_of_a_whole_layer():
    torch.manual_seed(0)
    layer = MoELayer(LinearRouter(4, 3, 2, coefficients={"lbl": 1.0, "z": 1.0}), GLUExperts(3, 4, 3)).double()
    layer.router.projection.weight.data *= 50  # far from ties, where the selection is not differentiable
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def forward(x):
        context = Context()
        return layer(x, context), context.aux

    assert torch.autograd.gradcheck(forward, (x,))


def test_fixed_and_variable_k_agree_bit_for_bit():
    torch.manual_seed(0)
    bank, x = GLUExperts(3, 8, 4), torch.randn(5, 8)
    fixed = Routing.fixed(torch.rand(5, 3).argsort(-1)[:, :2], torch.rand(5, 2), 3)
    ragged = Routing(fixed.expert, fixed.weight, fixed.offsets, 3)
    assert torch.equal(bank(x, fixed), bank(x, ragged))


def test_a_batch_of_any_shape_and_the_shared_expert():
    torch.manual_seed(0)
    shared = GLU(8, 4)
    layer = MoELayer(LinearRouter(8, 4, 2), GLUExperts(4, 8, 4), shared=shared)
    x = torch.randn(3, 5, 8)
    alone = MoELayer(layer.router, layer.experts)
    assert torch.allclose(layer(x), alone(x) + shared(x), atol=1e-6)
    assert torch.allclose(layer(x)[1, 2], layer(x[1, 2]), atol=1e-6)


def test_observers_see_the_routing_before_the_limit_until_removed():
    layer = MoELayer(LinearRouter(8, 4, 2), GLUExperts(4, 8, 4), capacity_factor=0.5)
    seen = []
    handle = layer.observe(lambda *call: seen.append(call))
    context = Context()
    layer(torch.randn(10, 8), context)
    assert len(seen) == 1 and seen[0][0] is layer and seen[0][2] is context
    routing = seen[0][1]
    assert int(routing.counts.sum()) == 20 and routing.kept is not None
    handle.remove()
    layer(torch.randn(10, 8))
    assert len(seen) == 1


def test_auxiliary_losses_add_up_over_layers():
    torch.manual_seed(0)
    layers = [MoELayer(LinearRouter(8, 4, 2, coefficients={"lbl": 0.5}), GLUExperts(4, 8, 4)) for _ in range(2)]
    x, context, losses = torch.randn(6, 8), Context(), []
    for layer in layers:
        layer.observe(lambda _, routing, __: losses.append(routing.losses["lbl"]))
        x = layer(x, context)
    assert context.aux.item() == pytest.approx(0.5 * sum(v.item() for v in losses))


def test_disagreeing_sizes_and_limits_are_refused():
    with pytest.raises(InputError, match=r"router.n_experts is 4 but must equal experts.n_experts = 3"):
        MoELayer(LinearRouter(8, 4, 2), GLUExperts(3, 8, 4))
    with pytest.raises(InputError, match="capacity_factor is 0"):
        MoELayer(LinearRouter(8, 4, 2), GLUExperts(4, 8, 4), capacity_factor=0.0)
    with pytest.raises(InputError, match="at least 1"):
        GLUExperts(0, 8, 4)


def test_moe_layers_are_found_by_name():
    model = torch.nn.Sequential(GLU(8, 4), MoELayer(ExpertChoiceRouter(8, 4), GLUExperts(4, 8, 4)))
    assert list(moe_layers(model)) == ["1"]
