"""How long a step takes where experts are copied for it, beside what others do about skewed loads; simulated.

Policies, each with all tokens served:

    ep         experts stay where they are
    relayout   every `every` steps owners are planned anew, by the loads of before, and move with their states
    fsdp       every device gathers all experts of a layer, and tokens stay where they are
    hecate     owners as relayout, by all layers together; before each layer copies, as long as what they save by the
               loads of before is more than what of them is not hidden
    remat      as hecate, and copies are gathered again for the backward pass: the memory of all layers is free for each

A layer takes, with n_d the tokens of device d,

    3 c max n_d + 4 exchanges + what the gathers and the scatter take beyond what they hide behind

c a token's time in an expert, forward once and backward twice. An exchange is as long as the device that sends or gets
most; within a node and out of it side by side. Left out: router, norms, kernel launches, and that transfers slow down
what they hide behind. All of it is the same for all policies but the last, which favours those that transfer.

Tensor letters: I steps, L layers, D devices, E experts.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError, unknown
from workbench.lib.core.simulation.fits import LinkModel
from workbench.lib.core.simulation.hardware import Hardware
from workbench.lib.core.simulation.timeline import Event, Timeline
from workbench.lib.core.simulation.traces import RouterTrace, zipf_markov
from workbench.lib.core.simulation.workload import Simulation, Workload
from workbench.lib.distributed.hecate_plans import WINDOW, even_owners, level, plan_placement, plan_sharding
from workbench.lib.distributed.sparse_shards import transfers

POLICIES = ("hecate", "remat", "ep", "relayout", "fsdp")
STATE_FACTOR = 7.0  # of a chunk's bytes in 16 bits, that move with an owner: itself, and 12 bytes a number
EFFICIENCY = 0.5  # of the peak that products reach


@dataclass(frozen=True)
class Machine:
    """A cluster and a layer of a model on it.

    Attributes:
        basis: "simulated, calibrated by ...".
        devices, per_node: D, and how many of them a node has.
        node, network: links of one device.
        token_seconds: c, of one token in one expert, forward.
        before_seconds: of what a layer computes before its experts, forward; the backward pass has twice that.
        chunk_bytes, token_bytes: of an expert, and of a token on its way.
        memory: copies that a device may have at a time, of all layers together.
        tokens: on each device, which is what `before_seconds` is of.
    """

    basis: str
    devices: int
    per_node: int
    node: LinkModel
    network: LinkModel
    token_seconds: float
    before_seconds: float
    chunk_bytes: float
    token_bytes: float
    memory: int
    tokens: float

    def __post_init__(self):
        for name in ("devices", "per_node"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)} but must be at least 1")
        for name in ("token_seconds", "before_seconds", "chunk_bytes", "token_bytes", "memory", "tokens"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value} but must be finite and at least 0")

    @property
    def far(self) -> float:
        """The share of the other devices that are in other nodes."""
        return max(0, self.devices - self.per_node) / max(1, self.devices - 1)

    def exchange(self, tokens: float) -> float:
        """Seconds in which the device with most to send or get does so."""
        count = tokens * self.token_bytes
        return max(self.node.seconds(count * (1 - self.far)), self.network.seconds(count * self.far))

    def chunks(self, count: float) -> float:
        """Seconds in which a device sends or gets so many chunks."""
        size = count * self.chunk_bytes
        return max(self.node.seconds(size * (1 - self.far)), self.network.seconds(size * self.far))


@dataclass(frozen=True)
class Layer:
    """One layer of one step.

    Attributes:
        parts: seconds of "before", "experts", "exchange" and "copies" (what is not hidden of them).
        straggler: tokens of the busiest device over the mean.
        copied: chunks that travelled for the forward pass.
    """

    parts: Mapping[str, float]
    straggler: float
    copied: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


class HecateSim:
    """Steps over a trace of loads, under one policy.

    Args:
        machine: the cluster.
        loads: (I, L, E) tokens of each expert, of all devices; they come from all devices alike.
        policy: one of `POLICIES`.
        every: steps between two plans of owners.
    """

    def __init__(
        self, machine: Machine, loads: Float[Tensor, "steps layers experts"], policy: str = "hecate", every: int = 50
    ):
        if policy not in POLICIES:
            raise unknown("policy", policy, POLICIES)
        if loads.ndim != 3 or 0 in loads.shape or not bool((loads >= 0).all() and loads.isfinite().all()):
            raise InputError(
                f"loads has shape {tuple(loads.shape)} but must be (steps, layers, experts), finite and not negative"
            )
        if every < 1:
            raise InputError(f"every is {every} but must be at least 1")
        self.machine, self.loads, self.policy, self.every = machine, loads.double(), policy, every

    def run(self) -> list[list[Layer]]:
        """Each layer of each step; what owners cost that move is in the layer's "copies"."""
        steps, layers, experts = self.loads.shape
        devices = self.machine.devices
        owner, found = even_owners(layers, experts, devices), []
        for step in range(steps):
            seen = self.loads[max(0, step - WINDOW) : step]
            moved = [0] * layers
            if self.policy in ("relayout", "hecate", "remat") and step and step % self.every == 0:
                planned = self._owners(seen.mean(0))
                moved = (planned != owner).sum(1).tolist()
                owner = planned
            found.append([self._layer(step, i, owner[i], seen, moved[i]) for i in range(layers)])
        return found

    def _owners(self, loads: Float[Tensor, "layers experts"]) -> Tensor:
        if self.policy != "relayout":
            return plan_sharding(loads, self.machine.devices)
        return torch.cat([plan_sharding(row[None], self.machine.devices) for row in loads])

    def _layer(self, step: int, layer: int, owner: Tensor, seen: Tensor, moved: int) -> Layer:
        machine, load = self.machine, self.loads[step, layer]
        devices = machine.devices
        placement = owner == torch.arange(devices)[:, None]
        if self.policy in ("hecate", "remat") and len(seen):
            load_seen, room = seen[:, layer].mean(0), machine.memory
            if self.policy == "hecate":  # copies stay from the forward pass of a layer to its backward pass
                room //= self.loads.shape[1]

            def seconds(placement: Tensor) -> float:
                busiest = float(level(load_seen, placement).sum(1).max())
                return 3 * machine.token_seconds * busiest + self._copies(owner, placement)

            placement = plan_placement(load_seen, owner, devices, room * devices, room, cost=seconds)
        elif self.policy == "fsdp":
            placement = torch.ones_like(placement)
        shares = level(load, placement)
        there = shares.sum(1)
        from_each = load / devices  # of every expert, on every device
        stay = torch.minimum(shares, from_each.expand_as(shares)).sum(1)
        travel = float(torch.maximum(there - stay, from_each.sum() - stay).max())
        parts = {
            "before": 3 * machine.before_seconds,
            "experts": 3 * machine.token_seconds * float(there.max()),
            "exchange": 4 * machine.exchange(travel),
            "copies": self._copies(owner, placement) + machine.chunks(STATE_FACTOR * moved / devices),
        }
        return Layer(parts, float(there.max() / there.mean().clamp(min=1e-30)), transfers(owner, placement))

    def _copies(self, owner: Tensor, placement: Tensor) -> float:
        """Seconds of gathers and of the scatter that nothing hides."""
        owns = owner == torch.arange(self.machine.devices)[:, None]
        gets, sends = (placement & ~owns).sum(1), (owns * (placement.sum(0) - 1)).sum(1)
        seconds, before = self.machine.chunks(float(torch.maximum(gets, sends).max())), self.machine.before_seconds
        forward, scatter = max(0.0, seconds - before), max(0.0, seconds - 2 * before)
        again = max(0.0, seconds - 2 * before) if self.policy in ("remat", "fsdp") else 0.0
        return forward + scatter + again

    @staticmethod
    def example(seed: int) -> dict[str, Any]:
        """A step of a drawn cluster under every policy, on a synthetic trace."""
        machine = drawn(seed)
        trace = zipf_markov(seed, prompts=2, layers=2)
        loads = loads_of(trace, 4, machine.tokens * machine.devices * trace.top_k)
        found = {policy: HecateSim(machine, loads, policy).run() for policy in POLICIES}
        return {"basis": machine.basis, "devices": machine.devices} | {
            policy: {
                "step_seconds": sum(layer.seconds for step in steps for layer in step) / len(steps),
                "straggler": sum(layer.straggler for step in steps for layer in step) / len(steps) / len(steps[0]),
            }
            for policy, steps in found.items()
        }


def loads_of(
    trace: RouterTrace, steps: int, tokens: float, power: float = 1.0, prompts: Sequence[int] | None = None
) -> Float[Tensor, "steps layers experts"]:
    """Loads of so many steps of training on what a trace's routers said, one after the other.

    A step sees a window of the trace. The share of an expert is that of what it was chosen for, to a
    power: 0 makes all the same, 1 is as it was, more is more skewed.

    Args:
        tokens: pairs of a token and an expert in a step, of all devices.
        prompts: of the trace, those that are seen; None: all.
    """
    if steps < 1 or not tokens > 0 or not 0 <= power < math.inf:
        raise InputError(f"steps is {steps}, tokens {tokens}, power {power}: at least 1, above 0, at least 0")
    if prompts is not None and not (prompts and min(prompts) >= 0 and max(prompts) < len(trace.probs)):
        raise InputError(
            f"prompts are {list(prompts)} but must be of the {len(trace.probs)} of the trace, one at least"
        )
    chosen = torch.nn.functional.one_hot(trace.chosen(), trace.n_experts).sum(3).double()  # (R, T, L, E)
    chosen = chosen if prompts is None else chosen[list(prompts)]
    time = chosen.shape[1]
    width = max(1, time // steps)
    found = []
    for step in range(steps):
        window = [(step * width + i) % time for i in range(width)]
        share = chosen[:, window].sum((0, 1)) + 0.5  # an expert that nobody asked for may be asked for
        share = (share / share.sum(1, keepdim=True)) ** power
        found.append(tokens * share / share.sum(1, keepdim=True))
    return torch.stack(found)


def machine_of(hardware: Hardware, devices: int, tokens: float, dim: int, chunk_bytes: float, memory: int) -> Machine:
    """A cluster of `devices` of a machine, with `tokens` on each; before the experts comes attention of width `dim`."""
    hardware.need("device", "node", "network", "devices_per_node")
    rate = EFFICIENCY * hardware.device.flops
    return Machine(
        hardware.label,
        devices,
        min(devices, hardware.devices_per_node),
        hardware.node.model,
        hardware.network.model,
        token_seconds=chunk_bytes / rate,  # two operations for each weight of two bytes
        before_seconds=tokens * 8 * dim**2 / rate,
        chunk_bytes=chunk_bytes,
        token_bytes=2.0 * dim,
        memory=memory,
        tokens=tokens,
    )


def drawn(seed: int, name: str = "h100-sxm") -> Machine:
    """A cluster and a model around public ones: every constant of the hardware, sizes, and tokens are drawn."""
    draw = random.Random(f"hecate {seed}")
    machine = Hardware.named(name).need("device", "node", "network")

    def about(value: float, spread: float) -> float:
        return value * math.exp(draw.gauss(0, spread))

    device = replace(machine.device, flops=about(machine.device.flops, 0.2))
    links = {
        part: replace(at, bandwidth=about(at.bandwidth, 0.3), latency_seconds=about(at.latency_seconds, 0.3))
        for part, at in (("node", machine.node), ("network", machine.network))
    }
    hardware = replace(machine, name=f"{machine.name} with drawn constants", device=device, **links)
    devices, dim = draw.choice((8, 16)), draw.choice((1024, 2048, 4096))
    hidden = 256 * round(dim / 256 * draw.uniform(1.0, 3.5))
    tokens = draw.choice((4096, 8192, 16_384))
    return machine_of(hardware, devices, tokens, dim, 6.0 * dim * hidden, memory=draw.choice((12, 24)))


def simulate(hardware: Hardware, workload: Workload) -> Simulation:
    """Training steps on a user's own machine: two nodes of it, the trace's routers, every policy side by side."""
    hardware.need("device", "node", "network", "devices_per_node")
    devices = 2 * hardware.devices_per_node
    trace = workload.trace
    dim = max(1, round(math.sqrt(workload.expert_bytes / workload.weight_bytes / 8)))  # experts of 3 dim (8/3 dim)
    tokens = 4096.0
    machine = machine_of(hardware, devices, tokens, dim, workload.expert_bytes, workload.capacity * trace.n_layers)
    loads = loads_of(trace, min(20, trace.probs.shape[1]), tokens * devices * trace.top_k)
    found = {policy: HecateSim(machine, loads, policy, every=10).run() for policy in POLICIES}
    rows = []
    for policy, steps in found.items():
        flat = [layer for step in steps for layer in step]
        rows.append(
            {
                "policy": policy,
                "milliseconds a step": 1e3 * sum(layer.seconds for layer in flat) / len(steps),
                "busiest / mean": sum(layer.straggler for layer in flat) / len(flat),
                "copies a layer": sum(layer.copied for layer in flat) / len(flat),
            }
            | {f"{part} (%)": 100 * _share(flat, part) for part in ("experts", "exchange", "copies")}
        )
    return Simulation("hecate", machine.basis, str(workload), rows, timeline(found["hecate"][-1], machine.basis))


def _share(layers: Sequence[Layer], part: str) -> float:
    return sum(layer.parts[part] for layer in layers) / sum(layer.seconds for layer in layers)


def timeline(layers: Sequence[Layer], basis: str) -> Timeline:
    """A step's layers one after the other, forward and backward together; what is hidden is not in it."""
    resources = {"before": "compute", "experts": "compute", "exchange": "network", "copies": "network"}
    events, now = [], 0.0
    for number, layer in enumerate(layers):
        for part, seconds in layer.parts.items():
            if seconds > 0:
                events.append(Event(f"layer {number}: {part}", resources[part], now, now + seconds, part))
            now += seconds
    return Timeline(tuple(events), basis, ("compute", "network"))
