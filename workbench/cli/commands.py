"""What each command does: one function of its name. Every heavy import is inside the function that needs it."""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from workbench import catalogue
from workbench.cli.progress import Report, progress_bar, progress_of
from workbench.cli.table import show
from workbench.errors import InputError, unknown


def as_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def methods(args: argparse.Namespace) -> None:
    rows = catalogue.methods(args.family, args.status)
    if args.json:
        return as_json([row.as_dict() for row in rows])
    show(
        [(row.slug, row.family, row.year, row.status, row.title) for row in rows],
        ("slug", "family", "year", "status", "title"),
    )
    print(f"{len(rows)} methods, {sum(row.ready for row in rows)} ready")


def method(args: argparse.Namespace) -> None:
    row = catalogue.method(args.slug)
    if args.json:
        as_json(row.as_dict())
    else:
        print(row)


def study(args: argparse.Namespace) -> None:
    row = catalogue.method(args.slug)  # before torch is imported: a wrong name is told in a moment
    if not row.ready:
        raise InputError(f"slug {args.slug!r} is planned: it has no study yet; workbench methods --status ready")
    if args.power and (args.fresh or args.seeds):
        raise InputError("--power takes neither --seeds nor --fresh: it has seeds of its own")
    from workbench.engines import Workers
    from workbench.studies.core import load_study, run_study

    with _keeping(f"{args.slug} {args.preset}") as progress:
        if args.power:
            workers = Workers(args.jobs, args.engine, args.address)
            result = load_study(args.slug).measure_power(args.preset, args.seed, workers, progress)
        else:
            where = {"jobs": args.jobs, "engine": args.engine, "address": args.address}
            result = run_study(
                args.slug, args.preset, args.seed, args.seeds, progress=progress, fresh=args.fresh, **where
            )
    if args.json:
        as_json(result.to_dict())
    else:
        print(result)


def verdicts(args: argparse.Namespace) -> None:
    path = Path(args.html)
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise InputError(f"--html is {args.html!r} but must be a file that ends in .html")
    from workbench.verdicts import packaged, write_page

    with _keeping("verdicts"):
        found = packaged()
    try:
        write_page(path, *found)
    except OSError as error:
        raise InputError(f"--html is {args.html!r} but cannot be written: {error.strerror}") from None
    as_json({"html": str(path)}) if args.json else print(path)


def results(args: argparse.Namespace) -> None:
    from workbench.studies import stored

    if args.store and args.slug is None:
        raise InputError("--store needs the SLUG of a system")
    with _keeping(f"{args.slug} small") as progress:
        if args.slug is None:
            found = stored.results()
            return as_json([row.as_dict() for row in found]) if args.json else print(found)
        catalogue.method(args.slug) if args.store else stored.need(args.slug)  # before torch is imported
        from workbench.studies.core import load_result, load_study

        result = load_study(args.slug).store(progress=progress) if args.store else load_result(args.slug)
    if args.json:
        as_json(result.to_dict())
    else:
        print(result)


@contextmanager
def _keeping(text: str) -> Iterator[Report]:
    """A progress bar for what keeps its rows: what is not used of them is a line, and Ctrl-C loses none."""
    from workbench.studies.sheets import NotUsed

    usual = warnings.showwarning

    def told(message: Warning | str, category: type[Warning], *where) -> None:
        if issubclass(category, NotUsed):
            print(f"workbench: {message}", file=sys.stderr)
        else:
            usual(message, category, *where)

    with warnings.catch_warnings(), progress_bar(text) as progress:
        warnings.simplefilter("always", NotUsed)
        warnings.showwarning = told
        try:
            yield progress
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt("the rows that are done are kept; the same command goes on from there") from stop


def bench(args: argparse.Namespace) -> None:
    from workbench.bench import BENCHES

    for name in args.names:
        if name not in BENCHES:
            raise unknown("bench", name, BENCHES)
    from workbench.bench import run as run_bench

    results = []
    for name in args.names or BENCHES:
        with progress_bar(f"bench {name}") as progress:
            options = {"threads": args.threads or (1, 2), "repeats": args.repeats, "quick": args.quick}
            results.append(run_bench(name, **options, progress=progress))
        if not args.json:
            _show_bench(results[-1])
    if args.json:
        rows = [row for result in results for row in result.pop("rows")]
        as_json({"rows": rows, "benches": results})


def _show_bench(result: dict) -> None:
    """One table of timings, the bench's own tables below it, and where the record is."""
    rows = [
        (
            row["case"],
            row["threads"],
            row["direction"],
            row["implementation"],
            f"{1000 * row['median_s']:.1f}",
            "" if row["ratio_to_limit"] is None else f"{row['ratio_to_limit']:.2f}",
            ", ".join(f"{ratio:.2f} x {peer}" for peer, ratio in row["speedup_over"].items()),
        )
        for row in result["rows"]
    ]
    if rows:
        show(
            rows, ("case", "threads", "direction", "implementation", "ms", "of limit", "speed-up (time of peer / own)")
        )
    for name, table in result.items():
        if name != "rows" and isinstance(table, list) and table and isinstance(table[0], dict):
            print()
            show(
                [list(row.values()) for row in table],
                [f"{name}: {key}" if i == 0 else key for i, key in enumerate(table[0])],
            )
    print(
        f"\nmedians of {result['repeats']} interleaved rounds, torch {result['machine']['torch']}, "
        f"{result['machine']['capability']}; kept at {result['record']}\n"
    )


def merge(args: argparse.Namespace) -> None:
    from workbench.cli.merge import merge as merge_files

    merge_files(args)


def compress(args: argparse.Namespace) -> None:
    from workbench.cli.compress import compress as compress_files

    compress_files(args)


def mix(args: argparse.Namespace) -> None:
    from workbench.cli.mix import mix as search_mixtures

    search_mixtures(args)


def search(args: argparse.Namespace) -> None:
    from workbench.cli.search import search as search_architectures

    search_architectures(args)


def simulate(args: argparse.Namespace) -> None:
    from workbench.cli.simulate import simulate as simulate_system

    simulate_system(args)


def live(args: argparse.Namespace) -> None:
    from workbench.cli.live import recipes
    from workbench.live.serve import live as serve_live

    serve_live(recipes(args), **_page(args), processes=args.processes)


def view(args: argparse.Namespace) -> None:
    from workbench.live.serve import view as serve_view

    serve_view(args.run, **_page(args))


def _page(args: argparse.Namespace) -> dict[str, object]:
    return {"port": args.port, "open_browser": False if args.no_browser else None, "address": args.address}


def run(args: argparse.Namespace) -> int:
    from workbench import notebook

    if args.parameters:
        found = notebook.parameters(notebook.find(args.notebook))
        if args.json:
            as_json({name: parameter.as_dict() for name, parameter in found.items()})
        else:
            show(
                [(p.name, p.type, p.default, p.allowed, p.help) for p in found.values()],
                ("parameter", "type", "default", "allowed", "what"),
            )
        return 0
    given = dict(args.p)
    if len(given) < len(args.p):
        raise InputError("a parameter is given twice with -p")
    try:
        with progress_bar(f"run {args.notebook}") as progress:
            output = notebook.run(args.notebook, given, args.output and Path(args.output), progress=progress)
    except notebook.NotebookError as error:
        if args.json:
            as_json({"output": str(error.output), "error": str(error)})
        print(f"workbench: {args.notebook} failed at {error} (kept at {error.output})", file=sys.stderr)
        return 1
    if args.json:
        as_json({"output": str(output), "error": None})
    else:
        print(output)
    return 0


def sweep(args: argparse.Namespace) -> int:
    from workbench.cli.sweep import sweep as run_sweep

    rows, status = run_sweep(args)
    if args.json:
        as_json(rows)
    elif rows:
        names = list(rows[0]["parameters"])
        told = [
            (*row["parameters"].values(), row["state"], f"{row['seconds']:.1f}", row["error"] or row["output"])
            for row in rows
        ]
        show(told, (*names, "state", "seconds", "output or error"))
    return status


def runs(args: argparse.Namespace) -> None:
    from workbench.live.store import runs as all_runs
    from workbench.paths import home

    rows = [_describe_run(run) for run in all_runs()]
    if args.json:
        return as_json(rows)
    table = [
        (r["name"], r["kind"], r["state"], f"{r['steps']}/{r['total_steps'] or '?'}", r["created"][:16], r["message"])
        for r in rows
    ]
    show(table, ("run", "kind", "state", "steps", "created", "message"))
    print(f"{len(rows)} run{'s' * (len(rows) != 1)} in {home() / 'runs'}")


def _describe_run(run) -> dict[str, object]:
    """A run as plain values; of a damaged one only what is known without reading it."""
    meta, steps = {}, 0
    try:
        with run:
            state, message = run.status
            if state != "damaged":
                meta, steps = run.meta, run.last_step + 1
    except InputError as error:  # since it was opened
        state, message = "damaged", str(error)
    row = {"name": run.name, "folder": str(run.folder), "created": run.created, "state": state, "message": message}
    return row | {"steps": steps} | {key: meta.get(key) for key in ("total_steps", "kind", "seed", "weights_sha256")}


def resume(args: argparse.Namespace) -> int:
    from workbench.live.store import RunStopped, find

    with find(args.run) as run:
        folder, before = run.folder, (run.meta.get("processes") or {}).get("world", 1)
    processes = before if args.processes is None else args.processes
    if processes < 1:
        raise InputError(f"--processes is {processes} but must be at least 1")
    from workbench.live.trainer import resume as go_on  # torch; after the name is known to be right

    try:
        if processes > 1:
            from workbench.live.team import launch

            with progress_of(folder, f"resume {folder.name}"):
                status = launch(processes, "workbench.live.trainer", [str(folder)])
            if status:
                return status
        else:
            with progress_bar(f"resume {folder.name}") as progress:
                go_on(folder, progress)
    except (RunStopped, FloatingPointError) as error:
        print(f"workbench: {error}", file=sys.stderr)
        return 1
    row = _describe_run(find(folder))
    said = f"{row['name']}: {row['state']} after {row['steps']} steps, kept at {row['folder']}"
    if row["state"] == "stopped" and "SIGINT" in row["message"]:  # its trainer ended in order, with a checkpoint
        raise KeyboardInterrupt(f"{said}; go on with: workbench resume {row['name']}")
    if args.json:
        as_json(row)
    else:
        print(said)
    return 0


def export(args: argparse.Namespace) -> None:
    from workbench.live.store import find

    with find(args.run) as run:
        folder = run.export(args.folder)
    if args.json:
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        as_json({"folder": str(folder), "files": files})
    else:
        print(folder)


def data(args: argparse.Namespace) -> None:
    if args.action == "list" and args.names:
        raise InputError(f"data list takes no name but got {' '.join(args.names)}")
    if args.action != "list" and not args.names:
        raise InputError(f"data {args.action} needs the NAME of a data set; workbench data lists them")
    if args.action == "describe" and len(args.names) > 1:
        raise InputError("data describe takes one NAME")
    {"list": _data_list, "get": _data_get, "describe": _data_describe}[args.action](args)


def where(args: argparse.Namespace) -> None:
    from workbench.paths import home, shipped

    places = {"notebooks": str(shipped("notebooks")), "apps": str(shipped("apps")), "home": str(home())}
    if args.what is not None and args.what not in places:
        raise unknown("what", args.what, places)
    if args.json:
        as_json(places if args.what is None else places[args.what])
    elif args.what is None:
        show(list(places.items()), ("what", "where"))
    else:
        print(places[args.what])


def doctor(args: argparse.Namespace) -> int:
    from workbench.doctor import FAIL, OK, examine

    checks = examine()
    if args.json:
        as_json([check.as_dict() for check in checks])
    else:
        show([(check.name, check.state, check.detail) for check in checks], ("check", "state", "detail"))
        for check in checks:
            if check.state != OK and check.mend:
                print(f"{check.name}: {check.mend}")
    return 1 if any(check.state == FAIL for check in checks) else 0


def _data_list(args: argparse.Namespace) -> None:
    from workbench.lib.data import available

    entries = available()
    if args.json:
        return as_json([asdict(entry) for entry in entries])
    rows = [
        (e.name, "here" if e.present else e.needs, _size(e.bytes or e.download), e.licence, e.what) for e in entries
    ]
    show(rows, ("name", "get it with", "size", "licence", "what"))


def _data_get(args: argparse.Namespace) -> None:
    from workbench.lib.data import available, get
    from workbench.lib.data.sets import parts
    from workbench.lib.data.store import intact

    try:
        for name in args.names:
            with progress_bar(f"get {name}") as progress:
                get(name, lambda text, done, total: progress(done, total, text))
    except KeyboardInterrupt as stop:
        asked = {part.name: intact(part) for name in args.names for part in parts(name)}
        here, missing = (", ".join(name for name in asked if asked[name] is there) for there in (True, False))
        raise KeyboardInterrupt(f"kept: {here or 'nothing'}; not fetched: {missing or 'nothing'}") from stop
    entries = [entry for entry in available() if entry.name in args.names]
    if args.json:
        return as_json([asdict(entry) for entry in entries])
    for entry in entries:
        print(f"{entry.name}: here, licence: {entry.licence}")


def _data_describe(args: argparse.Namespace) -> None:
    from workbench.lib.data import describe

    found = describe(args.names[0])
    if args.json:
        return as_json(found)
    print(f"{found['name']}: {found['what']}")
    for part, manifest in found["parts"].items():
        print(f"\n{part}")
        for key, value in manifest.items():
            print(f"    {key:<12} {value}")


def _size(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f} MiB"
