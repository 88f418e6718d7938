"""Tunable convolutions: a network whose objective is chosen by knobs when it is used (Maggioni et al. 2023, CVPR).

    net = make_tunable(network, n_knobs=2)                      # a copy; every convolution has two kernels now
    with knobs(net, w):                                         # (2,), or one row an image: (B, 2)
        loss, parts = objective(net(x), y, x, w)                # the same w mixes kernels and losses
    plain = fuse(net, [0.3, 0.7])                               # ordinary convolutions, of no further cost
    tuned(net, images, [0.3, 0.7])                              # images checked, without gradients

A layer holds P kernels and P biases, and a = phi(w) mixes them into one (workbench/lib/core/tunable.py). With w drawn
anew for every image in training, and the losses weighted by the same w, every compromise is trained and none is
extrapolated.

The formulas of phi and of the loss are from memory of the paper. Knobs lie in [0, 1]; they are not brought to sum 1.

Tensor letters: P knobs, B batch, C channels, H height, W width.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.modes import evaluating
from workbench.lib.core.routing import Context
from workbench.lib.core.tunable import (
    LAYERS,
    Knobs,
    TunableConv2d,
    TunableLayer,
    TunableLinear,
    check_count,
    checked,
    one_setting,
)

METHOD = Method(
    slug="tunable-conv",
    title="Tunable Convolutions with Parametric Multi-Loss Optimization",
    family="imaging",
    year=2023,
    paper="CVPR 2023",
    claim="Kernels mixed by the same knobs that weight the losses give reliable control over all compromises, better "
    "than other ways of control and at virtually no extra cost.",
    objects=("make_tunable", "knobs", "fuse", "tuned", "TunableConv2d", "TunableLinear", "MultiLoss", "sample_knobs"),
    kind="images",
)

__all__ = [
    "MultiLoss",
    "TunableConv2d",
    "TunableLinear",
    "Tuned",
    "fuse",
    "knobs",
    "make_tunable",
    "sample_knobs",
    "scales_of",
    "tunable_layers",
    "tuned",
]

MODES = ("cube", "simplex", "axis")
CORNERS = 0.1
"""Of two knobs, the probability of one of the two ends, so that these are fitted well."""

Loss = Callable[[Tensor, Tensor, Tensor], Float[Tensor, " B"]]
"""(output, target, input) -> one value an image."""


def example() -> nn.Module:
    """Two convolutions at equal knobs."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    return Tuned(make_tunable(net, 2), (0.5, 0.5))


# -- models


def make_tunable(
    module: nn.Module,
    n_knobs: int,
    phi: str = "affine",
    filter: Callable[[str, nn.Module], bool] | None = None,
    noise: float | None = None,
) -> nn.Module:
    """A copy in which every `nn.Conv2d` and `nn.Linear` is tunable; norms and all else stay as they are, shared.

    Args:
        module: of any kind; itself a convolution or not. A layer in several places stays one layer.
        phi: one of `PHIS`.
        filter: (name, layer) -> whether to convert it; None for all.
        noise: None draws every kernel anew, by the layer's own rule. For a trained module a deviation, as a share of
            the root mean square of each weight: every kernel is its own copy of the weight and so much noise.

    Raises:
        InputError: an argument does not fit, or there is no layer to convert.
    """
    check_count(n_knobs)
    if noise is not None and not 0 <= noise < float("inf"):
        raise InputError(f"noise is {noise} but must be None or a finite number of at least 0")
    made = copy.deepcopy(module)
    new: dict[int, nn.Module] = {}
    for name, layer in made.named_modules():
        if type(layer) in LAYERS and (filter is None or filter(name, layer)):
            new[id(layer)] = LAYERS[type(layer)].of(_copies(layer, n_knobs, noise), phi).train(layer.training)
    if not new:
        raise InputError("module has no convolution or linear layer to convert")
    return _replaced(made, new)


def tunable_layers(model: nn.Module) -> list[TunableLayer]:
    """The tunable layers of a model, each once; an `InputError` where there is none."""
    layers = [layer for layer in model.modules() if isinstance(layer, TunableLayer)]
    if not layers:
        raise InputError("model has no tunable layer: make_tunable(model, n_knobs) makes a model that has")
    return layers


@contextmanager
def knobs(model: nn.Module, w: Knobs) -> Iterator[Tensor]:
    """Inside, every tunable layer of the model is at these knobs: (P,) for all images, or one row an image (B, P)."""
    layers = tunable_layers(model)
    w = checked(w, layers[0].n_knobs)
    before = [layer.set for layer in layers]
    try:
        for layer in layers:
            layer.set = w
        yield w
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.set = was


def fuse(model: nn.Module, w: Knobs) -> nn.Module:
    """A copy of the model at one setting of the knobs, with plain layers: what it costs is what the original costs."""
    tunable_layers(model)
    made = copy.deepcopy(model)
    return _replaced(made, {id(layer): layer.fuse(w).train(layer.training) for layer in tunable_layers(made)})


def tuned(model: nn.Module, images: Float[Tensor, "..."], w: Knobs) -> Tensor:
    """The model's output for these images at these knobs, in evaluation mode; images (B, C, H, W) are checked."""
    if images.ndim != 4 or not images.numel():
        raise InputError(f"images has shape {tuple(images.shape)} but must be (batch, channels, height, width)")
    if not images.isfinite().all():
        raise InputError("images has values that are NaN or infinite")
    with evaluating(model), knobs(model, w):
        return model(images)


class Tuned(nn.Module):
    """A tunable model as any other: at the knobs it is given with the images, or else at those where it stands."""

    def __init__(self, net: nn.Module, w: Knobs):
        super().__init__()
        self.net = net
        self.register_buffer("w", one_setting(w, tunable_layers(net)[0].n_knobs))

    def forward(
        self, x: Float[Tensor, "B C H W"], context: Context | None = None, w: Knobs | None = None
    ) -> Float[Tensor, "B ..."]:
        with knobs(self.net, self.w if w is None else w):
            return self.net(x)


def _copies(layer: nn.Module, count: int, noise: float | None) -> list[nn.Module]:
    found = [copy.deepcopy(layer) for _ in range(count)]
    for one in found:
        if noise is None:
            one.reset_parameters()
        else:
            with torch.no_grad():
                for value in one.parameters():
                    value += noise * value.square().mean().sqrt() * torch.randn_like(value)
    return found


def _replaced(model: nn.Module, new: dict[int, nn.Module]) -> nn.Module:
    if id(model) in new:
        return new[id(model)]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in new:
                setattr(parent, name, new[id(child)])
    for parent in list(model.modules()):  # the same layer under a second name of one parent
        for name, child in parent._modules.items():
            if id(child) in new:
                parent._modules[name] = new[id(child)]
    return model


# -- knobs and losses


def sample_knobs(
    rows: int, n_knobs: int, mode: str = "cube", generator: torch.Generator | None = None
) -> Float[Tensor, "rows P"]:
    """Knobs to train at, one row an image.

    Args:
        mode: "cube" is uniform in [0, 1]^P; "simplex" is uniform among those of sum 1, for losses of which only the
            proportions matter; "axis" is (u, 1 - u), for two objectives that are opposite ends. Of two knobs a row is
            one of the corners (1, 0) and (0, 1) with probability `CORNERS`, whatever the mode.
    """
    check_count(n_knobs)
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if rows < 1 or (mode == "axis" and n_knobs != 2):
        raise InputError(f"rows, n_knobs are {rows}, {n_knobs} but must be at least 1, and 2 on an axis")
    u = torch.rand(rows, n_knobs, generator=generator)
    if mode == "axis":
        w = torch.stack([u[:, 0], 1 - u[:, 0]], 1)
    elif mode == "simplex":
        u = -(1 - u).log()
        w = torch.where(u.sum(1, keepdim=True) > 0, u / u.sum(1, keepdim=True), 1 / n_knobs)
    else:
        w = u
        while not (empty := w.any(1).logical_not()).logical_not().all():  # all knobs at 0 are no objective
            w[empty] = torch.rand(int(empty.sum()), n_knobs, generator=generator)
    if n_knobs == 2:
        at_corner = torch.rand(rows, generator=generator) < CORNERS
        which = torch.randint(2, (rows,), generator=generator)
        w = torch.where(at_corner[:, None], torch.eye(2)[which], w)
    return w


class MultiLoss(nn.Module):
    """L(w) = sum_p w_p s_p L_p, the mean over the images, each at its own knobs.

    Args:
        losses: P functions (output, target, input) -> one value an image.
        scales: s, P fixed numbers above 0 that make the losses alike in magnitude; see `scales_of`.
    """

    def __init__(self, losses: Sequence[Loss], scales: Iterable[float]):
        super().__init__()
        self.losses = list(losses)
        self.register_buffer("scales", torch.as_tensor([float(scale) for scale in scales]))
        if len(self.scales) != len(self.losses) or not self.losses:
            raise InputError(f"scales has {len(self.scales)} numbers but must have one for each of {len(self.losses)}")
        if not ((self.scales > 0) & self.scales.isfinite()).all():
            raise InputError(f"scales are {self.scales.tolist()} but must be finite numbers above 0")

    def forward(
        self, pred: Tensor, target: Tensor, x: Tensor, w: Knobs
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " P"]]:
        """The loss, and the mean of every s_p L_p, which the knobs have not weighted."""
        w = checked(w, len(self.losses)).to(pred)
        parts = torch.stack([loss(pred, target, x) for loss in self.losses], -1) * self.scales.to(pred)  # (B, P)
        return (parts * w).sum(-1).mean(), parts.mean(0)


def scales_of(losses: Sequence[Loss], batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> list[float]:
    """One over the mean of every loss on a few batches (output, target, input)."""
    with torch.no_grad():
        values = torch.cat([torch.stack([loss(*batch) for loss in losses], -1) for batch in batches])
    means = values.double().mean(0)
    if not ((means > 0) & means.isfinite()).all():
        raise InputError(f"losses have means {means.tolist()} on these batches but must all be finite and above 0")
    return (1 / means).tolist()
