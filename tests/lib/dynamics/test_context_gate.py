"""The refitted gate: its clusters, its assignment, its least squares, and when it stays as it was."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.lib.dynamics.context_gate import (
    WORST,
    ContextGate,
    assigned,
    cluster_scores,
    kmeans_l1,
    least_squares,
    ones,
)

CENTRES = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]])  # affinely independent
FAMILY = torch.arange(4).repeat_interleave(5)


def contexts(centres=CENTRES, spread=0.01) -> torch.Tensor:
    return centres[FAMILY] + spread * torch.randn(20, centres.shape[1], generator=torch.Generator().manual_seed(0))


def losses(best=(2, 0, 3, 1)) -> torch.Tensor:
    """Of each environment with each expert; that of its family is the best by far."""
    found = 1 + torch.rand(20, 4, generator=torch.Generator().manual_seed(1))
    found[torch.arange(20), torch.tensor(best)[FAMILY]] = 0.1
    return found


def gate(centres=CENTRES) -> ContextGate:
    """Which begins its clusters near the centres."""
    torch.manual_seed(0)
    made = ContextGate(centres.shape[1], 4)
    made.centroids.copy_(0.8 * centres)
    return made


@pytest.mark.parametrize("assignment", ["greedy", "hungarian"])
def test_one_fit_sends_every_environment_to_the_best_expert_and_a_second_changes_nothing(assignment):
    made, xi = gate(), contexts()
    fit = made.fit(xi, losses(), assignment)
    assert fit.updated and fit.agreement == 1.0 and fit.masked == ()
    assert made.assign(xi).tolist() == torch.tensor([2, 0, 3, 1])[FAMILY].tolist()
    weight = made.weight.clone()
    again = made.fit(xi, losses(), assignment)
    assert torch.equal(again.clusters, fit.clusters) and torch.equal(again.assignment, fit.assignment)
    torch.testing.assert_close(again.centroids, fit.centroids)
    torch.testing.assert_close(made.weight, weight, atol=5e-3, rtol=0)  # the noise on the contexts is drawn anew
    assert made.counts.tolist() == [2, 0, 0]


def test_a_cluster_between_others_on_a_line_is_masked_and_reported():
    line = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]])
    made = gate(line)
    fit = made.fit(contexts(line), losses())
    assert fit.updated and fit.clusters.tolist() == FAMILY.tolist()
    assert fit.masked == (1, 2) and fit.agreement == 0.5
    assert made.form_now() == {"fits": 1.0, "skipped": 0.0, "masked": 1.0}


def test_an_empty_cluster_leaves_the_gate_and_forgets_the_centroids():
    made, xi = gate(), contexts()
    made.centroids[3] = 100.0
    weight = made.weight.clone()
    fit = made.fit(xi, losses())
    assert not fit.updated and fit.centroids is None and torch.equal(made.weight, weight)
    assert made.centroids.isnan().all() and made.counts.tolist() == [1, 1, 0]


def test_centroids_that_still_move_leave_the_gate(monkeypatch):
    monkeypatch.setattr("workbench.lib.dynamics.context_gate.ROUNDS", 1)
    made, weight = gate(), gate().weight
    assert not made.fit(contexts(), losses()).updated and torch.equal(made.weight, weight)
    assert made.centroids.isnan().all()


def test_contexts_at_zero_are_all_of_one_cluster_so_the_gate_waits():
    made = ContextGate(3, 4)
    assert not made.fit(torch.zeros(20, 3), losses()).updated


@given(st.permutations(range(4)))
def test_relabelling_the_experts_permutes_the_columns(order):
    one, other, xi = gate(), gate(), contexts()
    torch.manual_seed(1)
    a = one.fit(xi, losses())
    torch.manual_seed(1)
    b = other.fit(xi, losses()[:, list(order)])
    torch.testing.assert_close(other.weight, one.weight[:, list(order)])
    assert sorted(a.assignment.tolist()) == sorted(b.assignment.tolist()) == [0, 1, 2, 3]


@given(st.integers(0, 1000), st.sampled_from(["greedy", "hungarian"]))
def test_an_assignment_is_a_permutation_and_the_hungarian_is_never_worse(seed, assignment):
    scores = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed))
    found = assigned(scores, assignment)
    assert sorted(found.tolist()) == [0, 1, 2, 3, 4]
    greedy, best = (float(scores.gather(1, assigned(scores, how)[:, None]).sum()) for how in ("greedy", "hungarian"))
    assert best <= greedy + 1e-6
    assert int(assigned(scores)[0]) == int(scores[0].argmin())


def test_greedy_goes_by_the_order_of_the_clusters():
    scores = torch.tensor([[1.0, 2.0], [0.0, 10.0]])
    assert assigned(scores).tolist() == [0, 1] and assigned(scores, "hungarian").tolist() == [1, 0]


def test_the_least_squares_have_a_residual_that_is_orthogonal():
    xi = contexts().double()
    x, w = ones(xi), least_squares(xi, FAMILY, 4)
    residual = x @ w - torch.nn.functional.one_hot(FAMILY, 4)
    torch.testing.assert_close(x.T @ residual, torch.zeros_like(w), atol=1e-10, rtol=0)
    flat = least_squares(torch.zeros(20, 3).double(), FAMILY, 4)  # contexts that do not differ: the share of each
    torch.testing.assert_close(ones(torch.zeros(20, 3).double()) @ flat, torch.full((20, 4), 0.25).double())


def test_one_environment_of_a_cluster_does_not_move_its_median():
    spoiled = losses()
    spoiled[3, :] = torch.tensor([0.0, 9.0, 1e9, 0.0])  # of the first family, whose expert is 2
    assert gate().fit(contexts(), spoiled).assignment.tolist() == [2, 0, 3, 1]
    assert spoiled[FAMILY == 0].mean(0).argmin() != 2
    scores = cluster_scores(losses(), FAMILY, 4)
    np.testing.assert_allclose(scores[1].numpy(), np.median(losses()[FAMILY == 1].numpy(), 0), rtol=1e-6)


def test_an_expert_that_leaves_the_finite_numbers_is_the_worst_and_no_more():
    spoiled = losses()
    spoiled[:, 1], spoiled[:5, 0] = torch.nan, torch.inf
    for assignment in ("greedy", "hungarian"):
        fit = gate().fit(contexts(), spoiled, assignment)
        assert fit.updated and fit.assignment.tolist() == [2, 0, 3, 1]
    assert WORST > 1e20


def test_clusters_are_those_of_the_mean_absolute_difference():
    """A point nearer to one centroid by L1 and to the other by L2."""
    point = torch.tensor([[1.0, 1.0], [0.0, 0.0], [3.0, 0.0]])
    clusters, _, _ = kmeans_l1(point, torch.tensor([[0.0, 0.1], [2.8, 1.0]]))
    assert (point[0] - torch.tensor([2.8, 1.0])).norm() > (point[0] - torch.tensor([0.0, 0.1])).norm()
    assert clusters[0] == 1


def test_apart_enough_they_are_those_of_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    xi = contexts()
    clusters, centroids, still = kmeans_l1(xi, 0.5 * CENTRES)
    peer = cluster.KMeans(4, init=0.5 * CENTRES.numpy(), n_init=1).fit(xi.numpy())
    assert still and clusters.tolist() == peer.labels_.tolist()
    np.testing.assert_allclose(centroids.numpy(), peer.cluster_centers_, atol=1e-5)


@pytest.mark.parametrize(
    ("xi", "given_losses", "assignment", "said"),
    [
        (torch.zeros(20, 2), losses(), "greedy", r"xi is \(20, 2\) and expert_losses is \(20, 4\)"),
        (torch.zeros(20, 3), torch.zeros(20, 3), "greedy", r"they must be \(environments, 3\) and \(environments, 4\)"),
        (
            torch.zeros(1, 3),
            torch.zeros(1, 4),
            "greedy",
            "xi has 1 environments but must have at least one for each of 4",
        ),
        (contexts(), losses(), "gredy", "assignment 'gredy' is unknown; did you mean 'greedy'"),
    ],
)
def test_wrong_input_is_named(xi, given_losses, assignment, said):
    with pytest.raises(InputError, match=said):
        gate().fit(xi, given_losses, assignment)
