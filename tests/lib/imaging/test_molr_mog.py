"""MoLR-MoG: scores against autograd, dense solves and torch's densities; symmetries; subspaces; wrong input."""

import math

import pytest
import torch
from torch.distributions import Categorical, LowRankMultivariateNormal, MixtureSameFamily, MultivariateNormal

from workbench.errors import InputError
from workbench.lib.core.diffusion import VP, sample
from workbench.lib.imaging.molr_mog import (
    LowRankMoG,
    MoLRMoG,
    dsm_loss,
    fit_modes,
    fit_subspaces,
    train_dsm,
)

S, G = (torch.full((7,), value, dtype=torch.float64) for value in (0.8, 0.6))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def made(dim=5, n_modes=3, rank=2, seed=0, **options) -> LowRankMoG:
    torch.manual_seed(seed)
    expert = LowRankMoG(dim, n_modes, rank, **options).double()
    with torch.no_grad():
        expert.log_scale.normal_()
        expert.log_weight.normal_()
    return expert


def prior(dims=(3, 5), ambient=8, tau=0.0) -> MoLRMoG:
    """Subspaces of unequal dimensions that are not orthogonal to each other."""
    frames = [torch.randn(ambient, d, generator=generator(d)).double() for d in dims]
    bases = [torch.linalg.qr(frame).Q for frame in frames]
    experts = [made(d, n_modes=2 + k, seed=k, tau=tau) for k, d in enumerate(dims)]
    return MoLRMoG(bases, experts, torch.tensor([0.3, 0.7], dtype=torch.float64))


def points(dim, rows=7):
    return torch.randn(rows, dim, generator=generator(9)).double() * 2


@pytest.mark.parametrize("tau", [0.0, 0.3])
@pytest.mark.parametrize("model", [made, prior], ids=["latent", "ambient"])
def test_the_score_is_the_gradient_of_the_density(model, tau):
    model = model(tau=tau)
    x = points(5 if isinstance(model, LowRankMoG) else 8).requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_prob(x, S, G).sum(), x)
    torch.testing.assert_close(model.score(x, S, G), gradient, rtol=0, atol=1e-8)


def dense(model: MoLRMoG, s: float, g: float) -> MixtureSameFamily:
    """The same density with full covariances in the ambient space."""
    means, covariances, weights = [], [], []
    for basis, expert, weight in zip(model.bases, model.experts, model.log_weights.exp(), strict=True):
        factor = torch.linalg.qr(expert.frame).Q * expert.log_scale.exp()[:, None]
        inside = basis @ (factor @ factor.mT) @ basis.T
        eye = torch.eye(len(basis)).double()
        means.append(s * expert.mean @ basis.T)
        covariances.append(s * s * (inside + expert.tau**2 * eye) + g * g * eye)
        weights.append(weight * expert.log_weight.softmax(0))
    return MixtureSameFamily(
        Categorical(torch.cat(weights).detach()),
        MultivariateNormal(torch.cat(means).detach(), torch.cat(covariances).detach()),
    )


@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_neither_solves_nor_determinants_are_needed(tau):
    model, x = prior(tau=tau), points(8)
    of = dense(model, 0.8, 0.6)
    torch.testing.assert_close(model.log_prob(x, S, G), of.log_prob(x), rtol=0, atol=1e-9)
    each = of.component_distribution.log_prob(x[:, None]) + of.mixture_distribution.probs.log()
    torch.testing.assert_close(model.responsibilities(x, S, G), each.softmax(-1), rtol=0, atol=1e-9)
    away = x[:, None] - of.component_distribution.mean
    solved = torch.linalg.solve(of.component_distribution.covariance_matrix, away[..., None])[..., 0]
    torch.testing.assert_close(model.score(x, S, G), -(each.softmax(-1)[..., None] * solved).sum(1), rtol=0, atol=1e-9)


def test_a_latent_mixture_has_the_density_of_torchs_low_rank_normals():
    expert, z = made(), points(5)
    factor = 0.8 * torch.linalg.qr(expert.frame).Q * expert.log_scale.exp()[:, None]
    noise = torch.full((3, 5), 0.36, dtype=torch.float64)
    of = MixtureSameFamily(
        Categorical(logits=expert.log_weight), LowRankMultivariateNormal(0.8 * expert.mean, factor, noise)
    )
    torch.testing.assert_close(expert.log_prob(z, S, G), of.log_prob(z), rtol=0, atol=1e-9)


def test_one_mode_with_a_floor_has_the_density_of_a_factor_analysis_with_even_noise():
    """Fitted by sklearn's PCA, the maximum-likelihood model of that form."""
    from sklearn.decomposition import PCA

    x = made(6, 1, 2, seed=3).draw(400, generator()) + 0.2 * torch.randn(400, 6, generator=generator(1)).double()
    pca = PCA(2).fit(x.numpy())
    values, axes = torch.from_numpy(pca.explained_variance_), torch.from_numpy(pca.components_)
    factor = (axes.T * (values - pca.noise_variance_).sqrt())[None]
    expert = LowRankMoG(6, 1, 2, tau=math.sqrt(pca.noise_variance_)).double()
    expert.set(torch.from_numpy(pca.mean_)[None], factor)
    clean = torch.ones(400).double(), torch.zeros(400).double()
    torch.testing.assert_close(expert.log_prob(x, *clean), torch.from_numpy(pca.score_samples(x.numpy())))


def test_one_mode_without_a_mean_is_linear_and_several_are_not():
    single, x = made(n_modes=1, centred=True), points(5)
    torch.testing.assert_close(single.score(2 * x, S, G), 2 * single.score(x, S, G))
    several = made(n_modes=2)
    assert not torch.allclose(several.score(2 * x, S, G), 2 * several.score(x, S, G), rtol=0.1)


def test_opposite_modes_make_an_odd_score():
    expert, z = made(n_modes=2), points(5)
    with torch.no_grad():
        for part in (expert.frame, expert.log_scale, expert.log_weight):
            part[1] = part[0]
        expert.mean[1] = -expert.mean[0]
    torch.testing.assert_close(expert.score(-z, S, G), -expert.score(z, S, G))
    torch.testing.assert_close(expert.score(0 * z, S, G), 0 * z, rtol=0, atol=1e-12)
    shares = expert.responsibilities(z, S, G)
    torch.testing.assert_close(shares.sum(-1), torch.ones(7).double())


def test_pure_noise_pulls_to_the_origin_and_far_modes_are_alone():
    model, x = prior(), points(8)
    none, all_of_it = torch.full((7,), 1e-9).double(), torch.ones(7).double()
    torch.testing.assert_close(model.score(x, none, all_of_it), -x, rtol=0, atol=1e-6)
    expert = made(n_modes=2)
    with torch.no_grad():
        expert.mean[1] = expert.mean[0] + 100
        one = made(n_modes=1).set(expert.mean[:1])
        one.frame.copy_(expert.frame[:1]), one.log_scale.copy_(expert.log_scale[:1])
        z = 0.8 * expert.mean[:1] + 0.1 * points(5)
    torch.testing.assert_close(expert.score(z, S, G), one.score(z, S, G))


def test_two_halves_of_a_mode_are_that_mode_and_order_does_not_matter():
    model, x = prior(), points(8)
    before = model.score(x, S, G)
    swapped = MoLRMoG(model.bases[::-1], [*model.experts][::-1], model.log_weights.exp().flip(0))
    torch.testing.assert_close(swapped.score(x, S, G), before)
    expert = model.experts[0]
    twice = LowRankMoG(expert.dim, 2 * expert.n_modes, expert.rank).double()
    state = {name: torch.cat([value, value]) for name, value in expert.state_dict().items()}
    twice.load_state_dict(state)
    split = MoLRMoG(model.bases, [twice, model.experts[1]], torch.tensor([0.3, 0.7], dtype=torch.float64))
    torch.testing.assert_close(split.score(x, S, G), before)


def test_gates_are_sums_of_the_shares_of_their_modes():
    model, x = prior(), points(8)
    shares = model.responsibilities(x, S, G)
    gate = torch.stack([part.sum(-1) for part in shares.split([2, 3], -1)], -1)
    torch.testing.assert_close(model.gate(x, S, G), gate)
    torch.testing.assert_close(gate.sum(-1), torch.ones(7).double())


def test_the_true_parameters_have_the_least_loss():
    """The gradient at them is 0 up to the draws, the loss is that of the posterior, and moving a mean raises it."""
    schedule = VP(first=0.2)
    expert = made(4, 2, 2, tau=0.1)
    model = MoLRMoG([torch.eye(4).double()], [expert])
    draws = generator(5)
    x = expert.draw(20_000, draws) + 0.1 * torch.randn(20_000, 4, generator=draws).double()
    t = 0.2 + 0.8 * torch.rand(20_000, generator=draws).double()
    noise = torch.randn(20_000, 4, generator=draws).double()
    loss = dsm_loss(model, x, t, noise, schedule)
    parts = [dsm_loss(model, *(one[i : i + 2000] for one in (x, t, noise)), schedule) for i in range(0, 20_000, 2000)]
    slopes = torch.stack([torch.autograd.grad(part, expert.mean, retain_graph=True)[0] for part in parts])
    error = slopes.std(0) / math.sqrt(len(parts))
    assert float((slopes.mean(0).abs() / error).max()) < 5
    with torch.no_grad():
        for shift in (0.3, -0.3):
            expert.mean.add_(shift)
            assert float(dsm_loss(model, x, t, noise, schedule)) > float(loss) + 1e-3
            expert.mean.sub_(shift)


def test_parameters_are_counted_by_the_form():
    model = prior()
    count = sum(e.n_modes * (e.dim + e.dim * e.rank + e.rank + 1) for e in model.experts)
    assert sum(p.numel() for p in model.parameters()) == count
    single = LowRankMoG(5, 1, 2, centred=True)
    assert sum(p.numel() for p in single.parameters() if p.requires_grad) == 10 + 2 + 1


@pytest.mark.parametrize("method", ["svd", "ksubspace"])
def test_subspaces_through_the_origin_are_found(method):
    bases = [torch.linalg.qr(torch.randn(12, 2, generator=generator(k)).double()).Q for k in range(3)]
    labels = torch.arange(3).repeat_interleave(60)
    x = torch.cat([torch.randn(60, 2, generator=generator(9 + k)).double() @ a.T for k, a in enumerate(bases)])
    if method == "svd":
        found = fit_subspaces(x, labels, 2)
    else:
        found = fit_subspaces(x, None, 2, method, n_subspaces=3, generator=generator(2))
    overlaps = torch.tensor([[float((a.T @ b).square().sum()) for b in found] for a in bases])
    torch.testing.assert_close(overlaps.max(1).values, torch.full((3,), 2.0), rtol=0, atol=1e-6)
    assert sorted(overlaps.argmax(1).tolist()) == [0, 1, 2]


def test_modes_begin_at_clusters_and_training_lowers_the_loss_and_samples_return_to_the_data():
    truth = made(3, 2, 1, seed=1)
    with torch.no_grad():
        truth.mean.copy_(torch.tensor([[3.0, 0, 0], [-3.0, 0, 0]]))
        truth.log_scale.fill_(-1)
        truth.log_weight.zero_()
    x = truth.draw(600, generator()).float()
    expert = fit_modes(x, 2, 1, seed=0, tau=0.05)
    assert sorted(expert.mean[:, 0].round().tolist()) == [-3.0, 3.0]
    random = LowRankMoG(3, 2, 1, tau=0.05)
    for one, steps in ((expert, 5), (random, 60)):
        history = train_dsm(MoLRMoG([torch.eye(3)], [one]), x, VP(), steps, 1e-2, generator())
        assert len(history) == steps
    assert sum(history[-10:]) < sum(history[:10])
    model = MoLRMoG([torch.eye(3)], [expert])
    drawn = sample(model.predictor(VP()), (64, 3), VP(), 40, generator(3))
    assert float((drawn[:, 0].abs() - 3).abs().mean()) < 0.5
    assert 0.2 < float((drawn[:, 0] > 0).double().mean()) < 0.8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: LowRankMoG(4, 0, 1), "n_modes is 0 but must be at least 1"),
        (lambda: LowRankMoG(4, 1, 5), "rank is 5 but must be from 1 to dim, 4"),
        (lambda: LowRankMoG(4, 1, 1, tau=-1.0), "tau is -1.0"),
        (lambda: LowRankMoG(4, 1, 1, tau=math.nan), "tau is nan"),
        (lambda: MoLRMoG([], []), "experts has 0 entries but bases has 0"),
        (lambda: MoLRMoG([torch.eye(4)], [LowRankMoG(3, 1, 1)]), r"bases\[0\] has 4 columns but its expert"),
        (
            lambda: MoLRMoG([2 * torch.eye(4)], [LowRankMoG(4, 1, 1)]),
            r"bases\[0\] has columns that are not",
        ),
        (lambda: MoLRMoG([torch.eye(4)], [LowRankMoG(4, 1, 1)], torch.zeros(1)), "weights is"),
        (lambda: fit_subspaces(torch.ones(3, 4), None, 2), "labels is None but method 'svd' needs them"),
        (lambda: fit_subspaces(torch.ones(3, 4), torch.zeros(3).long(), 5), "d is 5 but must be from 1 to the 4"),
        (lambda: fit_subspaces(torch.ones(1, 4), torch.zeros(1).long(), 2), "d is 2 but subspace 0 has 1 points"),
        (lambda: fit_subspaces(torch.full((3, 4), math.nan), torch.zeros(3).long(), 2), "x has entries"),
        (lambda: fit_subspaces(torch.ones(3, 4), None, 2, "kmeans"), "method 'kmeans' is unknown"),
        (lambda: fit_subspaces(torch.ones(3, 4), None, 2, "ksubspace"), "n_subspaces is None"),
        (lambda: fit_modes(torch.ones(3, 4), 5, 1, 0), "n_modes is 5 but z has 3 points"),
    ],
)
def test_wrong_input_is_named(wrong, message):
    with pytest.raises(InputError, match=message):
        wrong()
