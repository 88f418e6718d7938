"""How long a program takes to be told from others, and what of real code is found to be there already.

What travels with the package and the study of `fsap` reads is made by `python -m workbench.bench.validation --keep`:

- processor time of the keys of `fsap_duplicates` on Python files of torch, by turns in one process, one thread;
- duplicates among the methods of networks, as torch and transformers have them: methods of at least `LEAST` lines in
  classes that derive from a Module or a PreTrainedModel, in the order of the files. A method is a duplicate by a key if
  one before it has the same.

No file is imported; all are read as text.
"""

import argparse
import ast
import hashlib
import json
import platform
import re
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from workbench.bench.core import measure, median_ratio
from workbench.catalogue import PACKAGE
from workbench.lib.core.threads import torch_threads
from workbench.lib.measures.statistics import mean_interval
from workbench.lib.search.fsap_duplicates import KEYS
from workbench.sealed import sealed_file

ROUNDS = 15
TIMED, LINES = 30, (325, 375)  # files of about 350 lines
SIZES = (50, 100, 200, 400, 800, 1600)
LEAST = 8
BURST = 10
RATIOS = ("tree_ratio", "parse_ratio", "tree_again", "parse_again")
RECORD = PACKAGE / "studies" / "search" / "measured" / "fsap.json"
CODE = {"torch": "nn/modules/*.py", "transformers": "models/*/modeling_*.py"}
CONTESTANTS = KEYS | {
    "pattern": lambda code: hashlib.md5(re.sub(r"\s", "", code).encode(), usedforsecurity=False).hexdigest(),
    "parse": lambda code: ast.parse(code),
}
"""The keys; the hash of `whitespace` with a regular expression in the place of split and join; parsing and no more."""


def sources(package: str, pattern: str) -> list[Path]:
    """Files of an installed package, in order."""
    spec = find_spec(package)
    return [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob(pattern))


def by_lines(pattern: str) -> dict[Path, int]:
    """Files of torch, and how many lines they have: none very short or long."""
    found = {}
    for path in sources("torch", pattern):
        text = path.read_text(encoding="utf-8", errors="replace")
        if 40 <= text.count("\n") <= 2000:
            found[path] = text.count("\n")
    return found


def times(path: Path, rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each contestant on a file, and how many times those of the hash are those of two of them.

    "tree_ratio" and "parse_ratio" are of calls by turns, as a program comes by and is told from others once. In
    "tree_again" and "parse_again" each one is called `BURST` times in a row, and finds in the caches what it needs.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    calls = {name: partial(key, text) for name, key in CONTESTANTS.items()}
    seconds = measure(calls, rounds, time.thread_time)
    again = {name: partial(_burst, calls[name]) for name in ("whitespace", "tree", "parse")}
    bursts = measure(again, max(1, rounds // 3), time.thread_time)
    found = {name: sorted(spent)[len(spent) // 2] for name, spent in seconds.items()}
    for name in ("tree", "parse"):
        found[f"{name}_ratio"] = median_ratio(seconds[name], seconds["whitespace"])
        found[f"{name}_again"] = median_ratio(bursts[name], bursts["whitespace"])
    return found | {"lines": text.count("\n")}


def _burst(call: Callable[[], object]) -> None:
    for _ in range(BURST):
        call()


def methods(path: Path) -> Iterator[str]:
    """The methods of the networks in a file, as they stand there but for their indentation."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and any(map(_of_networks, node.bases)):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and inner.end_lineno - inner.lineno + 1 >= LEAST:
                    yield textwrap.dedent("".join(lines[inner.lineno - 1 : inner.end_lineno]))


def _of_networks(base: ast.expr) -> bool:
    name = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")
    return name == "Module" or name.endswith("PreTrainedModel")


def duplicates(codes: list[str]) -> dict[str, int]:
    """How many of the codes each key finds to be there already, and of the hash's against the trees': see `judged`."""
    seen: dict[str, set[str]] = {name: set() for name in KEYS}
    found = dict.fromkeys([*KEYS, "both", "missed", "merged"], 0)
    for code in codes:
        there = {}
        for name, key in KEYS.items():
            made = key(code)
            there[name] = made in seen[name]
            seen[name].add(made)
        for name, is_there in there.items():
            found[name] += is_there
        found["both"] += there["whitespace"] and there["tree"]
        found["missed"] += there["tree"] and not there["whitespace"]
        found["merged"] += there["whitespace"] and not there["tree"]
    return found | {"codes": len(codes)}


def record(
    timed: int = TIMED, rounds: int = ROUNDS, code: dict[str, str] | None = None, pattern: str = "**/*.py"
) -> dict:
    """All that is kept: of files of torch by the pattern, and of the methods in `code`, by default `CODE`."""
    files = by_lines(pattern)
    alike = [path for path, lines in files.items() if LINES[0] <= lines <= LINES[1]]
    alike = alike[:: max(1, len(alike) // timed)][:timed]
    near = [min(files, key=lambda path, size=size: (abs(files[path] - size), path)) for size in SIZES]
    with torch_threads(1):
        found, sized = [times(path, rounds) for path in alike], [times(path, rounds) for path in near]
    means = {name: mean_interval([one[name] for one in found]) for name in RATIOS}
    ratios = {name: mean.as_dict() | {"sd": mean.sd} for name, mean in means.items()}
    real = [text for package, pattern in (code or CODE).items() for path in sources(package, pattern)
            for text in methods(path)]  # fmt: skip
    return {
        "seconds": {name: sorted(one[name] for one in found)[len(found) // 2] for name in CONTESTANTS},
        "slowest": max(one["whitespace"] for one in found),
        **ratios,
        "files": len(found),
        "sized": sized,
        "methods": duplicates(real),
        "where": {
            "machine": platform.machine(), "python": platform.python_version(), "rounds": rounds,
            **{package: version(package) for package in (code or CODE)},
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workbench.bench.validation", description="The keys, measured now.")
    parser.add_argument("--keep", action="store_true", help="write the record beside the study")
    args = parser.parse_args()
    found = record()
    print(json.dumps(found, indent=1))
    if args.keep:
        with sealed_file(RECORD) as path:
            path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
