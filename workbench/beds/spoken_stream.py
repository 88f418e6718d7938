"""The stream of glyphs and names with a third modality in front: what a speaker says, and who speaks.

For models whose experts, projections or states know the modality of a token. A row is one of

    caption first    BOS  speaker 3  f1 ... f12  <caption, image>  EOS
    image first      BOS  f1 ... f12  speaker 3  <image, caption>  EOS

with the caption and the image as `glyph_stream` has them. f1 ... f12 are frames of one utterance, each the nearest of
64 codes of their twelve cepstra (k-means of training frames). Modalities: 0 text, who speaks included, 1 image, 2
speech; every row, and so every batch, has 49 tokens of image and 12 of speech. Who speaks can be told from the frames,
and the frames from who speaks; the utterance and the character are drawn apart and say nothing of each other.

Utterances of less than 12 frames are left out (13 %). In training any 12 frames of one that follow each other are said,
when judged the first 12: 1,153 windows of 210 utterances / 29 / 320, test by the official split, of the same speakers.

Tensor letters: B batch, T time.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.beds import glyph_stream
from workbench.beds.baseline import Measured
from workbench.beds.glyph_stream import FIRST_CODE, FIRST_LETTER, LETTERS, ORDERS, GlyphStream, Interleaved
from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.core.task import check_domain
from workbench.lib.data.glyphs import FACES

NEEDS = ("speech",)
FRAMES, SOUNDS = 12, 64
FIRST_FRAME = glyph_stream.VOCAB
VOCAB = FIRST_FRAME + SOUNDS
LABEL = "speaker "
SPOKEN = len(LABEL) + 1 + FRAMES
"""Tokens of an utterance and its label."""
MODALITIES = (*glyph_stream.MODALITIES, "speech")

SMOKE, SMALL, FULL = glyph_stream.SMOKE, glyph_stream.SMALL, glyph_stream.FULL


class SpokenStream(GlyphStream):
    """Next-token prediction as in `GlyphStream`, with "bits_per_token/speech" beside the metrics of that.

    Args:
        faces: type faces that characters are drawn in.
    """

    name = "spoken-stream"
    modalities, starts = MODALITIES, (FIRST_CODE, FIRST_FRAME)
    vocab, length = VOCAB, glyph_stream.LENGTH + SPOKEN

    def __init__(self, faces: Sequence[str] = FACES):
        super().__init__(faces)
        found = data.load("speech")
        self.sounds = codebook(torch.cat([frames for frames, _ in found.splits["train"]]))
        self.spoken = {split: spoken(found, split, self.sounds) for split in found.splits}  # (rows, orders, SPOKEN)
        self.manifest = self.manifest | found.manifest

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Interleaved:
        if size < 1:
            raise InputError(f"size is {size} but must be at least 1")
        rows = self._rows(split)
        orders = torch.randint(len(ORDERS), (size,), generator=generator)
        if domain is not None:
            check_domain(domain, ORDERS)
            orders = torch.full((size,), domain)
        chosen, said = (torch.randint(len(of), (size,), generator=generator) for of in (rows, self.spoken[split]))
        return self._batch(self._joined(rows[chosen, orders], self.spoken[split][said, orders]), orders)

    def batches(self, split: str, size: int) -> Iterator[Interleaved]:
        """Each character with one utterance: those of the split in turn."""
        rows, spoken = self._rows(split), self.spoken[split]
        said = torch.arange(len(rows)) % len(spoken)
        for order in range(len(ORDERS)):
            for part, at in zip(rows[:, order].split(size), said.split(size), strict=True):
                yield self._batch(self._joined(part, spoken[at, order]), torch.full((len(part),), order))

    def _joined(self, rows: Tensor, spoken: Tensor) -> Tensor:
        return torch.cat([rows[:, :1].long(), spoken, rows[:, 1:].long()], 1)


def codebook(frames: Float[Tensor, "frames cepstra"]) -> Float[Tensor, "sounds cepstra"]:
    """64 frames: the centres of those given (k-means), in the order of their first cepstrum."""
    from sklearn.cluster import KMeans

    found = KMeans(SOUNDS, n_init=1, max_iter=50, random_state=0).fit(frames.numpy())
    centres = torch.from_numpy(found.cluster_centers_).float()
    return centres[centres[:, 0].argsort()]


def spoken(
    found: "data.Series", split: str, sounds: Float[Tensor, "sounds cepstra"]
) -> Int64[Tensor, "rows orders time"]:
    """Windows of 12 frames and who speaks, in both orders: in training from every frame on, else from the first."""
    rows = []
    for frames, speaker in found.splits[split]:
        heard = torch.cdist(frames, sounds).argmin(1) + FIRST_FRAME
        label = [FIRST_LETTER + LETTERS.index(letter) for letter in LABEL + found.classes[speaker]]
        label = torch.tensor(label)
        for window in [] if len(heard) < FRAMES else heard.unfold(0, FRAMES, 1 if split == "train" else len(heard)):
            rows.append(torch.stack([torch.cat([label, window]), torch.cat([window, label])]))
    return torch.stack(rows)


def prepare(settings: Mapping[str, Any] = SMALL) -> SpokenStream:
    return SpokenStream(settings["faces"])


def measure(settings: Mapping[str, Any] = SMALL) -> list[Measured]:
    return glyph_stream.measured(prepare(settings), settings)
