"""`workbench simulate`: a serving system on the numbers of a user's own machine, before anything is bought or built."""

import argparse
import json
from pathlib import Path

from workbench import catalogue
from workbench.cli.files import check_new, write_new
from workbench.cli.table import show
from workbench.errors import InputError, unknown

EXPERT_BYTES = 17_301_504
"""Of three matrices of 2048 x 1408 in 16 bits, an expert of DeepSeek-V2-Lite."""
TRACES = {
    "trained": "routers of a small model that is trained now, in half a minute, and kept",
    "synthetic": "numbers that drift and are as skewed as Zipf's law",
}


def add_simulate(sub: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    sub.add_argument("slug", metavar="SLUG", help="its name in the catalogue, such as hybrimoe")
    text = "numbers of the machine: a JSON file, or a machine that is known by its public ones"
    sub.add_argument("--hardware", metavar="FILE", required=True, help=text)
    text = "; ".join(f"{name}: {what}" for name, what in TRACES.items())
    sub.add_argument("--trace", metavar="TRACE", default="trained", help=f"{text}; or a safetensors file of your own")
    text = "bytes of the device's memory for experts (default: half of all, or the device's memory if that is less)"
    sub.add_argument("--budget", metavar="BYTES", help=text)
    text = f"bytes of one expert, 2 a weight (default: {EXPERT_BYTES:,})"
    sub.add_argument("--expert-bytes", metavar="BYTES", default=str(EXPERT_BYTES), help=text)
    sub.add_argument("--html", metavar="FILE", help="a picture of the timeline; it must be new")


def simulate(args: argparse.Namespace) -> None:
    """What the command does, as `workbench.cli.commands` hands it on."""
    row = catalogue.method(args.slug)
    if not row.simulates:
        known = ", ".join(other.slug for other in catalogue.methods() if other.simulates)
        raise InputError(f"slug {args.slug!r} cannot be simulated; these can: {known}")
    budget = None if args.budget is None else _bytes("--budget", args.budget)
    expert = _bytes("--expert-bytes", args.expert_bytes)
    if args.html is not None:
        check_new("html", Path(args.html), ".html")
    from workbench.lib.core.simulation.hardware import Hardware, names
    from workbench.lib.core.simulation.workload import Workload

    file = Path(args.hardware)
    if file.suffix or (args.hardware and file.exists()):
        hardware = Hardware.read(file)
    elif args.hardware in names():
        hardware = Hardware.named(args.hardware)
    else:
        raise unknown("--hardware", args.hardware, names())
    trace = _trace(args.trace)
    memory = float("inf") if hardware.device is None else hardware.device.memory_bytes
    if budget is None:
        budget = trace.n_layers * trace.n_experts * expert / 2
        budget = min(budget, memory)
    elif budget > memory:
        raise InputError(f"--budget is {args.budget!r} but must be at most the device's memory, {memory:,.0f} bytes")
    found = row.resolve()["simulate"](hardware, Workload(trace, expert, budget))
    if args.html is not None:
        from workbench.figures.timeline import gantt

        write_new(Path(args.html), gantt(found.timeline, title=f"{row.slug}: {row.title}").to_html())
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    show([[_cell(name, row[name]) for name in found.rows[0]] for row in found.rows], [*map(_head, found.rows[0])])
    print(f"{found.slug}, {found.basis}: {found.workload}")


def _trace(name: str):
    from workbench.lib.core.simulation.traces import RouterTrace, zipf_markov

    if name == "synthetic":
        return zipf_markov()
    if name == "trained":
        from workbench.beds import router_traces

        return router_traces.trace()
    if not Path(name).suffix:
        raise unknown("--trace", name, TRACES)
    return RouterTrace.read(name)


def _bytes(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 1 <= value <= 1e24:
        raise InputError(f"{option} is {text!r} but must be a number of bytes from 1 to 1e24")
    return value


def _head(name: str) -> str:
    return name.replace("_seconds", " ms").replace("_", " ")


def _cell(name: str, value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value * 1e3:.3f}" if name.endswith("_seconds") else f"{value:.3g}"
