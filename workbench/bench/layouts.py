"""How long the layouts of `ascan` take on this machine: as many parameters each, a forward pass, one thread.

What travels with the package and its study reads is made by `python -m workbench.bench.layouts --keep`. Rows are taken
by turns in one process; what is kept are medians, and medians of the ratios to the asymmetric layout.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from functools import partial

import torch

from workbench.bench.core import FORWARD, OURS, Case, Contestants, measure
from workbench.catalogue import PACKAGE
from workbench.lib.core.threads import torch_threads
from workbench.lib.search.ascan import LAYOUTS, HybridNet, macs, match_params
from workbench.sealed import sealed_file

REPEATS = 30
BUDGET, CLASSES, SIZE, BATCHES = 60_000, 9, 32, (1, 64)
RECORD = PACKAGE / "studies" / "search" / "measured" / "ascan.json"


def cases(quick: bool = False) -> list[Case]:
    batches = BATCHES[:1] if quick else BATCHES
    return [Case(f"{size} images of 32x32", partial(_contestants, size), (FORWARD,)) for size in batches]


def nets() -> dict[str, HybridNet]:
    """The layouts, as the study has them."""
    return {
        name: HybridNet(stages, match_params(stages, BUDGET, CLASSES, 1), CLASSES, 1).eval()
        for name, stages in LAYOUTS.items()
    }


def _contestants(size: int, direction: str) -> Contestants:
    x = torch.randn(size, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

    def forward(net: HybridNet) -> Callable[[], object]:
        return torch.no_grad()(partial(net, x))

    made = nets()
    return {OURS: forward(made.pop("asymmetric"))} | {name: forward(net) for name, net in made.items()}


def record(repeats: int = REPEATS) -> dict:
    """{"batches": {size: {layout: {"median_s", "ratio"}}}, "macs": {layout: of an image}, and where}."""
    found = {}
    with torch_threads(1):
        for size in BATCHES:
            seconds = measure(_contestants(size, FORWARD), repeats)
            ours = seconds[OURS]
            found[str(size)] = {
                "asymmetric" if name == OURS else name: {
                    "median_s": statistics.median(spent),
                    "ratio": statistics.median(a / b for a, b in zip(spent, ours, strict=True)),
                }
                for name, spent in seconds.items()
            }
    counts = {name: macs(net) for name, net in nets().items()}
    where = {"threads": 1, "machine": platform.machine(), "torch": torch.__version__, "rounds": repeats}
    return {"batches": found, "macs": counts, **where}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workbench.bench.layouts", description="The layouts, measured now.")
    parser.add_argument("--keep", action="store_true", help="write the record beside the study")
    args = parser.parse_args()
    found = record()
    print(json.dumps(found, indent=1))
    if args.keep:
        with sealed_file(RECORD) as path:
            path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
