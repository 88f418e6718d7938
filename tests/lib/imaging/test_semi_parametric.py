"""RDM: a set and not a sequence, guidance exact at its ends, counts of the proposal, what a swap changes."""

import pytest
import torch
from scipy.stats import chisquare

from workbench.beds.retrieved_digits import DenoisingBeside
from workbench.errors import InputError
from workbench.lib.core.diffusion import Discrete, guided
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.imaging.semi_parametric import (
    NeighborConditionedDenoiser,
    RetrievalDatabase,
    TopMProposal,
    neighbours,
    sample,
)

SHAPE, WIDTH = (1, 8, 8), 16


def model(p_uncond=0.1, seed=0):
    torch.manual_seed(seed)
    return NeighborConditionedDenoiser(SHAPE, WIDTH, 32, 2, p_uncond=p_uncond).eval()


def inputs(n=5, k=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, shown = torch.randn(n, *SHAPE, generator=generator), torch.randn(n, k, WIDTH, generator=generator)
    return x, torch.arange(n) * 7, shown


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_order_of_the_neighbours_does_not_matter():
    net, (x, t, shown) = model(), inputs()
    torch.testing.assert_close(net(x, t, shown[:, [2, 0, 3, 1]]), net(x, t, shown), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(net(x, t, shown.roll(1, 0)), net(x, t, shown), atol=1e-3)  # but whose they are does


def test_one_neighbour_many_times_is_that_neighbour_once():
    net, (x, t, shown) = model(), inputs(k=1)
    for k in (2, 7):
        torch.testing.assert_close(net(x, t, shown.expand(-1, k, -1)), net(x, t, shown), atol=1e-6, rtol=1e-5)


def test_a_masked_slot_is_not_there():
    net, (x, t, shown) = model(), inputs()
    mask = torch.tensor([True, False, True, False]).expand(5, 4)
    torch.testing.assert_close(net(x, t, shown, mask), net(x, t, shown[:, [0, 2]]), atol=1e-6, rtol=1e-5)


def test_dropped_rows_see_the_null_vector_and_the_others_what_they_see():
    net, (x, t, shown) = model(), inputs()
    dropped = torch.tensor([True, False, True, False, False])
    found = net(x, t, shown, dropped=dropped)
    torch.testing.assert_close(found[dropped], net(x, t, None)[dropped], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[~dropped], net(x, t, shown)[~dropped], atol=1e-6, rtol=1e-5)


def test_guidance_is_the_conditional_model_at_one_and_the_null_at_zero():
    net, (_, _, shown), schedule = model(), inputs(), Discrete("linear-sqrt", 50)
    plain = sample(net, shown, schedule, seeded(), weight=1.0, steps=5)
    null = sample(net, None, schedule, seeded(), steps=5, n=5)
    assert torch.equal(sample(net, shown, schedule, seeded(), weight=0.0, steps=5), null)
    assert torch.equal(sample(model(p_uncond=0.0), shown, schedule, seeded(), weight=1.0, steps=5), plain)
    x, t, _ = inputs()
    with torch.no_grad():
        a, b = net(x, t, None), net(x, t, shown)
    assert torch.equal(guided(a, b, 1.0), b)
    torch.testing.assert_close(guided(a, b, 3.0) - a, 3 * (b - a), atol=1e-5, rtol=1e-4)


def test_one_seed_and_one_set_give_one_image_and_another_set_another():
    net, (_, _, shown), schedule = model(), inputs(), Discrete("linear-sqrt", 50)
    draw = lambda shown, seed=0: sample(net, shown, schedule, seeded(seed), steps=5)  # noqa: E731
    assert torch.equal(draw(shown), draw(shown.clone()))
    assert not torch.equal(draw(shown), draw(shown + 1)) and not torch.equal(draw(shown), draw(shown, 1))


def test_a_swap_changes_what_is_drawn_and_no_weight():
    net, schedule = model(), Discrete("linear-sqrt", 50)
    base = RetrievalDatabase(torch.randn(30, WIDTH, generator=seeded(1)))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    draw = lambda: sample(net, neighbours(base, torch.arange(5), 4)[1], schedule, seeded(), steps=5)  # noqa: E731
    first = draw()
    base.swap(RetrievalDatabase(torch.randn(20, WIDTH, generator=seeded(2))))
    assert not torch.equal(draw(), first)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_training_reaches_every_weight_and_no_embedding():
    net, (x, t, shown) = model().train(), inputs()
    shown.requires_grad_()
    net(x, t, shown, dropped=torch.tensor([True, False, False, False, False])).square().sum().backward()
    assert shown.grad is None
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


def test_what_is_trained_on_one_kind_of_neighbour_learns_to_use_it():
    """Two images, each beside its own embedding: the noise is told better beside the right one."""
    generator = seeded(4)
    images = torch.rand(2, *SHAPE, generator=generator).mul(2).sub(1).repeat(8, 1, 1, 1)
    shown = torch.randn(2, 1, WIDTH, generator=generator).repeat(8, 1, 1)
    schedule = Discrete("linear-sqrt", 50)
    task = DenoisingBeside({"train": (images, shown), "validation": (images, shown)}, schedule, 0.1)
    wrong = DenoisingBeside({"validation": (images, shown.flip(0))}, schedule)
    net = model()
    train(net, task, TrainConfig(200, 32, 3e-3, weight_decay=0.0, eval_every=None))
    assert task.evaluate(net)["noise_error"] < 0.92 * wrong.evaluate(net)["noise_error"]


def test_an_item_is_shown_first_and_then_what_is_near_it():
    base = RetrievalDatabase(torch.randn(30, WIDTH, generator=seeded(1)).repeat(2, 1))  # each item has a twin
    items = torch.tensor([3, 40])
    ids, shown = neighbours(base, items, 4)
    assert torch.equal(ids[:, 0], items) and ids[:, 1].tolist() == [33, 10]
    assert all(len(set(row)) == 4 for row in ids.tolist()) and torch.equal(shown, base.embeddings(ids))
    assert torch.equal(neighbours(base, items, 1)[0], items[:, None])


IDS = torch.tensor([[0, 2, 5], [2, 5, 3], [2, 3, 0], [2, 5, 7]])


def test_the_proposal_counts_every_neighbour_once():
    proposal = TopMProposal.fit(IDS, 10)
    assert proposal.counts.tolist() == [2, 0, 4, 2, 0, 3, 0, 1, 0, 0] and int(proposal.counts.sum()) == IDS.numel()
    assert proposal.sample(50, seeded(), m=1 / 10).unique().tolist() == [2]
    assert proposal.weights(0.3).nonzero()[:, 0].tolist() == [0, 2, 5]  # of 0 and 3, equal, the lower
    assert proposal.weights(0.3, weighted=False)[[0, 2, 5]].tolist() == [1 / 3] * 3


def test_draws_are_as_frequent_as_the_counts_say():
    proposal = TopMProposal.fit(IDS, 10)
    for m, weighted in ((1.0, True), (0.3, True), (0.4, False)):
        drawn = proposal.sample(4000, seeded(1), m, weighted).bincount(minlength=10)
        expected = 4000 * proposal.weights(m, weighted)
        assert drawn[expected == 0].sum() == 0
        assert chisquare(drawn[expected > 0].numpy(), expected[expected > 0].numpy()).pvalue > 0.01


def refused(**options):
    x, t, shown = inputs()
    return model()(**{"x": x, "t": t, "shown": shown} | options)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: NeighborConditionedDenoiser((0, 8, 8), 16), "shape, d_embedding"),
        (lambda: NeighborConditionedDenoiser(SHAPE, 16, dim=30), "n_heads a divisor of dim"),
        (lambda: NeighborConditionedDenoiser(SHAPE, 16, p_uncond=1.5), "p_uncond is 1.5"),
        (lambda: refused(x=torch.zeros(5, 1, 8, 9)), r"x has images of \(1, 8, 9\)"),
        (lambda: refused(shown=torch.zeros(5, 4, 8)), r"shown is \(5, 4, 8\)"),
        (lambda: refused(shown=torch.zeros(5, 0, 16)), r"shown is \(5, 0, 16\)"),
        (lambda: refused(shown=torch.full((5, 4, 16), torch.nan)), "not finite"),
        (lambda: refused(mask=torch.zeros(5, 4, dtype=torch.bool)), "at least one slot"),
        (lambda: refused(shown=None, dropped=torch.ones(5, dtype=torch.bool)), "shown is None"),
        (lambda: TopMProposal.fit(torch.zeros(0, 3).long(), 5), "at least one id"),
        (lambda: TopMProposal.fit(IDS, 7), "0 to 7 but must be 0 to 6"),
        (lambda: TopMProposal.fit(IDS, 10).sample(0, seeded()), "n is 0"),
        (lambda: TopMProposal.fit(IDS, 10).weights(0.0), "m is 0.0"),
        (lambda: TopMProposal.fit(IDS, 10).weights(1.1), "m is 1.1"),
        (lambda: sample(model(), None, Discrete(), seeded()), "shown or n"),
        (lambda: sample(model(), inputs()[2], Discrete(), seeded(), n=3), "shown or n"),
        (lambda: sample(model(p_uncond=0.0), inputs()[2], Discrete(), seeded()), "never saw the null vector"),
    ],
)
def test_what_is_refused(act, said):
    with pytest.raises(InputError, match=said):
        act()
