"""Steps of optimisers of matrices beside those of galore-torch and torch's own, and the bytes they keep.

One square matrix with a drawn gradient, the same at each step; the rank is a quarter of the side. Weights change, which
no contestant minds. The peer is asked for its first step beforehand, so that "galore-torch, between" never makes an
SVD; "galore-torch, every step" always does. What a step takes it on the mean at its own gap of 200 steps is in the
table "amortised", made of the two. The limit is the product with r columns and back, 4 n^2 r operations, as anyone has
to make it who keeps a basis; ours makes an FFT where that is less.

In the cases of Muon, of square matrices and tall ones, the limit are the products of Newton-Schulz by `newton_schulz`,
in bfloat16 as both contestants make them.

Beside the timings, "state_bytes" has what each keeps of the matrix. A peer that cannot be imported has no row.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn

from workbench.bench.core import FORWARD, LIMIT, OURS, Case, Contestants
from workbench.kernels import newton_schulz
from workbench.lib.core.optim import GaLoreAdamW
from workbench.lib.low_rank.muon_pp import MuonPP
from workbench.lib.low_rank.svd_free_dct import DCTAdamW, Trion

REPEATS = 5
GAP = 200  # steps from one SVD of the peer to the next
QUICK = (64,)
SIDES = (256, 512, 1024, 2048, 4096)
EVERY, BETWEEN = "galore-torch, every step", "galore-torch, between"
FED, TRION, ADAMW, MUON = "workbench/error in bytes", "workbench/Trion", "torch/AdamW", "torch/Muon"
TALL = ((1024, 256), (4096, 1024))


def cases(quick: bool = False) -> list[Case]:
    projected = [Case(_name(side), partial(_contestants, side), (FORWARD,)) for side in (QUICK if quick else SIDES)]
    shapes = [(side, side) for side in QUICK] if quick else [*((side, side) for side in SIDES), *TALL]
    return projected + [Case(f"Muon {o}x{i}", partial(_muon, (o, i)), (FORWARD,)) for o, i in shapes]


def tables(quick: bool = False) -> dict[str, list[dict]]:
    """{"state_bytes": rows {case, implementation, bytes, ratio_to_adamw}}."""
    rows = []
    for side in QUICK if quick else SIDES:
        found = {name: _kept(make, side) for name, make in OPTIMISERS.items()} | {
            "workbench/GaLoreAdamW": _kept(
                lambda params, rank: GaLoreAdamW(params, rank=rank, projector="random"), side
            )
        }
        rows += [
            {"case": _name(side), "implementation": name, "bytes": kept, "ratio_to_adamw": kept / found[ADAMW]}
            for name, kept in found.items()
        ]
    return {"state_bytes": rows}


def summary(rows: list[dict]) -> dict[str, list[dict]]:
    """{"amortised": rows {case, threads, ours_s, peer_s: a step of the peer on the mean of `GAP`, ratio}}."""
    times = {(row["case"], row["threads"], row["implementation"]): row["median_s"] for row in rows}
    found = []
    for (case, threads, name), every in times.items():
        if name == EVERY:
            ours, between = (times[case, threads, other] for other in (OURS, BETWEEN))
            peer = between + (every - between) / GAP
            found.append({"case": case, "threads": threads, "ours_s": ours, "peer_s": peer, "ratio": ours / peer})
    return {"amortised": found}


#: name -> (parameters, rank) -> the optimiser
OPTIMISERS: dict[str, Callable[[list, int], torch.optim.Optimizer]] = {
    OURS: lambda params, rank: DCTAdamW(params, rank=rank),
    FED: lambda params, rank: DCTAdamW(params, rank=rank, error_feedback=True, ef_bits=8),
    TRION: lambda params, rank: Trion(params, rank=rank),
    ADAMW: lambda params, rank: torch.optim.AdamW(params),
    MUON: lambda params, rank: torch.optim.Muon(params),
}


@cache
def galore_torch() -> type | None:
    """The peer's AdamW; None where it is not installed."""
    try:
        import galore_torch
    except ImportError:
        return None
    return galore_torch.GaLoreAdamW


def peer(params: list, rank: int, gap: int) -> torch.optim.Optimizer:
    group = {"params": params, "rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    return galore_torch()([group], no_deprecation_warning=True)


def _name(side: int) -> str:
    return f"{side}x{side} r={side // 4}"


def _parameter(*shape: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=generator))
    p.grad = torch.randn(shape, generator=generator)
    return p


def _kept(make: Callable[[list, int], torch.optim.Optimizer], side: int) -> int:
    p = _parameter(side, side)
    optimizer = make([p], side // 4)
    optimizer.step()
    return sum(t.nbytes for key, t in optimizer.state[p].items() if key not in ("step", "draws"))


def _contestants(side: int, direction: str) -> Contestants:
    rank = side // 4
    made = {name: make([_parameter(side, side)], rank).step for name, make in OPTIMISERS.items()}
    if galore_torch() is not None:
        between = peer([_parameter(side, side)], rank, 10**9)
        between.step()
        made |= {EVERY: peer([_parameter(side, side)], rank, 1).step, BETWEEN: between.step}
    grad, basis = _parameter(side, side).grad, torch.linalg.qr(torch.randn(side, rank)).Q
    return {LIMIT: lambda: (grad @ basis) @ basis.T, **made}


def _muon(shape: tuple[int, int], direction: str) -> Contestants:
    made = {OURS: MuonPP([_parameter(*shape)]).step, MUON: torch.optim.Muon([_parameter(*shape)]).step}
    grad = _parameter(*shape).grad.bfloat16()
    return {LIMIT: lambda: newton_schulz(grad), **made}
