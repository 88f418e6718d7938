"""MoE-Lens's second stage beside real runs: `TinyOffloadServer` on this machine, its link throttled to chosen rates.

The model is calibrated by the times of its parts, each alone, on none of the configurations below. A configuration is
lengths, requests, pages and a bandwidth; some run again with prefills and decodes in passes of their own, or with one
micro-group, so that device and CPU wait for each other. Beside what `stage2` predicts a row has what the woven tasks
would take in the simulation, and what a model says that knows of no limit of memory.
"""

from dataclasses import replace

import torch

from workbench.lib.core.attention import Attention
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.simulation.executor import ThrottledLink
from workbench.lib.core.simulation.fits import LinkModel
from workbench.lib.core.simulation.validation import Validation
from workbench.lib.serving.costs import ATTENTION, DEVICE, HOST, STREAM
from workbench.lib.serving.moe_lens import (
    MeasuredCosts,
    PagedKV,
    PipelineSim,
    Requests,
    Scheduler,
    TinyOffloadServer,
    calibrate,
    n_star,
    predict,
    stage2,
)

PAGE = 16
#: prompt, generated, requests, pages, bytes/s; with drawn lengths where the last is True
GRID = (
    (48, 24, 120, 700, 300e6, False),
    (48, 24, 60, 300, 300e6, False),
    (80, 12, 160, 600, 450e6, False),
    (80, 12, 60, 250, 300e6, False),
    (24, 40, 100, 400, 300e6, False),
    (24, 40, 140, 800, 450e6, False),
    (160, 10, 60, 400, 300e6, False),
    (160, 10, 100, 900, 450e6, False),
    (320, 12, 24, 400, 300e6, False),
    (320, 12, 40, 1200, 450e6, False),
    (120, 36, 60, 1200, 600e6, False),
    (72, 10, 60, 250, 300e6, True),
    (100, 14, 60, 900, 450e6, True),
)
VARIANTS = {"separate": {"mode": "separate"}, "one group": {"groups": 1}}
VARIED = (0, 9)  # of the grid
QUICK = (
    (16, 4, 8, 40, 10e6, False),
    (8, 8, 8, 20, 5e6, False),
    (24, 2, 8, 40, 10e6, True),
    (4, 4, 6, 10, 5e6, True),
)
UNLIMITED = 10**6
"""Pages of the model that knows of no limit."""
BUSIEST = {"link": STREAM, "device": DEVICE, "cpu": ATTENTION}


def model(quick: bool) -> DecoderLM:
    """Four layers of eight experts, two a token: 1.05 million parameters a layer, untrained."""
    width, hidden = (32, 16) if quick else (256, 128)
    torch.manual_seed(0)
    return DecoderLM(
        256,
        width,
        4,
        4,
        lambda layer: MoELayer(LinearRouter(width, 8, 2), GLUExperts(8, width, hidden)),
        seq_len=640,
        attention=lambda layer: Attention(width, 4, causal=True, rope=True),
        learned_positions=False,
    )


def measure(quick: bool = False) -> Validation:
    """Calibrate, then run and predict every configuration."""
    grid = QUICK if quick else GRID
    pages, most = max(row[3] for row in grid), max(row[2] for row in grid)
    with TinyOffloadServer(model(quick), pages, PAGE, 600e6, apart=most) as server:
        costs = calibrate(server, 256 if quick else 2048, repeats=7)
        run(server, costs, QUICK[0], "warm-up", {})  # the first run is slower
        rows = [run(server, costs, row, "full", {}) for row in grid]
        rows += [
            run(server, costs, grid[at], name, options)
            for at in VARIED
            if at < len(grid)
            for name, options in VARIANTS.items()
        ]
    return Validation.made("moe-lens", costs.to_dict(), rows, "tokens per second")


def run(server: TinyOffloadServer, costs: MeasuredCosts, configuration: tuple, variant: str, options: dict) -> dict:
    """One configuration, predicted and then run."""
    p, g, count, pages, bandwidth, drawn = configuration
    requests = Requests.drawn(p, g, count, seed=0) if drawn else Requests.uniform(p, g, count)
    costs = replace(costs, streamed=LinkModel(costs.streamed.alpha, 1 / bandwidth))
    most = n_star(costs)
    scheduler = Scheduler(requests, PagedKV(pages, PAGE), most, **options)
    passes, groups = list(scheduler), options.get("groups", 2)
    predicted, unlimited = (
        predict(costs, passes, requests, groups),
        stage2(costs, requests, UNLIMITED, PAGE, most, **options),
    )
    simulated = requests.generated / PipelineSim(costs).run(passes).makespan
    server.n_pages, server.link = pages, ThrottledLink(bandwidth)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(256, (n,), generator=generator).tolist() for n in requests.prompts]
    served = server.serve(prompts, requests.generate, most, **options)
    shares = served.timeline.busy_shares()
    first, second = sorted((value for name, value in predicted.terms.items() if name != HOST), reverse=True)[:2]
    return {
        "configuration": f"{'drawn ' if drawn else ''}p={p} g={g} K={count} pages={pages} "
        f"B={bandwidth / 1e6:.0f} MB/s {variant}",
        "variant": variant,
        "predicted": predicted.throughput,
        "measured": served.throughput,
        "woven": simulated,
        "without_memory": unlimited.throughput,
        "passes": len(passes),
        "max_tokens": most,
        "bottleneck": max(predicted.terms, key=predicted.terms.get),
        "busiest": BUSIEST[max(shares, key=shares.get)],
        "lead": first / second,
        "busy_shares": {name: round(share, 4) for name, share in shares.items()},
    }
