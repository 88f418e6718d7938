#!/usr/bin/env bash
# deepspeed 0.19.8: all experts of a layer, and the MLP beside them, start from the same weights.
#
# `deepspeed.moe.layer.MoE(hidden_size, expert, num_experts=E)` copies the one `expert` it is given E times; with
# `use_residual=True` it is also the MLP beside them. So E + 1 blocks are one function at first, and which expert a token
# goes to changes nothing until their gradients have parted them: experts that draw weights of their own, as elsewhere,
# take E modules, which the layer has no way to be given.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export DS_ACCELERATOR=cpu DS_BUILD_OPS=0
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 setuptools
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check deepspeed==0.19.8
cat > "$folder/look.py" <<'PY'
import torch
from deepspeed.moe.layer import MoE
from torch import nn

torch.manual_seed(0)
layer = MoE(16, nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), num_experts=4, use_residual=True)
experts = layer.deepspeed_moe.experts.deepspeed_experts
first = [p for p in experts[0].parameters()]
for name, other in (*((f"expert {i}", e) for i, e in enumerate(experts)), ("the MLP beside them", layer.mlp)):
    print(f"{name}: the weights of expert 0: {all(map(torch.equal, first, other.parameters()))}")
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | grep -v INFO | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
expert 0: the weights of expert 0: True
expert 1: the weights of expert 0: True
expert 2: the weights of expert 0: True
expert 3: the weights of expert 0: True
the MLP beside them: the weights of expert 0: True
SEEN
echo "as described"
