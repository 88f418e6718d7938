"""Layers with several kernels, which knobs mix into one before the images are seen (Maggioni et al. 2023).

Of P kernels and biases a layer makes W = sum_p a_p W_p and b = sum_p a_p b_p with a = phi(w), at P |W| products a
setting, whatever the size of the image. With one setting for all images this is one plain convolution more than the
mixing. Where each image has a setting of its own, the batch becomes the groups of one grouped convolution, which torch
does as fast (`workbench bench imaging`); so there is no kernel of the workbench's own here.

Tensor letters: P knobs, B batch, C and D channels in and out, H height, W width, k side of a kernel.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError, unknown

PHIS = ("identity", "affine", "mlp")

Knobs = Tensor | Sequence[float]


def make_phi(kind: str, n_knobs: int) -> nn.Module:
    """From knobs (..., P) to how much of each kernel: "identity", "affine" (identity at first) or "mlp".

    None has a softmax: a mix need not be convex, and the knobs (0, ..., 0) need not be the equal ones.
    """
    if kind == "identity":
        return nn.Identity()
    if kind == "affine":
        layer = nn.Linear(n_knobs, n_knobs)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(n_knobs))
            layer.bias.zero_()
        return layer
    if kind == "mlp":
        return nn.Sequential(nn.Linear(n_knobs, 4 * n_knobs), nn.ReLU(), nn.Linear(4 * n_knobs, n_knobs))
    raise unknown("phi", kind, PHIS)


class TunableLayer(nn.Module):
    """P weights and biases of one layer, their mixing, and the knobs that `knobs` has set.

    Args:
        layers: P layers of one shape, whose weights are taken.
        phi: one of `PHIS`.
    """

    def __init__(self, layers: Sequence[nn.Conv2d | nn.Linear], phi: str):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        biases = [layer.bias for layer in layers]
        self.bias = None if biases[0] is None else nn.Parameter(torch.stack([bias.detach() for bias in biases]))
        self.phi = make_phi(phi, len(layers)).to(self.weight)
        self.set: Tensor | None = None

    @property
    def n_knobs(self) -> int:
        return len(self.weight)

    def mixed(self, w: Float[Tensor, "*rows P"]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias at these knobs, with the dimensions of w before them."""
        a = self.phi(w.to(self.weight))
        weight = (a @ self.weight.flatten(1)).view(*a.shape[:-1], *self.weight.shape[1:])
        return weight, None if self.bias is None else a @ self.bias

    def at(self, w: Knobs | None, rows: int) -> Tensor:
        """The knobs to use for so many images: those given, or those set."""
        if w is not None:
            w = checked(w, self.n_knobs)
        elif self.set is None:
            raise InputError("no knobs are set: call the layer with w, or the model inside `with knobs(model, w)`")
        else:
            w = self.set
        if w.ndim == 2 and len(w) != rows:
            raise InputError(f"w has {len(w)} rows but the layer is given {rows}: one setting for all, or one a row")
        return w


class TunableConv2d(TunableLayer):
    """A convolution with one kernel for each knob: (B, C, H, W) -> (B, D, H', W').

    Args:
        in_ch, out_ch, k: as of `nn.Conv2d`.
        n_knobs: P.
        phi: one of `PHIS`.
        conv: further arguments of `nn.Conv2d`: stride, padding, dilation, groups, bias, padding_mode.
    """

    def __init__(
        self, in_ch: int, out_ch: int, k: int | tuple[int, int], n_knobs: int, phi: str = "affine", **conv: object
    ):
        check_count(n_knobs)
        self._become([nn.Conv2d(in_ch, out_ch, k, **conv) for _ in range(n_knobs)], phi)

    def _become(self, layers: Sequence[nn.Conv2d], phi: str) -> None:
        super().__init__(layers, phi)
        self.plain = {
            name: getattr(layers[0], name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")
        }
        self.around = tuple(layers[0]._reversed_padding_repeated_twice)

    @classmethod
    def of(cls, layers: Sequence[nn.Conv2d], phi: str) -> "TunableConv2d":
        """A layer that has taken its kernels from these, which are alike but for their values."""
        layer = cls.__new__(cls)
        layer._become(layers, phi)
        return layer

    def forward(self, x: Float[Tensor, "B C H W"], w: Knobs | None = None) -> Float[Tensor, "B D height width"]:
        options = self._check(x)
        w = self.at(w, len(x))
        if self.plain["padding_mode"] != "zeros":
            x, options["padding"] = F.pad(x, self.around, mode=self.plain["padding_mode"]), 0
        weight, bias = self.mixed(w)
        if w.ndim == 1:
            return F.conv2d(x, weight, bias, **options)
        options["groups"] *= len(x)
        bias = None if bias is None else bias.flatten()
        y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), bias, **options)
        return y.view(len(x), -1, *y.shape[2:])

    def fuse(self, w: Knobs) -> nn.Conv2d:
        """The plain convolution at one setting of the knobs."""
        weight, bias = self.mixed(one_setting(w, self.n_knobs))
        out, per_group, *k = weight.shape
        fused = nn.Conv2d(per_group * self.plain["groups"], out, k, bias=bias is not None, **self.plain)
        return filled(fused.to(weight), weight, bias)

    def made_matrices(self) -> Iterator[tuple[str, nn.Parameter, Callable[[Tensor], Tensor]]]:
        """Each kernel as the matrix (D, C k k / groups) that it is: see `workbench.live.probes`."""
        for p in range(self.n_knobs):
            yield f"kernels.{p}", self.weight, lambda weight, p=p: weight[p].flatten(1)

    def _check(self, x: Tensor) -> dict[str, object]:
        _, per_group, *k = self.weight.shape[1:]
        if x.ndim != 4 or x.shape[1] != per_group * self.plain["groups"] or not len(x):
            raise InputError(
                f"x has shape {tuple(x.shape)} but must be (batch, {per_group * self.plain['groups']}, height, width)"
            )
        sides = [side + around for side, around in zip(x.shape[2:], self._padded(), strict=True)]
        spans = [1 + dilation * (side - 1) for dilation, side in zip(self.plain["dilation"], k, strict=True)]
        if any(side < span for side, span in zip(sides, spans, strict=True)):
            raise InputError(
                f"x is {x.shape[2]} x {x.shape[3]}, with its padding {sides[0]} x {sides[1]}, but must be at least "
                f"{spans[0]} x {spans[1]}, what a kernel spans"
            )
        return {name: self.plain[name] for name in ("stride", "padding", "dilation", "groups")}

    def _padded(self) -> tuple[int, int]:
        left, right, top, bottom = self.around
        return top + bottom, left + right


class TunableLinear(TunableLayer):
    """A linear layer with one matrix for each knob: (B, ..., C) -> (B, ..., D)."""

    def __init__(self, in_features: int, out_features: int, n_knobs: int, phi: str = "affine", bias: bool = True):
        check_count(n_knobs)
        super().__init__([nn.Linear(in_features, out_features, bias) for _ in range(n_knobs)], phi)

    @classmethod
    def of(cls, layers: Sequence[nn.Linear], phi: str) -> "TunableLinear":
        layer = cls.__new__(cls)
        TunableLayer.__init__(layer, layers, phi)
        return layer

    def forward(self, x: Float[Tensor, "*B C"], w: Knobs | None = None) -> Float[Tensor, "*B D"]:
        if x.ndim < 1 or x.shape[-1] != self.weight.shape[-1]:
            raise InputError(f"x has shape {tuple(x.shape)} but must be (..., {self.weight.shape[-1]})")
        w = self.at(w, len(x))
        weight, bias = self.mixed(w)
        if w.ndim == 1:
            return F.linear(x, weight, bias)
        flat = x.reshape(len(x), -1, x.shape[-1])
        y = flat @ weight.mT if bias is None else torch.baddbmm(bias[:, None], flat, weight.mT)
        return y.view(*x.shape[:-1], -1)

    def fuse(self, w: Knobs) -> nn.Linear:
        """The plain layer at one setting of the knobs."""
        weight, bias = self.mixed(one_setting(w, self.n_knobs))
        return filled(nn.Linear(*weight.shape[::-1], bias=bias is not None).to(weight), weight, bias)


LAYERS: dict[type[nn.Module], type[TunableLayer]] = {nn.Conv2d: TunableConv2d, nn.Linear: TunableLinear}
"""What is converted, and to what. Subclasses are left as they are: what they do with their weights is their own."""


def filled(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def check_count(n_knobs: int) -> None:
    if not isinstance(n_knobs, int) or isinstance(n_knobs, bool) or n_knobs < 1:
        raise InputError(f"n_knobs is {n_knobs!r} but must be a whole number of at least 1")


def checked(w: Knobs, n_knobs: int) -> Float[Tensor, "*rows P"]:
    """Knobs as a tensor, (P,) or (rows, P), of numbers from 0 to 1."""
    w = torch.as_tensor(w, dtype=None if isinstance(w, Tensor) else torch.get_default_dtype())
    if not w.is_floating_point() or w.ndim not in (1, 2) or w.shape[-1] != n_knobs or not len(w):
        raise InputError(
            f"w is {w.dtype} of shape {tuple(w.shape)} but must be floating point, ({n_knobs},) or (rows, {n_knobs})"
        )
    if not ((w >= 0) & (w <= 1)).all():  # false of NaN too
        raise InputError(f"w has values from {w.min().item():g} to {w.max().item():g} but all must be within 0 to 1")
    return w


def one_setting(w: Knobs, n_knobs: int) -> Float[Tensor, " P"]:
    w = checked(w, n_knobs)
    if w.ndim != 1:
        raise InputError(f"w has shape {tuple(w.shape)} but must be one setting, ({n_knobs},)")
    return w
