"""Clusters of documents beside scikit-learn's own k-means and Ward linkage, pruning, and what is refused."""

import math
import random

import numpy as np
import pytest
import torch
from sklearn.cluster import AgglomerativeClustering, KMeans

from workbench.errors import InputError
from workbench.lib.data_mixtures.clusters import (
    ClusterDomains,
    Clusters,
    NgramEmbedder,
    compressibility,
    merge_centroids,
)

WORDS = ("alpha beta gamma delta", "un deux trois quatre cinq", "0123 4567 8901 2345")


def documents(count: int = 90) -> list[bytes]:
    draw = random.Random(0)
    return [
        (" ".join(draw.choice(WORDS[i % 3].split()) for _ in range(20 + 10 * (i % 3)))).encode() for i in range(count)
    ]


def junk(count: int) -> list[bytes]:
    draw = random.Random(1)
    return [bytes(draw.randrange(33, 250) for _ in range(120)) for _ in range(count)]


EMBED = NgramEmbedder(dimensions=8, buckets=512)


def cluster(n_initial: int = 6, merge_distance: float = 0.0, found=None, **options) -> Clusters:
    return ClusterDomains(n_initial, merge_distance, embed=EMBED, **options).fit(
        documents() if found is None else found
    )


def test_embeddings_have_length_1_and_tell_bytes_apart_that_are_no_text():
    points = EMBED([*documents(), b"\xff\xfe\x00" * 20])
    assert points.shape == (91, 8) and np.allclose(np.linalg.norm(points, axis=1), 1)
    assert np.array_equal(EMBED(documents()), EMBED(documents()))


def test_without_pruning_and_merging_the_clusters_are_those_of_scikit_learn():
    found = cluster()
    labels = KMeans(6, n_init=1, max_iter=300, random_state=0).fit_predict(EMBED(documents()))
    pairs = set(zip(found.labels.tolist(), labels.tolist(), strict=True))
    assert len(found) == len(pairs) == 6  # each is one of the other
    points = torch.from_numpy(EMBED(documents()))
    for k in range(6):
        assert torch.allclose(found.centroids[k], points[found.members(k)].mean(0))


@pytest.mark.parametrize("distance", [0.2, 0.7, 1.3])
def test_merging_is_ward_linkage_cut_at_a_distance(distance: float):
    points = np.random.default_rng(0).normal(size=(25, 3)) * 0.3
    ours = merge_centroids(points, distance)
    theirs = AgglomerativeClustering(None, linkage="ward", distance_threshold=distance).fit_predict(points)
    assert len(set(zip(ours, theirs, strict=True))) == len(set(ours)) == len(set(theirs)) > 1


def test_a_distance_of_0_keeps_what_is_not_pruned_and_infinity_makes_one():
    mixed = documents() + junk(12)
    kept = cluster(8, 0.0, mixed, prune_below=0.4)
    assert len(kept) == 8 - kept.pruned and kept.pruned > 0
    assert len(cluster(8, np.inf, mixed)) == 1
    assert 1 < len(cluster(8, 0.8, mixed)) < 8


def test_clusters_find_the_kinds_of_text_and_pruning_takes_the_junk():
    mixed = documents() + junk(12)
    found = cluster(8, 0.8, mixed, prune_below=0.4)
    labels = found.labels.numpy()
    assert (labels[90:] == -1).all() and (labels[:90] >= 0).all()
    kinds = np.arange(90) % 3
    assert sum(np.bincount(kinds[labels[:90] == k]).max() for k in range(len(found))) == 90
    assert (found.quality > 0.4).all()


def test_shares_are_of_bytes_the_largest_first():
    mixed = documents() + junk(12)
    found = cluster(8, 0.8, mixed, prune_below=0.4)
    sizes = [sum(len(mixed[i]) for i in found.members(k)) for k in range(len(found))]
    assert found.share.tolist() == pytest.approx([size / sum(sizes) for size in sizes])
    assert found.share.tolist() == sorted(found.share.tolist(), reverse=True) and found.share.sum() == pytest.approx(1)


def test_one_seed_gives_the_same_clusters():
    assert torch.equal(cluster(9).labels, cluster(9).labels)
    assert cluster(9).quality.isnan().all()  # nobody asked


def test_compressibility_tells_text_from_its_own_bytes_in_random_order():
    text = documents()[0] * 3
    assert compressibility(text) > compressibility(bytes(random.Random(0).sample(text, len(text)))) + 0.2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_initial": 91}, "n_initial is 91 but must be at most 90"),
        ({"n_initial": 0}, "n_initial is 0"),
        ({"prune_below": 0.1, "quality": lambda document: math.nan}, "quality holds nan but must be finite"),
        ({"merge_distance": -1.0}, "merge_distance is -1.0"),
        ({"prune_below": 2.0}, "prune_below is 2.0 but must be at most 0"),
        ({"found": [b"a", b""], "n_initial": 1}, "documents has nothing in document 1"),
    ],
)
def test_what_makes_no_clusters_is_refused(options: dict, said: str):
    with pytest.raises(InputError, match=said):
        cluster(**options)


def test_a_cluster_without_a_document_is_refused():
    two = ClusterDomains(3, 0.0, embed=lambda texts: np.array([[float(text == b"one")] for text in texts]))
    with pytest.raises(InputError, match="n_initial is 3 but must be at most 2: no more clusters have a document"):
        two.fit([b"one", b"two"] * 5)


@pytest.mark.parametrize("rows", [lambda n: np.full((n, 3), np.nan), lambda n: np.ones((n - 1, 3)), np.ones])
def test_an_embedding_that_is_none_is_refused(rows):
    with pytest.raises(InputError, match=r"embed gives .* numbers but must give a row for each of 4 documents, finite"):
        ClusterDomains(2, embed=lambda texts: rows(len(texts))).fit([b"one", b"two"] * 2)


def test_more_dimensions_than_documents_are_refused():
    with pytest.raises(InputError, match="dimensions is 8 but must be from 1 to below the number of documents, 2"):
        EMBED([b"one", b"two"])
