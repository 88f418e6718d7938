"""What a rank of a plan computes, in seconds, and the clusters that it is reckoned on: Frontier's, and drawn ones.

Products are made in whole tiles, so that what tp cuts small runs at a lower rate. How much of the peak large products
reach, `efficiency`, is taken: no figure of it is public. The level of every share follows from it nearly in proportion.
"""

import math
import random
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from workbench.lib.core.simulation.hardware import Hardware
from workbench.lib.distributed.folding_model import Cluster, Roofline
from workbench.lib.distributed.frontier_plans import DenseConfig, ParallelPlan

EFFICIENCY = (0.5, 0.7)
"""Taken: between these lies the part of the peak that large products reach."""

TILE, UNITS = 128, 110
"""Taken: products are made in tiles of 128 x 128, 110 at once, as many as a GCD has compute units."""


@dataclass(frozen=True)
class Tiled(Roofline):
    """Products in whole tiles and whole turns of them: the last turn takes as long as a full one, so that what tp cuts
    small runs at a lower rate."""

    def product(self, rows: float, inner: float, outer: float, width: int, matrices: float = 1) -> float:
        tiles = math.ceil(rows / TILE) * math.ceil(outer / TILE)
        filled = rows * outer / (math.ceil(tiles / UNITS) * UNITS * TILE**2)
        moved = width * (rows * (inner + outer) + matrices * inner * outer)
        return max(2 * rows * inner * outer / (self.device.flops * self.efficiency * filled), self.moved(moved))


@runtime_checkable
class Work(Protocol):
    """Seconds of a rank's own work on one micro-batch, without any message."""

    def layer(self, config: DenseConfig, plan: ParallelPlan) -> float:
        """One layer forward."""

    def layer_backward(self, config: DenseConfig, plan: ParallelPlan) -> float:
        """One layer backward, without what is computed again."""

    def embedding(self, config: DenseConfig, plan: ParallelPlan) -> float:
        """Forward and backward."""

    def output(self, config: DenseConfig, plan: ParallelPlan) -> float:
        """The last norm, logits and loss, forward and backward."""

    def update(self, numbers: float) -> float:
        """The optimiser on so many parameters."""


@dataclass(frozen=True)
class Reckoned:
    """`Work` by a roofline: products twice as long backward, all else at the memory's rate."""

    compute: Roofline

    def layer(self, config: DenseConfig, plan: ParallelPlan) -> float:
        c, dim, wide = self.compute, config.dim, config.dim / plan.tp
        rows, width = config.time * plan.micro_batch, config.width
        products = c.product(rows, dim, 3 * wide, width) + c.product(rows, wide, dim, width)
        products += c.product(rows, dim, 4 * wide, width) + c.product(rows, 4 * wide, dim, width)
        rate = c.device.flops * c.efficiency
        if plan.flash:  # what is masked is not computed, and scores stay where they are computed
            products += 2 * rows * config.time * wide / rate
        else:  # scores are written, masked, made shares, and read
            scores = rows * config.time * config.heads / plan.tp
            products += 4 * rows * config.time * wide / rate + c.moved(6 * width * scores)
        # two norms and two sums pass over whole rows, GELU over the 4 D of this rank
        return products + c.moved(width * rows * (10 * dim + 8 * wide))

    def layer_backward(self, config: DenseConfig, plan: ParallelPlan) -> float:
        return 2 * self.layer(config, plan)

    def embedding(self, config: DenseConfig, plan: ParallelPlan) -> float:
        return self.compute.moved(6 * config.width * config.time * plan.micro_batch * config.dim)

    def output(self, config: DenseConfig, plan: ParallelPlan) -> float:
        rows, vocab = config.time * plan.micro_batch, config.vocab / plan.tp
        logits = self.compute.product(rows, config.dim, vocab, config.width)
        return 3 * (logits + self.compute.moved(4 * config.width * rows * vocab))

    def update(self, numbers: float) -> float:
        return self.compute.update(numbers)


def cluster_of(machine: Hardware, efficiency: float = sum(EFFICIENCY) / 2) -> Cluster:
    """Devices by the numbers of a machine, products in tiles.

    Raises:
        InputError: it says nothing of its device, of its links or of how many devices a node has.
    """
    cluster = Cluster.of(machine, efficiency)
    return replace(cluster, compute=Tiled(machine.device, efficiency))


def frontier_cluster(efficiency: float = sum(EFFICIENCY) / 2) -> Cluster:
    """GCDs of Frontier by their public numbers."""
    return cluster_of(Hardware.named("frontier-gcd"), efficiency)


def drawn(seed: int) -> Cluster:
    """Around Frontier: what is not sure is drawn, the efficiency and what memory and links reach; the peak and the
    bytes of memory are specified."""
    draw, machine = random.Random(f"frontier {seed}"), Hardware.named("frontier-gcd")

    def about(value: float, spread: float) -> float:
        return value * math.exp(draw.gauss(0, spread))

    device = replace(machine.device, memory_bandwidth=about(machine.device.memory_bandwidth, 0.2))
    links = {
        name: replace(at, bandwidth=about(at.bandwidth, 0.3), latency_seconds=about(at.latency_seconds, 0.3))
        for name, at in (("node", machine.node), ("network", machine.network))
    }
    name = f"{machine.name} with drawn constants"
    return cluster_of(replace(machine, name=name, device=device, **links), draw.uniform(*EFFICIENCY))
