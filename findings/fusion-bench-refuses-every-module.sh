#!/usr/bin/env bash
# fusion_bench 0.2.33: `task_arithmetic_merge` raises a TypeError for every module that has a parameter.
#
# It subtracts state dicts that hold Parameters, which gives plain tensors, and then adds these to the base's Parameters.
# Its own addition refuses tensors of unlike type: "expected Parameter, got Tensor". Values that are buffers go through,
# so the arithmetic itself is as documented. Called from Python on modules, as its docstring says, it never returns.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 fusion_bench==0.2.33
cat > "$folder/look.py" <<'PY'
import torch
from fusion_bench.method.task_arithmetic.task_arithmetic import task_arithmetic_merge


class Buffered(torch.nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.register_buffer("weight", torch.tensor([value]))


merged = task_arithmetic_merge(Buffered(1.0), [Buffered(2.0), Buffered(4.0)], 0.5)
print("buffers:", merged.weight.item())
try:
    task_arithmetic_merge(torch.nn.Linear(2, 2), [torch.nn.Linear(2, 2)], 0.5)
    print("a linear layer: merged")
except TypeError as error:
    print("a linear layer:", str(error).partition(" at index")[2].partition(": ")[2])
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
buffers: 3.0
a linear layer: expected Parameter, got Tensor
SEEN
echo "as described"
