"""How near images are to the true ones: PSNR and SSIM of each image, by torchmetrics (the extra `imaging`).

Conventions, the same for both and pinned by tests against scikit-image:

    range       values from 0 to `data_range`; what lies outside is cut off first
    reduction   one value an image, over its channels and pixels together; no mean over images is taken here
    window      SSIM's: Gaussian of deviation 1.5 within 11 x 11 pixels; the mean over windows that lie inside the image

PSNR of a perfect image is infinite. SSIM has the constants K1 = 0.01 and K2 = 0.03 and variances over n (Wang et al.
2004, Image quality assessment: from error visibility to structural similarity); of several channels it is their mean.

Images and truth are (B, C, H, W): batch, channels, height, width.
"""

from types import ModuleType

import torch
from jaxtyping import Float, Float64, Num
from torch import Tensor

from workbench.errors import InputError

WINDOW, DEVIATION = 11, 1.5
"""Pixels of SSIM's window a side, and the deviation of its Gaussian."""


def psnr(images: Num[Tensor, "..."], truth: Num[Tensor, "..."], data_range: float = 1.0) -> Float64[Tensor, " B"]:
    """10 log10(data_range^2 / mean square error) of each image, in dB.

    Raises:
        InputError: the shapes differ or are no batch of images, a value is NaN or infinite, or torchmetrics is missing.
    """
    images, truth = _checked(images, truth, data_range)
    metric = _torchmetrics().peak_signal_noise_ratio
    return metric(images, truth, data_range=(0.0, float(data_range)), reduction="none", dim=(1, 2, 3))


def ssim(images: Num[Tensor, "..."], truth: Num[Tensor, "..."], data_range: float = 1.0) -> Float64[Tensor, " B"]:
    """Structural similarity of each image, -1 to 1.

    Raises:
        InputError: as for `psnr`; or a side is shorter than the window.
    """
    images, truth = _checked(images, truth, data_range)
    if min(images.shape[2:]) < WINDOW:
        height, width = images.shape[2:]
        raise InputError(f"images are {height} x {width} but must be at least {WINDOW} pixels a side, SSIM's window")
    metric = _torchmetrics().structural_similarity_index_measure
    _, every = metric(
        images,
        truth,
        sigma=DEVIATION,
        kernel_size=WINDOW,
        data_range=(0.0, float(data_range)),
        reduction="none",
        return_full_image=True,
    )
    edge = WINDOW // 2  # beyond it the window reaches into what torchmetrics reflects
    height, width = images.shape[2:]
    return every[:, :, edge : height - edge, edge : width - edge].mean((1, 2, 3))


def _checked(images: Tensor, truth: Tensor, data_range: float) -> tuple[Float[Tensor, "B C H W"], ...]:
    if not 0 < data_range < float("inf"):
        raise InputError(f"data_range is {data_range} but must be a finite number above 0")
    for name, given in (("images", images), ("truth", truth)):
        if given.ndim != 4 or not given.numel():
            raise InputError(f"{name} has shape {tuple(given.shape)} but must be (batch, channels, height, width)")
        if given.is_complex() or not given.isfinite().all():
            raise InputError(f"{name} has values that are no finite real numbers")
    if images.shape != truth.shape:
        raise InputError(f"images has shape {tuple(images.shape)} but must be as truth, {tuple(truth.shape)}")
    return images.to(torch.float64), truth.to(torch.float64)


def _torchmetrics() -> ModuleType:
    try:
        from torchmetrics.functional import image  # slow to import; only where a measure is asked for
    except ImportError as error:
        raise InputError("measures of images need torchmetrics: pip install 'workbench[imaging]'") from error
    return image
