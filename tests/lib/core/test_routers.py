"""The baseline routers, and the errors every router owes."""

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.core.expert_choice import ExpertChoiceRouter
from workbench.lib.core.routers import FixedRandomRouter, HashRouter, LinearRouter
from workbench.lib.core.routing import Context


@pytest.fixture
def x():
    return torch.randn(11, 8, generator=torch.Generator().manual_seed(1))


def test_linear_router_takes_the_largest_probabilities(x):
    torch.manual_seed(0)
    routing = LinearRouter(8, 5, 2)(x, Context())
    expected = routing.probs.topk(2).values
    assert torch.allclose(routing.weights, expected / expected.sum(-1, keepdim=True))
    assert torch.allclose(routing.probs.sum(-1), torch.ones(11))


def test_top1_keeps_the_probability_so_that_the_router_learns(x):
    torch.manual_seed(0)
    router = LinearRouter(8, 5, 1)
    routing = router(x, Context())
    assert torch.equal(routing.weight, routing.probs.amax(-1))
    routing.weight.sum().backward()
    assert router.projection.weight.grad.abs().sum() > 0
    frozen = LinearRouter(8, 5, 1, renormalize=True)
    frozen(x, Context()).weight.sum().backward()
    assert torch.allclose(frozen.projection.weight.grad, torch.zeros(5, 8), atol=1e-6)


def test_set_top_k_changes_the_next_routing_and_no_parameter(x):
    router = LinearRouter(8, 5, 4)
    before = {k: v.clone() for k, v in router.state_dict().items()}
    router.set_top_k(1)
    assert router(x, Context()).top_k == 1
    assert all(torch.equal(before[k], v) for k, v in router.state_dict().items())
    with pytest.raises(InputError, match="top_k is 6"):
        router.set_top_k(6)


def test_fixed_random_router_has_nothing_to_train(x):
    router = FixedRandomRouter(8, 4, 2)
    assert not any(p.requires_grad for p in router.parameters())
    assert router(x, Context()).probs.amax(-1).mean() > 0.3


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_hash_router_depends_on_the_token_id_alone(x, top_k):
    router = HashRouter(256, 4, top_k, seed=3)
    ids = torch.tensor([5, 5, 9, 200, 5, 9, 0, 1, 2, 3, 4])
    routing = router(x, Context(token_ids=ids))
    assert torch.equal(routing.indices[0], routing.indices[1]) and torch.equal(routing.indices[2], routing.indices[5])
    assert all(len(set(row)) == top_k for row in router.table.tolist())
    assert torch.equal(router.table, HashRouter(256, 4, top_k, seed=3).table)
    for column in HashRouter(250, 4, top_k).table.T:  # each of them, also where the ids do not divide by the experts
        share = torch.bincount(column, minlength=4)
        assert share.max() - share.min() <= 1
    with pytest.raises(InputError, match="token_ids"):
        router(x, Context())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearRouter(8, 4, 5), "top_k is 5 but must be between 1 and n_experts = 4"),
        (lambda: LinearRouter(8, 4, 0), "top_k is 0"),
        (lambda: LinearRouter(8, 0, 1), "n_experts is 0"),
        (lambda: HashRouter(256, 4, 9), "top_k is 9"),
        (lambda: ExpertChoiceRouter(8, 4, capacity=5.0), "capacity is 5"),
    ],
)
def test_impossible_sizes_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("router", [LinearRouter(8, 4, 2), ExpertChoiceRouter(8, 4)])
def test_nan_and_empty_input_are_refused(router, x):
    with pytest.raises(InputError, match="NaN or infinite"):
        router(torch.full((3, 8), float("nan")), Context())
    with pytest.raises(InputError, match="at least one token"):
        router(x[:0], Context())


def test_jitter_is_for_training_and_for_the_router_alone():
    torch.manual_seed(0)
    router, x = LinearRouter(6, 4, 2, jitter=0.25), torch.ones(1000, 6)
    assert torch.equal(router.eval().jittered(x), x)
    seen = router.train().jittered(x)
    assert (
        0.75 <= seen.min() < 0.76 and 1.24 < seen.max() <= 1.25 and seen.std() == pytest.approx(0.25 / 3**0.5, rel=0.05)
    )
    torch.manual_seed(1)
    logits = router(x).logits
    torch.manual_seed(1)
    assert torch.equal(logits, router.projection(router.jittered(x)))
    for wrong in (-0.1, 1):
        with pytest.raises(InputError, match=f"jitter is {wrong} but must be at least 0 and below 1"):
            LinearRouter(6, 4, 2, jitter=wrong)
