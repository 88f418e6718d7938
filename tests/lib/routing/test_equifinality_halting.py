"""Halting at inference: tokens whose update is small skip the later hops of a layer, and the threshold for it."""

import math

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.routers import HashRouter
from workbench.lib.core.routing import Context
from workbench.lib.routing.equifinality import (
    CosineRouter,
    GeometricMoE,
    RankOneExperts,
    calibrate_halting,
    halting,
    hop_stats,
    mean_saving,
)
from workbench.lib.routing.rmoe import RecurrentRouter, recurrent_cell

D, E, M = 16, 12, 8


def block(hops, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return GeometricMoE(CosineRouter(D, E, 3, M), RankOneExperts(E, D, 3), hops, **options).to(dtype)


def tokens(n=7, dtype=torch.float64):
    return torch.randn(n, D, dtype=dtype, generator=torch.Generator().manual_seed(1))


def model(hops):
    torch.manual_seed(0)
    return DecoderLM(
        vocab=256,
        d_model=D,
        n_layers=2,
        n_heads=2,
        ffn=lambda layer: GeometricMoE(CosineRouter(D, E, 3, M), RankOneExperts(E, D, 3), hops),
        seq_len=8,
    )


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (4, 8), generator=generator) for _ in range(3)]


@pytest.mark.parametrize("decoupled", [False, True])
def test_threshold_zero_never_halts_and_an_infinite_one_leaves_one_hop(decoupled):
    x = tokens(50, torch.float32)
    plain = block(3, dtype=torch.float32, decoupled=decoupled).eval()(x)
    never = block(3, dtype=torch.float32, decoupled=decoupled, halt_threshold=0.0).eval()(x)
    always = block(3, dtype=torch.float32, decoupled=decoupled, halt_threshold=math.inf).eval()(x)
    assert torch.equal(never, plain)
    assert torch.equal(always, block(1, dtype=torch.float32).eval()(x))


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_halted_token_gets_its_first_hops_and_the_others_are_untouched(decoupled):
    layer, x = block(3, decoupled=decoupled).eval(), tokens(60)
    full, seen = layer(x), []
    layer.observe(lambda _, stats: seen.append(stats))
    layer(x)
    layer.halt_threshold = float(seen[0].relative_norms[:2].median())
    expected = torch.zeros_like(x)
    for t in range(len(x)):
        h, routing = x[t : t + 1], None
        for hop in layer.hops:
            if routing is None or not decoupled:
                routing = hop.router(h, Context())
            update = hop.experts(h, routing)
            expected[t] += update[0]
            if update.norm() / h.norm() < layer.halt_threshold:
                break
            h = h + update
    y = layer(x)
    assert torch.allclose(y, expected, atol=1e-12)
    assert set(seen[1].used.tolist()) == {1, 2, 3}
    assert torch.allclose(y[seen[1].used == 3], full[seen[1].used == 3], atol=1e-12)
    assert seen[1].update_norms.isnan().sum() == (3 - seen[1].used).sum()


def test_halting_is_for_inference_only():
    layer, x = block(2, halt_threshold=math.inf), tokens()
    assert torch.equal(layer.train()(x), block(2)(x))


def test_halting_gives_a_hash_router_the_ids_of_the_tokens_that_go_on():
    torch.manual_seed(0)
    layer = GeometricMoE(HashRouter(50, E, 3), RankOneExperts(E, D, 3), hops=2).double().eval()
    x, ids, routings = tokens(40), torch.arange(40), []
    layer.hops[1].observe(lambda _, routing, context: routings.append((routing, context.token_ids)))
    seen = []
    layer.observe(lambda _, stats: seen.append(stats))
    layer(x, Context(token_ids=ids))
    layer.halt_threshold = float(seen[0].relative_norms[0].median())
    layer(x, Context(token_ids=ids))
    going = seen[1].used == 2
    assert 0 < going.sum() < 40
    assert torch.equal(routings[1][1], ids[going])
    assert torch.equal(routings[1][0].indices, layer.hops[0].router.table[going.nonzero()[:, 0]])


def test_halting_keeps_the_state_of_a_recurrent_router_in_step_with_its_token():
    torch.manual_seed(0)
    router = RecurrentRouter(D, E, 3, 4, recurrent_cell("gru", 4))
    layer = GeometricMoE(router, RankOneExperts(E, D, 3), hops=3).double().eval()
    x, seen, full = tokens(40), [], Context()
    layer.observe(lambda _, stats: seen.append(stats))
    layer(x, full)
    layer.halt_threshold = float(seen[0].relative_norms[:2].median())
    context = Context()
    layer(x, context)
    used, one_hop = seen[1].used, router(x, Context()).state
    assert set(used.tolist()) == {1, 2, 3}
    assert torch.allclose(context.state[used == 3], full.state[used == 3], atol=1e-12)
    assert torch.allclose(context.state[used == 1], one_hop[used == 1], atol=1e-12)


def test_calibration_meets_its_target_on_its_own_inputs():
    lm, slices = model(hops=3).train(), inputs()
    threshold = calibrate_halting(lm, slices, 0.4)
    with halting(lm, threshold):
        saved = mean_saving(hop_stats(lm, slices))
    with halting(lm, threshold * 0.8):
        assert mean_saving(hop_stats(lm, slices)) < 0.4
    assert 0.4 <= saved < 0.5
    assert lm.training and mean_saving(hop_stats(lm, slices)) == 0  # nothing is left behind


def test_calibration_refuses_what_cannot_be_saved():
    with pytest.raises(InputError, match=r"target_saving is 0.5 but must be above 0 and below .* = 0.5"):
        calibrate_halting(model(hops=2), inputs(), 0.5)
    with pytest.raises(InputError, match="without a GeometricMoE layer"):
        calibrate_halting(torch.nn.Linear(2, 2), [], 0.1)
