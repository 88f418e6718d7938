"""Utterances are read from the release's text files, and a tenth of the training ones are held out."""

import numpy as np
import pytest
import torch

from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.data import speech

HEAD = "#Two lines\n#of remarks: 1,2:3\n@problemName JapaneseVowels\n@classLabel true 1 2 3 4 5 6 7 8 9\n@data\n"


def written(rows):
    lines = (":".join(",".join(f"{v:.6f}" for v in channel) for channel in x.T) + f":{y}" for x, y in rows)
    return (HEAD + "\n".join(lines) + "\n\n").encode()


def utterances(n, seed):
    random = np.random.default_rng(seed)
    return [(random.normal(size=(7 + i % 5, 12)).round(6), 1 + i % 9) for i in range(n)]


def test_they_are_read_as_they_are_written_and_split(index):
    train, test = utterances(40, 0), utterances(9, 1)
    index.offer(
        "speech",
        {
            f"{speech.FOLDER}_TRAIN.ts": written(train),
            f"{speech.FOLDER}_TEST.ts": written(test),
            f"{speech.FOLDER}_eq_TEST.ts": b"of equal lengths: not wanted",
        },
    )
    with pytest.raises(InputError, match="get it with: workbench data get speech"):
        data.load("speech")
    data.get("speech")
    found = data.load("speech")
    for (frames, y), (x, label) in zip(found.splits["test"], test, strict=True):
        assert frames.dtype == torch.float32 and found.classes[y] == str(label)
        torch.testing.assert_close(frames, torch.from_numpy(x).float())
    parts = [found.splits[split] for split in ("train", "validation")]
    assert 0 < len(parts[1]) < len(parts[0]) and len(parts[0]) + len(parts[1]) == 40
    again = {tuple(frames.flatten().tolist()) for part in parts for frames, _ in part}
    assert again == {tuple(x.astype(np.float32).flatten().tolist()) for x, _ in train}
    assert found.manifest["speech"]["source"] == "aeon"
    assert repr(found) == (
        f"Series('speech': {len(parts[0])} train + {len(parts[1])} validation + 9 test rows of 12 channels, 9 classes)"
    )
    assert [name for name in data.describe("speech")["parts"]] == ["speech"]
