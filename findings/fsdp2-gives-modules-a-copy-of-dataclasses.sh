#!/usr/bin/env bash
# torch 2.13.0: under FSDP2 a module gets a copy of a dataclass that it is called with, and what it writes there is lost.
#
# A dataclass that travels through the layers and collects what they add, such as a balance loss, works until the model is
# sharded: fully_shard hands on a copy of any that holds a tensor with a gradient. The first layer still writes into the
# caller's, which holds none yet; what all others add is gone, without a word, and with it its gradient. A plain object in
# place of the dataclass is handed on as it is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/look.py" <<'PY'
import dataclasses

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard


@dataclasses.dataclass
class Noted:
    aux: torch.Tensor | float = 0.0


class Plain:
    aux: torch.Tensor | float = 0.0


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, context):
        x = self.linear(x)
        context.aux = context.aux + x.square().mean() / x.square().mean().detach()  # adds 1
        return x


def look(kind, sharded):
    torch.manual_seed(0)
    layers = [Layer() for _ in range(3)]
    if sharded:
        for layer in layers:
            fully_shard(layer)
    context, x = kind(), torch.ones(2, 4)
    for layer in layers:
        x = layer(x, context)
    print(f"{kind.__name__:5} sharded {sharded!s:5} three layers have added {float(context.aux):g}")


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for kind in (Noted, Plain):
    for sharded in (False, True):
        look(kind, sharded)
dist.destroy_process_group()
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
Noted sharded False three layers have added 3
Noted sharded True  three layers have added 1
Plain sharded False three layers have added 3
Plain sharded True  three layers have added 3
SEEN
echo "as described"
