#!/usr/bin/env bash
# torch 2.13.0: making an optimizer imports torch._dynamo, though nothing is ever compiled.
#
# `torch.optim.SGD([p], lr=0.1)` is enough: `add_param_group` is marked as not to be traced by the compiler, and the
# mark imports the compiler at the first call. On a CPU this about doubles what a short training process spends on
# imports, and no setting of the optimizer (foreach, fused, capturable) avoids it. A plain training step with autograd
# and no optimizer does not import it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/look.py" <<'PY'
import sys

import torch


def compiler() -> str:
    return f"torch._dynamo imported: {'torch._dynamo' in sys.modules}"


weight = torch.nn.Parameter(torch.ones(2))
weight.square().sum().backward()
with torch.no_grad():
    weight -= 0.1 * weight.grad
print("after a step by hand,", compiler())
before = len(sys.modules)
torch.optim.SGD([weight], lr=0.1)
print("after SGD was made,", compiler())
print("hundreds of modules more:", len(sys.modules) - before > 300)
PY
"$folder/venv/bin/python" "$folder/look.py" | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
after a step by hand, torch._dynamo imported: False
after SGD was made, torch._dynamo imported: True
hundreds of modules more: True
SEEN
echo "as described"
