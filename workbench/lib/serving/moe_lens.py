"""MoE-Lens: how fast mixture-of-experts can be served at most where weights stream from host memory (2504.09345).

    machine = HardwareSpec.of(Hardware.named("a40-pcie4"), MIXTRAL)
    stage1(machine, MIXTRAL, Workload.uniform(prompt=512, generate=64, requests=1)).throughput
    stage2(SpecCosts(machine, MIXTRAL), Workload.uniform(512, 64, 2000), n_pages=40_000, page=16, max_tokens=9000)

All weights go over the link once a pass, whatever the pass does, so a pass has to have many tokens. How many it can
have, host memory says: a request holds its keys and values for as many passes as it generates tokens. The tokens that
one request puts through the model over the tokens times passes that it holds are its *parallelism-memory efficiency*.
Only prefills in the same passes as decodes make it large.

No code of the paper is public. The two stages, the scheduler and the pipeline are named in it; their formulas are
derived here: a request's keys and values are p + i tokens in its pass i = 0..g-1, since its last token is given out and
never read.
"""

import math
from bisect import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.lib.serving.costs import (
    ATTENTION,
    DEVICE,
    HOST,
    MIXTRAL,
    STREAM,
    Costs,
    HardwareSpec,
    MoESpec,
    SpecCosts,
    pass_terms,
)
from workbench.lib.serving.costs import MeasuredCosts as MeasuredCosts
from workbench.lib.serving.offload import TinyOffloadServer as TinyOffloadServer
from workbench.lib.serving.offload import calibrate as calibrate
from workbench.lib.serving.paging import PagedKV, Pass, Scheduler, Share, Workload
from workbench.lib.serving.pipeline import PipelineSim as PipelineSim

METHOD = Method(
    slug="moe-lens",
    title="MoE-Lens: Towards the Hardware Limit of High-Throughput MoE LLM Serving Under Resource Constraints",
    family="serving",
    year=2025,
    paper="arXiv:2504.09345",
    claim="A performance model of host memory, link and processors predicts throughput, and a system built on it comes "
    "close to the limit.",
    objects=(
        "stage1",
        "stage2",
        "pme",
        "n_star",
        "HardwareSpec",
        "MoESpec",
        "Workload",
        "PagedKV",
        "Scheduler",
        "PipelineSim",
        "TinyOffloadServer",
        "calibrate",
        "SpecCosts",
        "MeasuredCosts",
    ),
    kind="simulator",
)


def pme(prompt: int, generate: int, exact: bool = True) -> float:
    """Parallelism-memory efficiency: tokens processed for each token of memory and pass.

    exact: (p + g - 1) / (p g + g (g - 1) / 2); otherwise the paper's form for long texts, (p + g) / (p g + g^2 / 2).
    """
    load = Workload.uniform(prompt, generate, 1)  # refuses what are no lengths
    if exact:
        return load.processed / load.held()
    return (prompt + generate) / (prompt * generate + generate**2 / 2)


def n_star(costs: Costs) -> int:
    """The most tokens of a pass whose products take the device no longer than the link takes for the weights.

    By the numbers of a machine that is F S / (a B): FLOP/s, bytes of the weights, FLOPs of a token, bytes/s.
    """

    def fits(n: int) -> bool:
        rows = (Share(0, 1, n, 0, (0,)),)
        return costs.qkv(rows) + costs.moe(rows) <= costs.load()

    most = 1
    while fits(2 * most):
        most *= 2
    return most + bisect(range(most + 1, 2 * most + 1), False, key=lambda n: not fits(n))


@dataclass(frozen=True)
class Bound:
    """What no schedule exceeds, in the steady state of endlessly many such requests.

    Attributes:
        throughput: generated tokens/s.
        bottleneck: the largest of the terms.
        terms: seconds of a pass by what takes them.
        tokens: in a pass, prefills and decodes.
        utilisation: of the device, 0 to 1.
    """

    throughput: float
    bottleneck: str
    terms: dict[str, float]
    tokens: float
    utilisation: float


def stage1(machine: HardwareSpec, moe: MoESpec, workload: Workload) -> Bound:
    """The bound by host memory, link, device, and CPU: endlessly many requests of these lengths, pages of one token.

    A pass with all memory in use advances a part x = M / held of the workload, and takes
    max(S / B, x device, x attention, (S + x read) / host bandwidth); generated tokens are x G.

    Raises:
        InputError: the memory does not hold the longest request.
    """
    costs, memory = SpecCosts(machine, moe), machine.kv_bytes / moe.kv_bytes_per_token
    longest = max(p + g - 1 for p, g in zip(workload.prompts, workload.generate, strict=True))
    if memory < longest:
        raise InputError(
            f"kv_bytes is {machine.kv_bytes:.4g} but must be at least {longest * moe.kv_bytes_per_token:.4g}: the "
            f"longest request has {longest} tokens of {moe.kv_bytes_per_token} bytes"
        )
    part = memory / workload.held()
    device, read = work(costs, workload)
    read *= moe.kv_bytes_per_token * part
    terms = {
        STREAM: moe.total_bytes / machine.link_bandwidth,
        DEVICE: part * device,
        ATTENTION: read / machine.attention_bandwidth,
        HOST: (moe.total_bytes + read) / machine.host_bandwidth,
    }
    bottleneck = max(terms, key=terms.get)
    seconds = terms[bottleneck]
    throughput = part * workload.generated / seconds
    return Bound(throughput, bottleneck, terms, part * workload.processed, terms[DEVICE] / seconds)


def work(costs: SpecCosts, workload: Workload) -> tuple[float, float]:
    """Seconds of the device for a whole workload, and the tokens whose keys and values are read for it."""
    spec = costs.moe_spec
    pairs = sum(p * (p + 1) // 2 for p in workload.prompts)
    flops = workload.processed * spec.token_flops + pairs * spec.pair_flops
    flops += 2 * workload.generated * spec.dim * spec.vocab
    return flops / costs.machine.flops, workload.held() - sum(workload.prompts)


def finite_bound(costs: SpecCosts, workload: Workload, n_pages: int, page: int) -> float:
    """Generated tokens/s that no schedule of these requests exceeds: not more than `stage1` of as much memory.

    There are at least max(g, held / M) passes, held in whole pages, and each resource has to do all its work.
    """
    machine, spec = costs.machine, costs.moe_spec
    passes = max(max(workload.generate), math.ceil(workload.held(page) / (n_pages * page)))
    device, read = work(costs, workload)
    stream, read = passes * spec.total_bytes, read * spec.kv_bytes_per_token
    seconds = max(
        stream / machine.link_bandwidth,
        device,
        read / machine.attention_bandwidth,
        (stream + read) / machine.host_bandwidth,
    )
    return workload.generated / seconds


@dataclass(frozen=True)
class Prediction:
    """A finite run, as the scheduler would have it.

    Attributes:
        seconds: from the first pass to the end of the last.
        throughput: generated tokens/s.
        passes: how many.
        phases: "fill" until the first request ends, "drain" from when nobody waits, "steady" between: their seconds.
        terms: seconds of each resource, if it were alone, over the run.
        bottleneck: the term that most of the seconds were due to.
        preemptions: requests that were turned out and prefilled again.
        basis: what the costs are, as it stands on figures.
    """

    seconds: float
    throughput: float
    passes: int
    phases: dict[str, float]
    terms: dict[str, float]
    bottleneck: str
    preemptions: int
    basis: str


def stage2(
    costs: Costs,
    workload: Workload,
    n_pages: int,
    page: int,
    max_tokens: int,
    *,
    admission: str = "peak",
    mode: str = "mixed",
    groups: int = 2,
) -> Prediction:
    """The prediction for finitely many requests in pages: the scheduler's own passes, each as long as its largest term.

    With one micro-group, device and CPU wait for each other: a pass takes the stream, or the sum of these two.

    Options are those of `Scheduler`.
    """
    scheduler = Scheduler(workload, PagedKV(n_pages, page), max_tokens, admission, mode, groups)
    return predict(costs, scheduler, workload, groups)


def predict(costs: Costs, passes: Iterable[Pass], workload: Workload, groups: int = 2) -> Prediction:
    """`stage2` of passes that are planned."""
    passes = list(passes)
    terms = [pass_terms(costs, step.shares) for step in passes]
    spent = [_seconds(found, groups) for found in terms]
    owed: dict[str, float] = dict.fromkeys(terms[0], 0.0)
    for found, seconds in zip(terms, spent, strict=True):
        owed[max(found, key=found.get)] += seconds
    ends = list(accumulate(spent))
    fill, idle = _first_end(passes), next(i for i, step in enumerate(passes) if not step.waiting)
    filled = ends[min(fill, idle)]
    phases = {"fill": filled, "steady": max(0.0, ends[idle] - filled), "drain": ends[-1] - ends[idle]}
    return Prediction(
        ends[-1],
        workload.generated / ends[-1],
        len(passes),
        phases,
        {name: sum(found[name] for found in terms) for name in owed},
        max(owed, key=owed.get),
        sum(len(step.preempted) for step in passes),
        costs.basis,
    )


def _seconds(terms: dict[str, float], groups: int) -> float:
    if groups == 1:
        return max(terms[STREAM], terms[DEVICE] + terms[ATTENTION], terms[HOST])
    return max(terms.values())


def _first_end(passes: list[Pass]) -> int:
    """The pass in which a request takes part for the last time, before any other does."""
    last: dict[int, int] = {}
    for number, step in enumerate(passes):
        last |= {share.request: number for share in step.shares}
    return min(last.values())


def example() -> Callable[[int], Prediction]:
    """Mixtral on a device of 48 GB that holds none of it: a few hundred requests of drawn lengths."""
    machine = HardwareSpec(150e12, 31.5e9, 205e9, 205e9, kv_bytes=20e9)
    page = 16
    n_pages = int(machine.kv_bytes / MIXTRAL.kv_bytes_per_token / page)

    def simulate(seed: int) -> Prediction:
        workload = Workload.drawn(prompt=512, generate=16, requests=300, seed=seed)
        costs = SpecCosts(machine, MIXTRAL)
        return stage2(costs, workload, n_pages, page, max_tokens=n_star(costs))

    return simulate
