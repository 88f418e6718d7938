"""One stored code of a matrix that serves every width: the first b of its bits are the code of b bits (2504.15299).

    nested = NestedQuantizer(bits=8, base=2, group=64).fit(w, gram)
    nested.dequant(3)                # of the first three planes
    nested.nbytes(4) - nested.nbytes(2)    # two planes, and the scales of two levels

    q = clamp(floor((w - low) / s), 0, 2^B - 1),  c_b = q >> (B - b),  w_b = low_b + (c_b + 1/2) scale_b

It has to be the floor: rounding carries into the bits above, and a prefix would not be the code of fewer bits. At first
low_b = low and scale_b = s 2^(B - b), so that every w_b lies in the middle of its interval. The codes are chosen once
for all levels, by how far the range is clipped; after that each level has its own low and scale by least squares, which
change no code.

Scales are float16 in units of the matrix's largest entry, and are rounded before the codes are made.

Tensor letters: R rows, C columns, G groups of columns in a row, B bits of the whole code, b bits of a level.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, Float32, UInt8
from torch import Tensor
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.kernels import dequantise_planes, pack_planes, plane_bytes, unpack_planes
from workbench.kernels.bit_planes import MOST

CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""What is tried of the distance from a group's mean to its least and to its largest weight."""

LEAST = 2.0**-24  # of float16: the step of a group whose entries are all the same
MOST_WEIGHT = 2.0**126  # the power of two above it, and what is made in units of it, are float32
UP = 1 + 2.0**-10  # twice the rounding of float16


@dataclass(frozen=True)
class NestedWeight:
    """Matrices as nested codes.

    Attributes:
        planes: of the whole code, the most significant first.
        low, scale: of each level from `base` to B, in units of `unit`.
        unit: of each matrix, a power of two.
        cols, group: C, and columns that have a low and a scale in common.
        base: bits of the lowest level.
    """

    planes: UInt8[Tensor, "*batch bits rows bytes"]
    low: Float16[Tensor, "*batch levels rows groups"]
    scale: Float16[Tensor, "*batch levels rows groups"]
    unit: Float32[Tensor, "*batch"]
    cols: int
    group: int
    base: int

    @property
    def bits(self) -> int:
        return self.planes.shape[-3]

    @property
    def levels(self) -> range:
        return range(self.base, self.bits + 1)

    def check(self, level: int) -> int:
        """The level; `InputError` if there is none of it."""
        if level not in self.levels:
            raise InputError(f"level is {level} but must be from {self.base} to {self.bits} bits")
        return level

    def __getitem__(self, index: int) -> "NestedWeight":
        """One of a batch of matrices."""
        parts = (part[index] for part in (self.planes, self.low, self.scale, self.unit))
        return NestedWeight(*parts, self.cols, self.group, self.base)

    def plane(self, level: int) -> UInt8[Tensor, "*batch planes rows bytes"]:
        """The planes that a level has beyond the one below it: one, and of the lowest all it has."""
        first = 0 if self.check(level) == self.base else level - 1
        return self.planes[..., first:level, :, :]

    def codes(self, level: int) -> UInt8[Tensor, "*batch rows cols"]:
        """c_b, below 2^b."""
        return unpack_planes(self.planes[..., : self.check(level), :, :], self.cols)

    def dequant(self, level: int) -> Float32[Tensor, "*batch rows cols"]:
        """w_b."""
        at = self.check(level) - self.base
        unit = self.unit[..., None, None]
        return dequantised(
            self.planes[..., :level, :, :], self.low[..., at, :, :], self.scale[..., at, :, :], unit, self.cols,
            self.group,
        )  # fmt: skip

    def nbytes(self, level: int) -> int:
        """Bytes of one matrix at a level: its planes, and low and scale of this level and those below it.

        0 at level 0, where nothing of it is there.
        """
        if level == 0:
            return 0
        rows, groups = self.low.shape[-2:]
        return plane_bytes(rows, self.cols, self.check(level)) + 4 * rows * groups * (level - self.base + 1)


def dequantised(planes: Tensor, low: Tensor, scale: Tensor, unit: Tensor, cols: int, group: int) -> Tensor:
    """low + (code + 1/2) scale, in float32."""
    step = scale.float() * unit
    return dequantise_planes(planes, step, low.float() * unit + step / 2, cols, group)


@dataclass(frozen=True)
class NestedQuantizer:
    """How matrices are coded.

    Args:
        bits: B, 1 to 8.
        base: bits of the lowest level that is used, 1 to B.
        group: columns that have a low and a scale in common.
        weights: how much the error of each level counts where the range is chosen, from `base` to B; None: each by
            4^b, as errors fall by a factor of four a bit, so that all levels count alike.
        refit: low and scale of each level by least squares.
    """

    bits: int = 8
    base: int = 2
    group: int = 64
    weights: Sequence[float] | None = None
    refit: bool = True

    def __post_init__(self):
        if not 1 <= self.bits <= MOST:
            raise InputError(f"bits is {self.bits} but must be from 1 to {MOST}")
        if not 1 <= self.base <= self.bits:
            raise InputError(f"base is {self.base} but must be from 1 to bits = {self.bits}")
        if self.group < 1:
            raise InputError(f"group is {self.group} but must be at least 1")
        levels = self.bits - self.base + 1
        if self.weights is not None and (
            len(self.weights) != levels
            or not all(math.isfinite(weight) and weight >= 0 for weight in self.weights)
            or not any(self.weights)
        ):
            raise InputError(
                f"weights is {self.weights} but must have a finite number of at least 0 for each of the {levels} "
                "levels, and one above it"
            )

    @torch.no_grad()
    def fit(
        self, w: Float[Tensor, "*batch rows cols"], gram: Float[Tensor, "*batch cols cols"] | None = None
    ) -> NestedWeight:
        """Code matrices y = W x.

        Args:
            gram: X^T X of inputs X (tokens, C) that are typical: errors are ||X (W - W_b)^T||^2. None: of W itself.

        Raises:
            InputError: what is not finite, or too large for the scales, or a gram that does not fit.
        """
        if w.ndim < 2 or 0 in w.shape or not w.is_floating_point() or not torch.isfinite(w).all():
            raise InputError(
                f"w is {w.dtype} of shape {tuple(w.shape)} but must hold finite floating-point matrices of a row and "
                "a column at least"
            )
        if (most := float(w.abs().amax())) >= MOST_WEIGHT:
            raise InputError(f"w holds {most:.4g} but must be below 2^126 = {MOST_WEIGHT:.4g}, for scales in float32")
        *batch, _, cols = w.shape
        if gram is not None and (gram.shape != (*batch, cols, cols) or not torch.isfinite(gram).all()):
            raise InputError(
                f"gram has shape {tuple(gram.shape)} but must be finite and have {(*batch, cols, cols)}, as w has "
                f"{tuple(w.shape)}"
            )
        unit = _power_above(w.abs().amax((-2, -1)).float())
        x = (w.double() / unit.double()[..., None, None]).contiguous()
        gram = torch.eye(cols, dtype=x.dtype, device=x.device) if gram is None else gram.double()
        best, low, step = self._range(x, gram)
        levels = [*range(self.base, self.bits + 1)]
        lows, scales = [low] * len(levels), [step * 2.0 ** (self.bits - level) for level in levels]
        if self.refit:
            fits = [
                self._refit(x, gram, best >> (self.bits - level), low, scale)
                for level, scale in zip(levels, scales, strict=True)
            ]
            lows, scales = zip(*fits, strict=True)
        stacked = (torch.stack([*part], -3).half() for part in (lows, scales))
        return NestedWeight(pack_planes(best.to(torch.uint8), self.bits), *stacked, unit, cols, self.group, self.base)

    def _range(self, x: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (*batch, R, C) of the clip that suits each row best, and its low and step (*batch, R, G)."""
        levels = [*range(self.base, self.bits + 1)]
        weights = [4.0**level for level in levels] if self.weights is None else self.weights
        found = None
        for clip in CLIPS:
            low, step = self._grid(x, clip)
            codes = self._code(x, low, step)
            error = sum(
                weight * _error(x - self._made(codes, level, low, step * 2.0 ** (self.bits - level)), gram)
                for weight, level in zip(weights, levels, strict=True)
            )
            if found is None:
                found = (error, codes, low, step)
                continue
            better = error < found[0]
            parts = ((error, better), *((part, better[..., None]) for part in (codes, low, step)))
            found = tuple(torch.where(mask, new, old) for (new, mask), old in zip(parts, found, strict=True))
        return found[1:]

    def _grid(self, x: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        """Low and step (*batch, R, G) of a part of the range, in float16: low is not above it, step not below."""
        groups = self._groups(x, float("nan"))
        least, most = groups.nan_to_num(torch.inf).amin(-1), groups.nan_to_num(-torch.inf).amax(-1)
        mean = groups.nanmean(-1)
        low = mean - clip * (mean - least)
        low = (low - low.abs() * (UP - 1)).half().double()
        step = ((mean + clip * (most - mean) - low) / 2**self.bits * UP).half().double().clamp(min=LEAST)
        return low, step

    def _code(self, x: Tensor, low: Tensor, step: Tensor) -> Tensor:
        low, step = (self._spread(part, x.shape[-1]) for part in (low, step))
        return ((x - low) / step).floor().clamp(0, 2**self.bits - 1).to(torch.int16)

    def _made(self, codes: Tensor, level: int, low: Tensor, scale: Tensor) -> Tensor:
        low, scale = (self._spread(part, codes.shape[-1]) for part in (low, scale))
        return low + ((codes >> (self.bits - level)) + 0.5) * scale

    def _refit(self, x: Tensor, gram: Tensor, codes: Tensor, low: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Low and scale of a level that leave the least error, a row at a time; as before where they do not gain."""
        cols, groups = x.shape[-1], low.shape[-1]
        member = F.one_hot(torch.arange(cols, device=x.device) // self.group, groups).to(x.dtype)  # (C, G)
        basis = torch.cat(
            [member.expand(*x.shape, groups), (codes + 0.5)[..., None] * member], -1
        )  # (*batch, R, C, 2G)
        weighed = gram[..., None, :, :] @ basis
        normal = basis.mT @ weighed
        right = weighed.mT @ x[..., None]
        fit = (torch.linalg.pinv(normal, hermitian=True, rtol=1e-10) @ right)[..., 0]
        new_low, new_scale = (part.half().double() for part in fit.split(groups, -1))

        def error(low: Tensor, scale: Tensor) -> Tensor:
            return _error(x - self._spread(low, cols) - (codes + 0.5) * self._spread(scale, cols), gram)

        better = (error(new_low, new_scale) < error(low, scale))[..., None]
        return torch.where(better, new_low, low), torch.where(better, new_scale, scale)

    def _groups(self, x: Tensor, fill: float) -> Tensor:
        """(*batch, R, G, group)."""
        return F.pad(x, (0, -x.shape[-1] % self.group), value=fill).unflatten(-1, (-1, self.group))

    def _spread(self, part: Tensor, cols: int) -> Tensor:
        return part.repeat_interleave(self.group, -1)[..., :cols]


def level_errors(
    nested: NestedWeight, w: Float[Tensor, "*batch rows cols"], gram: Float[Tensor, "*batch cols cols"] | None = None
) -> dict[int, Float[Tensor, "*batch rows"]]:
    """||X (W - W_b)^T||^2 of each row at each level; without a gram that of the weights."""
    gram = torch.eye(w.shape[-1], dtype=torch.float64) if gram is None else gram.double()
    return {level: _error(w.double() - nested.dequant(level).double(), gram) for level in nested.levels}


def grams(inputs: Iterable[Tensor]) -> Float[Tensor, "batch dim dim"]:
    """X^T X of each expert's inputs (tokens, D), of as many as it has; those of an expert that has none are taken to be
    white, for nothing is known of them.
    """
    return torch.stack(
        [x.double().T @ x.double() if len(x) else torch.eye(x.shape[-1], dtype=torch.float64) for x in inputs]
    )


def _error(difference: Tensor, gram: Tensor) -> Tensor:
    """(*batch, R)."""
    return ((difference @ gram) * difference).sum(-1)


def _power_above(largest: Tensor) -> Tensor:
    """The least power of two above it; 1 for 0."""
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent), 1.0)
