"""`workbench simulate`: a system on the numbers of a user's own machine, before anything is bought or built.

Serving systems, and those that train a mixture of experts, are given routers and the bytes of experts; those that train
a dense model are given its name and the devices. `simulate(hardware, workload)` of a system says which by its types.
"""

import argparse
import inspect
import json
from pathlib import Path

from workbench import catalogue
from workbench.cli.files import check_new, write_new
from workbench.cli.table import show
from workbench.errors import InputError, unknown

EXPERT_BYTES = 17_301_504
"""Of three matrices of 2048 x 1408 in 16 bits, an expert of DeepSeek-V2-Lite."""
ROUTED, DENSE = ("trace", "budget", "expert_bytes"), ("model", "world")
"""Options that some systems take and others do not."""

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
    sub.add_argument("--trace", metavar="TRACE", help=f"{text}; or a safetensors file of your own (default: trained)")
    text = "bytes of the device's memory for experts (default: half of all, or the device's memory if that is less)"
    sub.add_argument("--budget", metavar="BYTES", help=text)
    text = f"bytes of one expert, 2 a weight (default: {EXPERT_BYTES:,})"
    sub.add_argument("--expert-bytes", metavar="BYTES", help=text)
    text = "of a system that trains a dense model: its name, such as 22B (default)"
    sub.add_argument("--model", metavar="NAME", help=text)
    text = "devices that it is trained on (default: as few nodes as it fits on, doubled from one)"
    sub.add_argument("--world", metavar="N", help=text)
    sub.add_argument("--html", metavar="FILE", help="a picture of the timeline; it must be new")


def simulate(args: argparse.Namespace) -> None:
    """What the command does, as `workbench.cli.commands` hands it on."""
    row = catalogue.method(args.slug)
    if not row.simulates:
        known = ", ".join(other.slug for other in catalogue.methods() if other.simulates)
        raise InputError(f"slug {args.slug!r} cannot be simulated; these can: {known}")
    budget = None if args.budget is None else _bytes("--budget", args.budget)
    expert = EXPERT_BYTES if args.expert_bytes is None else _bytes("--expert-bytes", args.expert_bytes)
    world = None if args.world is None else _world(args.world)
    if args.html is not None:
        check_new("html", Path(args.html), ".html")
    from workbench.lib.core.simulation.hardware import Hardware, names
    from workbench.lib.core.simulation.workload import Training, Workload

    run = row.resolve()["simulate"]
    dense = inspect.signature(run).parameters["workload"].annotation is Training
    if given := [name for name in (ROUTED if dense else DENSE) if getattr(args, name) is not None]:
        takes = ", ".join(f"--{name.replace('_', '-')}" for name in (DENSE if dense else ROUTED))
        raise InputError(f"--{given[0].replace('_', '-')} is not for {row.slug!r}, which takes {takes}")
    file = Path(args.hardware)
    if file.suffix or (args.hardware and file.exists()):
        hardware = Hardware.read(file)
    elif args.hardware in names():
        hardware = Hardware.named(args.hardware)
    else:
        raise unknown("--hardware", args.hardware, names())
    if dense:
        workload = Training("22B" if args.model is None else args.model, world)
    else:
        trace = _trace("trained" if args.trace is None else args.trace)
        memory = float("inf") if hardware.device is None else hardware.device.memory_bytes
        if budget is None:
            budget = min(trace.n_layers * trace.n_experts * expert / 2, memory)
        elif budget > memory:
            what = f"the device's memory, {memory:,.0f} bytes"
            raise InputError(f"--budget is {args.budget!r} but must be at most {what}")
        workload = Workload(trace, expert, budget)
    found = run(hardware, workload)
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


def _world(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 9):
        raise InputError(f"--world is {text!r} but must be a whole number of devices, at least 1")
    return int(text)


def _head(name: str) -> str:
    return name.replace("_seconds", " ms").replace("_", " ")


def _cell(name: str, value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value * 1e3:.3f}" if name.endswith("_seconds") else f"{value:.3g}"
