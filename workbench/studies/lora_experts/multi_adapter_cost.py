"""What it costs to train several mixtures together, against one after the other: time, memory, operations.

    python -m workbench.studies.lora_experts.multi_adapter_cost

`measure()` gives the rows of the table that the command prints, to be shown in a notebook. A row is a number of jobs,
each a MixLoRA with data of its own on the same frozen decoder. "apart" trains them one after the other with
`lib.core.train.train`, "together" with `MultiAdapterTrainer`; both share one copy of the base within a process.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from workbench.beds.symbol_maps import SymbolMaps
from workbench.lib.core.adapt import Adapted, adapt
from workbench.lib.core.adapt.expert_ffn import RoutedFeedForward, activated, combine
from workbench.lib.core.budget import UNCOUNTED
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.routing import Routing
from workbench.lib.core.train import Hook, State, TrainConfig, train
from workbench.lib.lora_experts.multi_adapter import Job, MultiAdapterTrainer, skeleton

TASKS = 4  # maps of a job
SPARE = 3  # steps that count operations; the last step of a run would be followed by an evaluation
SMALL = {"d_model": 256, "n_layers": 4, "batch": 8, "counts": (1, 2, 4), "steps": 12}
SMOKE = {"d_model": 32, "n_layers": 1, "batch": 4, "counts": (1, 2), "steps": 3}
OPTIONS = {"experts": 8, "rank": 4, "top_k": 2}
TARGETS = ("*.ffn.*", "*.attention.*")


def measure(settings: Mapping[str, Any] = SMALL) -> list[dict[str, float]]:
    """A row for each number of jobs.

    Returns:
        jobs; the median milliseconds of a step of all jobs, `ms_apart` and `ms_together`, and `time_ratio`, the second
        by the first; the most bytes that training holds beyond what was there (adapters, optimizer, what the backward
        pass needs) with the base's own: `mb_together`; `mb_one`, where one job runs after the other in one process;
        `mb_processes`, where each has a process and so a base of its own; `memory_ratio`, together by processes;
        GFLOP of a step `gflop_separate_blocks` (each expert a block of its own), `gflop_apart` and `gflop_together`;
        and `loss_gap`, the largest difference of a loss between together and apart, at any step of any job.
    """
    base = make_base(settings)
    return [row(base, make_jobs(count, settings), settings) for count in settings["counts"]]


def make_base(settings: Mapping[str, Any]) -> DecoderLM:
    torch.manual_seed(0)
    vocab, width = 11 + TASKS * max(settings["counts"]), settings["d_model"]
    return DecoderLM(vocab, width, settings["n_layers"], 4, lambda layer: GLU(width, 2 * width), 13)


def make_jobs(count: int, settings: Mapping[str, Any]) -> dict[str, Job]:
    n_tasks = TASKS * max(settings["counts"])
    return {
        f"job {i}": Job(
            "mixlora",
            SymbolMaps(range(TASKS * i, TASKS * (i + 1)), n_tasks),
            TrainConfig(settings["steps"] + SPARE, settings["batch"], weight_decay=0.0, seed=i),
            TARGETS,
            OPTIONS,
        )
        for i in range(count)
    }


def row(base: nn.Module, jobs: dict[str, Job], settings: Mapping[str, Any]) -> dict[str, float]:
    steps = settings["steps"]
    base_bytes = sum(p.nbytes for p in base.parameters())
    apart = [Alone(base, job) for job in jobs.values()]
    together = MultiAdapterTrainer(base, jobs)
    curves: dict[str, list[float]] = {name: [] for name in jobs}
    milliseconds = []
    for _ in range(steps):  # in turn, so that a slow moment of the machine hits both
        for one in apart:
            one.step()
        began = time.perf_counter()
        losses = together.step()
        milliseconds.append((sum(one.milliseconds for one in apart), 1e3 * (time.perf_counter() - began)))
        for name, loss in losses.items():
            curves[name].append(loss)
    milliseconds = milliseconds[1:]  # the first step makes the state of the optimizer
    ms_apart, ms_together = (statistics.median(column) for column in zip(*milliseconds, strict=True))
    gaps = [
        abs(x - y)
        for one, curve in zip(apart, curves.values(), strict=True)
        for x, y in zip(one.losses, curve, strict=True)
    ]
    gflop_together = flops(together.step) / 1e9
    gflop_apart = sum(flops(one.step) for one in apart) / 1e9
    for one in apart:
        separate_blocks(one.adapted)
    gflop_separate = sum(flops(one.step) for one in apart) / 1e9
    alone = [peak_bytes(lambda job=job: Alone(base, job).run(2)) for job in jobs.values()]  # the optimizer's state too
    all_at_once = peak_bytes(lambda: MultiAdapterTrainer(base, jobs).run(2))
    return {
        "jobs": len(jobs),
        "ms_apart": ms_apart,
        "ms_together": ms_together,
        "time_ratio": ms_together / ms_apart,
        "mb_one": (base_bytes + max(alone)) / 1e6,
        "mb_processes": (len(jobs) * base_bytes + sum(alone)) / 1e6,
        "mb_together": (base_bytes + all_at_once) / 1e6,
        "memory_ratio": (base_bytes + all_at_once) / (len(jobs) * base_bytes + sum(alone)),
        "gflop_separate_blocks": gflop_separate,
        "gflop_apart": gflop_apart,
        "gflop_together": gflop_together,
        "loss_gap": max(gaps),
    }


class Alone(Hook):
    """A job trained by itself, a step at a time, on the weights of the base."""

    def __init__(self, base: nn.Module, job: Job):
        torch.manual_seed(job.config.seed)
        self.job, self.adapted = job, adapt(skeleton(base), job.slug, job.targets, **job.options)
        self.optimizer = self.adapted.optimizer(job.config.lr)
        self.losses: list[float] = []
        self.milliseconds = 0.0  # of the last step

    def step(self) -> None:
        done = len(self.losses)
        train(self.adapted.model, self.job.task, self.job.config, [self], optimizer=self.optimizer, start=done)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def after_step(self, state: State) -> None:
        self.losses.append(state.loss)
        self.milliseconds = 1e3 * state.seconds
        state.stop = True


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes of tensors that were alive at once during a call, beyond those alive before it."""
    gc.collect()  # what is freed during the call must not be from before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def flops(step: Callable[[], Any]) -> int:
    """Operations of the matrix products of a step."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        step()
    return counter.get_total_flops()


def separate_blocks(adapted: Adapted) -> None:
    """Let every expert run the frozen block by itself: 3 K D H products a token, what sharing is compared with."""

    def mix(layer: RoutedFeedForward, x: Tensor, routing: Routing) -> Tensor:
        pairs = Routing.fixed(routing.expert[:, None], torch.ones_like(routing.weight)[:, None], routing.n_experts)
        block, x = layer.block, x[routing.token]

        def linear(name: str, value: Tensor) -> Tensor:
            return layer.updated(name, block.linears[name](value), value, pairs)

        hidden = {name: linear(name, x) for name in block.linears if name != block.down}
        return combine(linear(block.down, activated(block, hidden)), routing)

    for layer in adapted.layers.values():
        if isinstance(layer, RoutedFeedForward):
            layer.mix = MethodType(mix, layer)


def table(rows: list[dict[str, float]]) -> str:
    """The rows as text, a column each."""
    lines = [f"{name:<24}" + "".join(f"{row[name]:>12.3g}" for row in rows) for name in rows[0]]
    return "\n".join(lines)


def main() -> None:
    print(table(measure()))


if __name__ == "__main__":
    main()
