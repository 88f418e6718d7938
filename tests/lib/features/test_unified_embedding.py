"""Hashes that are the same everywhere and independent; tables that are as large as they say; what collides."""

import subprocess
import sys

import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.budget import count_params
from workbench.lib.features.hashing import hash_rows, ids_of
from workbench.lib.features.unified_embedding import (
    SHARINGS,
    HashedEmbeddings,
    SharedBehind,
    UnifiedEmbedding,
    click_model,
    collision_report,
    weight_angles,
)

SIZES = (40, 7, 3)
N = 100_000


def ids(n: int = 20) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(size, (n,), generator=draw) for size in SIZES], 1)


def test_a_row_is_the_same_in_every_process():
    code = (
        "import torch; from workbench.lib.features.hashing import hash_rows, ids_of; "
        "print(hash_rows(ids_of(['user 7', 'Öl']), 3, 1000).tolist())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == str(hash_rows(ids_of(["user 7", "Öl"]), 3, 1000).tolist())


def test_rows_are_even_and_pairs_collide_as_by_chance():
    rows = hash_rows(torch.arange(N), 0, 1000)
    counts = torch.bincount(rows, minlength=1000)
    assert chisquare(counts.numpy()).pvalue > 1e-4
    n, m = 2000, 500
    counts = torch.bincount(hash_rows(torch.arange(n), 5, m), minlength=m).double()
    pairs, expected = float((counts * (counts - 1) / 2).sum()), n * (n - 1) / 2 / m
    assert abs(pairs - expected) < 4 * expected**0.5


def test_features_and_chunks_are_independent():
    values, m = torch.arange(N), 100
    rows = [hash_rows(values, salt, m) for salt in (0, 1, 256)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        same = float((rows[a] == rows[b]).double().mean())
        assert abs(same - 1 / m) < 4 * (1 / m / N) ** 0.5
    one, other = values[: N // 2], values[N // 2 :]
    both = [hash_rows(one, salt, m) == hash_rows(other, salt, m) for salt in (0, 1)]
    rate = float((both[0] & both[1]).double().mean())
    assert abs(rate - 1 / m**2) < 4 * (1 / m**2 / (N // 2)) ** 0.5


@pytest.mark.parametrize("sharing", SHARINGS)
def test_what_is_looked_up_are_the_rows(sharing: str):
    """Values and gradients as by indexing, to the last bit."""
    made = HashedEmbeddings(SIZES, 12, 5, sharing)
    grad = torch.randn(20, 15, generator=torch.Generator().manual_seed(1))
    found, plain = made(ids()), made.table[made.rows(ids())].flatten(1)
    grads = (torch.autograd.grad(y, made.table, grad)[0] for y in (found, plain))
    assert torch.equal(found, plain) and torch.equal(*grads)


def test_several_values_of_a_feature_are_their_mean():
    made = UnifiedEmbedding(50, 4, {"a": 3, "b": 1}, n_tables=2)
    values = torch.tensor([[1, 2, 9], [3, 4, 4]])
    several = made({"a": values, "b": values[:, 0]})
    one = [made({"a": values[:, j], "b": values[:, 0]}) for j in range(3)]
    assert torch.allclose(several["a"], sum(each["a"] for each in one) / 3, atol=1e-7)
    assert torch.equal(several["b"], one[0]["b"])
    both = torch.stack([values[:, 0], values[:, 0]], 1)
    flat = made.tables.flatten(0, 1)[made.rows(both)].flatten(1)
    assert torch.equal(made.concat(both), flat) and torch.equal(torch.cat([*one[0].values()], 1), flat)


def test_a_table_is_as_large_whatever_there_is():
    few, many = (UnifiedEmbedding(50, 4, {f"f{i}": 1 for i in range(n)}, n_tables=2) for n in (2, 9))
    assert count_params(few) == count_params(many) == 2 * 50 * 4
    made = UnifiedEmbedding(50, 4, {"a": 3, "b": 1}, n_tables=2)
    assert made.concat(torch.tensor([[1, 2], [3, 4]])).shape == (2, 16) and made.widths == (12, 4)
    rows = made.rows(torch.tensor([[1, 2]]))[0]
    assert [int(row) // 50 for row in rows] == [0, 1, 0, 1]  # lookups take turns


def test_features_one_by_one_are_those_side_by_side_and_several_values_are_their_mean():
    made = UnifiedEmbedding(50, 4, {"a": 3, "b": 1}, n_tables=2, seed=5)
    batch = torch.tensor([[1, 2], [3, 4], [5, 6]])
    found = made({"a": batch[:, 0], "b": batch[:, 1]})
    assert torch.equal(torch.cat([found["a"], found["b"]], 1), made.concat(batch))
    several = made({"a": batch, "b": batch[:, 1]})["a"]
    parts = [made({"a": batch[:, i], "b": batch[:, 1]})["a"] for i in range(2)]
    assert torch.allclose(several, (parts[0] + parts[1]) / 2)


def test_without_hashing_it_is_an_embedding_for_each_field():
    made, x = HashedEmbeddings(SIZES, sum(SIZES), 4, "none").double(), ids()
    apart = nn.ModuleList(nn.Embedding(size, 4).double() for size in SIZES)
    start = 0
    with torch.no_grad():
        for table in apart:
            table.weight.copy_(made.table[start : start + table.num_embeddings])
            start += table.num_embeddings
    y = torch.cat([table(x[:, f]) for f, table in enumerate(apart)], 1)
    assert torch.equal(made(x), y)
    made(x).square().sum().backward(), y.square().sum().backward()
    assert torch.equal(made.table.grad, torch.cat([table.weight.grad for table in apart]))


def test_of_one_field_multiplexing_is_a_table_of_its_own():
    one, other = (HashedEmbeddings((40,), 9, 4, sharing, seed=3) for sharing in ("multiplexed", "per_feature"))
    x = torch.arange(40)[:, None]
    assert torch.equal(one.rows(x), other.rows(x)) and one.table.shape == other.table.shape


@pytest.mark.parametrize("sharing", ["multiplexed", "per_feature", "even"])
@pytest.mark.parametrize("rows", [3, 5, 25, 49])
def test_budgets_are_equal_to_the_row(sharing: str, rows: int):
    made = HashedEmbeddings(SIZES, rows, 4, sharing)
    assert made.table.shape == (rows, 4)
    found = made.rows(ids())
    assert int(found.min()) >= 0 and int(found.max()) < rows
    if sharing != "multiplexed":
        assert sum(made.per_field) == rows and min(made.per_field) >= 1
        assert all(int(found[:, f].min()) >= start for f, start in enumerate(made.starts))


def test_the_gradient_of_a_row_is_the_sum_of_what_hashes_to_it():
    made, x = HashedEmbeddings(SIZES, 6, 4).double(), ids(50)
    draw = torch.Generator().manual_seed(1)
    theta = torch.randn(3, 4, dtype=torch.float64, generator=draw)
    y = torch.randint(2, (50,), generator=draw).double()
    z = (made(x).unflatten(1, (3, 4)) * theta).sum((1, 2))
    nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum").backward()
    residual, rows = (z.sigmoid() - y).detach(), made.rows(x)
    expected = torch.zeros_like(made.table)
    for feature in range(3):
        expected.index_add_(0, rows[:, feature], residual[:, None] * theta[feature])
    assert torch.allclose(made.table.grad, expected, atol=1e-12)
    # along an orthogonal theta nothing of the other feature moves
    one, other = torch.eye(4, dtype=torch.float64)[:2]
    row = torch.randn(4, dtype=torch.float64)
    assert float(((row - 0.1 * 3.0 * one) - row) @ other) == 0


def test_pairs_that_collide_are_counted():
    made = HashedEmbeddings(SIZES, 10, 4)
    rows = [(f, int(made.rows(_only(f, v))[0, f])) for f, size in enumerate(SIZES) for v in range(size)]
    pairs = [(a, b) for i, a in enumerate(rows) for b in rows[i + 1 :]]
    intra = [a[1] == b[1] for a, b in pairs if a[0] == b[0]]
    inter = [a[1] == b[1] for a, b in pairs if a[0] != b[0]]
    found = collision_report(made)
    assert found["intra"] == pytest.approx(sum(intra) / len(intra))
    assert found["inter"] == pytest.approx(sum(inter) / len(inter))
    none = collision_report(HashedEmbeddings(SIZES, sum(SIZES), 4, "none"))
    assert none == {"intra": 0, "inter": 0, "load": 1}
    apart = collision_report(HashedEmbeddings((2000, 1000), 300, 4, "per_feature"))
    shared = collision_report(HashedEmbeddings((2000, 1000), 300, 4))
    assert apart["inter"] == 0 < shared["inter"] and shared["intra"] < apart["intra"]


def _only(field: int, value: int) -> torch.Tensor:
    row = torch.zeros(1, len(SIZES), dtype=torch.int64)
    row[0, field] = value
    return row


def test_angles_and_the_control():
    weight = torch.tensor([[1.0, 0, 0, 1, 1, 0]])
    assert torch.allclose(weight_angles(weight, (2, 2, 2)), torch.tensor([[0.0, 90, 0], [90, 0, 90], [0, 90, 0]]))
    made = SharedBehind(HashedEmbeddings(SIZES, 10, 4))
    x = ids()
    assert torch.allclose(made(x), made.embedding(x).unflatten(1, (3, 4)).sum(1)) and made.widths == (4,)
    assert click_model(made, (8,))(x).shape == click_model(HashedEmbeddings(SIZES, 10, 4), ())(x).shape == (20,)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: hash_rows(torch.arange(3), 0, 0), "n_rows is 0"),
        (lambda: hash_rows(torch.arange(3), -1, 5), "salt -1"),
        (lambda: UnifiedEmbedding(0, 4, {"a": 1}), "n_rows, dim"),
        (lambda: UnifiedEmbedding(4, 4, {}), "features are"),
        (lambda: UnifiedEmbedding(4, 4, {"a": 0}), "lookups each"),
        (lambda: UnifiedEmbedding(4, 4, {"a": 1}).concat(torch.zeros(1, 2).long()), "ids have 2 features"),
        (lambda: UnifiedEmbedding(4, 4, {"a": 1})({"b": torch.zeros(1).long()}), "feature 'b' is unknown"),
        (lambda: UnifiedEmbedding(4, 4, {"a": 1, "b": 1})({"a": torch.zeros(1).long()}), "batch lacks b"),
        (lambda: HashedEmbeddings(SIZES, 2, 4), "a row a field"),
        (lambda: HashedEmbeddings(SIZES, 9, 4, "some"), "some"),
        (lambda: HashedEmbeddings(SIZES, 9, 4)(torch.tensor([[40, 0, 0]])), "field 0 are from 40 to 40"),
        (lambda: HashedEmbeddings(SIZES, 9, 4)(torch.tensor([[-1, 0, 0]])), "field 0 are from -1 to -1"),
        (lambda: HashedEmbeddings(SIZES, 9, 4)(torch.tensor([[0]])), "ids have 1 fields"),
        (lambda: weight_angles(torch.ones(1, 4), (1, 3)), "widths are"),
    ],
)
def test_what_does_not_fit_is_refused(build, said: str):
    with pytest.raises(InputError, match=said):
        build()
