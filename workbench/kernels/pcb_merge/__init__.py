"""Merging by parameter competition (PCB, arXiv 2410.02396) with pairwise tanh: all of it in three passes.

Paths: "reference", "native" (float32) and "triton" (float32 and narrower), each a module with

    pcb_merge(experts, base, clip, drop, scale) -> merged
    bounds(pieces, low, high, drop) -> least, most
    piece(tau, low, high, least, most, scale) -> merged

experts a list of n flat contiguous tensors of one type, base as one of them or None, clip two ranks, drop a rank, scale
n numbers, merged flat in the type of the experts. The latter two are the same for models that are not in memory at
once: pieces and tau are differences (n, p), and the others n numbers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels import dispatch
from workbench.kernels.trim_elect_merge import check_numbers, check_rows

BACKENDS = ("reference", "native", "triton")
NATIVE = Path(__file__).with_name("native.c")
MODELS = 64  # exp(-n) is far from the end of float32


def pcb_merge(
    experts: Float[Tensor, "models params"] | Sequence[Float[Tensor, " params"]],
    base: Float[Tensor, " params"] | None = None,
    *,
    clip: tuple[int, int],
    drop: int,
    scale: float | Float[Tensor, " models"] | Sequence[float] = 1.0,
    backend: str | None = None,
) -> Float[Tensor, " params"]:
    """base + sum of scale_i s_i c_i / sum of s_i, of tau_i = experts_i - base, n models and P parameters.

    c_i is tau_i with its magnitude clipped to that of ranks `clip` in its row, and g_i = sign(tau_i) * (|c_i| - low) /
    (high - low). The score of an entry is exp(n g_i^2) * sum over j of tanh(g_i g_j), its own row included, and s_i is
    where the score stands between that of rank `drop` in its row, 0 as all below it, and the largest, 1. Where no s_i
    is above 0, base alone is left. A row whose magnitudes are all the same has g = 0, and so s = 0 throughout: it does
    not say which of its entries matter.

    The other paths agree with the reference to 1e-5 / d of the largest difference, d being the distance of the
    nearest of a parameter's scores from that of rank `drop` in its row, in parts of the terms of the score's sum: where
    d is next to nothing, rounding may keep what another path drops.

    Args:
        experts: n tensors (P,) of all merged parameters, or (n, P).
        base: (P,) that they came from; None where `experts` are differences already, and is not added then.
        clip: two ranks of magnitudes in a row, 0 for the smallest, to P - 1: exact, nothing is interpolated.
        drop: likewise, of scores.
        scale: one number, or n.
        backend: one of `BACKENDS`; None chooses by device.

    Raises:
        InputError: names the argument that does not fit; or clipping makes all magnitudes of a row the same that were
            not.
    """
    rows = check_rows(experts, base)
    scales = (
        [float(scale)] * len(rows) if isinstance(scale, int | float) else check_numbers("scale", scale, len(rows), 1)
    )
    _check(rows, clip, drop, scales)
    wide = torch.promote_types(rows[0].dtype, torch.float32)
    chosen = _choose(rows[0].device, wide, backend)
    return _merge(rows, base, list(clip), drop, scales, chosen)


@dataclass(frozen=True)
class Bounds:
    """What merging some parameters needs to know of all: n numbers each.

    Attributes:
        low, high: the magnitudes at the ranks of `clip`.
        least, most: the score at rank `drop`, and the largest.
    """

    low: Sequence[float]
    high: Sequence[float]
    least: Sequence[float]
    most: Sequence[float]


def pcb_bounds(
    pieces: Iterable[Float[Tensor, "models piece"]],
    low: Sequence[float],
    high: Sequence[float],
    drop: int,
    *,
    backend: str | None = None,
) -> Bounds:
    """The scores that `pcb_piece` needs, of models that are gone through a piece at a time.

    Args:
        pieces: all parameters, as differences (n, p) of one type; an object whose `__iter__` reads them anew, three
            times. The path "reference" keeps the scores of all of them in memory.
        low, high: of each model, the magnitudes at the ranks of `clip`, as `checked_ends` has them.
        drop, backend: as of `pcb_merge`.
    """
    path = _streaming(next(iter(pieces)), backend)
    return Bounds(low, high, *path.bounds(pieces, low, high, drop))


def pcb_piece(
    tau: Float[Tensor, "models piece"], bounds: Bounds, scale: Sequence[float], *, backend: str | None = None
) -> Float[Tensor, " piece"]:
    """The merged difference of some parameters; all of them are what `pcb_merge` makes of the whole."""
    return _streaming(tau, backend).piece(tau, bounds.low, bounds.high, bounds.least, bounds.most, scale)


def _streaming(tau: Tensor, backend: str | None):
    if tau.ndim != 2 or not 0 < len(tau) <= MODELS:
        raise InputError(f"tau is of shape {tuple(tau.shape)} but must be (models, params), at most {MODELS} models")
    return _path(dispatch.begin("pcb_merge", _choose(tau.device, tau.dtype, backend), NATIVE))


def _choose(device: torch.device, dtype: torch.dtype, backend: str | None) -> str:
    if backend is None and dtype == torch.float64:
        backend = "reference"  # the others count the bits of float32
    return dispatch.choose("pcb_merge", backend, device, BACKENDS, dtype, NATIVE)


def _path(chosen: str):
    return import_module(f"{__name__}.{'reference' if chosen == 'cpu' else chosen}")


@torch.library.custom_op("workbench::pcb_merge", mutates_args=())
def _merge(
    experts: Sequence[Tensor], base: Tensor | None, clip: Sequence[int], drop: int, scale: Sequence[float], backend: str
) -> Tensor:
    rows = check_rows(experts, base)
    _check(rows, clip, drop, scale)
    wide = torch.promote_types(rows[0].dtype, torch.float32)
    dispatch.admit("pcb_merge", backend, rows[0].device, BACKENDS, wide)
    chosen = dispatch.begin("pcb_merge", backend, NATIVE)
    path = _path(chosen)
    flat = [x.detach().contiguous() for x in rows]
    return path.pcb_merge(flat, None if base is None else base.detach().contiguous(), tuple(clip), drop, list(scale))


@_merge.register_fake
def _(experts, base, clip, drop, scale, backend):
    return torch.empty_like(experts[0])


def _check(rows: list[Tensor], clip: Sequence[int], drop: int, scale: Sequence[float]) -> None:
    if rows[0].ndim != 1 or not len(rows[0]):
        raise InputError(f"experts[0] is of shape {tuple(rows[0].shape)} but must be (params,), at least one")
    if len(rows) > MODELS:
        raise InputError(f"experts has {len(rows)} models but must have at most {MODELS}")
    last = len(rows[0]) - 1
    if len(clip) != 2 or not 0 <= clip[0] <= clip[1] <= last:
        raise InputError(f"clip is {tuple(clip)} but must be two ranks of 0 to {last}, the second not below the first")
    if not 0 <= drop <= last:
        raise InputError(f"drop is {drop} but must be a rank of 0 to {last}")
    if len(scale) != len(rows) or not all(abs(number) < float("inf") for number in scale):
        raise InputError(f"scale is {list(scale)} but must be one finite number, or {len(rows)}")
