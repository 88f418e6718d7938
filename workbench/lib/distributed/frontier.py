"""Tensor, pipeline and sharded data parallelism together, and the mix of them found by search (Dash et al. 2023).

"Optimizing Distributed Training on Frontier for Large Language Models" (arXiv:2312.12705), no public code; from the
abstract, with standard formulas where it gives none. A decoder is split three ways at once

    products of a layer over tp     `frontier_train`      an all-reduce after attention and after the feed-forward part
    layers over pp stages           `frontier_schedules`  one forward one backward, interleaved or not; or GPipe
    rows of a batch over dp         `frontier_train`      gradients summed; with ZeRO-1 the optimiser's states split

and which mix is fastest no formula says: larger micro-batches fill the devices and take memory, more stages save memory
and stand still, tensors split far leave small products. So a step is simulated (`frontier_sim`, with what a rank
holds from `frontier_memory`), and settings are searched, most of which do not even fit (`frontier_tuning`).

Whatever the plan, a step of it computes what one process does; what is simulated is its time alone.
"""

from collections.abc import Callable, Iterator
from typing import Any

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.distributed.grids import divisors
from workbench.lib.core.simulation.hardware import Hardware
from workbench.lib.core.simulation.workload import Simulation, Training
from workbench.lib.distributed.folding_model import Cluster
from workbench.lib.distributed.frontier_memory import Memory, memory
from workbench.lib.distributed.frontier_plans import GPT, DenseConfig, ParallelPlan
from workbench.lib.distributed.frontier_schedules import in_flight, orders
from workbench.lib.distributed.frontier_sim import StepReport, StepSimulator
from workbench.lib.distributed.frontier_train import Trainer3D, train_3d
from workbench.lib.distributed.frontier_tuning import Space, Tuning, importance, tune
from workbench.lib.distributed.frontier_work import cluster_of, drawn, frontier_cluster

__all__ = [
    "DenseConfig", "Memory", "ParallelPlan", "Space", "StepReport", "StepSimulator", "Trainer3D", "Tuning",
    "frontier_cluster", "importance", "in_flight", "memory", "orders", "simulate", "train_3d", "tune",
]  # fmt: skip

METHOD = Method(
    slug="frontier",
    title="Optimizing Distributed Training on Frontier for Large Language Models",
    family="distributed",
    year=2023,
    paper="arXiv:2312.12705",
    claim="A tuned mix of tensor, pipeline and sharded data parallelism, found by search, keeps throughput high up to "
    "a trillion parameters.",
    objects=(
        "ParallelPlan", "Trainer3D", "train_3d", "StepSimulator", "Space", "tune", "importance", "memory",
        "frontier_cluster", "simulate",
    ),
    kind="simulator",
)  # fmt: skip

BUDGET = 30
"""Trials of `simulate`."""

MOST_NODES = 2**14


def example() -> Callable[[int], dict[str, Any]]:
    """The plan that a short search finds on drawn hardware."""
    return _searched


def _searched(seed: int) -> dict[str, Any]:
    simulator, space = StepSimulator(drawn(seed)), Space.of(GPT["22B"], 256)
    tuning = tune(space.settings, space.objective(simulator), 15, "random", seed)
    report = simulator.run(space.config, space.plan(tuning.best.setting))
    return {
        "basis": report.basis,
        "plan": str(report.plan),
        "step_seconds": report.seconds,
        "share": report.share,
        "failures": tuning.failures,
    }


def simulate(hardware: Hardware, workload: Training) -> Simulation:
    """A step on a user's own machine: of the plan that a search finds, of the best there is, and of mixes of two and of
    one of the three."""
    if workload.model not in GPT:
        raise unknown("model", workload.model, GPT)
    config, cluster = GPT[workload.model], cluster_of(hardware)
    simulator, world = StepSimulator(cluster), workload.world
    if world is None:
        world = _least(config, cluster)
    per = cluster.devices_per_node
    if (world > per and world % per) or (per % world and world < per):
        fit = ", ".join(map(str, divisors(per)))
        raise InputError(f"world is {world} but must be {fit}, or a multiple of {per}: whole nodes, or an equal part")
    if world > per * MOST_NODES:
        raise InputError(f"world is {world} but must be at most {per * MOST_NODES}, {MOST_NODES} nodes")
    space = Space.of(config, world)
    if not space.fits(simulator):
        enough = _least(config, cluster)
        raise InputError(f"world is {world} but no plan of {config.name!r} fits on so few; on {enough} one does")
    tuning = tune(space.settings, space.objective(simulator), BUDGET, "forest")
    found = {f"searched, {BUDGET} trials": tuning.best.setting} if tuning.measured else {}
    for name, among in _mixes():
        if (best := space.best(simulator, among)) is not None:
            found[name] = best[0]
    reports = {name: simulator.run(config, space.plan(setting)) for name, setting in found.items()}
    words = f"{config.name}, {config.params / 1e9:,.4g}e9 parameters, on {world:,} devices"
    shown = simulator.run(config, _shown(next(iter(reports.values())).plan))
    return Simulation("frontier", cluster.basis, words, [_row(*pair) for pair in reports.items()], shown.timeline())


def _mixes() -> Iterator[tuple[str, Callable[[dict[str, Any]], bool]]]:
    yield "best of all", lambda s: True
    yield "best without pp", lambda s: s["pp"] == 1
    yield "best without tp", lambda s: s["tp"] == 1
    yield "best without ZeRO-1", lambda s: s["zero"] == 0
    yield "dp alone", lambda s: s["tp"] == s["pp"] == 1


def _row(name: str, report: StepReport) -> dict[str, str | float]:
    parts = report.parts
    return {
        "mix": name,
        "plan": str(report.plan),
        "step_seconds": report.seconds,
        "of the peak (%)": 100 * report.share,
        "bubble (%)": 100 * report.bubble,
        "tp (%)": 100 * parts["tp"] / report.seconds,
        "dp (%)": 100 * parts["dp"] / report.seconds,
        "memory (GB)": report.memory.total / 1e9,
    }


def _shown(plan: ParallelPlan) -> ParallelPlan:
    """With two micro-batches a stage, at most: what a picture can show."""
    sizes = {name: getattr(plan, name) for name in ("tp", "pp", "dp", "micro_batch", "zero", "recompute")}
    return ParallelPlan(**sizes, accum=min(plan.accum, 2 * plan.pp))


def _least(config: DenseConfig, cluster: Cluster) -> int:
    """Devices of the fewest nodes, doubled from one, on which a plan fits."""
    simulator, nodes = StepSimulator(cluster), 1
    while nodes <= MOST_NODES:
        space = Space.of(config, nodes * cluster.devices_per_node)
        if space.fits(simulator):
            return space.world
        nodes *= 2
    raise InputError(
        f"model is {config.name!r} but no plan of it fits in {cluster.memory_bytes / 1e9:.3g} GB a device, on up to "
        f"{MOST_NODES} nodes"
    )
