"""Operators close to the hardware, each exact and differentiable, with a path for the CPU and a Triton path for a GPU.

One folder an operator: `reference.py` is its meaning in plain torch, `cpu.py` and `triton.py` are its fast paths, and
the operator itself, registered with torch, checks its arguments and chooses the path by device; `backend=` forces one.
`dispatch` keeps the record of the path that ran. Triton is imported when a Triton path runs, and not before.
"""

# Imported here and not on demand: an operator has the name of its folder, and a folder that is imported before its
# operator is asked for would stand here in its place.
from workbench.kernels.bit_planes import dequantise_planes, pack_planes, plane_bytes, unpack_planes
from workbench.kernels.block_sparse_attention import block_gate_topk, block_sparse_attention
from workbench.kernels.column_adam import column_adam
from workbench.kernels.column_topk import column_topk, gather_columns
from workbench.kernels.dct import dct2_rows, dct3_rows, dct_basis
from workbench.kernels.e3m0 import e3m0_pack, e3m0_unpack
from workbench.kernels.gather_sum import gather_sum
from workbench.kernels.haar import haar_dwt2, haar_idwt2
from workbench.kernels.hashed_lookup import Lookups, hashed_lookup
from workbench.kernels.low_rank import low_rank
from workbench.kernels.moe_mlp import moe_mlp
from workbench.kernels.newton_schulz import newton_schulz
from workbench.kernels.pcb_merge import pcb_merge
from workbench.kernels.plan import RoutePlan
from workbench.kernels.random_basis import random_basis, random_basis_adjoint
from workbench.kernels.route_metadata import route_metadata
from workbench.kernels.selective_scan import selective_scan
from workbench.kernels.shared_store import shared_linear, shared_weight
from workbench.kernels.span_attention import span_attention, span_decode
from workbench.kernels.topk_softmax import topk_softmax
from workbench.kernels.transformers import register_transformers
from workbench.kernels.trim_elect_merge import magnitude_threshold, trim_elect_merge
from workbench.kernels.walsh_hadamard import walsh_hadamard

__all__ = [
    "Lookups",
    "RoutePlan",
    "block_gate_topk",
    "block_sparse_attention",
    "column_adam",
    "column_topk",
    "dct2_rows",
    "dct3_rows",
    "dct_basis",
    "dequantise_planes",
    "e3m0_pack",
    "e3m0_unpack",
    "gather_columns",
    "gather_sum",
    "haar_dwt2",
    "haar_idwt2",
    "hashed_lookup",
    "low_rank",
    "magnitude_threshold",
    "moe_mlp",
    "newton_schulz",
    "pack_planes",
    "pcb_merge",
    "plane_bytes",
    "random_basis",
    "random_basis_adjoint",
    "register_transformers",
    "route_metadata",
    "selective_scan",
    "shared_linear",
    "shared_weight",
    "span_attention",
    "span_decode",
    "topk_softmax",
    "trim_elect_merge",
    "unpack_planes",
    "walsh_hadamard",
]
