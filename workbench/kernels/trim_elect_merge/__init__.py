"""Models trimmed, elected and averaged in one pass: the merge of TIES, and what is made of it by leaving steps out.

Paths of `trim_elect_merge`: "reference", "cpu", "native" (float32; narrower types are widened a piece at a time) and
"triton", each a module with

    trim_elect_merge(experts, base, weights, thresholds, elect, divide, scale, out)

experts a list of n flat contiguous tensors of one type, base as one of them or None, weights and thresholds n numbers,
out as one of the experts, and perhaps one of them. Paths of `magnitude_threshold`: "reference",
"native" and "triton" (both for float32 and narrower).

All paths do the same operations in the same order, in float32 or wider, so that they agree bit for bit.
"""

from collections.abc import Iterable, Sequence
from importlib import import_module
from itertools import repeat
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError, unknown
from workbench.kernels import dispatch
from workbench.kernels.memory import fresh

BACKENDS = ("reference", "cpu", "native", "triton")
SELECTIONS = ("reference", "native", "triton")
NATIVE = Path(__file__).with_name("native.c")
ELECT = ("values", "weighted")
DIVIDE = ("count", "weights")


def trim_elect_merge(
    experts: Float[Tensor, "models ..."] | Sequence[Float[Tensor, "..."]],
    base: Float[Tensor, "..."] | None = None,
    *,
    weights: Float[Tensor, " models"] | Sequence[float] | None = None,
    thresholds: Float[Tensor, " models"] | Sequence[float] | None = None,
    elect: str | None = "values",
    divide: str | None = "count",
    scale: float = 1.0,
    out: Float[Tensor, "..."] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "..."]:
    """base + scale * (sum of weight_i * tau_i) / divisor, tau_i = experts_i - base, over the entries that survive.

    An entry survives the trim where |tau_i| >= threshold_i: of entries equal to the threshold all do. With an election
    it must also be other than 0 and have the sign of the sum of the trimmed tau_i ("values") or weight_i * tau_i
    ("weighted"); a sum of 0 elects plus. The average is `elect=None`, task arithmetic is that with `divide=None`.

    Args:
        experts: n tensors of one shape, or one (n, ...).
        base: the tensor that they came from; None where `experts` are differences already, and is not added then.
        weights: n numbers; None for ones.
        thresholds: n numbers that are not NaN, `magnitude_threshold` has them; infinity keeps nothing that is finite,
            None all.
        elect: "values", "weighted" or None for no election.
        divide: by the number of entries that survive ("count"), by the sum of their weights ("weights"), or not (None).
            A divisor of 0 is 1.
        scale: of the merged difference.
        out: to write the result to, contiguous and like an expert; it may be one of them, or base. The memory that a
            large result is otherwise written to comes fresh from the system, which costs as much as half an average.
        backend: one of `BACKENDS`; None chooses by device.

    Returns:
        `out`, or a tensor of the shape and type of an expert, computed in float32 or wider. NaN is passed on. Not
        differentiable.

    Raises:
        InputError: names the argument that does not fit, or the backend that cannot do this.
    """
    rows = check_rows(experts, base, out)
    weights = check_numbers("weights", weights, len(rows), 1.0)
    thresholds = check_numbers("thresholds", thresholds, len(rows), 0.0)
    _check(rows, weights, thresholds, elect, divide, scale)
    wide = torch.promote_types(rows[0].dtype, torch.float32)
    chosen = dispatch.choose("trim_elect_merge", backend, rows[0].device, BACKENDS, wide, NATIVE)
    rows = [x.detach().contiguous() for x in rows]
    base = None if base is None else base.detach().contiguous()
    if out is None:
        out = fresh(rows[0].shape, rows[0].dtype) if rows[0].device.type == "cpu" else torch.empty_like(rows[0])
    _merge(rows, base, weights, thresholds, elect, divide, scale, out, chosen)
    return out


def magnitude_threshold(
    experts: Tensor | Iterable[Tensor],
    k: int,
    base: Tensor | Iterable[Tensor] | None = None,
    *,
    backend: str | None = None,
) -> float:
    """The k-th largest |experts - base|, exactly: at least k entries are no smaller, and more only where some equal it.

    Args:
        experts: a tensor, or the tensors of a model, to be taken together; they are gone through twice, so a model
            larger than memory can be an object whose `__iter__` reads one tensor after the other.
        k: 0 to the number of entries; 0 gives infinity.
        base: likewise; None where `experts` are differences already.
        backend: one of `SELECTIONS`; None chooses by device and type.

    Raises:
        InputError: names the argument that does not fit, such as a NaN.
    """
    if not isinstance(k, int) or k < 0:
        raise InputError(f"k is {k} but must be a whole number of at least 0")
    found = magnitudes(experts, lambda size: [size - k], base, backend)
    return found[0]


def magnitudes(experts, ranks, base=None, backend: str | None = None) -> list[float]:
    """Those of `|experts - base|` that stand at `ranks(number of entries)`, from 0 for the smallest; see above."""
    pieces = Pieces(experts, base)
    first = next(iter(pieces), None)
    if first is None:
        raise InputError("experts has no tensor but must have at least one")
    wide = torch.promote_types(first[0].dtype, torch.float32)
    if backend is None and wide == torch.float64:
        backend = "reference"  # the others count the bits of float32
    chosen = dispatch.choose("magnitude_threshold", backend, first[0].device, SELECTIONS, wide, NATIVE)
    chosen = dispatch.begin("magnitude_threshold", chosen, NATIVE)
    path = import_module(f"{__name__}.{'reference' if chosen == 'cpu' else chosen}")
    return path.magnitudes(pieces, ranks)


class Pieces:
    """Pairs of a checked tensor and its base, flat, each time that they are gone through."""

    def __init__(self, experts: Tensor | Iterable[Tensor], base: Tensor | Iterable[Tensor] | None):
        self.experts = [experts] if isinstance(experts, Tensor) else experts
        self.base = [base] if isinstance(base, Tensor) else base
        if iter(self.experts) is self.experts or (self.base is not None and iter(self.base) is self.base):
            raise InputError("experts or base is an iterator but must be something that can be gone through twice")

    def __iter__(self):
        kind = None
        try:
            for x, base in zip(
                self.experts, repeat(None) if self.base is None else self.base, strict=self.base is not None
            ):
                check_rows([x], base)
                kind = kind or (x.dtype, x.device)
                if (x.dtype, x.device) != kind:
                    raise InputError(f"experts has {x.dtype} on {x.device} beside {kind[0]} on {kind[1]}: one of each")
                yield x.detach().reshape(-1), None if base is None else base.detach().reshape(-1)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError("experts and base differ in length but must have the same tensors") from error


@torch.library.custom_op("workbench::trim_elect_merge", mutates_args=("out",))
def _merge(
    experts: Sequence[Tensor],
    base: Tensor | None,
    weights: Sequence[float],
    thresholds: Sequence[float],
    elect: str | None,
    divide: str | None,
    scale: float,
    out: Tensor,
    backend: str,
) -> None:
    rows = check_rows(experts, base, out)
    _check(rows, weights, thresholds, elect, divide, scale)
    wide = torch.promote_types(rows[0].dtype, torch.float32)
    dispatch.admit("trim_elect_merge", backend, rows[0].device, BACKENDS, wide)
    backend = dispatch.begin("trim_elect_merge", backend, NATIVE)
    flat = [x.reshape(-1) for x in rows]
    base = None if base is None else base.reshape(-1)
    path = import_module(f"{__name__}.{backend}")
    path.trim_elect_merge(flat, base, list(weights), list(thresholds), elect, divide, scale, out.view(-1))


@_merge.register_fake
def _(experts, base, weights, thresholds, elect, divide, scale, out, backend):
    pass


def check_rows(experts: Tensor | Sequence[Tensor], base: Tensor | None, out: Tensor | None = None) -> list[Tensor]:
    """The experts as a list of tensors of one shape, type and device, those of `base` and `out` too."""
    rows = [] if isinstance(experts, Tensor) and not experts.ndim else list(experts)
    if not rows or not all(isinstance(x, Tensor) for x in rows):
        raise InputError("experts must be one or more tensors, or a tensor (models, ...)")
    first = rows[0]
    if not first.is_floating_point() or first.dtype.itemsize == 1:
        raise InputError(f"experts are {first.dtype} but must be floating point, of two bytes at least")
    named = [(f"experts[{i}]", x) for i, x in enumerate(rows)] + [("base", base), ("out", out)]
    for name, x in named:
        if x is not None and (x.shape, x.dtype, x.device) != (first.shape, first.dtype, first.device):
            raise InputError(
                f"{name} is {x.dtype} of shape {tuple(x.shape)} on {x.device} but must be as experts[0], {first.dtype} "
                f"of shape {tuple(first.shape)} on {first.device}"
            )
    if out is not None and (not out.is_contiguous() or out.requires_grad):
        raise InputError(f"out has strides {out.stride()} but must be contiguous, and must not require a gradient")
    return rows


def check_numbers(name: str, given, n: int, default: float) -> list[float]:
    """n Python numbers."""
    numbers = [default] * n if given is None else given.tolist() if isinstance(given, Tensor) else list(given)
    if not isinstance(numbers, list) or len(numbers) != n:
        raise InputError(
            f"{name} has {len(numbers) if isinstance(numbers, list) else 1} numbers but there are {n} experts"
        )
    return [float(number) for number in numbers]


def _check(rows, weights, thresholds, elect, divide, scale) -> None:
    for name, numbers in (("weights", weights), ("thresholds", thresholds)):
        if len(numbers) != len(rows):
            raise InputError(f"{name} has {len(numbers)} numbers but there are {len(rows)} experts")
    if not all(abs(weight) < float("inf") for weight in weights):
        raise InputError(f"weights is {weights} but must be finite")
    if any(threshold != threshold for threshold in thresholds):
        raise InputError(f"thresholds is {thresholds} but must not have NaN")
    if not abs(scale) < float("inf"):
        raise InputError(f"scale is {scale} but must be finite")
    for name, value, allowed in (("elect", elect, ELECT), ("divide", divide, DIVIDE)):
        if value is not None and value not in allowed:
            raise unknown(name, value, allowed)
