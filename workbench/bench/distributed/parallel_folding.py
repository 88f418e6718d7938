"""The model of a folded step held to steps of two processes over a shaped link.

Calibrated by all-to-alls of messages alone, and by the work of one rank without the other's: attention, experts, the
ends and the optimiser. Predicted are whole steps, of layouts whose attention and experts are split in different ways.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from workbench.bench.distributed._ranks import timed
from workbench.lib.core.distributed.dispatcher import TokenDispatcher
from workbench.lib.core.distributed.processes import run_processes
from workbench.lib.core.distributed.shaped import call_shaped
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.simulation.fits import LinkModel, RateTable
from workbench.lib.core.simulation.validation import Validation
from workbench.lib.distributed.folding_layouts import Layout, MoEConfig
from workbench.lib.distributed.folding_model import Cluster, FoldingModel
from workbench.lib.distributed.parallel_folding import FoldedDecoder, FoldedMesh

MBIT, WORLD, VOCAB = 200, 2, 256
SHAPE = {"layers": 2, "dim": 128, "heads": 4, "hidden": 256, "experts": 8, "top_k": 2, "time": 512}
QUICK_SHAPE = SHAPE | {"layers": 1, "dim": 32, "hidden": 32, "time": 64}
#: Sizes of the mesh; what is left is dp and edp. Each way to split attention with each to split experts that differs.
MESHES = (
    {"tp": 2, "ep": 2},
    {"tp": 2, "etp": 2},
    {"tp": 2},
    {"cp": 2, "ep": 2},
    {"cp": 2, "etp": 2},
    {"ep": 2},
    {"etp": 2},
    {},
)
SIZES = (4_096, 32_768, 131_072, 524_288, 2_097_152)
ROUNDS = 5


@dataclass(frozen=True)
class Measured:
    """Seconds of a rank's work as they were measured; see `folding_model.Compute`.

    Attributes:
        attending: "tp x cp" -> seconds of a layer.
        routed: "ep x etp" -> seconds by pairs.
        ending: seconds by the rows of a rank.
        updating: seconds by numbers.
    """

    attending: dict[str, float]
    routed: dict[str, RateTable]
    ending: RateTable
    updating: RateTable

    def attention(self, config: MoEConfig, layout: Layout) -> float:
        return self.attending[f"{layout.tp} x {layout.cp}"]

    def experts(self, config: MoEConfig, layout: Layout, pairs: float) -> float:
        return self.routed[f"{layout.ep} x {layout.etp}"].seconds(pairs)

    def ends(self, config: MoEConfig, layout: Layout) -> float:
        return self.ending.seconds(config.time / (layout.tp * layout.cp))

    def update(self, states: float) -> float:
        return self.updating.seconds(states)


def measure(quick: bool = False) -> Validation:
    """Seconds of a step, predicted and measured. An `InputError` where the link cannot be shaped."""
    shape, rounds = (QUICK_SHAPE, 3) if quick else (SHAPE, ROUNDS)
    ranks = call_shaped(run_processes, _look, WORLD, shape, rounds, mbit=MBIT, timeout=300)
    sent, compute = [max(each) for each in zip(*(rank["sent"] for rank in ranks), strict=True)], ranks[0]["compute"]
    link = LinkModel.fit(SIZES, sent)  # by what one rank sends while the other sends as much
    cluster = Cluster("measured", compute, link, link, WORLD, float("inf"), 1.0)
    rows = []
    for i, sizes in enumerate(MESHES):
        layout = FoldedMesh(WORLD, **sizes).layout
        report = FoldingModel(_config(shape, layout), layout, cluster).step()
        measured = max(rank["steps"][i] for rank in ranks)
        parts = {name: round(seconds, 5) for name, seconds in report.parts.items() if seconds}
        rows.append({"configuration": str(layout), "predicted": report.seconds, "measured": measured, "parts": parts})
    calibration = {
        "mbit": MBIT,
        "shape": shape,
        "link": {"alpha": link.alpha, "beta": link.beta},
        "exchanges": [list(pair) for pair in zip(SIZES, sent, strict=True)],
        "compute": asdict(compute),
    }
    return Validation.made("parallel-folding", calibration, rows, "seconds a step")


def _config(shape: dict[str, int], layout: Layout) -> MoEConfig:
    """A sequence for each rank of dp. Positions are rows of a table like tokens, whole on each rank."""
    rest = {"vocab": VOCAB + shape["time"], "kv_heads": shape["heads"], "batch": layout.dp, "width": 4}
    return MoEConfig("measured", **shape, **rest, split_vocab=False)


def _model(shape: dict[str, int]) -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(
        VOCAB, shape["dim"], shape["layers"], shape["heads"], lambda layer: _layer(shape, 1, 1), shape["time"]
    )


def _layer(shape: dict[str, int], ep: int, etp: int) -> MoELayer:
    """A layer with the experts that a rank has, each sliced."""
    experts = shape["experts"] // ep
    router = LinearRouter(shape["dim"], experts, min(shape["top_k"], experts))
    return MoELayer(router, GLUExperts(experts, shape["dim"], shape["hidden"] // etp))


def _look(shape: dict[str, int], rounds: int) -> dict[str, Any]:
    """On each of the two ranks, which do the same at the same time."""
    sent = [_exchange(size, rounds) for size in SIZES]
    return {"sent": sent, "compute": _compute(shape, rounds), "steps": [_step(shape, m, rounds) for m in MESHES]}


def _exchange(size: int, rounds: int) -> float:
    """Seconds until each rank has so many bytes of the other, one message after another: a link that was idle lets the
    first tens of kilobytes through at once, and in a step it is not idle."""
    x, many = torch.zeros(WORLD * size, dtype=torch.uint8), max(1, 2**20 // size)
    into = torch.empty_like(x)

    def call() -> None:
        for _ in range(many):
            dist.all_to_all_single(into, x)

    return _median(call, rounds) / many


def _compute(shape: dict[str, int], rounds: int) -> Measured:
    dim, time_, top_k = shape["dim"], shape["time"], shape["top_k"]
    attending = {}
    for tp, cp in ((1, 1), (2, 1), (1, 2)):
        attending[f"{tp} x {cp}"] = _median(_attention(shape, tp, cp), rounds)
    routed = {}
    for ep, etp in ((1, 1), (2, 1), (1, 2)):
        layer = _layer(shape, ep, etp)
        pairs = [time_ * top_k // 4, time_ * top_k // 2, time_ * top_k, 2 * time_ * top_k]
        spent = [_median(_routing(layer, n // top_k, dim), rounds) for n in pairs]
        routed[f"{ep} x {etp}"] = RateTable(tuple(pairs), tuple(spent))
    rows = [time_ // 2, time_]
    ending = RateTable(tuple(rows), tuple(_median(_ends(shape, n), rounds) for n in rows))
    numbers = [2**14, 2**17, 2**20]
    return Measured(
        attending, routed, ending, RateTable(tuple(numbers), tuple(_median(_update(n), rounds) for n in numbers))
    )


def _attention(shape: dict[str, int], tp: int, cp: int) -> Callable[[], None]:
    """A layer's norm and attention, forward and backward, of the heads and queries of a rank."""
    dim, time_, heads = shape["dim"], shape["time"], shape["heads"] // tp
    width = dim // shape["heads"]
    rows, wide = time_ // cp, heads * width
    qkv, out, norm = torch.nn.Linear(dim, 3 * wide, False), torch.nn.Linear(wide, dim, False), torch.nn.RMSNorm(dim)
    x = torch.randn(rows, 1, dim, requires_grad=True)
    seen = torch.arange(time_) <= torch.arange(rows)[:, None]

    def call() -> None:
        q, k, v = qkv(norm(x)).unflatten(-1, (3, -1, width)).unbind(2)
        k, v = (part.repeat(cp, 1, 1, 1) for part in (k, v))
        y = F.scaled_dot_product_attention(*(part.permute(1, 2, 0, 3) for part in (q, k, v)), attn_mask=seen)
        (x + out(y.permute(2, 0, 1, 3).flatten(2))).sum().backward()

    return call


def _routing(layer: MoELayer, n: int, dim: int) -> Callable[[], None]:
    """A layer's norm, router and experts on so many rows, forward and backward."""
    x, norm, dispatcher = (
        torch.randn(n, dim, requires_grad=True),
        torch.nn.RMSNorm(dim),
        TokenDispatcher(layer.n_experts),
    )

    def call() -> None:
        rows = norm(x)
        sent = dispatcher.dispatch(rows, layer.router(rows))
        (x + dispatcher.combine(layer.experts(sent.rows, sent.routing), sent)).sum().backward()

    return call


def _ends(shape: dict[str, int], n: int) -> Callable[[], None]:
    table, tokens = torch.nn.Embedding(VOCAB, shape["dim"]), torch.randint(VOCAB, (n,))
    norm = torch.nn.RMSNorm(shape["dim"])
    return lambda: F.cross_entropy(norm(table(tokens)) @ table.weight.T, tokens).backward()


def _update(n: int) -> Callable[[], None]:
    p = torch.nn.Parameter(torch.zeros(n))
    optimizer, p.grad = torch.optim.AdamW([p]), torch.ones(n)
    return optimizer.step


def _step(shape: dict[str, int], sizes: dict[str, int], rounds: int) -> float:
    model = FoldedDecoder(_model(shape), FoldedMesh(WORLD, **sizes))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(VOCAB, (model.mesh.layout.dp, shape["time"] + 1), generator=torch.Generator().manual_seed(0))

    def call() -> None:
        optimizer.zero_grad()
        model.loss(tokens).backward()
        model.reduce()
        optimizer.step()

    return _median(call, rounds)


def _median(call: Callable[[], object], rounds: int) -> float:
    return statistics.median(timed(call, rounds))
