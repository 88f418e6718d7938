"""MNIST-1D: ten short curves, padded, stretched, moved, sheared and drowned in noise (Greydanus and Kobak, 2011.14439).

A set of 5,000 signals on which a linear model, an MLP and a convolutional one are far apart, and which takes a second
to make. Written here from the published procedure; the heights of the curves and the constants are those of the
authors' release (mnist1d, Apache-2.0), whose `make_dataset` gives the same signals up to rounding.
"""

from hashlib import sha256

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d

from workbench.lib.data.cache import Parsed, cached
from workbench.lib.data.images import DIGITS, arrays
from workbench.lib.data.sets import SETS
from workbench.lib.data.types import Arrays

ROWS = 5000
SEED = 42
KNOTS = 12
PADDING = (36, 60)
STRETCHED = KNOTS + PADDING[1]
SCALE = 0.4
MOST_MOVED = 48
CORRELATED_NOISE = 0.25
WHITE_NOISE = 0.02
SHEAR = 0.75
LENGTH = 40

HEIGHTS = (  # of each digit's curve at its twelve knots, in hundredths
    (500, 600, 650, 675, 700, 700, 700, 700, 675, 650, 600, 500),
    (500, 300, 300, 340, 380, 420, 460, 500, 540, 580, 500, 500),
    (500, 600, 650, 650, 600, 525, 475, 400, 350, 350, 400, 500),
    (500, 600, 650, 650, 600, 500, 500, 600, 650, 650, 600, 500),
    (500, 440, 380, 320, 260, 260, 500, 500, 500, 500, 500, 500),
    (500, 300, 300, 300, 300, 500, 600, 650, 650, 600, 450, 500),
    (500, 400, 350, 325, 300, 300, 300, 300, 325, 350, 400, 500),
    (500, 700, 700, 660, 620, 580, 540, 500, 460, 420, 500, 500),
    (500, 400, 350, 350, 400, 500, 500, 400, 350, 350, 400, 500),
    (500, 400, 350, 350, 400, 500, 500, 500, 500, 470, 430, 500),
)


def load(fold: int = 0) -> Arrays:
    """The 5,000 signals: x float32 (rows, 40), mean 0 and deviation 1 over all of them; y int64 (rows,).

    The release splits them 4,000 / 1,000; here, as everywhere, 70 / 10 / 20 by digest, another one for each `fold`.

    Raises:
        InputError: `fold` is negative.
    """

    def build() -> Parsed:
        x, y = generate()
        x = x.astype(np.float32)
        tensors = {"x": torch.from_numpy(x), "y": torch.from_numpy(y)}
        return tensors, {"sha256": sha256(x.tobytes() + y.tobytes()).hexdigest()}

    tensors, manifest = cached("mnist-1d", str(SEED), build)
    origin = {"source": "MNIST-1D, made here", "version": f"seed {SEED}", "licence": SETS["mnist-1d"].licence}
    return arrays("mnist-1d", tensors["x"], tensors["y"], DIGITS, fold, origin | manifest)


def generate(rows: int = ROWS, seed: int = SEED) -> tuple[np.ndarray, np.ndarray]:
    """Signals float64 (rows, 40), normalised together, and their digits int64 (rows,), equally many of each."""
    # The release draws from numpy's old global generator; its stream is frozen (NEP 19), so the set never changes.
    random = np.random.RandomState(seed)
    shapes = curves()
    y = np.repeat(np.arange(len(shapes)), rows // len(shapes))
    x = np.stack([signal(shapes[digit], random) for digit in y])
    order = random.permutation(len(y))
    return (x[order] - x.mean()) / x.std(), y[order]


def curves() -> np.ndarray:
    """The ten clean curves (10, 12), each of deviation 1/6 and starting at 0."""
    heights = np.array(HEIGHTS) / 100
    return (heights - heights[:, :1]) / heights.std(axis=1, keepdims=True) / 6


def signal(curve: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """One signal (40,) from a curve (12,); the draws come in the order of the release."""
    shortest, longest = PADDING
    padded = np.append(curve + 1e-8, np.zeros(shortest + int(random.rand() * (longest - shortest + 1))))
    stretched = resample(padded, STRETCHED) * (1 + SCALE * (random.rand() - 0.5))
    moved = np.roll(stretched, random.choice(MOST_MOVED))
    background = gaussian_filter1d(CORRELATED_NOISE * random.randn(STRETCHED), 2)
    noisy = np.where(moved != 0, moved, background) + WHITE_NOISE * random.randn(STRETCHED)
    slope = SHEAR * (random.rand() - 0.5)
    return resample(noisy - slope * np.linspace(-0.5, 0.5, STRETCHED), LENGTH)


def resample(values: np.ndarray, length: int) -> np.ndarray:
    """Linear interpolation of (n,) at `length` points spread evenly from its first to its last."""
    return np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(values)), values)
