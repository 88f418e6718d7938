"""The retrieval database: scikit-learn as the oracle, the ties rule, exclusion, approximate recall, files, refusals."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.neighbors import NearestNeighbors

from workbench.errors import InputError
from workbench.lib.core.retrieval import BACKENDS, RetrievalDatabase


def rows(n, width=16, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def clustered(n, width=16, seed=0):
    """Rows around 40 centres, as embeddings of images are: none of the directions is empty, and none alike."""
    return 2 * rows(40, width, 99)[torch.arange(n) % 40] + rows(n, width, seed)


@pytest.mark.parametrize("backend", ["exact", "faiss-flat"])
def test_search_is_that_of_scikit_learn(backend):
    database, queries = RetrievalDatabase(rows(500), backend=backend), rows(40, seed=1)
    ids, similar = database.search(queries, 7)
    oracle = NearestNeighbors(n_neighbors=7, metric="cosine", algorithm="brute").fit(rows(500).double().numpy())
    distances, expected = oracle.kneighbors(queries.double().numpy())
    assert np.array_equal(ids.numpy(), expected)
    torch.testing.assert_close(similar, 1 - torch.from_numpy(distances), atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_item_finds_itself_first_and_what_is_excluded_is_not_found(backend):
    database = RetrievalDatabase(clustered(600), backend=backend)
    items = torch.arange(0, 600, 7)
    ids, similar = database.search(database.embeddings(items), 3)
    assert torch.equal(ids[:, 0], items)
    torch.testing.assert_close(similar[:, 0], torch.ones(len(items)).double())
    exclude = torch.cat([ids[:, :2], torch.full((len(items), 1), -1)], 1)
    without, _ = database.search(database.embeddings(items), 3, exclude)
    assert not (without[:, :, None] == exclude[:, None]).any()
    if backend != "faiss-ivfpq":
        assert torch.equal(without[:, 0], ids[:, 2])


def test_of_equal_similarities_the_lower_id_comes_first():
    once = rows(50)
    database = RetrievalDatabase(torch.cat([once, 2 * once, once]))  # the same directions three times
    ids, _ = database.search(rows(30, seed=2), 9)
    assert torch.equal(ids.view(30, 3, 3) % 50, (ids[:, ::3] % 50)[:, :, None].expand(-1, -1, 3))
    assert torch.equal(ids.view(30, 3, 3) // 50, torch.arange(3).expand(30, 3, 3))


def test_the_search_is_blind_to_length_and_the_condition_is_not():
    embeddings, lengths = rows(80), torch.arange(1, 81)[:, None].float()
    plain, scaled = RetrievalDatabase(embeddings), RetrievalDatabase(embeddings * lengths)
    queries = rows(20, seed=3)
    ids, _ = plain.search(queries, 4)
    assert torch.equal(scaled.search(queries * 3, 4)[0], ids)
    assert torch.equal(scaled.embeddings(ids), (embeddings * lengths)[ids])
    assert not torch.equal(scaled.embeddings(ids), plain.embeddings(ids))


def test_product_codes_recall_nine_in_ten_and_tell_true_similarities():
    n = 20_000
    exact, approximate = (RetrievalDatabase(clustered(n), backend=name) for name in ("faiss-flat", "faiss-ivfpq"))
    queries = clustered(200, seed=5)
    (wanted, _), (ids, similar) = exact.search(queries, 10), approximate.search(queries, 10)
    recall = (ids[:, :, None] == wanted[:, None]).any(-1).double().mean()
    assert recall >= 0.9
    unit = torch.nn.functional.normalize(clustered(n)[ids].double(), dim=-1)
    cosine = (unit * torch.nn.functional.normalize(queries.double(), dim=-1)[:, None]).sum(-1)
    torch.testing.assert_close(similar, cosine)


def test_all_but_the_excluded_can_be_asked_for():
    for backend in BACKENDS:
        database = RetrievalDatabase(clustered(300), backend=backend)
        ids, _ = database.search(clustered(2, seed=1), 299, torch.tensor([[5, 5], [7, -1]]))
        assert [sorted(row) for row in ids.tolist()] == [[i for i in range(300) if i != out] for out in (5, 7)]


def test_no_gradient_reaches_an_embedding_and_the_caller_keeps_his_own():
    embeddings = rows(10).requires_grad_()
    database = RetrievalDatabase(embeddings, torch.arange(10))
    assert not database.embeddings(torch.tensor([[1, 2]])).requires_grad
    with torch.no_grad():
        embeddings.zero_()
    assert database.raw.abs().sum() > 0


def test_swap_holds_the_items_of_the_other():
    one, other = RetrievalDatabase(rows(10)), RetrievalDatabase(rows(20, seed=1), rows(20, 3))
    one.swap(other)
    assert len(one) == 20 and torch.equal(one.payload, other.payload)
    assert torch.equal(one.search(rows(4, seed=2), 3)[0], other.search(rows(4, seed=2), 3)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_and_loaded_it_finds_the_same(backend, tmp_path):
    database = RetrievalDatabase(clustered(400), rows(400, 3), backend)
    database.save(tmp_path / "database.safetensors")
    loaded = RetrievalDatabase.load(tmp_path / "database.safetensors")
    assert loaded.backend == backend and torch.equal(loaded.raw, database.raw)
    assert torch.equal(loaded.payload, database.payload)
    for ours, theirs in zip(database.search(rows(9), 5), loaded.search(rows(9), 5), strict=True):
        assert torch.equal(ours, theirs)


def test_files_that_are_no_database_are_refused(tmp_path):
    save_file({"embeddings": rows(3)}, str(tmp_path / "other.safetensors"))
    torch.save({"embeddings": rows(3)}, tmp_path / "pickle.pt")
    for name, said in (("other.safetensors", "no database"), ("pickle.pt", "cannot be read"), ("none", "cannot be")):
        with pytest.raises(InputError, match=said):
            RetrievalDatabase.load(tmp_path / name)


def test_without_faiss_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(InputError, match=r"workbench\[imaging\]"):
        RetrievalDatabase(rows(5), backend="faiss-flat")


NAN = torch.tensor([[1.0, 2.0], [float("nan"), 1.0]])


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: RetrievalDatabase(torch.zeros(0, 4)), "embeddings is \\(0, 4\\)"),
        (lambda: RetrievalDatabase(torch.zeros(4, 0)), "embeddings is \\(4, 0\\)"),
        (lambda: RetrievalDatabase(NAN), "not finite, first in row 1"),
        (lambda: RetrievalDatabase(torch.eye(3) - torch.diag(torch.tensor([0.0, 0, 1]))), "length 0 in row 2"),
        (lambda: RetrievalDatabase(rows(5), torch.zeros(4)), "payload is \\(4,\\)"),
        (lambda: RetrievalDatabase(rows(5), backend="annoy"), "backend 'annoy' is unknown"),
        (lambda: RetrievalDatabase(rows(50), backend="faiss-ivfpq"), "at least 256"),
        (lambda: RetrievalDatabase(rows(5)).search(rows(2), 6), "k is 6 but must be 1 to 5"),
        (lambda: RetrievalDatabase(rows(5)).search(rows(2), 0), "k is 0"),
        (lambda: RetrievalDatabase(rows(5)).search(rows(1), 5, torch.tensor([[2]])), "k is 5 but must be at most 4"),
        (lambda: RetrievalDatabase(rows(5)).search(rows(2, 8), 1), "queries is \\(2, 8\\)"),
        (lambda: RetrievalDatabase(rows(5, 2)).search(NAN, 1), "queries has values that are not finite"),
        (lambda: RetrievalDatabase(rows(5)).search(rows(1), 1, torch.tensor([[5]])), "exclude_ids"),
        (lambda: RetrievalDatabase(rows(5)).search(rows(1), 1, torch.tensor([[1], [2]])), "exclude_ids"),
        (lambda: RetrievalDatabase(rows(5)).embeddings(torch.tensor([5])), "ids are 5 to 5"),
        (lambda: RetrievalDatabase(rows(5)).swap(RetrievalDatabase(rows(5, 8))), "width 8 but must have 16"),
    ],
)
def test_what_is_refused(act, said):
    with pytest.raises(InputError, match=said):
        act()
