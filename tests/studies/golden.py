"""The figures of every study at its smoke preset, kept in golden.json, so that a change of numbers is always seen.

    python -m tests.studies.golden            # write the figures of all studies anew, and say what is new
    python -m tests.studies.golden rmoe moa   # of these
    python -m tests.studies.golden --check    # say what differs from the file, and write nothing

Kept are the metric of every arm and seed, the scalar measures of every arm at the first seed (losses are among them),
the size and cost of every arm, the verdict, its effect, and the version that the study declares. `test_studies.py`
compares them with its one run.

On one machine two runs agree to the last bit. Another processor adds in another order, and a sum of 32-bit numbers then
differs in its last digits: with torch and MKL held to SSE4, AVX2 and AVX-512 the figures of all studies agree to 1e-6,
and the effects, which are small differences of large metrics, to 4e-5. The tolerance is wider than that, and narrower
than what a changed rule, seed or split does.

Some studies learn text that is made of the Python that runs them. Under another version of Python their sizes are
compared, and not their losses.
"""

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).with_name("golden.json")
TOLERANCE = 1e-4
"""Of floats, relative to the figure, and absolute where that is below 1; everything else must be equal."""

DRAWN = {"subsets"}
"""Measures that count different draws: one draw falls the other way where a sum is rounded in another order."""

MADE = '"text-domains"'
"""As a source names the data set that is made of the Python that runs: its sources, topics of help, and characters."""


def figures(result) -> dict:
    """What is kept of a `StudyResult`, as plain values."""
    plain = result.to_dict()
    first = [row for row in plain["arms"] if row["seed"] == result.seeds[0]]
    return {
        "version": plain["version"],
        "metric": {row["arm"]: [r["metric"] for r in plain["arms"] if r["arm"] == row["arm"]] for row in first},
        "measures": {
            row["arm"]: {key: value for key, value in row["extra"].items() if is_kept(key, value)} for row in first
        },
        "size": {row["arm"]: [row["params"], row["active_params"], row["flops"], row["steps"]] for row in first},
        "effect": plain["effect"],
        "verdict": plain["verdict"],
    }


def is_kept(key: str, value: object) -> bool:
    return isinstance(value, int | float | str | None) and key not in DRAWN and "second" not in key


def compare(slug: str, kept: dict, found: dict) -> list[str]:
    """What differs from the file's figures of a study, a line each; empty where nothing does."""
    if slug not in kept["studies"]:
        return [f"{slug} is not in golden.json: python -m tests.studies.golden {slug}"]
    before = kept["studies"][slug]
    if kept["python"] != platform.python_version() and learns_python(slug):
        before, found = ({key: each[key] for key in ("version", "size")} for each in (before, found))
    return list(differences(before, json.loads(json.dumps(found)), slug))


def learns_python(slug: str) -> bool:
    """Whether a study stands on a bed, or on a part of its own, that loads this set or reads such texts itself."""
    from workbench.catalogue import PACKAGE, method
    from workbench.imports import files_below, imported, modules_of

    study = modules_of(PACKAGE)[method(slug).study.removeprefix("workbench.")]
    files = {study, *files_below(study.read_text())}
    readers = [file.read_text() for file in files if file.relative_to(PACKAGE).parts[0] in ("beds", "studies")]
    return any(MADE in source or "lib.data.text" in imported(source) for source in readers)


def differences(expected: object, found: object, where: str) -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            if key not in expected or key not in found:
                yield f"{where}/{key} is only in {'the file' if key in expected else 'the run'}"
            else:
                yield from differences(expected[key], found[key], f"{where}/{key}")
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for i, pair in enumerate(zip(expected, found, strict=True)):
            yield from differences(*pair, f"{where}[{i}]")
    elif isinstance(expected, float) and isinstance(found, float):
        if not math.isclose(expected, found, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            yield f"{where} was {expected!r} and is {found!r}"
    elif expected != found or type(expected) is not type(found):
        yield f"{where} was {expected!r} and is {found!r}"


def read() -> dict:
    return json.loads(FILE.read_text())


def write(kept: dict) -> None:
    lines = ",\n".join(f"{json.dumps(slug)}: {json.dumps(found)}" for slug, found in sorted(kept["studies"].items()))
    FILE.write_text(f'{{"python": {json.dumps(kept["python"])}, "studies": {{\n{lines}\n}}}}\n')


def main() -> int:
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch is imported
    from workbench.catalogue import methods
    from workbench.studies.core import load_study

    ready = [row.slug for row in methods(status="ready")]
    parser = argparse.ArgumentParser(prog="python -m tests.studies.golden", description=__doc__.splitlines()[0])
    parser.add_argument("slugs", nargs="*", metavar="SLUG", help="studies; all where none is named")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    args = parser.parse_args()
    kept = read() if FILE.exists() else {"python": platform.python_version(), "studies": {}}
    left = set(ready) - set(args.slugs or ready)
    if not args.check and kept["python"] != platform.python_version() and any(map(learns_python, left)):
        parser.error(f"the file is of Python {kept['python']} and this is another: write all studies")
    said, found = [], {}
    for slug in args.slugs or ready:
        found[slug] = figures(load_study(slug).execute("smoke"))
        new = compare(slug, kept, found[slug])
        if new and kept["studies"].get(slug, {}).get("version") == found[slug]["version"]:
            new.append(f"{slug} is still of version {found[slug]['version']}: raise it if small has other numbers too")
        said += new
    print("\n".join(said) or "nothing differs")
    if not args.check:
        studies = {slug: figures for slug, figures in (kept["studies"] | found).items() if slug in ready}
        write({"python": platform.python_version(), "studies": studies})
    return int(args.check and bool(said))


if __name__ == "__main__":
    sys.exit(main())
