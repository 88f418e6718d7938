#!/usr/bin/env bash
# torch 2.13.0: under FSDP2 torch.optim.Muon makes another step than on the whole matrix, and none on a matrix of one row.
#
# Two processes hold the rows of a weight between them. Muon works on the DTensors as they are, in bfloat16: products
# over the parts are summed in another order, and each of its five steps makes a small singular value 3.4 times as large.
# Where the gradient has less rank than the matrix (rank 2 here; a batch that is smaller than a layer is wide does it
# too), rounding in the directions it does not have becomes a good part of the step, another one in parts than whole. In
# the directions that the gradient does have the two agree to a few per cent, and so they do where it has full rank. On
# a weight of one row, of which one process holds nothing, the step raises.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/look.py" <<'PY'
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor


def step(layer: nn.Linear, grad: torch.Tensor) -> torch.Tensor:
    """What one step of Muon adds to the weight, which starts at 0."""
    nn.init.zeros_(layer.weight)
    layer.weight.grad = grad
    torch.optim.Muon(layer.parameters(), lr=1.0, weight_decay=0.0).step()
    return layer.weight.detach()


def compare(mesh, rows: int, columns: int, rank: int) -> str:
    draw = torch.Generator().manual_seed(1)
    grad = torch.randn(rows, rank, generator=draw) @ torch.randn(rank, columns, generator=draw)
    whole = step(nn.Linear(columns, rows, bias=False), grad)
    parted = fully_shard(nn.Linear(columns, rows, bias=False), mesh=mesh)
    place = parted.weight.device_mesh, parted.weight.placements
    try:
        other = step(parted, distribute_tensor(grad, *place)).full_tensor()
    except RuntimeError as error:
        return f"raises: {str(error)[:45]}"
    left, _, right = torch.linalg.svd(grad, full_matrices=False)
    left, right = left[:, :rank], right[:rank]

    def off(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / b.norm())

    there = off(left.T @ other @ right.T, left.T @ whole @ right.T)
    return f"steps differ by more than 15 %: {off(other, whole) > 0.15}, where the gradient is: {there > 0.15}"


def work(process: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=process, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for rows, columns, rank in ((64, 16, 2), (16, 64, 2), (64, 16, 16), (16, 64, 16), (1, 16, 1)):
        said = compare(mesh, rows, columns, rank)
        if process == 0:
            print(f"{rows} x {columns}, rank {rank}: {said}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (f"{folder}/meeting",), nprocs=2)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/errors" | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
64 x 16, rank 2: steps differ by more than 15 %: True, where the gradient is: False
16 x 64, rank 2: steps differ by more than 15 %: True, where the gradient is: False
64 x 16, rank 16: steps differ by more than 15 %: False, where the gradient is: False
16 x 64, rank 16: steps differ by more than 15 %: False, where the gradient is: False
1 x 16, rank 1: raises: aten.add_.Tensor: in-place operations that re
SEEN
echo "as described"
