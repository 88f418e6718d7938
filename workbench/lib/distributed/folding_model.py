"""What a step of a mixture of experts takes on a cluster, for a layout of attention and experts over its ranks.

    cluster = Cluster.of(Hardware.named("h100-sxm"))
    config = MoEConfig("fine", layers=28, dim=4096, heads=32, kv_heads=8, hidden=1536, experts=64, top_k=8)
    fastest = best(config, cluster, world=256)                  # with folding
    fastest.layout, fastest.seconds, fastest.parts              # seconds by what they are spent on
    best(config, cluster, 256, folded=False)                    # as before: etp = tp, and ep divides dp

The step reckoned with is the one of `FoldedDecoder`, with stages (1F1B) besides: rows are gathered and summed over tp
before and after attention, keys and values gathered over cp, rows sent to their experts and back over ep, gathered and
summed over etp; backward, the same the other way. Nothing is hidden behind anything else. Optimiser states are split
over the copies of a parameter (ZeRO-1). Everything computed and sent for the layer norm of a row, and the like, is left
out as far as it needs no memory traffic.

A micro-batch is one sequence. Units are seconds and bytes; "pairs" are (token, expert) pairs.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol, runtime_checkable

from workbench.errors import InputError
from workbench.lib.core.simulation.fits import LinkModel
from workbench.lib.core.simulation.hardware import Hardware, Processor
from workbench.lib.distributed.folding_layouts import Layout, MoEConfig, layouts

USABLE = 0.9
"""The part of a device's memory that a model may fill: the rest is the allocator's and the libraries'."""


@runtime_checkable
class Compute(Protocol):
    """Seconds of forward and backward work on one rank, for one micro-batch."""

    def attention(self, config: MoEConfig, layout: Layout) -> float:
        """A layer's attention, of T / cp queries and heads / tp."""

    def experts(self, config: MoEConfig, layout: Layout, pairs: float) -> float:
        """A layer's router on this rank's rows and its experts, E / ep of hidden / etp, on so many pairs."""

    def ends(self, config: MoEConfig, layout: Layout) -> float:
        """Embedding, output and loss."""

    def update(self, states: float) -> float:
        """The optimiser on so many parameters."""


@dataclass(frozen=True)
class Roofline:
    """Products at a part of the peak or at the memory's rate, whichever takes longer; all else at the memory's rate.

    Attributes:
        efficiency: of large products.
    """

    device: Processor
    efficiency: float = 0.75

    def product(self, rows: float, inner: float, outer: float, width: int, matrices: float = 1) -> float:
        """Rows, spread over so many matrices (inner, outer)."""
        moved = width * (rows * (inner + outer) + matrices * inner * outer)
        return max(2 * rows * inner * outer / (self.device.flops * self.efficiency), self.moved(moved))

    def moved(self, n: float) -> float:
        return n / self.device.memory_bandwidth

    def attention(self, config: MoEConfig, layout: Layout) -> float:
        rows = config.time / layout.cp
        dim, kv = config.dim / layout.tp, config.kv_dim / layout.tp
        products = self.product(rows, config.dim, dim + 2 * kv, config.width)
        products += self.product(rows, dim, config.dim, config.width)
        products += 2 * rows * config.time * dim / (self.device.flops * self.efficiency)  # half of 4: causal, balanced
        # norm, residual and rows in and out of products, about eight passes over this rank's rows
        return 3 * (products + self.moved(8 * config.width * rows / layout.tp * config.dim))

    def experts(self, config: MoEConfig, layout: Layout, pairs: float) -> float:
        rows, hidden = config.time / (layout.tp * layout.cp), config.hidden / layout.etp
        local = config.experts / layout.ep
        products = self.product(rows, config.dim, config.experts, config.width)
        products += self.product(pairs, config.dim, 2 * hidden, config.width, local)
        products += self.product(pairs, hidden, config.dim, config.width, local)
        # pairs are brought into order and back, and the gate is applied
        passes = 8 * rows * config.dim + pairs * (4 * config.dim + 3 * hidden)
        return 3 * (products + self.moved(config.width * passes))

    def ends(self, config: MoEConfig, layout: Layout) -> float:
        rows, vocab = config.time / layout.cp, config.vocab / layout.tp
        return 3 * (self.product(rows, config.dim, vocab, config.width) + self.moved(8 * rows * vocab))

    def update(self, states: float) -> float:
        return self.moved(30 * states)  # reads gradient, weight and two moments of 4 bytes, writes three and a half


@dataclass(frozen=True)
class Cluster:
    """What the devices compute and how they reach each other.

    Attributes:
        basis: what stands on every figure: "simulated, calibrated by ...".
        node, network: links of one device within its node and out of it.
        memory_bytes, peak_flops: of a device.
    """

    basis: str
    compute: Compute
    node: LinkModel
    network: LinkModel
    devices_per_node: int
    memory_bytes: float
    peak_flops: float

    @classmethod
    def of(cls, hardware: Hardware, efficiency: float = 0.75) -> "Cluster":
        """By the numbers of a machine, products at a part of the peak."""
        if not 0 < efficiency <= 1:
            raise InputError(f"efficiency is {efficiency} but must be above 0 and at most 1")
        hardware.need("device", "node", "network", "devices_per_node")
        links = hardware.node.model, hardware.network.model
        device = hardware.device
        memory, peak = device.memory_bytes * USABLE, device.flops
        return cls(hardware.label, Roofline(device, efficiency), *links, hardware.devices_per_node, memory, peak)

    def gather(self, n: float, axes: tuple[tuple[int, int], ...]) -> float:
        """An all-gather to n bytes on each rank, or a reduce-scatter of them, by a ring: as many links leave a node as
        it has members."""
        size, near = _members(axes, self.devices_per_node)
        if near == size:
            return self.node.all_gather(n, size)
        return LinkModel(self.network.alpha, max(self.node.beta, self.network.beta / near)).all_gather(n, size)

    def exchange(self, n: float, axes: tuple[tuple[int, int], ...]) -> float:
        """An all-to-all of n bytes on each rank, to all at once: within the node and out of it side by side."""
        size, near = _members(axes, self.devices_per_node)
        return max(self.node.seconds(n * (near - 1) / size), self.network.seconds(n * (size - near) / size))


@cache
def _members(axes: tuple[tuple[int, int], ...], per_node: int) -> tuple[int, int]:
    """Ranks of the group of rank 0, and how many of them are in its node."""
    places = [0]
    for stride, size in axes:
        places = [place + i * stride for place in places for i in range(size)]
    return len(places), sum(place < per_node for place in places)


@dataclass(frozen=True)
class Report:
    """What a step takes. `parts`: seconds by what they are spent on, of the slowest rank; they sum to `seconds`."""

    layout: Layout
    parts: dict[str, float]
    memory_bytes: float
    mfu: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class FoldingModel:
    """A model of a step: `FoldingModel(config, layout, cluster).step()`."""

    config: MoEConfig
    layout: Layout
    cluster: Cluster

    @property
    def rows(self) -> float:
        """Of a micro-batch on each rank."""
        return self.config.time / (self.layout.tp * self.layout.cp)

    @property
    def hottest(self) -> float:
        """Pairs of the rank of ep that gets most, over the mean."""
        if self.config.loads is None:
            return 1.0
        per = self.config.experts // self.layout.ep
        shares = [sum(self.config.loads[i : i + per]) for i in range(0, self.config.experts, per)]
        return max(shares) * self.layout.ep

    def held(self) -> dict[str, float]:
        """Parameters on a rank of the stage that has most, by which ranks copy them: "cp dp", "edp", "all"."""
        c, m = self.config, self.layout
        layers, vocab = c.layers / m.pp, c.vocab * c.dim
        dense, whole = layers * c.attention_params / m.tp, layers * c.small_params
        if c.split_vocab:
            dense += vocab / m.tp * (2 if m.pp == 1 else 1)
        else:
            whole += vocab
        return {"cp dp": dense, "edp": layers * c.experts / m.ep * c.expert_params / m.etp, "all": whole}

    def memory(self) -> float:
        """Bytes on a rank of the first stage: weights, float32 gradients, and 12 bytes a parameter of the optimiser's,
        split over the copies; activations of as many micro-batches as 1F1B holds."""
        copies = {"cp dp": self.layout.cp * self.layout.dp, "edp": self.layout.edp}
        copies["all"] = copies["cp dp"] * self.layout.tp
        states = sum(n * (self.config.width + 4 + 12 / copies[kind]) for kind, n in self.held().items())
        return states + self.activations()

    def activations(self) -> float:
        c, m = self.config, self.layout
        pairs = self.rows * c.top_k
        # stream and norm; gathered rows; queries, output, and keys and values of all of cp
        attention = self.rows * (2 * c.dim + m.tp * c.dim + 2 * c.dim + 2 * m.cp * c.kv_dim)
        # stream and norm; rows of all slices, and outputs; gate, up and their product; rows as sent and as returned
        experts = self.rows * 2 * c.dim + pairs * self.hottest * (2 * m.etp * c.dim + 3 * c.hidden) + 2 * pairs * c.dim
        a_layer = c.width * (attention + experts) + 8 * self.rows * c.experts
        flight = min(c.batch // m.dp, m.pp)
        logits = 6 * self.rows * c.vocab if m.pp == 1 else 0.0
        return c.layers / m.pp * a_layer * flight + logits

    def step(self) -> Report:
        c, m, cluster = self.config, self.layout, self.cluster
        axes = {name: tuple(m.axes(name)) for name in ("tp", "cp", "etp", "ep", "edp", "cp dp", "tp cp dp", "pp")}
        row, pairs = c.dim * c.width, self.rows * c.top_k * self.hottest
        layer = {  # forward and backward: each transfer has an adjoint of the same bytes
            "attention": cluster.compute.attention(c, m),
            "experts": cluster.compute.experts(c, m, pairs * m.etp),
            "tp": 4 * cluster.gather(self.rows * m.tp * row, axes["tp"]),
            "cp": 2 * cluster.gather(self.rows * m.tp * m.cp * 2 * c.kv_dim / m.tp * c.width, axes["cp"]),
            "ep": 4 * cluster.exchange(pairs * row, axes["ep"]) + cluster.exchange(8 * c.experts, axes["ep"]),
            "etp": 4 * cluster.gather(pairs * m.etp * row, axes["etp"]),
        }
        micro, layers = c.batch // m.dp, c.layers / m.pp
        parts = {name: micro * layers * value for name, value in layer.items()}
        parts["ends"] = micro * cluster.compute.ends(c, m)
        if m.pp > 1:
            near = m.world // m.pp < cluster.devices_per_node
            link = cluster.node if near else cluster.network
            parts["pp"] = micro * 4 * link.seconds(self.rows * row)  # in and out, forward and backward
        parts["bubble"] = (m.pp - 1) / micro * sum(parts.values())
        held, group = self.held(), {"cp dp": "cp dp", "edp": "edp", "all": "tp cp dp"}
        parts["gradients"] = sum(
            cluster.gather(4 * n, axes[group[kind]]) + cluster.gather(c.width * n, axes[group[kind]])
            for kind, n in held.items()
        )
        copies = {kind: _members(axes[group[kind]], 1)[0] for kind in held}
        parts["update"] = cluster.compute.update(sum(n / copies[kind] for kind, n in held.items()))
        seconds = sum(parts.values())
        return Report(m, parts, self.memory(), c.flops / (seconds * m.world * cluster.peak_flops))


def best(config: MoEConfig, cluster: Cluster, world: int, folded: bool = True) -> Report:
    """The fastest layout that memory allows; of two as fast, the first of `layouts`.

    Raises:
        InputError: none fits.
    """
    return fastest(config, cluster, layouts(config, world, folded), world)


def fastest(config: MoEConfig, cluster: Cluster, among: Iterator[Layout], world: int) -> Report:
    """The fastest of some layouts; see `best`."""
    models = [FoldingModel(config, layout, cluster) for layout in among]
    if not models:
        raise InputError(f"world is {world} but no layout of {config.name!r} has so many ranks")
    fit = [model for model in models if model.memory() <= cluster.memory_bytes]
    if not fit:
        least = min(model.memory() for model in models)
        raise InputError(
            f"world is {world} but {config.name!r} fits in no layout: the least needs {least / 1e9:.1f} GB a device, "
            f"and {cluster.memory_bytes / 1e9:.1f} GB are there"
        )
    return min((model.step() for model in fit), key=lambda report: report.seconds)


KINDS = ("coarse", "fine")


def drawn(seed: int, kind: str = "fine", most: int = 512) -> tuple[MoEConfig, Cluster, int]:
    """A model, a cluster and its ranks: around published models and an H100 cluster, of which every constant is drawn.

    Coarse is 8 experts of which 2 are active (as Mixtral's), fine 64 of which 8 are (as Qwen2-57B-A14B's). The cluster
    is the same for both, and has a quarter of `most` ranks, half of them or all. A draw that fits in no layout without
    folding is drawn again.
    """
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r} but must be one of {', '.join(KINDS)}")
    draw = random.Random(f"cluster {seed}")
    machine = Hardware.named("h100-sxm").need("device", "node", "network")

    def about(value: float, spread: float) -> float:
        return value * math.exp(draw.gauss(0, spread))

    device = replace(machine.device, flops=about(machine.device.flops, 0.2))
    device = replace(device, memory_bandwidth=about(device.memory_bandwidth, 0.2))
    links = {
        name: replace(at, bandwidth=about(at.bandwidth, 0.3), latency_seconds=about(at.latency_seconds, 0.3))
        for name, at in (("node", machine.node), ("network", machine.network))
    }
    name = f"{machine.name} with drawn constants"
    cluster = Cluster.of(replace(machine, name=name, device=device, **links), efficiency=draw.uniform(0.6, 0.8))
    world = draw.choice((most // 4, most // 2, most))
    time, batch = draw.choice((4096, 8192, 16_384)), draw.choice((256, 512, 1024))
    draw = random.Random(f"{kind} {seed}")
    while True:
        experts, top_k, vocab = (8, 2, 32_000) if kind == "coarse" else (64, 8, 152_064)
        dim = draw.choice((4096, 6144) if kind == "coarse" else (3072, 4096))
        hidden = 256 * round(dim / 256 * (draw.uniform(2.0, 3.5) if kind == "coarse" else draw.uniform(0.4, 0.75)))
        skew = [math.exp(draw.gauss(0, 0.3)) for _ in range(experts)]
        config = MoEConfig(
            kind,
            layers=draw.choice((32, 48, 56) if kind == "coarse" else (24, 28, 32)),
            dim=dim,
            heads=dim // 128,
            kv_heads=8,
            hidden=hidden,
            experts=experts,
            top_k=top_k,
            vocab=vocab,
            time=time,
            batch=batch,
            loads=tuple(each / sum(skew) for each in skew),
        )
        limit = cluster.memory_bytes
        if any(FoldingModel(config, each, cluster).memory() <= limit for each in layouts(config, world, folded=False)):
            return config, cluster, world
