"""Times of the parts of a server's passes on this machine, from which its runs are predicted."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from workbench.lib.core.simulation.executor import Executor
from workbench.lib.core.simulation.fits import LinkModel, RateTable
from workbench.lib.core.simulation.validation import machine
from workbench.lib.core.threads import torch_threads
from workbench.lib.serving.attendant import attend
from workbench.lib.serving.costs import MeasuredCosts
from workbench.lib.serving.offload import Batch, TinyOffloadServer, prefill_attention
from workbench.lib.serving.paging import Share
from workbench.lib.serving.pipeline import CPU, DEVICE


def calibrate(server: TinyOffloadServer, max_tokens: int, repeats: int = 7) -> MeasuredCosts:
    """Times of the parts of this server's passes, each alone; none of a whole pass.

    Only how much slower device and CPU make each other is measured with both at work: twice as slow each on one core,
    and not at all where they do not meet.
    """
    with torch_threads(1), torch.no_grad():
        return _calibrated(server, max_tokens, repeats)


def _calibrated(server: TinyOffloadServer, max_tokens: int, repeats: int) -> MeasuredCosts:
    server.buffers[0].copy_(server.stored[0])
    block, longest, page = server.blocks[0], server.model.seq_len, server.page
    sizes = [n for n in (1, 4, 16, 64, 128, 256, 512, 1024, 2048) if n < max_tokens] + [max_tokens]
    rows = {n: _decodes(server, n, 1) for n in sizes}
    x, y = ({n: getattr(batch, name) for n, batch in rows.items()} for name in "xy")

    def load() -> None:
        """The weights come anew, as before every layer: the caches hold something else, and the thread has slept."""
        server.link.copy(server.buffers[0], server.stored[0])

    def moe(n: int) -> None:
        rows[n].x, rows[n].y = x[n], y[n]
        rows[n].moe(block)

    def output(n: int) -> None:
        rows[n].embed()
        rows[n].x = x[n]
        rows[n].head()
        for text in rows[n].texts:
            text.pop()

    measure = partial(RateTable.measure, repeats=repeats, before=load)
    q, k, v = block.attention.heads(torch.cat([x[n] for n in sizes])[:longest])
    lengths = [p for p in (1, 8, 32, 64, 128, 256, 512, 1024) if p <= q.shape[1]]
    most = min(max(1, server.cached_tokens // page), -(-longest // page))  # pages of one request attended over at once
    alone = {m: _decodes(server, 1, m) for m in sorted({1, max(1, most // 4), max(1, most // 2), most})}
    room = 16 if server.apart is None else min(16, server.apart)
    many = {n: _decodes(server, n, most) for n in sorted({1, max(1, room // 4), room})}
    calls = RateTable.measure(lambda n: many[n].attend(0), list(many), repeats, load)
    call = LinkModel.fit(calls.sizes, calls.times).alpha if room > 1 else 0.0
    chunks = RateTable.measure(lambda m: alone[m].attend(0), list(alone), repeats, load)
    n_bytes = server.stored[0].nbytes
    loads = statistics.median(_times(load, repeats))
    return MeasuredCosts(
        basis=f"simulated, calibrated by {machine()['cpu']} (measured)",
        layers=server.n_layers,
        page=page,
        cached_tokens=server.cached_tokens,
        layer_bytes=n_bytes,
        streamed=LinkModel(max(0.0, loads - n_bytes / server.link.bandwidth), 1 / server.link.bandwidth),
        products_in=measure(lambda n: rows[n].qkv(block, 0), sizes),
        products_out=measure(moe, sizes),
        prefill=measure(lambda p: prefill_attention(q[:, :p], k[:, :p], v[:, :p]), lengths),
        decode_call=call,
        decode=LinkModel.fit([m * page for m in chunks.sizes], [max(s - call, s / 10) for s in chunks.times]),
        output=measure(output, sizes),
        hand_over=_hand_over(),
        crowd=_crowd(partial(moe, sizes[-1]), partial(many[room].attend, 0), repeats),
    )


def _decodes(server: TinyOffloadServer, n: int, pages: int) -> Batch:
    """Decodes of n requests that fill so many pages each; where there are too few pages, they share them."""
    held = pages * server.page
    tables = [tuple((i * pages + j) % server.n_pages for j in range(pages)) for i in range(n)]
    generator = torch.Generator().manual_seed(n)
    texts = torch.randint(server.model.embedding.num_embeddings, (n, held), generator=generator).tolist()
    batch = Batch(server, texts, [Share(i, held - 1, 1, 0, tables[i]) for i in range(n)])
    batch.embed()
    batch.qkv(server.blocks[0], 0)
    batch.y = attend(batch.q, server.keys[0], server.values[0], batch.decodes)
    return batch


def _times(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each call, after one that does not count."""
    spent = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return spent[1:]


def _crowd(device: Callable[[], object], cpu: Callable[[], object], repeats: int) -> tuple[float, float]:
    """How many times longer each of two threads takes for its work while the other works too; medians."""
    calls = (device, cpu)
    alone = [statistics.median(_times(call, repeats)) for call in calls]
    counts = [max(1, round(max(0.05, *alone) / spent)) for spent in alone]
    alone = [spent * count for spent, count in zip(alone, counts, strict=True)]

    def repeated(which: int) -> None:
        with torch.no_grad():
            for _ in range(counts[which]):
                calls[which]()

    found: tuple[list[float], list[float]] = [], []
    for _ in range(repeats):
        with Executor((DEVICE, CPU), "measured") as executor:
            jobs = [executor.submit(name, name, partial(repeated, i)) for i, name in enumerate((DEVICE, CPU))]
            for job in jobs:
                job.result()
        spent = [job.end - job.start for job in jobs]
        first = spent.index(min(spent))
        both = spent[first]  # and the other does the rest of its work alone
        for i in (0, 1):
            found[i].append(both / max(alone[i] - (spent[i] - both), alone[i] / 4))
    return max(1.0, statistics.median(found[0])), max(1.0, statistics.median(found[1]))


def _hand_over(count: int = 200) -> float:
    """Seconds a task of a chain that goes to and fro between two threads and does nothing."""
    with Executor((DEVICE, CPU), "measured") as executor:
        job = executor.submit("0", DEVICE, int)
        first = job
        for i in range(1, count):
            job = executor.submit(str(i), (DEVICE, CPU)[i % 2], int, after=[job])
        job.result()
    return (job.end - first.start) / count
