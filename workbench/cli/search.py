"""`workbench search`: an architecture search for so many minutes, which is kept and goes on where it was stopped.

A system joins with one function, `search(seed, max_macs)`, in `<its study>_search.py`: it returns what
`workbench.lib.core.search.kept.Search` describes, and refuses a limit that nothing meets.
"""

import argparse
import json
import math
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from workbench import catalogue, paths
from workbench.cli.files import check_new, write_new
from workbench.cli.progress import progress_bar
from workbench.errors import InputError, unknown

LONGEST = 7 * 24 * 60  # minutes


def add_search(sub: argparse.ArgumentParser, whole: Any) -> None:
    """The arguments of the command; `whole` makes the type of a whole number."""
    sub.add_argument("system", metavar="SYSTEM", help="a system that searches, such as neas")
    text = "how long to search in this call, preparation included (default: 1); what is prepared or rated is finished"
    sub.add_argument("--budget", type=_minutes, default=1.0, metavar="MINUTES", help=text)
    text = "most multiply-accumulates of what is found, for one input (default: the system's own limit)"
    sub.add_argument("--max-macs", type=whole(1), metavar="N", help=text)
    sub.add_argument("--seed", type=whole(0, 2**31 - 1), default=0, metavar="N", help="of everything (default: 0)")
    sub.add_argument("--html", metavar="FILE", help="a picture of all candidates and the front; it must be new")


def search(args: argparse.Namespace) -> None:
    """What the command does, as `workbench.cli.commands` hands it on."""
    if args.html is not None:
        check_new("html", Path(args.html), ".html")
    made = _offered(args.system)(args.seed, args.max_macs)
    limit = "" if args.max_macs is None else f"-{args.max_macs}"
    folder = paths.home() / "searches" / f"{args.system}-{args.seed}{limit}"
    from workbench.lib.core.search.kept import go_on
    from workbench.lib.core.threads import torch_threads

    with progress_bar(f"search {args.system}") as report, torch_threads(1):
        try:
            found = go_on(made, folder, 60 * args.budget, report)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"what was rated is kept in {folder}; the same command goes on") from stop
    said = {"system": args.system, "folder": str(folder), "settings": dict(made.settings)}
    said |= {"rating": made.rating, "cost": made.cost, "rated": len(found.rated), "kept": found.kept}
    said |= {"ended": found.ended, "front": [_named(point) for point in found.front]}
    if args.html is not None:
        write_new(Path(args.html), _picture(args.system, made, found))
    print(json.dumps(said, indent=2) if args.json else _lines(said))


def _offered(system: str) -> Any:
    """The function by which a system offers its search."""
    row = catalogue.method(system)
    if not row.ready:
        raise InputError(f"system {system!r} is planned: it has no search yet; workbench methods --status ready")
    searching = [one.slug for one in catalogue.methods(status="ready") if find_spec(f"{one.study}_search")]
    if system not in searching:
        raise unknown("system that searches", system, searching)
    return import_module(f"{row.study}_search").search


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= LONGEST:
        raise argparse.ArgumentTypeError(f"is {text!r} but must be a number of minutes above 0, at most {LONGEST}")
    return value


def _named(point: tuple[list[int], float, float]) -> dict[str, Any]:
    return dict(zip(("genome", "cost", "rating"), point, strict=True))


def _lines(said: dict[str, Any]) -> str:
    state = "nothing more to ask for" if said["ended"] else "the same command goes on"
    head = f"{said['folder']}: {said['rated']} candidates rated, {said['kept']} of them before; {state}"
    points = (f"  {one['cost']:>12,} {said['cost']}  {one['rating']:.4f} {said['rating']}  " for one in said["front"])
    genomes = (" ".join(map(str, one["genome"])) for one in said["front"])
    return "\n".join([head, *(point + genome for point, genome in zip(points, genomes, strict=True))])


def _picture(system: str, made: Any, found: Any) -> str:
    from workbench.figures.search import search_front

    title = f"What {system} has found"
    return search_front(found.rated, title=title, x_title=made.cost, y_title=made.rating).to_html()
