"""Random subspaces: the three projections, the network that trains in one, and the toy of known intrinsic dimension."""

import copy
import math

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.adapters.intrinsic_dimension import (
    PROJECTIONS,
    DenseProjection,
    FastfoodProjection,
    SparseProjection,
    SubspaceModel,
    measure_intrinsic_dimension,
    normal,
)

kinds = pytest.mark.parametrize("kind", list(PROJECTIONS))


class Everything(nn.Module):
    """A network with norms, biases, buffers, a convolution and a tied matrix: (B, 4) tokens -> (B, 4, 9) logits."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.norm, self.batch_norm = nn.LayerNorm(6), nn.BatchNorm1d(4)
        self.mix = nn.Conv1d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 9)
        self.head.weight = self.embedding.weight

    def forward(self, tokens, scale=1.0):
        x = self.batch_norm(self.norm(self.embedding(tokens)))
        return scale * self.head(torch.tanh(self.mix(x.mT).mT))


def everything(seed: int = 0) -> Everything:
    torch.manual_seed(seed)
    return Everything()


TOKENS = torch.randint(9, (5, 4), generator=torch.Generator().manual_seed(1))


# -- the projections


@kinds
@pytest.mark.parametrize(("size", "dims"), [(3000, 50), (64, 64), (1, 1), (37, 5), (4, 4)])
def test_columns_have_unit_length(kind, size, dims):
    norms = PROJECTIONS[kind](size, dims, 3).column_norms()
    if kind == "fastfood" and size & (size - 1):  # a part of each column is cut off
        assert norms.mean() == pytest.approx(1, abs=0.02 if size > 1000 else 0.3) and norms.std() < 0.3
    else:
        assert torch.allclose(norms, torch.ones(dims), atol=1e-5)


@kinds
def test_columns_are_nearly_orthogonal_and_a_step_in_the_subspace_is_as_long_in_the_whole(kind):
    projection = PROJECTIONS[kind](3000, 50, 0)
    matrix = projection.matrix()
    gram = matrix.T @ matrix
    off = (gram - gram.diagonal().diag()).abs()
    assert off.max() < 6 / 3000**0.5 and off.sum() / (50 * 49) < 1.2 / 3000**0.5
    v = torch.randn(50, generator=torch.Generator().manual_seed(1))
    assert projection(v).norm() == pytest.approx(v.norm().item(), rel=0.1)


@kinds
def test_it_is_linear_and_its_adjoint_is_the_transpose(kind):
    projection, generator = PROJECTIONS[kind](70, 9, 5).double(), torch.Generator().manual_seed(2)
    matrix = projection.matrix()
    assert matrix.shape == (70, 9)
    v, g = torch.randn(4, 9, generator=generator).double(), torch.randn(4, 70, generator=generator).double()
    assert torch.allclose(projection(v), v @ matrix.T, atol=1e-12)
    assert torch.allclose(projection(v[0]), matrix @ v[0], atol=1e-12)
    assert torch.allclose(projection.adjoint(g), g @ matrix, atol=1e-12)
    assert torch.autograd.gradcheck(projection, v.requires_grad_())
    assert torch.autograd.gradgradcheck(projection, v)


@kinds
def test_the_gradient_has_a_gradient_as_of_the_network_itself(kind):
    """A Hessian times a vector in the subspace is P^T H P times it."""
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(5, 3).double()
    model, v = SubspaceModel(copy.deepcopy(plain), 6, kind, seed=1), torch.randn(6).double()
    matrix = model.projection.matrix()
    flat = torch.cat([p.detach().flatten() for p in plain.parameters()])

    def loss(theta):
        parts = theta.split([p.numel() for p in plain.parameters()])
        there = {n: t.view(p.shape) for (n, p), t in zip(plain.named_parameters(), parts, strict=True)}
        return torch.func.functional_call(plain, there, (x,)).square().sum()

    expected = matrix.T @ torch.autograd.functional.hessian(loss, flat) @ matrix @ v
    (gradient,) = torch.autograd.grad(model(x).square().sum(), model.vtheta, create_graph=True)
    (found,) = torch.autograd.grad(gradient @ v, model.vtheta)
    assert torch.allclose(found, expected, atol=1e-10)


@kinds
def test_a_vector_of_another_width_is_named(kind):
    for v in (torch.ones(2, 4), torch.ones(2)):
        with pytest.raises(InputError, match=r"v is of shape .* but must be \(\.\.\., 3\)"):
            PROJECTIONS[kind](10, 3)(v)


@kinds
def test_the_seed_is_all_of_it(kind):
    def make(seed):
        return PROJECTIONS[kind](300, 20, seed)

    state = torch.get_rng_state()
    one, again, other = make(7), make(7), make(8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.matrix(), again.matrix()) and not torch.allclose(one.matrix(), other.matrix())
    assert list(one.state_dict()) == ["seed"]
    other.double().load_state_dict(one.state_dict())  # what is loaded is drawn anew, in the type that is there
    assert other.matrix().dtype == torch.float64 and torch.allclose(other.matrix().float(), one.matrix(), atol=1e-6)
    larger = PROJECTIONS[kind](300, 30, 7).matrix()
    assert torch.allclose(larger[:, :20], one.matrix(), atol=1e-6)  # subspaces of one seed lie in one another


def test_the_numbers_of_a_seed_stay_what_they_are():
    """What is saved is a seed: of another version it must be the same network."""
    first = {kind: PROJECTIONS[kind](20, 2, 1).matrix()[:, 0] for kind in PROJECTIONS}
    assert torch.allclose(first["dense"][:3], torch.tensor(PINNED["dense"]), atol=1e-6)
    assert torch.allclose(first["fastfood"][:3], torch.tensor(PINNED["fastfood"]), atol=1e-6)
    assert first["sparse"].nonzero().flatten().tolist() == PINNED["sparse"]


PINNED = {
    "dense": [0.297090, 0.302879, 0.052397],
    "fastfood": [0.088512, 0.115823, 0.024007],
    "sparse": [2, 3, 10, 18],
}


def test_dense_entries_are_normal():
    entries = DenseProjection(4000, 30, 0).columns.flatten() * 4000**0.5
    assert entries.mean().abs() < 0.02 and entries.std() == pytest.approx(1, abs=0.01)
    assert (entries.abs() > 1.96).float().mean() == pytest.approx(0.05, abs=0.005)
    assert normal(torch.tensor(0), 0, 200_000).isfinite().all()


def test_sparse_entries_are_those_of_scikit_learn():
    from sklearn.random_projection import SparseRandomProjection

    size, dims = 2500, 400
    theirs = SparseRandomProjection(dims, density="auto", random_state=0).fit(torch.zeros(1, size).numpy()).components_
    ours = SparseProjection(size, dims, 0).matrix()
    count, expected = int((ours != 0).sum()), dims * size**0.5
    spread = 5 * expected**0.5
    assert abs(count - expected) < spread and abs(theirs.nnz - expected) < spread
    assert (ours > 0).sum() / count == pytest.approx(0.5, abs=0.02)
    by_column = (ours != 0).sum(0)
    assert torch.allclose(ours.abs().sum(0), by_column.float().sqrt(), rtol=1e-5)  # one number but for its sign
    assert by_column.float().var() == pytest.approx(by_column.float().mean().item(), rel=0.25)  # each place by itself
    by_row = (ours != 0).float().sum(1)
    assert by_row.var() == pytest.approx(by_row.mean().item(), rel=0.25)


def test_no_sparse_column_is_empty():
    for seed in range(20):
        assert torch.allclose(SparseProjection(3, 3, seed).column_norms(), torch.ones(3), atol=1e-6)


def test_fastfood_keeps_three_numbers_for_each_of_the_next_power_of_two_and_an_order():
    projection, length = FastfoodProjection(3000, 2900, 0), 4096
    kept = {name: buffer.numel() for name, buffer in projection.named_buffers()}
    assert kept.pop("order") == length and sum(kept.values()) <= 3 * length
    assert projection.order.sort().values.equal(torch.arange(length))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((10, 0), "dims is 0 but must be between 1 and the number of parameters, 10"),
        ((10, 11), "dims is 11 but"),
        ((10, 2, -1), "seed is -1 but must be between 0"),
        ((10, 2, 2**63), "seed is 9223372036854775808 but"),
    ],
)
def test_a_projection_that_cannot_be_is_named(given, said):
    with pytest.raises(InputError, match=said):
        DenseProjection(*given)


# -- the network


@kinds
def test_at_first_it_is_the_network_as_it_was_initialised(kind):
    plain = everything()
    model = SubspaceModel(copy.deepcopy(plain), 30, kind, seed=1)
    for mode in (True, False):
        plain.train(mode), model.train(mode)
        assert torch.equal(model(TOKENS), plain(TOKENS)) and torch.equal(model(TOKENS, scale=2.0), plain(TOKENS, 2.0))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["vtheta"]
    assert model.vtheta.shape == (30,)


@kinds
def test_the_gradient_is_that_of_all_parameters_times_the_transpose(kind):
    plain = everything().double()
    model = SubspaceModel(copy.deepcopy(plain), 12, kind, seed=3)
    with torch.no_grad():
        model.vtheta.copy_(torch.randn(12, generator=torch.Generator().manual_seed(4)))
    theta = nn.utils.parameters_to_vector(plain.parameters()) + model.projection.matrix() @ model.vtheta
    nn.utils.vector_to_parameters(theta, plain.parameters())  # which counts the tied matrix once, too
    outputs = [network(TOKENS) for network in (plain, model)]
    assert torch.allclose(*outputs, atol=1e-12)
    for output in outputs:
        output.square().sum().backward()
    whole = torch.cat([p.grad.flatten() for p in plain.parameters()])
    assert len(whole) == model.projection.size == sum(p.numel() for p in plain.parameters())
    assert torch.allclose(model.vtheta.grad, model.projection.matrix().T @ whole, atol=1e-10)


def test_every_parameter_moves_and_the_start_stays():
    model = SubspaceModel(everything(), 4, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam([model.vtheta], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()
    change = model.change(model.vtheta.detach())
    assert set(change) == {name for name, _ in model.model.named_parameters()}
    assert all((value != 0).float().mean() > 0.9 for value in change.values())
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    buffers = {f"model.batch_norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert moved == {"vtheta"} | buffers
    whole = torch.cat([value.flatten() for value in change.values()])
    assert whole.norm() == pytest.approx(model.vtheta.norm().item(), rel=0.35)  # of four directions in few parameters
    assert model.description_bits == 4 * 32 + 64


def test_it_is_saved_as_the_start_the_seed_and_what_was_learned(tmp_path):
    saved, loaded = SubspaceModel(everything(0), 8, "dense"), SubspaceModel(everything(1), 8, "dense")
    with torch.no_grad():
        saved.vtheta.normal_()
    assert int(saved.projection.seed) != int(loaded.projection.seed)
    torch.save(saved.state_dict(), tmp_path / "state")
    loaded.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(saved.eval()(TOKENS), loaded.eval()(TOKENS))
    assert "projection.columns" not in saved.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for vtheta"):
        SubspaceModel(everything(), 9, "dense").load_state_dict(saved.state_dict())


def test_types_are_the_networks_own():
    half = SubspaceModel(everything().bfloat16(), 8)
    assert half.vtheta.dtype == torch.float32 and half(TOKENS).dtype == torch.bfloat16
    assert SubspaceModel(everything().double(), 8).vtheta.dtype == torch.float64
    copied = copy.deepcopy(half)
    assert torch.equal(copied(TOKENS), half(TOKENS))


def test_what_is_watched_are_the_changes_of_its_matrices():
    model = SubspaceModel(everything(), 8, seed=0)
    with torch.no_grad():
        model.vtheta.normal_()
    made = {name: pick(parameter) for name, parameter, pick in model.made_matrices()}
    assert {name: tuple(value.shape) for name, value in made.items()} == {
        "embedding.weight": (9, 6),
        "mix.weight": (6, 18),
    }
    change = model.change(model.vtheta)
    assert all(torch.equal(value, change[name].flatten(1)) for name, value in made.items())


def test_a_network_that_cannot_be_is_named():
    with pytest.raises(InputError, match="projection 'fastfod' is unknown; did you mean 'fastfood'"):
        SubspaceModel(everything(), 3, "fastfod")
    with pytest.raises(InputError, match="model must have parameters"):
        SubspaceModel(nn.ReLU(), 1)
    with pytest.raises(InputError, match="dims is 1000 but must be between 1 and the number of parameters, 197"):
        SubspaceModel(everything(), 1000)
    with pytest.raises(InputError, match="real and floating point"):
        SubspaceModel(nn.Linear(2, 2, dtype=torch.complex64), 1)


# -- the measure


def test_with_as_many_dimensions_as_parameters_all_of_them_are_reached():
    """On least squares, the best of the subspace is the best there is; with one less it is not."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 12, generator=generator).double(), torch.randn(40, generator=generator).double()

    def rest(a):
        return (a @ torch.linalg.lstsq(a, y).solution - y).square().sum()

    for kind in ("dense", "fastfood"):
        losses = [rest(x @ PROJECTIONS[kind](12, d, 3).double().matrix()) for d in (6, 11, 12)]
        assert losses[0] > losses[1] > losses[2] + 1e-4
        assert losses[2] == pytest.approx(rest(x).item(), rel=1e-9)


SUMS = torch.eye(10).repeat_interleave(100, 1)  # (10, 1000)
"""The paper's toy: of 1,000 parameters each tenth must have a given sum, so that the solutions are a space of 990."""


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)).double())

    def forward(self):
        return (SUMS.double() @ self.theta - torch.arange(1, 11)).square().sum()


@kinds
def test_the_toy_of_a_thousand_parameters_has_dimension_ten(kind):
    def score(d):
        model = SubspaceModel(Toy(), d, kind, seed=4)
        a = SUMS.double() @ model.projection.matrix()
        miss = torch.arange(1, 11) - SUMS.double() @ model.model.theta
        with torch.no_grad():
            model.vtheta.copy_(torch.linalg.lstsq(a, miss).solution)
            return math.exp(-model())

    found = measure_intrinsic_dimension(score, range(1, 14), 1.0, criterion=1 - 1e-9)
    assert found.value == 10
    assert max(found.scores[:9]) < 0.9 and min(found.scores[9:]) > 1 - 1e-12


@kinds
def test_the_toy_is_solved_by_training_in_ten_dimensions_and_not_in_nine(kind):
    def trained(d):
        model = SubspaceModel(Toy(), d, kind, seed=4)
        optimizer = torch.optim.LBFGS(
            [model.vtheta], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            loss = model()
            loss.backward()
            return loss

        optimizer.step(closure)
        return model().item()

    assert trained(9) > 0.1 and trained(10) < 1e-8


def test_the_first_that_reaches_its_share_counts():
    scores = {10: 0.2, 20: 0.8, 40: 0.96, 80: 0.7, 160: 0.99}
    found = measure_intrinsic_dimension(scores.__getitem__, [*scores], 1.0)
    assert found.value == 40 and found.threshold == 0.9 and found.scores == tuple(scores.values())
    assert found.crossing == pytest.approx(20 * 2 ** ((0.9 - 0.8) / (0.96 - 0.8)))
    assert measure_intrinsic_dimension(scores.__getitem__, [*scores], 0.2).crossing == 10  # there from the first
    never = measure_intrinsic_dimension(scores.__getitem__, [*scores], 1.2)
    assert never.value is None and never.crossing is None


@pytest.mark.parametrize(
    ("dims", "baseline", "criterion", "said"),
    [
        ((), 1.0, 0.9, r"dims are \(\) but must ascend"),
        ((2, 2), 1.0, 0.9, "must ascend"),
        ((0, 2), 1.0, 0.9, "from 1 or more"),
        ((1, 2), 0.0, 0.9, "baseline, criterion are 0.0, 0.9"),
        ((1, 2), math.nan, 0.9, "must be above 0"),
        ((1, 2), math.inf, 0.9, "baseline, criterion are inf"),
        ((1, 2), 1.0, 1.1, "up to 1"),
    ],
)
def test_a_measure_that_cannot_be_is_named(dims, baseline, criterion, said):
    with pytest.raises(InputError, match=said):
        measure_intrinsic_dimension(lambda d: 1.0, dims, baseline, criterion)
