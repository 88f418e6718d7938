"""Install the oldest and the newest versions that pyproject.toml allows, test each, and say what broke.

    python .ci/versions.py                                  # both, as `make test-versions` does
    python .ci/versions.py oldest                           # one
    python .ci/versions.py newest --hold torch==2.13.0      # but this at this version
    .venv/bin/python .ci/versions.py --freeze               # write constraints.txt from this environment instead

Oldest means each requirement at its lower bound, and what these need in turn as pip chooses. Each end has a virtual
environment of its own below build/versions, kept for the next time, and a log of what pip and the tests said. The
tests are some of each floor, with the ways in: the shell, a page that is served, a notebook that is run.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tomllib
import venv
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "build" / "versions"
ENDS = ("oldest", "newest")
TESTS = [
    "tests/test_package.py", "tests/test_cli.py", "tests/test_common.py", "tests/test_notebook_runner.py",
    "tests/figures", "tests/kernels/test_moe_mlp.py", "tests/kernels/test_transformers.py", "tests/lib/core/adapt",
    "tests/lib/data", "tests/lib/data_mixtures/test_climb.py", "tests/lib/measures/test_power_law.py",
    "tests/lib/measures/test_statistics.py",
    "tests/live/test_export.py", "tests/live/test_serve.py", "tests/live/test_store.py", "tests/live/views",
    "tests/studies/test_core.py", "tests/notebooks/test_stored.py",
]  # fmt: skip
HEAD = """\
# The versions that all tests were run with, which `make` installs; `make live CONSTRAINTS=` takes the newest instead.
# Written from an environment in which `make test` passed, by: .venv/bin/python .ci/versions.py --freeze
# triton is not among them, because each torch of PyPI asks for the one it was built with.
"""


class Result(NamedTuple):
    """One end: the versions installed by package, the tests that failed, and the last line of the runner or of pip."""

    found: dict[str, str]
    broke: list[str]
    last: str


def plain(name: str) -> str:
    return name.lower().replace("_", "-")


def requirements() -> dict[str, str]:
    """Package -> what pyproject.toml allows of it, everything that the tests need included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    return dict(re.match(r"([\w-]+)([^;\s]*)", line).groups() for line in lines)


def test(end: str, held: dict[str, str]) -> Result:
    lowest = {name: re.search(r">=([\w.]+)", allowed)[1] for name, allowed in requirements().items()}
    constraints, log, folder = PLACE / f"{end}.txt", PLACE / f"{end}.log", PLACE / end
    pins = (lowest if end == "oldest" else {}) | held
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
    log.write_text("")
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        venv.create(folder, with_pip=True)

    def run(*command: str) -> int:
        print(f"{end}: {' '.join(command[:2])}, log in {log.relative_to(ROOT)}", flush=True)
        with log.open("a") as said:
            options = {"cwd": ROOT, "stdin": subprocess.DEVNULL, "stdout": said, "stderr": subprocess.STDOUT}
            return subprocess.run([python, "-m", *command], **options).returncode

    upgrade = ["--upgrade", "--upgrade-strategy", "eager"] if end == "newest" else []
    if run("pip", "install", "--progress-bar", "off", *upgrade, "-c", str(constraints), "-e", ".[test,hf]"):
        return Result({}, ["pip install"], last_line(log, "^ERROR"))
    status = run("pytest", "-q", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider", *TESTS)
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], capture_output=True, check=True).stdout
    found = {plain(package["name"]): package["version"] for package in json.loads(listed)}
    broke = re.findall(r"^((?:FAILED|ERROR) .*)", log.read_text(), re.MULTILINE)
    return Result(found, broke or [f"pytest ended with {status}"] * bool(status), last_line(log, r" in [\d.]+s"))


def last_line(log: Path, pattern: str) -> str:
    lines = [line for line in log.read_text().splitlines() if re.search(pattern, line)]
    return lines[-1].strip("= ") if lines else "no result"


def report(results: dict[str, Result], held: dict[str, str]) -> None:
    """What was installed, what failed with it, and a line for each end."""
    rows = [("package", "allowed", *results)]
    for name, allowed in requirements().items():
        versions = [result.found.get(plain(name), "-") + " (held)" * (name in held) for result in results.values()]
        rows.append((name, allowed, *versions))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    print()
    for end, result in results.items():
        for line in result.broke:
            print(f"{end}: {line}")
    for end, result in results.items():
        print(f"versions: {end}: {'broken' if result.broke else 'works'}: {result.last}")


def freeze() -> None:
    """Write constraints.txt: what this environment has of the packages that pyproject.toml names."""
    pins = {name: metadata.version(name).partition("+")[0] for name in requirements() if name != "triton"}
    (ROOT / "constraints.txt").write_text(HEAD + "".join(f"{name}=={version}\n" for name, version in pins.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ends", nargs="*", metavar="END", help="oldest, newest (default: both)")
    parser.add_argument("--hold", action="append", default=[], metavar="NAME==VERSION", help="keep a package there")
    parser.add_argument("--freeze", action="store_true", help="write constraints.txt, test nothing")
    args = parser.parse_args()
    if args.freeze:
        freeze()
        return 0
    held = dict(text.partition("==")[::2] for text in args.hold)
    if wrong := (set(args.ends) - set(ENDS)) | {name for name in held if name not in requirements() or not held[name]}:
        parser.error(f"{', '.join(sorted(wrong))}: an END is oldest or newest, and held is a requirement==VERSION")
    PLACE.mkdir(parents=True, exist_ok=True)
    results = {end: test(end, held) for end in args.ends or ENDS}
    report(results, held)
    return 1 if any(result.broke for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
