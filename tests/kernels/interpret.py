"""Triton's interpreter is chosen when a kernel's module is imported, so its tests run in a process of their own."""

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CASES = sorted(path.name for path in HERE.glob("interp_*.py"))
"""Files of interpreter tests. pytest does not collect them by itself."""


@dataclass
class Outcome:
    """What became of the tests of one file: how many passed, and what was said of each that failed."""

    passed: int = 0
    wrong: list[str] = field(default_factory=list)


@cache
def run_interpreted() -> dict[str, Outcome]:
    """Run the tests of all files under the interpreter, on one thread, in one process: the outcome by file.

    Raises:
        AssertionError: with what pytest printed, where it came to no report.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
    found: dict[str, Outcome] = defaultdict(Outcome)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [str(HERE / name) for name in CASES]
        done = subprocess.run(
            [*command, f"--junitxml={report}", *files], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert report.exists() and done.returncode in (0, 1), f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
        for case in ElementTree.parse(report).iter("testcase"):
            outcome = found[case.get("classname").rsplit(".", 1)[-1] + ".py"]
            said = [part for part in case if part.tag in ("failure", "error", "skipped")]
            outcome.wrong += [f"{case.get('name')}: {part.text}" for part in said if part.tag != "skipped"]
            outcome.passed += not said
    return found
