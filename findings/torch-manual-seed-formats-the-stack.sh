#!/usr/bin/env bash
# torch 2.13.0, a build for the CPU alone: every torch.manual_seed formats the caller's whole stack, three times.
#
# The seeds of CUDA, XPU and MTIA are queued until those devices are first used, which on this build is never, and each
# of the three keeps a formatted traceback beside it for an error that may come. So a call takes some hundred times as
# long as seeding the CPU's generator, longer the deeper it is called, and a training loop that seeds each step pays for
# it in each. `torch.default_generator.manual_seed` gives the same numbers on the CPU and formats nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --extra-index-url https://download.pytorch.org/whl/cpu \
    torch==2.13.0 numpy==2.4.6
cat >"$folder/seed.py" <<'PYTHON'
import time
import traceback

import torch

lines = []
real = traceback.format_stack


def counted(*args, **kwargs):
    found = real(*args, **kwargs)
    lines.append(len(found))
    return found


def at_depth(depth, call):
    return call() if depth == 0 else at_depth(depth - 1, call)


assert not torch.cuda.is_available()
traceback.format_stack = counted
seen = {}
for depth in (0, 50):
    lines.clear()
    at_depth(depth, lambda: torch.manual_seed(1))
    seen[depth] = list(lines)
    print(f"called {depth} frames deep: the stack is formatted {len(lines)} times")
lines.clear()
torch.manual_seed(1)
numbers = torch.rand(5)
before = len(lines)
torch.default_generator.manual_seed(1)
print("the CPU's generator alone: formatted", len(lines) - before, "times, the same numbers:", torch.equal(numbers, torch.rand(5)))
traceback.format_stack = real


def microseconds(call):
    start = time.perf_counter()
    for _ in range(300):
        at_depth(50, call)
    return (time.perf_counter() - start) / 300 * 1e6


both = microseconds(lambda: torch.manual_seed(1)), microseconds(lambda: torch.default_generator.manual_seed(1))
print(f"50 frames deep, {both[0]:.0f} and {both[1]:.0f} microseconds a call")
assert [len(found) for found in seen.values()] == [3, 3]
assert torch.equal(numbers, torch.rand(5, generator=torch.Generator().manual_seed(1))) and len(lines) == before
PYTHON
"$folder/venv/bin/python" "$folder/seed.py"
# called 0 frames deep: the stack is formatted 3 times
# called 50 frames deep: the stack is formatted 3 times
# the CPU's generator alone: formatted 0 times, the same numbers: True
# 50 frames deep, 1056 and 6 microseconds a call (the last line hangs on the machine)
