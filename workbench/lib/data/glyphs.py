"""Characters drawn in the type faces that come with matplotlib, and their Unicode names."""

import unicodedata
from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from workbench.errors import InputError, unknown
from workbench.lib.data.cache import Parsed, cached
from workbench.lib.data.sets import SETS
from workbench.lib.data.splits import SPLITS, TABLE_SHARES, digest, split_of
from workbench.lib.data.types import Glyphs

FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
)
"""Faces with more than a thousand letters and numbers; the last is of another design."""
SIZE, POINTS = 28, 22


def load(faces: Sequence[str] = FACES) -> Glyphs:
    """Letters and numbers in these faces: uint8 images (28, 28), 80 / 10 / 10 percent of the CODEPOINTS by digest.

    The same character in two faces is in one split. Which characters have a name depends on Python's Unicode tables,
    and an image by a grey level on the release of FreeType; `manifest` has the digest.

    Raises:
        InputError: a face is unknown, twice, or there is none.
    """
    if not faces or len(set(faces)) < len(faces):
        raise InputError(f"faces is {tuple(faces)} but must name at least one, each once; allowed: {', '.join(FACES)}")
    for face in faces:
        if face not in FACES:
            raise unknown("face", face, FACES)
    release = version("matplotlib")

    def build() -> Parsed:
        parts = [_draw(face) for face in faces]
        images = np.concatenate([images for images, _ in parts])
        codes = np.concatenate([codes for _, codes in parts])
        face = np.repeat(np.arange(len(parts)), [len(codes) for _, codes in parts])
        tensors = {"images": images, "codepoint": codes, "face": face}
        value = sha256(images.tobytes() + codes.tobytes() + face.tobytes()).hexdigest()
        return {name: torch.from_numpy(x) for name, x in tensors.items()}, {"sha256": value}

    raw = f"{release} {version('pillow')} {unicodedata.unidata_version} {' '.join(faces)}"
    tensors, manifest = cached("glyph-names", raw, build)
    images, codes, face = (tensors[name] for name in ("images", "codepoint", "face"))
    where = np.array([SPLITS.index(split_of(digest(f"glyph/{code:x}"), TABLE_SHARES)) for code in codes.tolist()])
    chosen = {split: torch.from_numpy(np.flatnonzero(where == number)) for number, split in enumerate(SPLITS)}
    splits = {split: (images[at], codes[at], face[at]) for split, at in chosen.items()}
    origin = {"source": "matplotlib", "version": release, "unicode": unicodedata.unidata_version}
    sizes = {split: len(at) for split, at in chosen.items()}
    manifest = origin | {"licence": SETS["glyph-names"].licence} | manifest | {"rows": len(codes), "splits": sizes}
    return Glyphs("glyph-names", tuple(faces), splits, {"glyph-names": manifest})


def _draw(face: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (rows, 28, 28) and codepoints int64 (rows,) of a face, in the order of the codepoints."""
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw, ImageFont

    path = str(Path(find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf" / f"{face}.ttf")
    font = ImageFont.truetype(path, POINTS, layout_engine=ImageFont.Layout.BASIC)
    images, codes = [], []
    for code in sorted(FT2Font(path).get_charmap()):
        if unicodedata.category(chr(code))[0] not in "LN" or not unicodedata.name(chr(code), ""):
            continue
        canvas = Image.new("L", (SIZE, SIZE))
        ImageDraw.Draw(canvas).text((SIZE / 2, SIZE / 2), chr(code), fill=255, font=font, anchor="mm")
        if canvas.getbbox():  # some names are of signs that show nothing
            images.append(np.asarray(canvas))
            codes.append(code)
    return np.stack(images), np.array(codes, np.int64)
