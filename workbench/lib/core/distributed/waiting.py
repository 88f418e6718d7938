"""How long this rank stands in collectives: for the wire, and for ranks that come later.

with waited() as waiting:
    step()
waiting.seconds
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass
class Waiting:
    """seconds: in `Work.wait`, where every collective of torch.distributed ends that is not awaited otherwise."""

    seconds: float = 0.0


@contextmanager
def waited() -> Iterator[Waiting]:
    """Counts the waiting of this process within the block; one block at a time.

    What a backend does between the call of a collective and the wait for it, beside other work, is not waiting.
    """
    waiting, usual = Waiting(), dist.Work.wait

    def wait(work: Any, *args: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return usual(work, *args, **named)
        finally:
            waiting.seconds += time.perf_counter() - began

    dist.Work.wait = wait
    try:
        yield waiting
    finally:
        dist.Work.wait = usual
