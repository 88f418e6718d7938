"""Side-by-side timings of the operators, against their peers and the bound of the hardware (`workbench bench`)."""

from collections.abc import Callable, Sequence

# Name -> module, imported when it is run. A module has `cases(quick) -> list[Case]`, `REPEATS`, and, where there are
# tables beside the timings, `tables(quick) -> {key: rows}`, and `summary(rows) -> {key: rows}` where some are made of
# the timings; they are added to the result.
BENCHES = {
    "moe": "workbench.bench.moe",
    "attention": "workbench.bench.attention",
    "lora": "workbench.bench.lora",
    "merge": "workbench.bench.merge",
    "basis": "workbench.bench.basis",
    "hadamard": "workbench.bench.hadamard",
    "optimisers": "workbench.bench.optimisers",
    "shared": "workbench.bench.shared",
    "scan": "workbench.bench.scan",
    "serving": "workbench.bench.serving",
    "distributed": "workbench.bench.distributed",
    "layouts": "workbench.bench.layouts",
    "dynamics": "workbench.bench.dynamics",
    "imaging": "workbench.bench.imaging",
    "features": "workbench.bench.features",
}


def run(
    name: str,
    *,
    threads: Sequence[int] = (1, 2),
    repeats: int | None = None,
    quick: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict:
    """Run one bench and keep its record.

    Args:
        name: one of `BENCHES`.
        threads: numbers of threads to time at.
        repeats: rounds of each measurement; None for the bench's own.
        quick: small problems that take seconds: to see that it works, not to judge by.
        progress: called as progress(done, all, what) before each measurement.

    Returns:
        {"bench", "machine", "threads", "repeats", "rows": as of `core.timed`, the bench's own tables, "record": the
        path of the file that keeps all this}.

    Raises:
        InputError: no bench has this name, or a number is below 1.
        KeyboardInterrupt: it was interrupted; its words name the file that keeps what was timed until then.
    """
    from importlib import import_module

    from workbench.errors import unknown

    if name not in BENCHES:
        raise unknown("bench", name, BENCHES)
    from workbench.bench import core

    bench = import_module(BENCHES[name])
    repeats = bench.REPEATS if repeats is None else repeats
    core.check_counts(threads, repeats)
    tables = bench.tables(quick) if hasattr(bench, "tables") else {}
    result = {"bench": name, "machine": core.machine(), "threads": list(threads), "repeats": repeats, "rows": []}
    try:
        for rows in core.timed(bench.cases(quick), threads=threads, repeats=repeats, progress=progress):
            result["rows"] += rows
    except KeyboardInterrupt as stop:
        if not result["rows"]:
            raise KeyboardInterrupt(f"bench {name} had timed nothing yet") from stop
        record = core.save(name, result | tables | {"interrupted": True})
        raise KeyboardInterrupt(f"{len(result['rows'])} timings of bench {name} are kept at {record}") from stop
    result |= tables | (bench.summary(result["rows"]) if hasattr(bench, "summary") else {})
    return {**result, "record": str(core.save(name, result))}
