#!/usr/bin/env bash
# torch 2.13.0: torch.optim.Muon(nesterov=False) overwrites its momentum with a matrix of norm 1, for bfloat16 weights.
#
# Newton-Schulz begins with `grad.bfloat16()` and divides that by its norm in place. Where the matrix is bfloat16 already
# `.bfloat16()` copies nothing, and without Nesterov's look-ahead the matrix is the momentum buffer itself. So at every
# step the sum of past gradients is brought to norm 1, whatever it was: of gradients larger than that next to nothing is
# remembered, and of smaller ones too much. The same optimiser on the same gradients in float32 sums them. With
# nesterov=True, the default, the matrix is a fresh one, and nothing is lost. Nothing is said in either case.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/look.py" <<'PY'
import torch


def norms(dtype: torch.dtype, nesterov: bool) -> list[float]:
    """Of the momentum after each of three steps with one gradient of norm 16."""
    weight = torch.nn.Parameter(torch.zeros(8, 8, dtype=dtype))
    muon = torch.optim.Muon([weight], momentum=0.5, weight_decay=0.0, nesterov=nesterov)
    weight.grad = torch.full((8, 8), 2.0, dtype=dtype)
    found = []
    for _ in range(3):
        muon.step()
        found.append(round(float(muon.state[weight]["momentum_buffer"].norm()), 2))
    return found


for nesterov in (True, False):
    for dtype in (torch.float32, torch.bfloat16):
        print(f"nesterov={nesterov}, {dtype}: norm of the momentum {norms(dtype, nesterov)}")
PY
"$folder/venv/bin/python" "$folder/look.py" | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
nesterov=True, torch.float32: norm of the momentum [8.0, 12.0, 14.0]
nesterov=True, torch.bfloat16: norm of the momentum [8.0, 12.0, 14.0]
nesterov=False, torch.float32: norm of the momentum [8.0, 12.0, 14.0]
nesterov=False, torch.bfloat16: norm of the momentum [1.0, 1.0, 1.0]
SEEN
echo "as described"
