"""A database that is asked for its nearest neighbours: raw embeddings, what they stand for, and a search by cosine.

Only the search normalises; what a model is conditioned on are the embeddings as they were given. Three backends:

    exact         similarities in float64, all of them; of equal ones the lower id comes first. Equal rows are equally
                  similar to the last bit, whatever a product of matrices makes of their places
    faiss-flat    the same in float32 by faiss; of equal ones at the k-th place any may be returned
    faiss-ivfpq   approximate: cells and product codes find `REORDER` k candidates, whose true similarities decide

The two of faiss come with the extra `imaging`. A query whose probed cells hold too few items is searched exactly.

Tensor letters: N items, E width of an embedding, B queries, k neighbours.
"""

import math
from pathlib import Path

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workbench.errors import InputError, unknown

BACKENDS = ("exact", "faiss-flat", "faiss-ivfpq")
FORMAT = "workbench-retrieval-1"
REORDER = 8
LEAST = 256  # items from which product codes can be learned
LEARNED, ROUNDS = 10_000, 10  # items to learn cells and codes from (fewer than twice as many), rounds of k-means


class RetrievalDatabase:
    """Embeddings and what they stand for.

    Args:
        embeddings: (N, E), none of length 0; copied, and no gradient goes back through them.
        payload: (N, ...), a row for each item, such as its image; default: the ids.
        backend: of the search, see the module's docstring.
    """

    def __init__(
        self, embeddings: Float[Tensor, "items width"], payload: Shaped[Tensor, "..."] | None = None,
        backend: str = "exact",
    ):  # fmt: skip
        if backend not in BACKENDS:
            raise unknown("backend", backend, BACKENDS)
        n = len(embeddings)
        if not embeddings.numel():
            raise InputError(f"embeddings is {tuple(embeddings.shape)} but must have at least one row and one column")
        payload = torch.arange(n) if payload is None else payload
        if payload.ndim < 1 or len(payload) != n:
            raise InputError(f"payload is {tuple(payload.shape)} but must have a row for each of the {n} embeddings")
        if backend == "faiss-ivfpq" and n < LEAST:
            raise InputError(f"embeddings has {n} rows but backend faiss-ivfpq needs at least {LEAST}")
        self.raw, self.payload = embeddings.detach().float().cpu().clone(), payload.detach().cpu().clone()
        self.backend = backend
        unit = _unit(self.raw, "embeddings")
        self._distinct, self._which = unit.unique(dim=0, return_inverse=True)
        self._unit = unit
        self._index = None if backend == "exact" else _faiss_index(unit, backend)

    def __len__(self) -> int:
        return len(self.raw)

    @property
    def width(self) -> int:
        """E."""
        return self.raw.shape[1]

    def search(
        self, queries: Float[Tensor, "batch width"], k: int, exclude_ids: Int64[Tensor, "rows most"] | None = None
    ) -> tuple[Int64[Tensor, "batch k"], Float64[Tensor, "batch k"]]:
        """The ids of the k nearest items of each query, nearest first, and their cosines.

        Args:
            exclude_ids: of each query ids that must not be returned, filled up with -1.
        """
        queries = self._checked(queries, k)
        if exclude_ids is None:
            exclude_ids = torch.full((len(queries), 0), -1)
        if exclude_ids.shape[0] != len(queries) or bool(((exclude_ids < -1) | (exclude_ids >= len(self))).any()):
            raise InputError(f"exclude_ids must be a row of ids below {len(self)} for each query, filled up with -1")
        kept = len(self) - max((len(set(row) - {-1}) for row in exclude_ids.tolist()), default=0)
        if k > kept:
            raise InputError(f"k is {k} but must be at most {kept}, the items of the database that are not excluded")
        if self.backend == "exact":
            return self._exact(queries, k, exclude_ids)
        return self._approximate(queries, k, exclude_ids)

    def embeddings(self, ids: Int64[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
        """The raw embeddings of items, such as (B, k) of them: what a model is conditioned on."""
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < len(self)):
            raise InputError(f"ids are {int(ids.min())} to {int(ids.max())} but must be 0 to {len(self) - 1}")
        return self.raw[ids]

    def swap(self, other: "RetrievalDatabase") -> None:
        """Hold what another database of the same width holds; whoever uses this one is given the other's items."""
        if other.width != self.width:
            raise InputError(f"other has embeddings of width {other.width} but must have {self.width}")
        self.__dict__.update(other.__dict__)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: numbers and names, nothing that runs when it is read."""
        tensors = {"embeddings": self.raw, "payload": self.payload.contiguous()}
        save_file(tensors, str(path), {"format": FORMAT, "backend": self.backend})

    @classmethod
    def load(cls, path: str | Path) -> "RetrievalDatabase":
        """Read what `save` wrote; an index of faiss is built again."""
        try:
            with safe_open(str(path), "pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT or {*file.keys()} != {"embeddings", "payload"}:
                    raise InputError(f"path {path} is a safetensors file but no database of embeddings")
                return cls(file.get_tensor("embeddings"), file.get_tensor("payload"), about["backend"])
        except (OSError, SafetensorError) as error:
            raise InputError(f"path {path} cannot be read as a database of embeddings: {error}") from error

    def _checked(self, queries: Tensor, k: int) -> Tensor:
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise InputError(f"queries is {tuple(queries.shape)} but must be (queries, {self.width}), as the database")
        if not 1 <= k <= len(self):
            raise InputError(f"k is {k} but must be 1 to {len(self)}, the items of the database")
        return _unit(queries.detach().float().cpu(), "queries")

    def _exact(self, queries: Tensor, k: int, exclude: Tensor) -> tuple[Tensor, Tensor]:
        similar = (queries @ self._distinct.T)[:, self._which]
        if exclude.shape[1]:
            wide = torch.cat([similar, similar.new_zeros(len(similar), 1)], 1)  # -1 is the column that is cut off
            similar = wide.scatter(1, exclude % (len(self) + 1), -math.inf)[:, :-1]
        found, ids = similar.sort(dim=1, descending=True, stable=True)
        return ids[:, :k], found[:, :k]

    def _approximate(self, queries: Tensor, k: int, exclude: Tensor) -> tuple[Tensor, Tensor]:
        wanted = k * (REORDER if self.backend == "faiss-ivfpq" else 1) + exclude.shape[1]
        _, candidates = self._index.search(queries.float().numpy(), min(wanted, len(self)))
        candidates = torch.from_numpy(candidates)
        # by id first, so that of equal similarities the lower id comes first
        candidates = candidates.sort(1).values
        similar = torch.einsum("bce,be->bc", self._unit[candidates.clamp(min=0)], queries)
        barred = (candidates[:, :, None] == exclude[:, None]).any(-1) | (candidates < 0)
        similar, order = similar.masked_fill(barred, -math.inf).sort(dim=1, descending=True, stable=True)
        if similar.shape[1] < k:
            return self._exact(queries, k, exclude)
        ids, similar = candidates.gather(1, order)[:, :k], similar[:, :k]
        few = similar[:, -1] == -math.inf
        if few.any():
            ids[few], similar[few] = self._exact(queries[few], k, exclude[few])
        return ids, similar


def _unit(rows: Tensor, name: str) -> Tensor:
    """Rows of length 1, float64."""
    if not rows.isfinite().all():
        raise InputError(
            f"{name} has values that are not finite, first in row {int((~rows.isfinite()).any(1).int().argmax())}"
        )
    length = rows.double().norm(dim=1, keepdim=True)
    if not (length > 0).all():
        raise InputError(
            f"{name} has length 0 in row {int((length[:, 0] == 0).int().argmax())}, which has no direction"
        )
    return rows.double() / length


def _faiss_index(unit: Tensor, backend: str):
    try:
        import faiss  # only where an index is asked for
    except ImportError as error:
        raise InputError(f"backend {backend} needs faiss: pip install 'workbench[imaging]'") from error
    n, width = unit.shape
    if backend == "faiss-flat":
        index = faiss.IndexFlatIP(width)
    else:
        cells = max(1, round(math.sqrt(n)))
        parts = next(parts for parts in range(min(width, 16), 0, -1) if width % parts == 0)
        bits = 8 if n >= LEARNED else 4  # faiss asks for 39 items a code
        index = faiss.IndexIVFPQ(faiss.IndexFlatIP(width), width, cells, parts, bits, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = max(1, cells // 4)
        index.cp.min_points_per_centroid = 1  # so small a database is meant
        index.cp.niter = index.pq.cp.niter = ROUNDS
    rows = unit.float().numpy()
    index.train(rows[:: max(1, n // LEARNED)])
    index.add(rows)
    return index
