"""Photographs, whole and as released; what is cut from them, and how it is spoiled, is a test-bed's choice."""

import io
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from workbench.lib.data import store
from workbench.lib.data.cache import Parsed, cached
from workbench.lib.data.sets import SETS
from workbench.lib.data.splits import SPLITS
from workbench.lib.data.types import Photos

HELD_OUT = {
    "astronaut": "test",
    "camera": "test",
    "coffee": "test",
    "flower": "test",
    "page": "test",
    "coins": "validation",
    "rocket": "validation",
}
"""The split of a photograph; of all others "train", both views of the motorcycle among them."""
SKLEARN = ("china.jpg", "flower.jpg")


def load() -> Photos:
    """Twenty photographs of 170 to 1,400 pixels a side: uint8 (3, height, width), or (1, ...) of the nine grey ones.

    Of scikit-image, read from its archive, and of scikit-learn. They are split by hand, since with so few a digest
    would put the faces and the text into one split. The colour wheel that scikit-image calls "color" is left out: it is
    drawn. What a JPEG decodes to may differ by a grey level with the release of libjpeg; `manifest` has the digest.
    """
    row = SETS["photos"]
    store.require(row)
    release = version("scikit-learn")

    def build() -> Parsed:
        folder = Path(find_spec("sklearn").origin).parent / "datasets" / "images"
        raw = {Path(name).stem: content for name, content in store.files(row).items()}
        raw |= {Path(name).stem: (folder / name).read_bytes() for name in SKLEARN}
        tensors = {name: decode(raw[name]) for name in sorted(raw)}
        value = sha256()
        for name, pixels in tensors.items():
            value.update(f"{name} {tuple(pixels.shape)}".encode() + pixels.numpy().tobytes())
        return tensors, {"sha256": value.hexdigest(), "shapes": {name: list(x.shape) for name, x in tensors.items()}}

    tensors, manifest = cached("photos", f"{row.source.sha256} {release}", build)
    splits = {split: {} for split in SPLITS}
    for name in sorted(tensors):
        splits[HELD_OUT.get(name, "train")][name] = tensors[name]
    origin = store.origin(row) | {"also": f"scikit-learn {release}", "licence": row.licence}
    sizes = {split: len(photos) for split, photos in splits.items()}
    return Photos("photos", splits, {"photos": origin | manifest | {"splits": sizes}})


def decode(content: bytes) -> torch.Tensor:
    """The pixels of an image file, uint8 (channels, height, width): one channel of grey, or red, green, blue."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        pixels = np.array(image.convert("L" if image.mode == "L" else "RGB"))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy())
