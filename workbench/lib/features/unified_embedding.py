"""Unified Embedding: all features look up one table, each by hashes of its own (Coleman et al. 2023).

"Unified Embedding: Battle-Tested Feature Representations for Web-Scale ML Systems" (NeurIPS 2023). Feature t has values
v, and c_t lookups ("chunks") of w numbers each; its embedding is those side by side,

    e_t(v) = [E[h(t, 1, v)], ..., E[h(t, c_t, v)]]          E (M, w), h by `hashing.hash_rows`

so a table has M w numbers whatever features there are, and another feature adds none. Two values of one feature that
share a row cannot be told apart any more; values of two features can, for each feature has weights of its own behind
the embedding. Sharing one table makes the former rarer: a pair of one feature collides with 1 / M, and with 1 / M_t
where each feature has a table of its own.

`HashedEmbeddings` has the alternatives at the same number of rows: a table for each feature, its rows in proportion to
the feature's values or the same for all, and no hashing at all.

Of a logistic model z = sum_t theta_t . e_t the gradient of row m is the sum over the (t, v) that hash to it of the
residuals of the examples that have them, times theta_t: collisions of other features pull along their theta.

Tensor letters: B rows, T features, M table rows, w width, c chunks.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.kernels import Lookups, hashed_lookup
from workbench.kernels.hashed_lookup import BY_ID
from workbench.lib.features.dcn_v2 import DCNV2, SMALL, CrossNetwork
from workbench.lib.features.hashing import hash_rows

METHOD = Method(
    slug="unified-embedding",
    title="Unified Embedding: Battle-Tested Feature Representations for Web-Scale ML Systems",
    family="features",
    year=2023,
    paper="NeurIPS 2023",
    claim="One hashed table shared by all features is better at every size than one table per feature.",
    objects=("UnifiedEmbedding", "HashedEmbeddings", "collision_report", "weight_angles"),
)

SHARINGS = ("multiplexed", "per_feature", "even", "none")
CHUNKS = 1 << 8  # salts of a feature: more lookups than any has


def example() -> nn.Module:
    """A click model's network on rows of width 32, behind an embedding of four features."""
    return _Behind()


class _Behind(nn.Module):
    """Rows (N, 32), whose signs are ids, through a unified embedding and back to the rows' width."""

    def __init__(self):
        super().__init__()
        self.embedding = UnifiedEmbedding(16, 8, {f"f{i}": 1 for i in range(4)})
        self.cross, self.out = CrossNetwork(32, 1), nn.Linear(64, 32)

    def forward(self, x: Float[Tensor, "tokens 32"]) -> Float[Tensor, "tokens 32"]:
        bits = (x.unflatten(1, (4, 8)) > 0).long()
        ids = (bits * 2 ** torch.arange(8, device=x.device)).sum(2)
        return self.out(torch.cat([self.cross(self.embedding.concat(ids)), x], 1))


class UnifiedEmbedding(nn.Module):
    """One table, or a few of which chunks take turns, for all features.

    Args:
        n_rows: M, of each table.
        dim: w, of a lookup.
        features: name -> its number of lookups.
        n_tables: equal tables; lookups are dealt out to them in turn, as shards are filled evenly.
        seed: another one makes other hashes.

    Attributes:
        widths: of the features' embeddings, chunks times dim, in order.
    """

    def __init__(self, n_rows: int, dim: int, features: Mapping[str, int], n_tables: int = 1, seed: int = 0):
        super().__init__()
        if min(n_rows, dim, n_tables) < 1 or seed < 0:
            raise InputError(
                f"n_rows, dim, n_tables are {n_rows}, {dim}, {n_tables} and seed {seed}: at least 1, and a seed of 0"
            )
        if not features or not all(1 <= chunks < CHUNKS for chunks in features.values()):
            raise InputError(f"features are {dict(features)} but must have from 1 to {CHUNKS - 1} lookups each")
        self.features, self.n_rows, self.dim, self.seed = dict(features), n_rows, dim, seed
        self.tables = nn.Parameter(torch.empty(n_tables, n_rows, dim).uniform_(-SMALL, SMALL))
        self.widths = tuple(chunks * dim for chunks in self.features.values())
        pairs = [(t, j) for t, chunks in enumerate(self.features.values()) for j in range(chunks)]
        self._salts = [(self.seed * (1 << 16) + t) * CHUNKS + j for t, j in pairs]
        self._feature = [t for t, _ in pairs]

    def rows(self, ids: Int64[Tensor, "batch features"]) -> Int64[Tensor, "batch lookups"]:
        """Where each lookup of each value goes, as rows of all tables one under the other."""
        if ids.shape[1] != len(self.features):
            raise InputError(f"ids have {ids.shape[1]} features but must have {len(self.features)}")
        n_tables = len(self.tables)
        found = [
            hash_rows(ids[:, t], salt, self.n_rows) + (place % n_tables) * self.n_rows
            for place, (t, salt) in enumerate(zip(self._feature, self._salts, strict=True))
        ]
        return torch.stack(found, 1)

    def concat(self, ids: Int64[Tensor, "batch features"]) -> Float[Tensor, "batch d"]:
        """The embeddings of all features side by side."""
        if ids.shape[1] != len(self.features):
            raise InputError(f"ids have {ids.shape[1]} features but must have {len(self.features)}")
        return hashed_lookup([self.tables.flatten(0, 1)], ids, self._lookups((1,) * len(self.features)))

    def _lookups(self, values: tuple[int, ...]) -> Lookups:
        """Of so many values of each feature, beside each other, to the slots of its lookups."""
        ends, n_tables = [0, *itertools.accumulate(values)], len(self.tables)
        found = [
            (0, place % n_tables * self.n_rows, self.n_rows, salt, field, place)
            for place, (t, salt) in enumerate(zip(self._feature, self._salts, strict=True))
            for field in range(ends[t], ends[t + 1])
        ]
        return Lookups(*zip(*found, strict=True))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "batch width"]]:
        """The embedding of each feature; of several values of one, (B, n), the mean of theirs.

        Raises:
            InputError: a feature is missing or unknown.
        """
        for name in batch:
            if name not in self.features:
                raise unknown("feature", name, self.features)
        if missing := [name for name in self.features if name not in batch]:
            raise InputError(f"batch lacks {', '.join(missing)} but must have every feature")
        values = [batch[name] if batch[name].ndim == 2 else batch[name][:, None] for name in self.features]
        lookups = self._lookups(tuple(each.shape[1] for each in values))
        found = hashed_lookup([self.tables.flatten(0, 1)], torch.cat(values, 1), lookups, mean=True)
        return dict(zip(self.features, found.split(self.widths, 1), strict=True))


class HashedEmbeddings(nn.Module):
    """An embedding of each field in so many rows in all, one lookup a field: ids (B, F) -> (B, F w).

    Args:
        sizes: values of each field.
        n_rows: of all tables together; without hashing there are as many as values.
        dim: w.
        sharing: "multiplexed": one table; "per_feature": one for each, its rows in proportion to the field's values, at
            least one; "even": the same number for each; "none": a row for every value.
        seed: of the hashes.
    """

    def __init__(self, sizes: Sequence[int], n_rows: int, dim: int = 16, sharing: str = "multiplexed", seed: int = 0):
        super().__init__()
        if sharing not in SHARINGS:
            raise unknown("sharing", sharing, SHARINGS)
        if not sizes or min(sizes) < 1 or dim < 1 or n_rows < len(sizes):
            raise InputError(f"sizes are {tuple(sizes)}, dim {dim}, n_rows {n_rows}: all at least 1, a row a field")
        self.sizes, self.sharing, self.seed = tuple(sizes), sharing, seed
        self.widths = (dim,) * len(sizes)
        self.per_field = _split(sizes, n_rows, sharing)
        starts = [0, *itertools.accumulate(self.per_field)]
        self.starts = [0] * len(sizes) if sharing == "multiplexed" else starts[:-1]
        total = n_rows if sharing == "multiplexed" else starts[-1]
        self.table = nn.Parameter(torch.empty(total, dim).uniform_(-SMALL, SMALL))
        fields = tuple(range(len(sizes)))
        self._salts = tuple(BY_ID if sharing == "none" else self.seed * (1 << 16) + field for field in fields)
        self._lookups = Lookups(
            (0,) * len(sizes), tuple(self.starts), tuple(self.per_field), self._salts, fields, fields
        )

    def rows(self, ids: Int64[Tensor, "batch fields"]) -> Int64[Tensor, "batch fields"]:
        """The row of each value."""
        self._check(ids)
        found = [
            (ids[:, field] if salt == BY_ID else hash_rows(ids[:, field], salt, count)) + start
            for field, (salt, count, start) in enumerate(zip(self._salts, self.per_field, self.starts, strict=True))
        ]
        return torch.stack(found, 1)

    def _check(self, ids: Tensor) -> None:
        if ids.shape[1] != len(self.sizes):
            raise InputError(f"ids have {ids.shape[1]} fields but must have {len(self.sizes)}")
        if not len(ids):
            return
        ends = zip(ids.amin(0).tolist(), ids.amax(0).tolist(), self.sizes, strict=True)
        for field, (low, high, size) in enumerate(ends):
            if not 0 <= low <= high < size:
                raise InputError(f"ids of field {field} are from {low} to {high} but must be from 0 to {size - 1}")

    def forward(self, ids: Int64[Tensor, "batch fields"]) -> Float[Tensor, "batch d"]:
        self._check(ids)
        return hashed_lookup([self.table], ids, self._lookups)


def _split(sizes: Sequence[int], n_rows: int, sharing: str) -> list[int]:
    """Rows of each field, of sum n_rows where each has a table of its own."""
    if sharing == "none":
        return list(sizes)
    if sharing == "multiplexed":
        return [n_rows] * len(sizes)
    wanted = [n_rows / len(sizes) if sharing == "even" else n_rows * size / sum(sizes) for size in sizes]
    found = [max(1, int(part)) for part in wanted]
    by_rest = sorted(range(len(sizes)), key=lambda i: int(wanted[i]) - wanted[i])
    for i in itertools.cycle(
        by_rest
    ):  # what rounding left, by the largest remainders; what the ones took, of the largest
        left = n_rows - sum(found)
        if left > 0:
            found[i] += 1
        elif left < 0:
            found[found.index(max(found))] -= 1
        else:
            return found
    raise AssertionError("a cycle does not end")


def collision_report(embedding: HashedEmbeddings) -> dict[str, float]:
    """Of all values: pairs of one field, and of two fields, that share a row, and the largest load of a row.

    Returns:
        intra, inter: shares of the pairs. load: values of the fullest row.
    """
    fields = [
        embedding.rows(torch.where(torch.arange(len(embedding.sizes)) == f, torch.arange(size)[:, None], 0))[:, f]
        for f, size in enumerate(embedding.sizes)
    ]
    counts = torch.stack([torch.bincount(rows, minlength=len(embedding.table)) for rows in fields]).double()
    same = (counts * (counts - 1) / 2).sum()
    every = counts.sum(0)
    both = (every * (every - 1) / 2).sum() - same
    sizes = torch.tensor(embedding.sizes, dtype=torch.float64)
    pairs = (sizes * (sizes - 1) / 2).sum()
    across = (sizes.sum() * (sizes.sum() - 1) / 2) - pairs
    return {
        "intra": float(same / pairs) if pairs else 0.0,
        "inter": float(both / across) if across else 0.0,
        "load": float(every.max()),
    }


def weight_angles(weight: Float[Tensor, "out d"], widths: Sequence[int]) -> Float[Tensor, "features features"]:
    """Angles in degrees, 0 to 90, between the subspaces' mean directions: what a layer multiplies each feature by.

    Args:
        weight: of the first layer behind the embeddings, (outputs, d); with one output it is theta itself.
        widths: of the features, all the same, of sum d.
    """
    if len(set(widths)) != 1 or sum(widths) != weight.shape[1]:
        raise InputError(f"widths are {tuple(widths)} but must be equal and sum to the {weight.shape[1]} of weight")
    parts = nn.functional.normalize(torch.stack([part.flatten() for part in weight.split(list(widths), 1)]), dim=1)
    return torch.rad2deg(torch.acos((parts @ parts.T).abs().clamp(max=1)))


class SharedBehind(nn.Module):
    """The negative control: embeddings of all fields are added, so that all have the same weights behind them.

    Then values of two features that share a row cannot be told apart either, and a shared table gains nothing.
    """

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding, (width, *_) = embedding, embedding.widths
        self.widths = (width,)

    def forward(self, ids: Int64[Tensor, "batch fields"]) -> Float[Tensor, "batch width"]:
        return self.embedding(ids).unflatten(1, (len(self.embedding.widths), -1)).sum(1)


def click_model(embedding: nn.Module, deep: Sequence[int] = (64, 32), layers: int = 2) -> DCNV2:
    """DCN-V2 behind an embedding, stacked, as the paper has it."""
    return DCNV2(embedding, CrossNetwork(sum(embedding.widths), layers), deep=deep)
