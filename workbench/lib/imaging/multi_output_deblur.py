"""Several outputs of which only the best is penalised (Liu et al. 2022, Multi-Outputs Is All You Need For Deblur).

    model = MultiOutput(NAFNet(3, 16, out_ch=3 * 4), heads=4)
    outputs = model(blurred)                               # (B, 10, 3, H, W): 4 heads and the means of their pairs
    loss, winner = winner_loss(outputs, sharp)             # only the best output of an image is penalised

A blurred image may have come from many sharp ones, and the one that is the label is a sample of these. Heads that need
not all be right become different. The best of them is known only with the label at hand: what can be used without it
is one head, chosen on other images (`OutputReport.best_single`).

Tensor letters: B batch, C channels, H height, W width, K outputs.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.nafnet import NAFNet
from workbench.lib.core.observe import Announcing
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.task import psnr

METHOD = Method(
    slug="multi-output-deblur",
    title="Multi-Outputs Is All You Need For Deblur",
    family="imaging",
    year=2022,
    paper="arXiv, August 2022",
    claim="Several outputs of which only the best is penalised deblur better than one, with almost no extra "
    "parameters.",
    objects=("MultiOutput", "winner_loss", "output_report", "OutputReport"),
    kind="images",
)

LOSSES = ("psnr", "charbonnier_edge")


def example() -> nn.Module:
    """Two heads on a small NAFNet, and their mean."""
    return MultiOutput(NAFNet(3, 8, out_ch=6), heads=2)


class MultiOutput(Announcing):
    """(B, C, H, W) -> (B, K, C, H, W): what each head adds to the image, and with `multiplex` the means of all pairs.

    Which output won is announced by `won`, so the outputs can be watched as the experts of a router.

    Args:
        backbone: makes C * heads channels of an image; a wider last convolution is all that several heads cost.
        heads: how many.
        multiplex: K is heads (heads + 1) / 2, the means of all pairs of heads, a head with itself among them; without
            it K is heads.

    Attributes:
        pairs: (K, 2) the heads whose mean an output is.

    Raises:
        InputError: no head, or a backbone whose channels are not the image's for each head.
    """

    top_k = 1

    def __init__(self, backbone: nn.Module, heads: int, multiplex: bool = True):
        super().__init__()
        if heads < 1:
            raise InputError(f"heads is {heads} but must be at least 1")
        self.backbone, self.heads = backbone, heads
        pairs = torch.tril_indices(heads, heads).T if multiplex else torch.arange(heads)[:, None].expand(-1, 2)
        self.register_buffer("pairs", pairs.contiguous(), persistent=False)
        self.n_experts = len(pairs)

    def forward(self, x: Float[Tensor, "B C H W"], context: Context | None = None) -> Float[Tensor, "B K C H W"]:
        changes = self.backbone(x)
        if changes.ndim != 4 or changes.shape[1] != self.heads * x.shape[1]:
            raise InputError(
                f"backbone makes {tuple(changes.shape)} of {tuple(x.shape)} but must make {self.heads} heads of "
                f"{x.shape[1]} channels"
            )
        first, second = changes.unflatten(1, (self.heads, x.shape[1]))[:, self.pairs.T].unbind(1)
        return x[:, None] + (first + second) / 2

    def won(self, winner: Int64[Tensor, " B"], context: Context) -> None:
        """Announce which output is penalised, as the expert that an image was sent to."""
        if self.observed:
            weights = torch.ones(len(winner), 1, device=winner.device)
            self.announce(Routing.fixed(winner[:, None], weights, self.n_experts), context)


def winner_loss(
    outputs: Float[Tensor, "B K C H W"], target: Float[Tensor, "B C height width"], kind: str = "psnr"
) -> tuple[Float[Tensor, ""], Int64[Tensor, " B"]]:
    """The mean over images of the loss of each one's best output, and which that is.

    Args:
        kind: "psnr", minus the peak signal to noise ratio in dB, or "charbonnier_edge", a smooth absolute error plus
            0.05 times that of the Laplacian.

    Raises:
        InputError: shapes that do not fit, numbers that are not finite, or another kind.
    """
    _check(outputs, target)
    if kind == "psnr":
        errors = (outputs - target[:, None]).square().flatten(2).mean(2)
    elif kind == "charbonnier_edge":
        truth = target[:, None].expand_as(outputs)
        errors = _charbonnier(outputs - truth) + 0.05 * _charbonnier(_laplacian(outputs) - _laplacian(truth))
    else:
        raise unknown("kind", kind, LOSSES)
    least, winner = errors.min(1)
    if kind == "psnr":
        return (10 / math.log(10)) * (least + 1e-8).log().mean(), winner
    return least.mean(), winner


def _charbonnier(difference: Float[Tensor, "B K C H W"]) -> Float[Tensor, "B K"]:
    return (difference.square() + 1e-6).sqrt().flatten(2).mean(2)


def _laplacian(images: Float[Tensor, "B K C H W"]) -> Float[Tensor, "B K C H W"]:
    """What an image loses when every second pixel of its smooth version, brought back smoothly, is all there is."""
    single = images.flatten(0, 2)[:, None]
    coarse = torch.zeros_like(single)
    coarse[..., ::2, ::2] = 4 * _smooth(single)[..., ::2, ::2]
    return (single - _smooth(coarse)).reshape(images.shape)


def _smooth(images: Float[Tensor, "N 1 H W"]) -> Float[Tensor, "N 1 H W"]:
    taps = images.new_tensor([0.05, 0.25, 0.4, 0.25, 0.05])
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), taps.outer(taps)[None, None])


@dataclass(frozen=True)
class OutputReport:
    """How good the outputs for a set of images are, in dB.

    Attributes:
        per_output: (K,) mean PSNR of each.
        best_overall: mean of each image's best output. An oracle: it takes the truth to know which that is.
        worst: mean of each image's worst.
        usage: (K,) share of the images for which each is the best.
    """

    per_output: tuple[float, ...]
    best_overall: float
    worst: float
    usage: tuple[float, ...]

    @property
    def best_single(self) -> int:
        """The output that is the best on average: to be chosen on images other than those it is judged on."""
        return max(range(len(self.per_output)), key=self.per_output.__getitem__)

    @property
    def oracle_gap(self) -> float:
        """What knowing the best output of each image is worth beyond the one that is the best on average."""
        return self.best_overall - self.per_output[self.best_single]


def output_report(outputs: Float[Tensor, "B K C H W"], target: Float[Tensor, "B C height width"]) -> OutputReport:
    """PSNR at a peak of 1, of outputs held within 0 and 1.

    Raises:
        InputError: shapes that do not fit, no image, or numbers that are not finite.
    """
    _check(outputs, target)
    found = torch.stack([psnr(output, target) for output in outputs.unbind(1)], 1)
    best, winner = found.max(1)
    usage = winner.bincount(minlength=found.shape[1]) / len(found)
    return OutputReport(
        tuple(found.mean(0).tolist()), best.mean().item(), found.amin(1).mean().item(), tuple(usage.tolist())
    )


def _check(outputs: Tensor, target: Tensor) -> None:
    if outputs.ndim != 5 or not outputs.numel() or outputs[:, 0].shape != target.shape:
        raise InputError(
            f"outputs, target have shapes {tuple(outputs.shape)}, {tuple(target.shape)} but must be (B, K, C, H, W), "
            "(B, C, H, W) and not empty"
        )
    for name, images in (("outputs", outputs), ("target", target)):
        if not images.isfinite().all():
            raise InputError(f"{name} has numbers that are not finite")


__all__ = ["METHOD", "MultiOutput", "OutputReport", "example", "output_report", "winner_loss"]
