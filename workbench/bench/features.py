"""Embeddings of many fields, looked up and trained, beside torch's and DeepCTR-Torch's; crosses beside their products.

A step is 4,096 rows x 26 fields x 16 numbers: looked up, put side by side, and on the way back each row that was looked
up moves against its gradient (SGD). Ours moves it in the backward pass; peers make sparse gradients, which torch's SGD
applies, as is usual with them. "ids": a table of 10,000 rows for each field. "hashed": one table of 260,000 rows for
all fields and values of 62 bits; peers are given the rows, whose hashes ours makes. The limit is a copy of as many
numbers from one place, and in both directions also a sum with as many.

In the cases of crosses, of the same width, 416, and layers of kind full and low_rank, the limit are the products with
the layers' matrices alone.

DeepCTR-Torch has no row where it cannot be imported; "peers" says of each whether it was there. The machine's load is
in "busy": above its number of cores, only ratios mean something.
"""

import importlib
import os
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor, nn

from workbench.bench.core import BOTH, FORWARD, LIMIT, OURS, Case, Contestants
from workbench.kernels import Lookups, hashed_lookup
from workbench.kernels.hashed_lookup import BY_ID
from workbench.kernels.hashed_lookup.reference import hashed
from workbench.lib.features.dcn_v2 import CrossNetwork

REPEATS = 15
BAGS, DEEPCTR = "torch/EmbeddingBag", "deepctr-torch/input layer"
N, FIELDS, DIM, ROWS, LR = 4096, 26, 16, 10_000, 0.01
QUICK = {"n": 8, "fields": 3, "dim": 4, "rows": 10}
KINDS = {"full": None, "low_rank": 64}


def cases(quick: bool = False) -> list[Case]:
    sizes = QUICK if quick else {"n": N, "fields": FIELDS, "dim": DIM, "rows": ROWS}
    name = "{n} rows x {fields} fields x {dim}".format(**sizes)
    lookups = [Case(f"{name}, {how}", partial(_lookups, sizes, how == "hashed")) for how in ("ids", "hashed")]
    d, n = sizes["fields"] * sizes["dim"], sizes["n"]
    return lookups + [Case(f"cross {kind}, {n} rows x {d}", partial(_crosses, n, d, kind)) for kind in KINDS]


def tables(quick: bool = False) -> dict[str, list[dict]]:
    """{"peers": rows {peer, there}, "busy": rows {load, cores}}."""
    there = [{"peer": DEEPCTR, "there": deepctr() is not None}]
    return {"peers": there, "busy": [{"load": os.getloadavg()[0], "cores": os.cpu_count()}]}


@cache
def deepctr() -> ModuleType | None:
    """The peer's input layer; None where it is not installed, or cannot be imported."""
    try:
        return importlib.import_module("deepctr_torch.inputs")
    except ImportError:
        return None


class Problem:
    """Ids, and a gradient; a contestant looks up, and in both directions trains tables of its own."""

    def __init__(self, n: int, fields: int, dim: int, rows: int, by_hash: bool):
        generator = torch.Generator().manual_seed(0)
        self.by_hash, self.dim = by_hash, dim
        self.grad = torch.randn(n, fields * dim, generator=generator)
        self.weight = torch.randn(fields, rows, dim, generator=generator)
        every = range(fields)
        same, here = (0,) * fields, tuple(every)
        if by_hash:
            self.ids = torch.randint(2**62, (n, fields), generator=generator)
            size = fields * rows
            self.lookups = Lookups(same, same, (size,) * fields, here, here, here)
            self.places = torch.stack([hashed(self.ids[:, f], f, size) for f in every], 1)
        else:
            self.ids = torch.randint(rows, (n, fields), generator=generator)
            self.lookups = Lookups(here, same, (rows,) * fields, (BY_ID,) * fields, here, here)
            self.places = self.ids

    def parameters(self) -> list[nn.Parameter]:
        """One table of all rows where there are hashes, one for each field otherwise."""
        parts = [self.weight.flatten(0, 1)] if self.by_hash else self.weight.unbind()
        return [nn.Parameter(part.clone()) for part in parts]

    def step(self, look: Callable[[], Tensor], tables: list[nn.Parameter], direction: str) -> Callable[[], Tensor]:
        """A contestant whose gradients are sparse."""
        if direction == FORWARD:
            return torch.no_grad()(look)
        optimizer = torch.optim.SGD(tables, lr=LR)

        def made() -> Tensor:
            optimizer.zero_grad()
            found = look()
            found.backward(self.grad)
            optimizer.step()
            return found

        return made

    def ours(self, direction: str) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
        given = self.parameters()

        def look() -> Tensor:
            found = hashed_lookup(given, self.ids, self.lookups, lr=LR)
            if direction == BOTH:
                found.backward(self.grad)
            return found

        return given, look if direction == BOTH else torch.no_grad()(look)

    def bags(self, direction: str) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
        given = self.parameters()
        fields = self.ids.shape[1]
        parts = [nn.EmbeddingBag.from_pretrained(table, mode="sum", sparse=True) for table in given]
        for part, table in zip(parts, given, strict=True):
            part.weight = table
        columns, starts = [column.contiguous() for column in self.places.unbind(1)], torch.arange(len(self.ids))

        def look() -> Tensor:
            return torch.cat([parts[f % len(parts)](columns[f], starts) for f in range(fields)], 1)

        return given, self.step(look, given, direction)

    def deepctr(self, direction: str) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
        """As its models make x_0: columns of numbers, to ids, to embeddings, side by side."""
        inputs, fields = deepctr(), self.ids.shape[1]
        one = {"embedding_name": "all"} if self.by_hash else {}
        columns = [inputs.SparseFeat(f"c{f}", self.size, embedding_dim=self.dim, **one) for f in range(fields)]
        matrix, index = inputs.create_embedding_matrix(columns, sparse=True), inputs.build_input_features(columns)
        given = [part.weight for part in matrix.values()]
        with torch.no_grad():
            for table, start in zip(given, self.parameters(), strict=True):
                table.copy_(start)
        x = self.places.double()  # float32 cannot tell the rows of a large table apart

        def look() -> Tensor:
            found = inputs.embedding_lookup(x, matrix, index, columns, to_list=True)
            return inputs.combined_dnn_input(found, [])

        return given, self.step(look, given, direction)

    @property
    def size(self) -> int:
        fields, rows, _ = self.weight.shape
        return fields * rows if self.by_hash else rows

    def limit(self, direction: str) -> Callable[[], Tensor]:
        kept = self.grad.clone()

        def made() -> Tensor:
            found = kept.clone()
            return kept.add_(self.grad, alpha=-LR) if direction == BOTH else found

        return made


def _lookups(sizes: dict[str, int], by_hash: bool, direction: str) -> Contestants:
    problem = Problem(**sizes, by_hash=by_hash)
    made = {OURS: problem.ours(direction)[1], BAGS: problem.bags(direction)[1]}
    if deepctr() is not None:
        made[DEEPCTR] = problem.deepctr(direction)[1]
    return {LIMIT: problem.limit(direction), **made}


def _crosses(n: int, d: int, kind: str, direction: str) -> Contestants:
    generator = torch.Generator().manual_seed(0)
    network = CrossNetwork(d, 1, kind, min(KINDS[kind] or d, d))
    (layer,) = network.layers
    matrices = [layer.weight] if kind == "full" else [layer.v, layer.u]
    x, grad = (torch.randn(n, d, generator=generator) for _ in range(2))
    x.requires_grad_(direction == BOTH)

    def products(x: Tensor) -> Tensor:
        for matrix in matrices:
            x = x @ matrix.T
        return x

    def run(function: Callable[[Tensor], Tensor], weights: list[Tensor]) -> object:
        if direction == FORWARD:
            with torch.no_grad():
                return function(x)
        return torch.autograd.grad(function(x), [x, *weights], grad)

    return {LIMIT: partial(run, products, matrices), OURS: partial(run, network, list(network.parameters()))}
