"""HybriMoE on two threads and a slow link, beside what its simulator says of the same decisions (`hybrimoe`).

The costs are fitted on single transfers and on layers all on the device or all on the CPU, while another thread
works on products too, as the other of the two does in a layer that has both. The configurations mix the three. The CPU
does its work several times over, so that it is that much slower than the device.

Beside them stands what one thread of this machine takes for an expert ("one_thread", as the device does) and for a copy
of its weights in memory ("copy"): the study starts from these.
"""

import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import nn

from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.simulation.executor import ThrottledLink, pair_speedup
from workbench.lib.core.simulation.traces import RouterTrace, zipf_markov
from workbench.lib.core.simulation.validation import Validation
from workbench.lib.core.threads import torch_threads
from workbench.lib.serving.hybrid_execution import Executed, HybridExecutor
from workbench.lib.serving.hybrid_schedule import CostModel, Rate
from workbench.lib.serving.hybrimoe import HybridSim, Offload

POLICIES = {
    "fixed mapping": {"cache": "lru", "mode": "fixed", "prefetch": "none"},
    "device alone": {"cache": "lru", "mode": "device", "prefetch": "none"},
    "greedy, LRU": {"cache": "lru", "prefetch": "none"},
    "hybrimoe": {},
}
REPEATS = 3


@dataclass(frozen=True)
class Machine:
    """Layers, and the link and the CPU that they have here."""

    width: int = 512
    hidden: int = 1024
    layers: int = 3
    experts: int = 16
    bandwidth: float = 1.25e9
    slower: int = 6
    capacities: tuple[int, ...] = (4, 7, 10)
    generated: int = 12


QUICK = Machine(64, 64, 2, 8, 2e7, 2, (2,), 3)


def measure(quick: bool = False) -> Validation:
    """Costs fitted on plain layers, then every policy at every capacity, predicted and measured."""
    shape = QUICK if quick else Machine()
    torch.manual_seed(0)
    with torch_threads(1):
        banks = [GLUExperts(shape.experts, shape.width, shape.hidden) for _ in range(shape.layers)]
        mixers = [nn.Linear(shape.width, shape.width, bias=False) for _ in range(shape.layers)]
        run = partial(executed, shape, banks, mixers)
        cost = fitted(shape, banks, run)
        rows = []
        trace = _trace(shape, 100, prompt=8, generated=shape.generated, top_k=4 if shape.experts > 8 else 2)
        for capacity in shape.capacities:
            for name, how in POLICIES.items():
                offload = Offload.of(trace, cost, capacity, **how)
                said = HybridSim(trace, cost, offload).run().metrics
                seen = [run(trace, offload).metrics for _ in range(1 if quick else REPEATS)]
                measured = statistics.median(found.token_seconds for found in seen)
                row = {"configuration": f"{name}, {capacity} of {shape.experts} experts", "policy": name}
                row |= {"predicted": 1e3 * said.token_seconds, "measured": 1e3 * measured}
                row |= {"hit_rate_predicted": said.hit_rate, "hit_rate_measured": seen[-1].hit_rate}
                rows.append(row)
        x, bank = torch.randn(1, shape.width), banks[0]
        gain = pair_speedup(*(partial(_products, x, bank, expert) for expert in (0, 1)))
    found = {"cost": asdict(cost), "one_thread": asdict(cost.device), "copy": copied(banks[0])}
    return Validation.made("hybrimoe", found | {"pair_speedup": gain, "shape": asdict(shape)}, rows, "ms")


def executed(
    shape: Machine, banks: list[GLUExperts], mixers: list[nn.Module], trace: RouterTrace, offload: Offload
) -> Executed:
    inputs = torch.randn(*trace.probs.shape[:2], shape.width, generator=torch.Generator().manual_seed(1))
    with HybridExecutor(banks, mixers, offload, ThrottledLink(shape.bandwidth), shape.slower) as executor:
        return executor.run(trace, inputs)


def fitted(shape: Machine, banks: list[GLUExperts], run: partial) -> CostModel:
    """Costs by layers that are all on the device or all on the CPU, and by transfers with nothing beside them."""
    nothing, never = Rate(0.0, 0.0, 0.0), Rate(0.0, math.inf, 0.0)
    everywhere = CostModel(nothing, nothing, math.inf)
    samples: dict[str, list] = {"cpu": [], "device": [], "transfer": [], "dense": []}
    for name, cost in (("cpu", replace(everywhere, device=never)), ("device", replace(everywhere, cpu=never))):
        for seed, (prompt, top_k) in enumerate(((4, 1), (4, 2), (8, 2), (8, 4), (24, 2))):
            trace = _trace(shape, 10 + seed, prompt=prompt, generated=4, top_k=top_k)
            offload = Offload.of(trace, cost, shape.experts, prefetch="none")
            with beside(partial(_products, torch.randn(1, shape.width), banks[-1], shape.experts - 1)):
                layers = run(trace, offload).layers[shape.layers :]  # the first pass warms up
            samples[name] += [(counts, after) for counts, _, after in layers]
            samples["dense"] += [before for _, before, _ in layers]
    link, bank = ThrottledLink(shape.bandwidth), banks[0]
    rooms = [torch.empty_like(part[0]) for part in (bank.gate_up, bank.down)]
    for expert in range(7):
        began = time.perf_counter()
        for room, part in zip(rooms, (bank.gate_up, bank.down), strict=True):
            link.copy(room, part.detach()[expert])
        samples["transfer"].append(time.perf_counter() - began)
    return CostModel.fit(samples)


def copied(bank: GLUExperts) -> float:
    """Seconds of a copy of an expert's weights to another place in memory, the median over the bank."""
    times = []
    rooms = [torch.zeros_like(part[0]) for part in (bank.gate_up, bank.down)]
    for expert in range(bank.n_experts):
        began = time.perf_counter()
        for room, part in zip(rooms, (bank.gate_up, bank.down), strict=True):
            room.copy_(part.detach()[expert])
        times.append(time.perf_counter() - began)
    return statistics.median(times)


@contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    """Another thread does this over and over."""
    over = threading.Event()

    def keep_on() -> None:
        while not over.is_set():
            work()

    thread = threading.Thread(target=keep_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _trace(shape: Machine, seed: int, **how: int) -> RouterTrace:
    return zipf_markov(seed, prompts=2, layers=shape.layers, experts=shape.experts, **how)


@torch.no_grad()
def _products(x: torch.Tensor, bank: GLUExperts, expert: int) -> None:
    for _ in range(8):
        (x @ bank.gate_up[expert].T)[:, : bank.down.shape[2]] @ bank.down[expert].T
