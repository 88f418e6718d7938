"""The recurrent router: its cell, its memory over depth, its gradient paths, and the limits in which it has none."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.budget import count_params
from workbench.lib.core.experts import GLU, GLUExperts
from workbench.lib.core.models import DecoderLM, ResidualStack
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context
from workbench.lib.core.train import TrainConfig, make_optimizer
from workbench.lib.routing.rmoe import (
    RecurrentRouter,
    example,
    matched_width,
    recurrent_cell,
    recurrent_routers,
    router_state_flow,
)

L, D, E, K, P = 3, 16, 5, 2, 6


def routers(n_layers=L, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    made = recurrent_routers(n_layers, D, E, K, P, **options)
    return list(nn.ModuleList(made).to(dtype))


def tokens(n=9, seed=1, dtype=torch.float64):
    return torch.randn(n, D, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def language_model(dense_first=0, seed=0, **options):
    torch.manual_seed(seed)
    made = recurrent_routers(L, D, E, K, P, **options)
    ffns = [GLU(D, 8) for _ in range(dense_first)] + [MoELayer(r, GLUExperts(E, D, 8)) for r in made]
    return DecoderLM(256, D, len(ffns), 2, lambda layer: ffns[layer], seq_len=8)


def chain(made, x):
    """The logits and states of routers that all see the same input."""
    context, logits, states = Context(), [], []
    for router in made:
        routing = router(x, context)
        context.state = routing.state
        logits.append(routing.logits)
        states.append(routing.state)
    return logits, states


# 1. the cell


def test_the_state_follows_the_equations_of_the_gru():
    made, x = routers(), tokens()
    cell = made[0].cell
    nn.init.normal_(cell.bias_ih)
    nn.init.normal_(cell.bias_hh)
    (w_ir, w_iz, w_in), (w_hr, w_hz, w_hn) = cell.weight_ih.chunk(3), cell.weight_hh.chunk(3)
    (b_ir, b_iz, b_in), (b_hr, b_hz, b_hn) = cell.bias_ih.chunk(3), cell.bias_hh.chunk(3)
    h = torch.zeros(len(x), P, dtype=x.dtype)
    for router, state, logits in zip(made, *reversed(chain(made, x)), strict=True):
        r = x @ router.projection.weight.T
        g_r = torch.sigmoid(r @ w_ir.T + b_ir + h @ w_hr.T + b_hr)
        g_z = torch.sigmoid(r @ w_iz.T + b_iz + h @ w_hz.T + b_hz)
        n = torch.tanh(r @ w_in.T + b_in + g_r * (h @ w_hn.T + b_hn))
        h = (1 - g_z) * n + g_z * h
        assert torch.allclose(state, h, atol=1e-12)
        assert torch.allclose(logits, h @ router.readout.weight.T, atol=1e-12)


def test_the_cell_equals_torchs_own_with_copied_weights():
    router, x = routers(1)[0], tokens()
    peer = nn.GRUCell(P, P).double()
    peer.load_state_dict(router.cell.state_dict())
    state = torch.randn(len(x), P, dtype=x.dtype)
    assert torch.allclose(router(x, Context(state=state)).state, peer(router.projection(x), state), atol=1e-6)


def test_there_is_exactly_one_cell_in_the_model():
    model = language_model()
    assert len({id(m) for m in model.modules() if isinstance(m, nn.GRUCell)}) == 1
    ids = [id(p) for p in model.parameters()]
    cell = moe_layers(model)["blocks.0.ffn"].router.cell
    assert all(ids.count(id(p)) == 1 for p in cell.parameters())
    trained = [id(p) for g in make_optimizer(model, TrainConfig(steps=1)).param_groups for p in g["params"]]
    assert sorted(trained) == sorted(ids)


def test_recurrent_weights_start_orthogonal_and_biases_at_zero():
    for kind in ("gru", "rnn"):
        torch.manual_seed(0)
        cell = recurrent_cell(kind, P)
        for gate in cell.weight_hh.split(P):
            assert torch.allclose(gate @ gate.T, torch.eye(P), atol=1e-5)
        assert not cell.bias_ih.any() and not cell.bias_hh.any()
    assert recurrent_cell("none", P) is None


# 2. parameter counts


def test_parameter_counts():
    def routing_params(made):
        return count_params(nn.ModuleList(made))

    assert routing_params(routers()) == L * (P * D + E * P) + 6 * P**2 + 6 * P
    assert routing_params(routers(cell="rnn")) == L * (P * D + E * P) + 2 * P**2 + 2 * P
    assert routing_params(routers(cell="none")) == L * (P * D + E * P)
    assert routing_params(routers(share_projection=True)) == P * D + L * E * P + 6 * P**2 + 6 * P
    assert routing_params(LinearRouter(D, E, K) for _ in range(L)) == L * D * E


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 12), d=st.integers(8, 128), e=st.integers(2, 64), p=st.integers(1, 64))
def test_the_matched_width_gives_equal_router_parameters(n, d, e, p):
    target = n * p * (d + e) + 6 * p**2 + 6 * p
    assert abs(n * matched_width(n, d, e, p) * (d + e) - target) <= n * (d + e) / 2


# 3. token independence


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 12), cell=st.sampled_from(["gru", "rnn", "none"]))
def test_permuting_tokens_permutes_logits_and_states(seed, n, cell):
    made, x = routers(seed=seed, cell=cell), tokens(n, seed)
    order = torch.randperm(n)
    (logits, states), (moved, moved_states) = chain(made, x), chain(made, x[order])
    for a, b in zip(logits, moved, strict=True):
        assert torch.allclose(a[order], b, atol=1e-12)
    if cell != "none":
        assert torch.allclose(states[-1][order], moved_states[-1], atol=1e-12)


def test_a_token_changes_no_other_tokens_logits():
    """The GRU runs over depth, not over the sequence."""
    made, x = routers(), tokens()
    other = x.clone()
    other[4] += 1
    for a, b in zip(chain(made, x)[0], chain(made, other)[0], strict=True):
        changed = (a != b).any(-1)
        assert changed.tolist() == [t == 4 for t in range(9)]


def test_the_state_reaches_the_next_layer():
    made, x = routers(), tokens()
    assert not torch.allclose(made[1](x, Context()).logits, chain(made, x)[0][1], atol=1e-6)


# 4. gradient paths


def test_the_last_logits_reach_the_first_projection_through_the_states():
    """With the experts and attention detached: each router sees a constant input."""
    for options, flows in [({}, True), ({"detach_state": True}, False), ({"shuffle_state": True}, True)]:
        made, x = routers(**options), tokens()
        chain(made, x)[0][-1].square().sum().backward()
        gradient = made[0].projection.weight.grad
        assert (gradient is not None and bool(gradient.abs().max() > 1e-8)) is flows


def test_detached_states_still_carry_information():
    plain, detached = routers(), routers(detach_state=True)
    for a, b in zip(chain(plain, tokens())[0], chain(detached, tokens())[0], strict=True):
        assert torch.equal(a, b)


def test_shuffled_states_are_those_of_other_tokens():
    router, x = routers(shuffle_state=True)[1], tokens()
    state = torch.randn(len(x), P, dtype=x.dtype)
    torch.manual_seed(3)
    shuffled = router(x, Context(state=state)).state
    torch.manual_seed(3)
    order = torch.randperm(len(x))
    assert torch.equal(shuffled, router.cell(router.projection(x), state[order]))
    assert not torch.equal(order, torch.arange(len(x)))


def test_variants_of_one_seed_start_from_the_same_weights():
    plain = nn.ModuleList(routers()).state_dict()
    for options in ({"shuffle_state": True}, {"detach_state": True}):
        other = nn.ModuleList(routers(**options)).state_dict()
        assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_state_flow_equals_the_jacobian():
    made = routers(dtype=torch.float32)
    stack = ResidualStack(MoELayer(r, GLUExperts(E, D, 8)) for r in made)
    x, seen = tokens(4, dtype=torch.float32), []
    hooks = [r.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())) for r in made]
    flow = router_state_flow(stack, x)
    for hook in hooks:
        hook.remove()

    def logits(layer, *rs):
        state = None
        for router, r in zip(made[: layer + 1], rs, strict=True):
            state = router.step(r, state)
        return made[layer].readout(state)

    for layer in range(L):
        rs = tuple(r.projection(x_l) for r, x_l in zip(made[: layer + 1], seen, strict=False))
        jacobians = torch.autograd.functional.jacobian(lambda *rs, layer=layer: logits(layer, *rs), rs)
        for m, jacobian in enumerate(jacobians):  # (N, E, N, p)
            own = torch.stack([jacobian[t, :, t] for t in range(4)])
            assert torch.allclose(jacobian.norm(), own.norm())  # tokens do not meet
            assert torch.allclose(flow[layer, m], own.flatten(1).norm(dim=1).mean(), rtol=1e-4)
    assert not flow.triu(1).any() and (flow.tril() > 0).sum() == L * (L + 1) / 2


@pytest.mark.parametrize("options", [{"detach_state": True}, {"cell": "none"}])
def test_without_a_path_the_state_flow_is_diagonal(options):
    model = language_model(**options).train()
    flow = router_state_flow(model, torch.randint(256, (2, 8)))
    assert torch.equal(flow, flow.diag().diag()) and (flow.diag() > 0).all()
    assert model.training and all(p.grad is None for p in model.parameters())


# 5. limits of the gates


def test_a_closed_update_gate_keeps_the_zero_state_and_uniform_logits():
    made = routers()
    made[0].cell.bias_ih.data[P : 2 * P] = 1e4
    for logits in chain(made, tokens())[0]:
        assert torch.equal(logits, torch.zeros_like(logits))


def test_an_open_update_gate_without_recurrence_is_the_memoryless_router():
    made, x = routers(), tokens()
    cell = made[0].cell
    with torch.no_grad():
        cell.weight_hh.zero_()
        cell.bias_ih[P : 2 * P] = -1e4
        cell.bias_ih[2 * P :] = torch.randn(P)
    w_in, b_in = cell.weight_ih[2 * P :], cell.bias_ih[2 * P :]
    for router, state in zip(made, chain(made, x)[1], strict=True):
        assert torch.allclose(state, torch.tanh(router.projection(x) @ w_in.T + b_in), atol=1e-12)
    with torch.no_grad():
        cell.bias_ih[2 * P :] = 0
    memoryless = routers(cell="none")
    for plain, router in zip(memoryless, made, strict=True):
        plain.projection.weight.data = w_in @ router.projection.weight
        plain.readout.weight.data = router.readout.weight.data
    for a, b in zip(chain(made, x)[0], chain(memoryless, x)[0], strict=True):
        assert torch.allclose(a, b, atol=1e-12)


# 6. one layer


def test_one_layer_is_one_gru_step_from_zero_and_the_naive_loop_over_experts():
    (router,), x = routers(1), tokens()
    bank = GLUExperts(E, D, 8).double()
    layer, seen = MoELayer(router, bank), []
    layer.observe(lambda _, routing, context: seen.append(routing))
    y, routing = layer(x), seen[0]
    h = router.cell(router.projection(x), torch.zeros(len(x), P, dtype=x.dtype))
    probs = torch.softmax(h @ router.readout.weight.T, -1)
    assert torch.allclose(routing.probs, probs, atol=1e-12)
    assert torch.allclose(routing.weights.sum(-1), torch.ones(len(x), dtype=x.dtype))
    for t in range(len(x)):
        top = probs[t].topk(K)
        expected = torch.zeros(D, dtype=x.dtype)
        for p, e in zip(top.values / top.values.sum(), top.indices, strict=True):
            gate, up = (bank.gate_up[e] @ x[t]).chunk(2)
            expected += p * (bank.down[e] @ (F.silu(gate) * up))  # experts see x, not h
        assert torch.allclose(y[t], expected, atol=1e-6)


def test_balance_probabilities_are_over_all_experts():
    routing = routers()[0](tokens())
    assert routing.probs.shape == (9, E) and torch.allclose(routing.probs.sum(-1), torch.ones(9, dtype=torch.float64))


# 7. no stale state


@pytest.mark.parametrize("dense_first", [0, 2])
def test_two_calls_on_one_input_are_identical(dense_first):
    model, batch = language_model(dense_first), torch.randint(256, (2, 8))
    first = model(batch)
    model(torch.randint(256, (3, 5)))  # another batch, another number of tokens
    assert torch.equal(model(batch), first)


def test_dense_layers_hand_the_state_on_untouched():
    made, x = routers(2), tokens()
    context = Context()
    MoELayer(made[0], GLUExperts(E, D, 8).double())(x, context)
    state = context.state
    GLU(D, 8).double()(x, context)
    MoELayer(LinearRouter(D, E, K).double(), GLUExperts(E, D, 8).double())(x, context)
    assert context.state is state


def test_the_model_is_causal():
    model = language_model()
    batch = torch.randint(256, (1, 8))
    other = batch.clone()
    other[0, 5] = (other[0, 5] + 1) % 256
    changed = (model(batch) - model(other)).abs().amax(-1)[0] > 1e-6
    assert not changed[:5].any() and changed[5]


# initial logits, sharing, files, errors


@pytest.mark.parametrize("cell", ["gru", "rnn", "none"])
@pytest.mark.parametrize("d_router", [4, 64])
def test_initial_logits_have_the_spread_of_a_linear_routers(cell, d_router):
    torch.manual_seed(0)
    x = torch.randn(2000, 64)
    linear = torch.stack([LinearRouter(64, 16, 2)(x).logits.std() for _ in range(5)]).mean()
    made = [recurrent_routers(1, 64, 16, 2, d_router, cell)[0] for _ in range(5)]
    ours = torch.stack([router(x, Context()).logits.std() for router in made]).mean()
    assert torch.allclose(ours, linear, rtol=0.3)


def test_a_shared_projection_is_one_object_and_readouts_are_not():
    made = routers(share_projection=True)
    assert all(r.projection is made[0].projection and r.cell is made[0].cell for r in made)
    assert len({id(r.readout) for r in made}) == L
    assert len({id(r.projection) for r in routers()}) == L


def test_the_shared_cell_survives_a_copy_and_a_file(tmp_path):
    model, other, batch = language_model(), language_model(seed=4), torch.randint(256, (2, 8))
    clone = copy.deepcopy(model)
    assert len({id(m) for m in clone.modules() if isinstance(m, nn.GRUCell)}) == 1
    save_model(model, str(tmp_path / "weights.safetensors"))
    assert not torch.equal(other(batch), model(batch))
    load_model(other, str(tmp_path / "weights.safetensors"))
    assert torch.equal(other(batch), model(batch))
    other = language_model(seed=4)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch), model(batch))
    assert len({id(m) for m in other.modules() if isinstance(m, nn.GRUCell)}) == 1


def test_gradients_are_those_of_finite_differences():
    made, state = routers(2), torch.randn(3, P, dtype=torch.float64, requires_grad=True)

    def weights(x, state):
        first = made[0](x, Context(state=state))
        return made[1](x, Context(state=first.state)).weights

    assert torch.autograd.gradcheck(weights, (tokens(3).requires_grad_(), state), atol=1e-6)


def test_bad_input_is_named():
    router, x = routers(1)[0], tokens()
    with pytest.raises(InputError, match=r"context.state has shape \(4, 6\) but must be \(9, 6\)"):
        router(x, Context(state=torch.zeros(4, P, dtype=x.dtype)))
    with pytest.raises(InputError, match="cell 'gur' is unknown; did you mean 'gru'"):
        recurrent_routers(2, D, E, K, P, cell="gur")
    with pytest.raises(InputError, match="d_router is 0"):
        recurrent_routers(2, D, E, K, 0)
    with pytest.raises(InputError, match="n_layers is 0"):
        recurrent_routers(0, D, E, K, P)
    with pytest.raises(InputError, match="top_k is 6"):
        RecurrentRouter(D, E, 6, P, recurrent_cell("gru", P))
    with pytest.raises(InputError, match="without a RecurrentRouter"):
        router_state_flow(nn.Linear(2, 2), torch.zeros(1, 2))


def test_the_example_maps_tokens_to_tokens():
    assert example()(torch.randn(5, 32)).shape == (5, 32)
