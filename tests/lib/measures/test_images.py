"""PSNR and SSIM: scikit-image's values, the conventions, and what is refused."""

import math
import sys

import numpy as np
import pytest
import torch

from workbench.errors import InputError
from workbench.lib.core.task import psnr as psnr_of_task
from workbench.lib.measures.images import psnr, ssim


def pair(channels: int = 1, height: int = 20, width: int = 27, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(channels)
    across, down = torch.linspace(0, 6, width), torch.linspace(0, 4, height)
    truth = (0.5 + 0.4 * torch.sin(down[:, None] * across)).expand(3, channels, height, width)
    return truth + noise * torch.randn(truth.shape, generator=generator), truth


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_values_are_those_of_scikit_image(channels: int, data_range: float):
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    images, truth = (data_range * x for x in pair(channels))
    similar, peak = ssim(images, truth, data_range), psnr(images, truth, data_range)
    assert similar.shape == peak.shape == (3,) and similar.dtype == peak.dtype == torch.float64
    for row in range(3):
        ours, theirs = (x[row].double().clamp(0, data_range).numpy() for x in (images, truth))
        assert peak[row].item() == pytest.approx(peak_signal_noise_ratio(theirs, ours, data_range=data_range), rel=1e-6)
        expected = structural_similarity(
            ours,
            theirs,
            data_range=data_range,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert similar[row].item() == pytest.approx(expected, rel=1e-6)


def test_the_peak_is_the_range_and_what_lies_outside_is_cut_off():
    images, truth = pair(noise=0.3)
    assert images.max() > 1 and images.min() < 0
    assert torch.equal(psnr(images, truth), psnr(images.clamp(0, 1), truth))
    assert torch.equal(ssim(images, truth), ssim(images.clamp(0, 1), truth))
    torch.testing.assert_close(psnr(images, truth), psnr_of_task(images, truth))
    truth, images = torch.zeros(1, 1, 11, 11), torch.full((1, 1, 11, 11), 0.1, dtype=torch.float64)
    assert psnr(images, truth).item() == pytest.approx(20)
    assert psnr(images, truth, 10.0).item() == pytest.approx(40)


def test_the_true_image_is_perfect_and_whole_numbers_are_taken():
    truth = (255 * pair()[1]).byte()
    assert psnr(truth, truth, 255).tolist() == [math.inf] * 3
    assert ssim(truth, truth, 255).tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x[0], r"images has shape \(1, 20, 27\) but must be \(batch"),
        (lambda x: x[:0], "images has shape"),
        (lambda x: x[..., 1:], "but must be as truth"),
        (lambda x: x[:1], "but must be as truth"),
        (lambda x: x.expand(3, 4, 20, 27), "but must be as truth"),  # RGBA of grey
        (lambda x: torch.full_like(x, math.nan), "no finite real numbers"),
        (lambda x: torch.full_like(x, math.inf), "no finite real numbers"),
        (lambda x: x.to(torch.complex64), "no finite real numbers"),
    ],
)
def test_wrong_images_are_refused(change, said: str):
    images, truth = pair()
    for measure in (psnr, ssim):
        with pytest.raises(InputError, match=said):
            measure(change(images), truth)


def test_nan_in_the_truth_a_small_image_and_a_range_of_nothing_are_refused():
    images, truth = pair()
    with pytest.raises(InputError, match="truth has values"):
        psnr(images, truth * np.nan)
    with pytest.raises(InputError, match="10 x 27 but must be at least 11 pixels a side"):
        ssim(images[:, :, :10], truth[:, :, :10])
    assert ssim(images[..., :11, :11], truth[..., :11, :11]).isfinite().all()
    assert psnr(images[..., :1, :1], truth[..., :1, :1]).isfinite().all()
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="data_range is"):
            psnr(images, truth, value)


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional", None)
    images, truth = pair()
    with pytest.raises(InputError, match=r"torchmetrics: pip install 'workbench\[imaging\]'"):
        psnr(images, truth)
