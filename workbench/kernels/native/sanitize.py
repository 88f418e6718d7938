"""The C files under the sanitizers of their compiler, through calls of random shapes and through calls that cannot be.

A run is two processes: one that starts, counts and tells, and one in which the sanitizers' libraries are loaded before
anything else and the files are built anew, in a folder that is gone afterwards. What they find is told by them, and the
second process goes on; the first counts. Before the calls, one number behind the end of a tensor is read on purpose:
sanitizers that do not say so are not at work, and then nothing that they do not say means anything.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench.errors import InputError
from workbench.kernels import native

OPTIONS = ("-O0", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fsanitize-recover=all")
FOUND = re.compile(r"^(?:==\d+==ERROR: AddressSanitizer|.*: runtime error): (.*)$", re.MULTILINE)
PROBE = "float behind(const float *x, long n) { return x[n]; }\n"
MARK = "the calls begin"


@dataclass(frozen=True)
class Findings:
    """What a run was, and what it found.

    Attributes:
        sound, refused, taken: calls that were right, and of the others those refused and those that were none the less
            what they should be.
        found: a line for each finding of a sanitizer, each wrong answer to a call, and an end that was none.
    """

    sound: int
    refused: int
    taken: int
    found: tuple[str, ...]

    def __str__(self) -> str:
        of = self.sound + self.refused + self.taken
        shown = f"{of} calls: {self.sound} sound, {self.refused} refused, {self.taken} as good as sound; "
        return "\n".join([f"{shown}findings: {len(self.found)}", *self.found])


def sanitize(shapes: int, seed: int = 0) -> Findings:
    """Run so many calls under the sanitizers.

    Raises:
        InputError: the compiler has none, or they are not at work.
    """
    compiler = native.compiler()
    if compiler is None:
        raise InputError("there is no C compiler, so there is nothing to look at")
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {
            "WORKBENCH_HOME": scratch,
            # torch throws C++ exceptions, which the sanitizer wants to know of before torch is there
            "LD_PRELOAD": " ".join(_preloaded(compiler.rpartition(" ")[0])),
            "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=0",
        }
        command = [sys.executable, "-m", "workbench.kernels.native", "--calls", str(shapes), "--seed", str(seed)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    before, _, after = done.stderr.partition(MARK)
    if not FOUND.search(before):
        raise InputError(f"the sanitizers are not at work: {done.stderr.strip()[-300:]}")
    found = _told(after) + done.stdout.splitlines()[:-1]
    if done.returncode:
        found.append(f"it ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
        return Findings(0, 0, 0, tuple(found))
    return Findings(*map(int, done.stdout.split()[-3:]), tuple(found))


def _told(said: str) -> list[str]:
    """What the sanitizers say, each with the call in which they do."""
    found, call = [], ""
    for line in said.splitlines():
        if line.startswith("call "):
            call = line
        elif match := FOUND.match(line):
            found.append(f"{call}: {match[1]}")
    return found


def _preloaded(compiler: str) -> list[str]:
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        asked = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
        path = Path(asked.stdout.strip())
        if not path.is_absolute():
            raise InputError(f"the C compiler {compiler} has no {name}; on Linux gcc brings it")
        paths.append(str(path.resolve()))
    return paths


def calls(shapes: int, seed: int) -> None:
    """The second process: faults on standard output, and last how many calls were sound, refused and taken."""
    import ctypes

    import torch

    native.FLAGS = (*native.FLAGS, *OPTIONS)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "probe" / "native.c"
        source.parent.mkdir()
        source.write_text(PROBE)
        native.library(source).behind(native.address(torch.zeros(16)), ctypes.c_long(16))
    print(MARK, file=sys.stderr, flush=True)
    from workbench.kernels.native.cases import calls as every

    counts = {"sound": 0, "refused": 0, "taken": 0}
    for number, call in enumerate(itertools.islice(every(seed, native=True), shapes)):
        print(f"call {number}, {call.name}", file=sys.stderr, flush=True)
        outcome = "taken" if number % 2 else "sound"
        try:
            call()
        except InputError as error:
            outcome = "refused"
            if not number % 2:
                print(f"call {number}, {call.name}, was refused: {error}")
        else:
            if call.refused:
                print(f"call {number}, {call.name}, was taken")
        counts[outcome] += 1
    print(*counts.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 nothing was found, 1 something was, 2 there is no sanitizer."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m workbench.kernels.native", description=native.__doc__)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--sanitize", action="store_true", help="run calls of the paths in C under the sanitizers")
    asked.add_argument("--calls", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--shapes", type=int, default=1000, help="how many calls (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.calls is not None:
        calls(args.calls, args.seed)
        return 0
    try:
        findings = sanitize(args.shapes, args.seed)
    except InputError as error:
        print(f"workbench: error: {error}", file=sys.stderr)
        return 2
    print(findings)
    return 1 if findings.found else 0
