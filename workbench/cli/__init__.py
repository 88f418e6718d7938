"""The ``workbench`` command: the same parts as in Python, from a shell.

Results go to stdout and progress to stderr, so every ``--json`` can be piped. Exit status: 0 done, 1 it ran and failed,
2 wrong input (one line on stderr says what is allowed), 130 interrupted by Ctrl-C. This module builds the parser; what
a command does is the function of its name in ``commands.py``, imported when it is known that it will be needed.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

from workbench.bench import BENCHES
from workbench.cli.compress import add_compress
from workbench.cli.merge import add_merge
from workbench.cli.mix import add_mix
from workbench.cli.search import add_search
from workbench.cli.simulate import add_simulate
from workbench.cli.sweep import add_sweep
from workbench.errors import InputError, WorkerLostError, unknown

PRESETS = ("smoke", "small", "full")


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose complaints are one ``InputError`` with the nearest names."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        # the only place where argparse refuses a choice; its own message has no near names
        if action.choices is not None and value not in action.choices:
            raise unknown((action.metavar or action.dest).lower(), value, action.choices)


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number from ``low`` to ``high``."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"is {text!r} but must be a whole number {allowed}")
        return value

    return convert


def add_workers(sub: argparse.ArgumentParser) -> None:
    """The arguments that say where work is done, one thread a piece."""
    sub.add_argument("--jobs", type=whole(1), metavar="N", help="at the same time (default: one for each core)")
    text = "where: loky, processes of this machine (default), or dask or ray, a cluster"
    sub.add_argument("--engine", metavar="E", default="loky", help=text)
    text = "of a cluster that is there (default: one of this machine, for as long as the work takes)"
    sub.add_argument("--address", metavar="HOST:PORT", help=text)


def build_parser(argv: Sequence[str] = ()) -> Parser:
    """The parser of every command. The many flags of live take time to make: only with "live" in ``argv``."""
    from workbench import __version__

    parser = Parser(
        prog="workbench",
        description="Mixture-of-experts, low-rank adaptation, merging and subspace methods: run, compare, watch.",
        epilog="Runs and cached data are kept in $WORKBENCH_HOME, or ~/.workbench. workbench COMMAND --help says more.",
    )
    parser.add_argument("--version", action="version", version=f"workbench {__version__}")
    add = parser.add_subparsers(dest="command", metavar="COMMAND", required=True).add_parser

    def command(name: str, text: str, *, json: bool = True) -> Parser:
        sub = add(name, help=text, description=text[0].upper() + text[1:] + ".")
        if json:
            sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    sub = command("methods", "list the catalogue of published systems")
    sub.add_argument("--family", metavar="F", help="only this family, such as routing")
    sub.add_argument("--status", metavar="S", help="only ready or only planned ones")

    sub = command("method", "say what one system is, how to build it and where to read on")
    sub.add_argument("slug", metavar="SLUG", help="its name in the catalogue, such as rmoe")

    sub = command("study", "run a paper's claim as a comparison and print the verdict")
    sub.add_argument("slug", metavar="SLUG", help="its name in the catalogue, such as rmoe")
    sub.add_argument("--preset", choices=PRESETS, default="small", help="how much to spend (default: small)")
    sub.add_argument(
        "--seed", type=whole(0, 2**31 - 1), metavar="N", help="first seed (default: the preset's, mostly 0)"
    )
    sub.add_argument(
        "--seeds",
        type=whole(1),
        metavar="N",
        help="how many (default: the preset's); with more, intervals hold at every look",
    )
    add_workers(sub)
    sub.add_argument("--fresh", action="store_true", help="run everything, also what is kept")
    sub.add_argument("--power", action="store_true", help="run the baselines alone and say how many seeds are needed")

    sub = command("results", "print the verdicts that travel with the package, or one of them")
    sub.add_argument("slug", nargs="?", metavar="SLUG", help="its name in the catalogue, such as rmoe")
    sub.add_argument("--store", action="store_true", help="write the result of SLUG at small into the package")

    sub = command("verdicts", "write the page of all systems, their claims and verdicts")
    sub.add_argument("--html", metavar="FILE", required=True, help="the file to write; it needs nothing beside it")

    sub = command("bench", "time the operators beside their peers and the bound of the hardware")
    sub.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHES)} (default: everything)")
    sub.add_argument("--threads", type=whole(1), nargs="+", metavar="N", help="numbers of threads (default: 1 2)")
    sub.add_argument(
        "--repeats", type=whole(1), metavar="N", help="rounds of each measurement (default: the bench's own)"
    )
    sub.add_argument("--quick", action="store_true", help="small problems that take seconds, not to judge by")

    sub = command("merge", "merge models or adapters of one base, from files to files")
    add_merge(sub)

    sub = command("compress", "put factors of low rank in the place of a trained model's matrices, without data")
    add_compress(sub)

    sub = command("mix", "search in which proportion to train on domains of text, with small proxy models")
    add_mix(sub, whole)

    sub = command("search", "search for architectures for so many minutes; stopped, the same command goes on")
    add_search(sub, whole)

    sub = command("simulate", "run a serving system on the numbers of a machine of your own")
    add_simulate(sub)

    def page(name: str, text: str) -> Parser:
        sub = command(name, text, json=False)
        port = "port of the page (default: a free one from 5006)"
        sub.add_argument("--port", type=whole(1, 65535), metavar="N", help=port)
        address = "where to listen (default: 127.0.0.1, for this machine alone)"
        sub.add_argument("--address", metavar="A", default="127.0.0.1", help=address)
        sub.add_argument("--no-browser", action="store_true", help="only print the address")
        return sub

    sub = page("live", "train a small model, or arms of a study, and watch it in a browser")
    if "live" in argv:
        from workbench.cli.live import add_recipe

        add_recipe(sub)

    sub = page("view", "show a run that is kept, or one that another program writes, in a browser")
    sub.add_argument("run", nargs="?", default="latest", metavar="RUN", help="name or folder (default: the newest)")

    sub = command("run", "run a notebook with parameters, checked before it starts")
    sub.add_argument("notebook", metavar="NOTEBOOK", help="a path, or a name such as 01_routing")
    sub.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    sub.add_argument("-o", "--output", metavar="FILE", help="where to write (default: out/<notebook>-<hash>.ipynb)")
    sub.add_argument("--parameters", action="store_true", help="list what can be set, and run nothing")

    sub = command("sweep", "run a notebook at every point of a grid of parameters")
    add_sweep(sub)
    add_workers(sub)

    command("runs", "list the runs that are kept, newest first")

    sub = command("resume", "continue a run that was stopped or died, to the same final weights")
    sub.add_argument("run", metavar="RUN", help="its name or folder")
    sub.add_argument("--processes", type=int, metavar="N", help="train in N processes (default: as many as before)")

    sub = command("export", "write a run's record as parquet files")
    sub.add_argument("run", metavar="RUN", help="its name or folder")
    sub.add_argument("folder", metavar="FOLDER", help="where to write")

    sub = command("data", "list the data sets, fetch them, or describe one")
    sub.add_argument(
        "action",
        nargs="?",
        choices=("list", "get", "describe"),
        default="list",
        help="list (default), get NAME..., describe NAME",
    )
    sub.add_argument("names", nargs="*", metavar="NAME", help="data sets")

    sub = command("where", "say where the notebooks, the apps and the kept files are")
    sub.add_argument("what", nargs="?", metavar="WHAT", help="only the path of one: notebooks, apps or home")

    command("doctor", "check that this machine has what the workbench needs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command and return its exit status."""
    with suppress(AttributeError):  # a name of a file need be no text; stderr spells it out by itself
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        argv = sys.argv[1:] if argv is None else argv
        args = build_parser(argv).parse_args(argv)
        return getattr(import_module("workbench.cli.commands"), args.command)(args) or 0
    except InputError as error:
        print(f"workbench: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except WorkerLostError as error:
        print(f"workbench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:  # its words, if any, say what is kept
        print(": ".join(filter(None, ["workbench: interrupted", str(stop)])), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of a pipe has gone (| head); keep the interpreter from complaining about it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
