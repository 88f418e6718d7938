"""Triton's interpreter is chosen when a kernel's module is imported, so its tests run in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CASES = sorted(path.name for path in HERE.glob("interp_*.py"))
"""Files of interpreter tests. pytest does not collect them by itself."""


def run_interpreted(name: str) -> int:
    """Run the tests of one file under the interpreter, on one thread; the number that passed.

    Raises:
        AssertionError: with what pytest printed, where a test failed or none ran.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / name)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    passed = re.search(r"\b(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, f"{name}:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return int(passed.group(1))
