"""The three all-to-alls of DeepSpeed-MoE on a slow link, against alpha + beta bytes for each message.

Ranks are gloo processes in a network namespace whose loopback passes 100 Mbit/s, one medium for all of them. alpha and
beta are fitted to the flat form on four ranks; the others on four ranks, and all on eight, are predicted with them. A
time is that of the slowest rank, from a barrier, the median over the repeats. The bucket that shapes the loopback is
full when a transfer begins, so that its first 64 kB pass at once: as many bytes fewer are reckoned.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from workbench.lib.core.distributed.processes import run_processes
from workbench.lib.core.distributed.shaped import call_shaped
from workbench.lib.core.simulation.fits import LinkModel
from workbench.lib.core.simulation.validation import Validation
from workbench.lib.serving.all_to_all import Exchange, all_to_all_seconds, make_exchange

MBIT = 100.0
BURST = 64_000  # bytes, see `shaped`
FILLED = 0.01  # seconds in which the bucket is full again
REPEATS = 4
BLOCKS = (2**15, 2**16, 2**17)  # bytes from each rank to each
WORLDS = {4: {"hierarchical": 2, "coordinated": 2}, 8: {"hierarchical": 4, "coordinated": 2}}
"""Ranks -> ranks of a node, and of tensor parallelism."""

Times = Mapping[int, Mapping[str, Sequence[tuple[float, float]]]]
"""Ranks -> form -> for each block the seconds there and back."""


def measure(quick: bool = False) -> Validation:
    """Fit, predict and measure, in a minute; `quick` in half of it.

    Raises:
        InputError: no shaped link can be made here, with the reason.
    """
    blocks, repeats = (BLOCKS[:2], 1) if quick else (BLOCKS, REPEATS)
    found = {}
    for world, sizes in WORLDS.items():
        forms = {"flat": 1, **sizes}
        found[world] = call_shaped(run_processes, ways, world, forms, blocks, repeats, mbit=MBIT, timeout=300)[0]
    return compared(found, blocks)


def compared(found: Times, blocks: Sequence[int]) -> Validation:
    """The model, fitted to one form at one number of ranks, beside the other times."""
    first = min(found)
    steps = first - 1  # each waits for the messages of all ranks
    flat = [there for there, _ in found[first]["flat"]]
    link = LinkModel.fit([first * b - BURST / steps for b in blocks], [seconds / steps for seconds in flat])
    rows = []
    for world, forms in found.items():
        for form, times in forms.items():
            if (world, form) == (first, "flat"):
                continue
            size = WORLDS[world].get(form, 1)
            for block, measured in zip(blocks, times, strict=True):
                for back, seconds in enumerate(measured if form == "coordinated" else measured[:1]):
                    way = "" if form != "coordinated" else (" there", " back")[back]
                    whole = all_to_all_seconds(form, block, world, size, link, link, back=bool(back), shared=True)
                    name = f"{form}{way}, {world} ranks, {block // 1024} KiB"
                    predicted = 1e3 * (whole - link.beta * BURST)
                    rows.append({"configuration": name, "predicted": predicted, "measured": 1e3 * seconds})
    calibration = {
        "link": f"loopback of {MBIT:g} Mbit/s in a namespace of its own",
        "fitted to": f"flat, {first} ranks, blocks of {', '.join(map(str, blocks))} bytes",
        "seconds": flat,
        "alpha": link.alpha,
        "beta": link.beta,
    }
    return Validation.made("deepspeed-moe", calibration, rows, "ms")


def ways(sizes: dict[str, int], blocks: tuple[int, ...], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """On each rank: form -> for each block the seconds there and back."""
    world, found = dist.get_world_size(), {}
    for form, size in sizes.items():
        exchange = make_exchange(form, world, size)
        found[form] = [_timed(exchange, torch.zeros(world, 1, block // 4), repeats) for block in blocks]
    return found


def _timed(exchange: Exchange, x: torch.Tensor, repeats: int) -> tuple[float, float]:
    there, back = [], []
    for turn in range(-1, repeats):
        came, one = _slowest(exchange.dispatch, x)
        _, other = _slowest(exchange.combine, came)
        if turn >= 0:
            there.append(one)
            back.append(other)
    return statistics.median(there), statistics.median(back)


def _slowest(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What the call gives, and the seconds of the slowest rank."""
    time.sleep(FILLED)
    dist.barrier()
    start = time.perf_counter()
    y = call(x)
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return y, float(seconds)
