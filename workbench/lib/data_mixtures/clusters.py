"""Domains for text that has no labels, as CLIMB makes them: embed, cluster, prune, merge (2504.13161, sec. 3).

The paper embeds with a language model (stella, 400M), and scores with trained classifiers. Here documents are bytes,
embedded by their n-grams of characters and scored by how well they compress; both may be replaced.
Tensor letters: N documents, D dimensions, K clusters.
"""

import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.measures.statistics import checked

Documents = Sequence[bytes]
Embed = Callable[[Documents], np.ndarray]
"""Documents -> (N, D), rows of length 1."""
PRUNED = -1


@dataclass(frozen=True, eq=False)
class Clusters:
    """The domains that were found, the largest first.

    Attributes:
        labels: cluster of each document, -1 of one that was pruned.
        centroids: mean embedding of the documents of each cluster.
        share: of the bytes that are left in each cluster; of sum 1.
        quality: mean of the documents of each cluster; NaN where none was asked for.
        pruned: first clusters that were dropped.
    """

    labels: Int64[Tensor, " documents"]
    centroids: Float64[Tensor, "clusters dim"]
    share: Float64[Tensor, " clusters"]
    quality: Float64[Tensor, " clusters"]
    pruned: int

    def __len__(self) -> int:
        return len(self.share)

    def members(self, cluster: int) -> list[int]:
        """The documents of a cluster."""
        return (self.labels == cluster).nonzero().flatten().tolist()


class NgramEmbedder:
    """TF-IDF of hashed character n-grams, cut to their leading dimensions by SVD, rows of length 1 (latent semantics).

    Args:
        dimensions: D, below the number of documents.
        longest: of the n-grams, from 1.
        buckets: that n-grams are hashed into.
    """

    def __init__(self, dimensions: int = 48, longest: int = 3, buckets: int = 2**13, seed: int = 0):
        self.dimensions, self.longest, self.buckets, self.seed = dimensions, longest, buckets, seed

    def __call__(self, documents: Documents) -> np.ndarray:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import Normalizer

        if not 1 <= self.dimensions < len(documents):
            raise InputError(
                f"dimensions is {self.dimensions} but must be from 1 to below the number of documents, {len(documents)}"
            )
        ngrams = HashingVectorizer(
            analyzer="char",
            decode_error="strict",
            encoding="latin-1",  # each byte is a character
            lowercase=False,
            ngram_range=(1, self.longest),
            n_features=self.buckets,
            norm=None,
            alternate_sign=False,
        )
        svd = TruncatedSVD(self.dimensions, random_state=self.seed)
        return make_pipeline(ngrams, TfidfTransformer(sublinear_tf=True), svd, Normalizer()).fit_transform(documents)


def compressibility(document: bytes) -> float:
    """Share of its bytes that zlib saves: what is written has repeats, and bytes in random order have none."""
    return 1 - len(zlib.compress(document, 9)) / len(document)


class ClusterDomains:
    """Discovers domains: many clusters by k-means, those of low quality dropped, the rest merged by Ward's linkage.

    Args:
        n_initial: clusters of k-means; 1000 in the paper.
        merge_distance: centroids closer than that in Ward's distance become one cluster; 1.5 in the paper. 0 merges
            none, infinity makes one of all.
        prune_below: the mean quality of its documents that a cluster needs; None keeps all.
        quality: of a document.
        embed: see `Embed`; `NgramEmbedder` by default.
        seed: of k-means.
    """

    def __init__(
        self,
        n_initial: int = 1000,
        merge_distance: float = 1.5,
        prune_below: float | None = None,
        quality: Callable[[bytes], float] = compressibility,
        embed: Embed | None = None,
        seed: int = 0,
    ):
        if n_initial < 1:
            raise InputError(f"n_initial is {n_initial} but must be at least 1")
        if not merge_distance >= 0:
            raise InputError(f"merge_distance is {merge_distance} but must be at least 0")
        self.n_initial, self.merge_distance, self.prune_below = n_initial, merge_distance, prune_below
        self.quality, self.embed, self.seed = quality, embed or NgramEmbedder(), seed

    def fit(self, documents: Documents) -> Clusters:
        """The clusters of documents.

        Raises:
            InputError: a document is empty, an embedding or a quality no number, a cluster has no document, or pruning
                would leave none.
        """
        if self.n_initial > len(documents):
            raise InputError(f"n_initial is {self.n_initial} but must be at most {len(documents)}, one a document")
        if empty := [index for index, document in enumerate(documents) if not document]:
            raise InputError(f"documents has nothing in document {empty[0]}")
        points = np.asarray(self.embed(documents), dtype=np.float64)
        if points.ndim != 2 or len(points) != len(documents) or not np.isfinite(points).all():
            raise InputError(
                f"embed gives {points.shape} numbers but must give a row for each of {len(documents)} documents, finite"
            )
        first = self._first(points)
        counts = np.bincount(first, minlength=self.n_initial)
        means = _sums(points, first, self.n_initial) / counts[:, None]
        quality = np.full(len(documents), np.nan)
        kept = np.arange(self.n_initial)
        if self.prune_below is not None:
            quality = checked("quality", [self.quality(document) for document in documents])
            by_cluster = _sums(quality, first, self.n_initial) / counts
            kept = np.flatnonzero(by_cluster >= self.prune_below)
            if not len(kept):
                raise InputError(
                    f"prune_below is {self.prune_below} but must be at most {by_cluster.max():.3g}, the quality of the "
                    "best cluster, for one to be left"
                )
        merged = np.full(self.n_initial, PRUNED)
        merged[kept] = merge_centroids(means[kept], self.merge_distance)
        return self._ordered(documents, points, merged[first], quality, self.n_initial - len(kept))

    def _first(self, points: np.ndarray) -> np.ndarray:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: refused below
            first = KMeans(self.n_initial, n_init=1, max_iter=300, random_state=self.seed).fit_predict(points)
        if (found := len(np.unique(first))) < self.n_initial:
            raise InputError(
                f"n_initial is {self.n_initial} but must be at most {found}: no more clusters have a document"
            )
        return first

    def _ordered(self, documents: Documents, points, labels, quality, pruned: int) -> Clusters:
        inside = labels >= 0
        count = int(labels.max()) + 1
        size = np.array([len(document) for document in documents], dtype=np.float64)
        share = _sums(size[inside], labels[inside], count)
        order = np.argsort(-share, kind="stable")
        place = np.empty(count + 1, dtype=np.int64)
        place[order], place[PRUNED] = np.arange(count), PRUNED
        members = np.bincount(labels[inside], minlength=count)[order]
        means = [_sums(part[inside], labels[inside], count)[order].T / members for part in (points, quality)]
        return Clusters(
            torch.from_numpy(place[labels]),
            torch.from_numpy(means[0].T.copy()),
            torch.from_numpy(share[order] / share.sum()),
            torch.from_numpy(means[1]),
            pruned,
        )


def merge_centroids(centroids: np.ndarray, distance: float) -> np.ndarray:
    """The group (K,) of each of K centroids, from 0, when Ward's linkage is cut at a distance.

    Ward's distance of two groups of sizes a and b whose means are d apart is d sqrt(2 a b / (a + b)).
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(centroids) == 1 or distance == 0:
        return np.arange(len(centroids))
    if distance == np.inf:
        return np.zeros(len(centroids), dtype=np.int64)
    return fcluster(linkage(centroids, "ward"), distance, "distance").astype(np.int64) - 1


def _sums(values: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Sum of the rows of each label."""
    total = np.zeros((count, *values.shape[1:]))
    np.add.at(total, labels, values)
    return total
