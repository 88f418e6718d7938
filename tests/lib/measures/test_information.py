"""Mutual information and its null, against scikit-learn, scipy and shuffling."""

import math

import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import contingency_matrix, expected_mutual_information

from workbench.errors import InputError
from workbench.lib.measures import information
from workbench.lib.measures.information import entropy, jensen_shannon, mutual_information

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


def labels(n: int, sizes: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(size, (n,), generator=generator) for size in sizes)


def table(a: torch.Tensor, b: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
    return torch.bincount(a * sizes[1] + b, minlength=sizes[0] * sizes[1]).view(sizes)


@pytest.mark.parametrize(("n", "sizes"), [(20, (3, 4)), (300, (5, 8)), (400, (100, 8)), (5000, (2, 3))])
def test_against_scikit_learn(n, sizes):
    a, b = labels(n, sizes, 0)
    result = mutual_information(table(a, b, sizes))
    assert result.value.item() == pytest.approx(mutual_info_score(a, b), abs=1e-12)
    expected = expected_mutual_information(contingency_matrix(a, b, sparse=True), n)
    assert result.null.item() == pytest.approx(expected, rel=1e-8)
    assert result.row_entropy.item() == pytest.approx(scipy.stats.entropy(torch.bincount(a)))
    assert result.column_entropy.item() == pytest.approx(scipy.stats.entropy(torch.bincount(b)))


@PROPERTY
@given(
    st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=2, max_size=5).filter(
        lambda t: any(map(any, t))
    )
)
def test_bounds_and_symmetry(rows):
    counts = torch.tensor(rows)
    result, swapped = mutual_information(counts), mutual_information(counts.T)
    smaller = min(result.row_entropy.item(), result.column_entropy.item())
    assert -1e-12 <= result.value.item() <= smaller + 1e-12
    assert -1e-12 <= result.null.item() <= smaller + 1e-12
    assert result.value.item() == pytest.approx(swapped.value.item(), abs=1e-12)
    assert result.null.item() == pytest.approx(swapped.null.item(), abs=1e-10)


def test_the_null_is_the_mean_over_shuffles_also_for_several_experts_per_token():
    """Tokens with K = 3 of 10 uneven experts, 4 classes: shuffling the classes of the TOKENS, not of the pairs."""
    generator = torch.Generator().manual_seed(0)
    n, n_classes, n_experts, top_k = 60, 4, 10, 3
    weights = torch.linspace(0.2, 2, n_experts).expand(n, -1)
    mask = torch.zeros(n, n_experts).scatter_(1, torch.multinomial(weights, top_k, generator=generator), 1.0)
    label = torch.nn.functional.one_hot(torch.randint(n_classes, (n,), generator=generator), n_classes).float()
    shuffled = torch.stack([label[torch.randperm(n, generator=generator)].T @ mask for _ in range(3000)])
    samples = mutual_information(shuffled, column_k=top_k, null="first_order").value
    result = mutual_information(label.T @ mask, column_k=top_k)
    error = samples.std() / math.sqrt(len(samples))
    assert abs(samples.mean() - result.null) < 4 * error
    first = mutual_information(label.T @ mask, column_k=top_k, null="first_order").null
    assert first.item() == pytest.approx(3 * 7 / (2 * 3 * 59))  # (C - 1)(E - K) / (2 K (N - 1))
    assert first.item() == pytest.approx(result.null.item(), rel=0.15)
    # taking the pairs for independent draws would overstate the null by (E - 1)/(E - K)
    assert mutual_information(label.T @ mask).null > 1.2 * result.null


def test_first_order_converges_to_exact():
    a, b = labels(100_000, (4, 8), 1)
    counts = table(a, b, (4, 8))
    exact, first = (mutual_information(counts, null=null).null.item() for null in ("exact", "first_order"))
    assert first == pytest.approx(exact, rel=1e-3)
    assert first == pytest.approx(3 * 7 / (2 * 99_999))  # Miller's bias


def test_every_token_its_own_class_has_no_information_beyond_chance():
    counts = torch.nn.functional.one_hot(torch.arange(30) % 5)
    result = mutual_information(counts)
    assert result.value.item() == pytest.approx(math.log(5))
    assert result.corrected.item() == pytest.approx(0, abs=1e-9)


def test_table_of_factorials_and_direct_evaluation_agree(monkeypatch):
    a, b = labels(3000, (6, 7), 2)
    counts = table(a, b, (6, 7))
    with_table = mutual_information(counts).null
    monkeypatch.setattr(information, "TABLE_UP_TO", 10)
    torch.testing.assert_close(mutual_information(counts).null, with_table, rtol=1e-9, atol=0)


def test_leading_dimensions_and_undefined():
    counts = torch.tensor([[[5, 3], [1, 7]], [[0, 0], [0, 0]]])
    result = mutual_information(counts)
    assert result.value.shape == result.null.shape == (2,)
    torch.testing.assert_close(result.null[0], mutual_information(counts[0]).null)
    assert result.value[1].isnan() and result.null[1].isnan() and result.normalised[1].isnan()
    assert mutual_information(torch.zeros(0, 2, 2)).null.shape == (0,)


def test_entropy_against_scipy():
    weights = torch.tensor([[3.0, 1.0, 0.0], [2.0, 2.0, 2.0]])
    assert entropy(weights).tolist() == pytest.approx(scipy.stats.entropy(weights, axis=1).tolist())
    assert entropy(torch.zeros(3)).isnan()


def test_bad_arguments():
    counts = torch.tensor([[2, 1], [1, 3]])
    with pytest.raises(InputError, match="did you mean 'exact'"):
        mutual_information(counts, null="exakt")
    with pytest.raises(InputError, match="column_k is 2 but must divide"):
        mutual_information(counts, column_k=2)
    with pytest.raises(InputError, match="row_k is 0"):
        mutual_information(counts, row_k=0)


def test_jensen_shannon_by_hand():
    assert float(jensen_shannon(torch.tensor([[4, 0], [0, 2]]))) == pytest.approx(1)
    assert float(jensen_shannon(torch.tensor([[4, 0], [2, 2]]))) == pytest.approx(0.5579, abs=1e-4)
    counts = torch.randint(1, 20, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    p = counts / counts.sum(-1, keepdim=True)
    for found, rows in zip(jensen_shannon(counts).tolist(), p.numpy(), strict=True):
        pairs = [scipy.spatial.distance.jensenshannon(rows[a], rows[b], base=2) for a, b in ((0, 1), (0, 2), (1, 2))]
        assert found == pytest.approx(sum(pairs) / 3, rel=1e-6)
