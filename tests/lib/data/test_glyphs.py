"""Drawn characters: what is in a face, and that a character is in one split whatever its face."""

import unicodedata

import pytest
import torch

from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.data import glyphs
from workbench.lib.data.splits import TABLE_SHARES, digest, split_of

FACES = ("DejaVuSerif-Italic", "STIXGeneral")


def test_characters_are_split_by_codepoint_over_all_faces():
    found = data.load("glyph-names", faces=FACES)
    for split, (images, codes, faces) in found.splits.items():
        assert {split_of(digest(f"glyph/{code:x}"), TABLE_SHARES) for code in codes.tolist()} == {split}
        assert images.shape == (len(codes), 28, 28) and images.flatten(1).amax(1).min() > 0
        assert set(faces.tolist()) == {0, 1}
        assert all(unicodedata.category(chr(code))[0] in "LN" for code in codes.tolist())
    rows = torch.cat([torch.stack(part[1:], 1) for part in found.splits.values()])
    assert len(rows.unique(dim=0)) == len(rows) == found.manifest["glyph-names"]["rows"] > 3000
    again = data.load("glyph-names", faces=FACES)
    assert all(torch.equal(again.splits[split][0], found.splits[split][0]) for split in found.splits)


def test_an_image_shows_its_character():
    found = data.load("glyph-names", faces=FACES[:1])
    images = torch.cat([part[0] for part in found.splits.values()]).double()
    codes = torch.cat([part[1] for part in found.splits.values()]).tolist()
    ink = {chr(code): image for code, image in zip(codes, images, strict=True)}
    assert ink["M"].sum() > 2 * ink["l"].sum()
    assert torch.equal(ink["A"], ink["Α"])  # Greek, drawn alike
    upper = ink["d"][:14].sum() / ink["d"].sum()
    assert upper > ink["p"][:14].sum() / ink["p"].sum() + 0.1  # an ascender is above, a descender below


@pytest.mark.parametrize(
    ("faces", "message"),
    [(("Arial",), "face 'Arial' is unknown"), ((), "each once"), (("STIXGeneral",) * 2, "each once")],
)
def test_wrong_faces_are_named(faces, message):
    with pytest.raises(InputError, match=message):
        glyphs.load(faces)
