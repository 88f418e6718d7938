"""MoE-Lens: how fast mixture-of-experts can be served at most where weights stream from host memory (2504.09345).

    machine = HardwareSpec.of(Hardware.named("a40-pcie4"), MIXTRAL)
    stage1(machine, MIXTRAL, Requests.uniform(prompt=512, generate=64, requests=1)).throughput
    stage2(SpecCosts(machine, MIXTRAL), Requests.uniform(512, 64, 2000), n_pages=40_000, page=16, max_tokens=9000)

All weights go over the link once a pass, whatever the pass does, so a pass has to have many tokens. How many it can
have, host memory says: a request holds its keys and values for as many passes as it generates tokens. The tokens that
one request puts through the model over the tokens times passes that it holds are its *parallelism-memory efficiency*.
Only prefills in the same passes as decodes make it large.

No code of the paper is public. The two stages, the scheduler and the pipeline are named in it; their formulas are
derived here: a request's keys and values are p + i tokens in its pass i = 0..g-1, since its last token is given out and
never read.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.lib.core.simulation.hardware import Hardware
from workbench.lib.core.simulation.timeline import Timeline
from workbench.lib.core.simulation.workload import Simulation, Workload
from workbench.lib.serving.calibration import calibrate as calibrate
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
from workbench.lib.serving.paging import PagedKV, Pass, Requests, Scheduler, Share
from workbench.lib.serving.pipeline import BUFFERS
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
        "Requests",
        "PagedKV",
        "Scheduler",
        "PipelineSim",
        "TinyOffloadServer",
        "calibrate",
        "SpecCosts",
        "MeasuredCosts",
        "simulate",
    ),
    kind="simulator",
)


def pme(prompt: int, generate: int, exact: bool = True) -> float:
    """Parallelism-memory efficiency: tokens processed for each token of memory and pass.

    exact: (p + g - 1) / (p g + g (g - 1) / 2); otherwise the paper's form for long texts, (p + g) / (p g + g^2 / 2).
    """
    load = Requests.uniform(prompt, generate, 1)  # refuses what are no lengths
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
    step = most  # by hand: `bisect` counts no farther than a machine's word
    while step := step // 2:
        if fits(most + step):
            most += step
    return most


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


def stage1(machine: HardwareSpec, moe: MoESpec, requests: Requests) -> Bound:
    """The bound by host memory, link, device, and CPU: endlessly many requests of these lengths, pages of one token.

    A pass with all memory in use advances a part x = M / held of them, and takes
    max(S / B, x device, x attention, (S + x read) / host bandwidth); generated tokens are x G.

    Raises:
        InputError: the memory does not hold the longest request.
    """
    costs, memory = SpecCosts(machine, moe), machine.kv_bytes / moe.kv_bytes_per_token
    longest = max(p + g - 1 for p, g in zip(requests.prompts, requests.generate, strict=True))
    if memory < longest:
        raise InputError(
            f"kv_bytes is {machine.kv_bytes:.4g} but must be at least {longest * moe.kv_bytes_per_token:.4g}: the "
            f"longest request has {longest} tokens of {moe.kv_bytes_per_token} bytes"
        )
    part = memory / requests.held()
    device, read = work(costs, requests)
    read *= moe.kv_bytes_per_token * part
    terms = {
        STREAM: moe.total_bytes / machine.link_bandwidth,
        DEVICE: part * device,
        ATTENTION: read / machine.attention_bandwidth,
        HOST: (moe.total_bytes + read) / machine.host_bandwidth,
    }
    bottleneck = max(terms, key=terms.get)
    seconds = terms[bottleneck]
    throughput = part * requests.generated / seconds
    return Bound(throughput, bottleneck, terms, part * requests.processed, terms[DEVICE] / seconds)


def work(costs: SpecCosts, requests: Requests) -> tuple[float, float]:
    """Seconds of the device for all requests, and the tokens whose keys and values are read for it."""
    spec = costs.moe_spec
    pairs = sum(p * (p + 1) // 2 for p in requests.prompts)
    flops = requests.processed * spec.token_flops + pairs * spec.pair_flops
    flops += 2 * requests.generated * spec.dim * spec.vocab
    return flops / costs.machine.flops, requests.held() - sum(requests.prompts)


def finite_bound(costs: SpecCosts, requests: Requests, n_pages: int, page: int) -> float:
    """Generated tokens/s that no schedule of these requests exceeds: not more than `stage1` of as much memory.

    There are at least max(g, held / M) passes, held in whole pages, and each resource has to do all its work.
    """
    machine, spec = costs.machine, costs.moe_spec
    passes = max(max(requests.generate), math.ceil(requests.held(page) / (n_pages * page)))
    device, read = work(costs, requests)
    stream, read = passes * spec.total_bytes, read * spec.kv_bytes_per_token
    seconds = max(
        stream / machine.link_bandwidth,
        device,
        read / machine.attention_bandwidth,
        (stream + read) / machine.host_bandwidth,
    )
    return requests.generated / seconds


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
    requests: Requests,
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
    scheduler = Scheduler(requests, PagedKV(n_pages, page), max_tokens, admission, mode, groups)
    return predict(costs, scheduler, requests, groups)


def predict(costs: Costs, passes: Iterable[Pass], requests: Requests, groups: int = 2) -> Prediction:
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
        requests.generated / ends[-1],
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


PAGE, SIMULATED = 16, 2048
"""Tokens of a page, and requests, of `simulate`."""
#: what is compared there -> options of the scheduler
POLICIES = {
    "moe-lens": {},
    "prefills and decodes apart": {"mode": "separate"},
    "one group": {"groups": 1},
    "a page kept free for each": {"admission": "headroom"},
}


def simulate(hardware: Hardware, workload: Workload) -> Simulation:
    """A workload on a machine by its numbers, beside systems that lack one idea of MoE-Lens, and its two bounds.

    2,048 requests have the lengths of the trace. Only experts' bytes are given, so the rest of the model is taken to be
    as DeepSeek-V2-Lite's: experts as wide as 11/16 of the model, heads of 128. All weights are in host memory, and
    those of two layers on the device.

    Raises:
        InputError: host memory does not hold the weights and one request, or the budget not two layers of experts; or
            weights of a part of a byte.
    """
    trace, size = workload.trace, workload.weight_bytes
    if size != int(size):
        raise InputError(f"weight_bytes is {size} but must be whole bytes, which keys and values have too")
    least = BUFFERS * trace.n_experts * workload.expert_bytes
    if workload.budget_bytes < least:
        raise InputError(
            f"budget is {workload.budget_bytes:,.0f} bytes but must hold all experts of {BUFFERS} layers, {least:,.0f}"
        )
    dim = max(128, round(math.sqrt(workload.expert_bytes / size / (3 * 11 / 16)) / 128) * 128)
    heads, hidden = dim // 128, max(1, round(workload.expert_bytes / size / 3 / dim))
    sizes = (trace.n_layers, dim, heads, heads, 128, hidden, trace.n_experts, trace.top_k, 32_000, round(size))
    moe = MoESpec(*sizes)
    machine, generate = HardwareSpec.of(hardware, moe), trace.probs.shape[1] - trace.prompt
    requests = Requests.uniform(max(1, trace.prompt), generate, SIMULATED)
    bound = stage1(machine, moe, requests)  # refuses what memory does not hold
    costs, n_pages = SpecCosts(machine, moe), int(machine.kv_bytes / moe.kv_bytes_per_token / PAGE)
    n_pages = min(n_pages, SIMULATED * (2 + (requests.prompts[0] + generate) // PAGE))  # all of them, and one free each
    rows, timelines = [], []
    for name, options in POLICIES.items():
        passes = list(Scheduler(requests, PagedKV(n_pages, PAGE), n_star(costs), **options))
        timelines.append(PipelineSim(costs).run(passes))
        rate = requests.generated / timelines[-1].makespan
        rows.append({"system": name, "tokens_per_second": rate} | _busy(timelines[-1]))
    bounds = {
        "bound of these requests": finite_bound(costs, requests, n_pages, PAGE),
        f"bound of endlessly many, by {bound.bottleneck}": bound.throughput,
    }
    idle = dict.fromkeys(_busy(timelines[0]), "")
    rows += [{"system": name, "tokens_per_second": rate} | idle for name, rate in bounds.items()]
    shown = timelines[0].between(0.0, timelines[0].makespan / 16)
    said = f"{SIMULATED} requests of {requests.prompts[0]} tokens and {generate} after each; {workload}"
    return Simulation(METHOD.slug, hardware.label, said, rows, shown)


def _busy(timeline: Timeline) -> dict[str, float]:
    return {f"{name}_busy": share for name, share in timeline.busy_shares().items()}


def example() -> Callable[[int], Prediction]:
    """Mixtral on a device of 48 GB that holds none of it: a few hundred requests of drawn lengths."""
    machine = HardwareSpec(150e12, 31.5e9, 205e9, 205e9, kv_bytes=20e9)
    page = 16
    n_pages = int(machine.kv_bytes / MIXTRAL.kv_bytes_per_token / page)

    def simulate(seed: int) -> Prediction:
        requests = Requests.drawn(prompt=512, generate=16, requests=300, seed=seed)
        costs = SpecCosts(machine, MIXTRAL)
        return stage2(costs, requests, n_pages, page, max_tokens=n_star(costs))

    return simulate
