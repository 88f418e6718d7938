"""Digits beside others that were looked up: parts without overlap, a frozen embedder, measures with known answers."""

import pytest
import torch

from workbench.beds.retrieved_digits import (
    EMBEDDED,
    WIDTH,
    DenoisingBeside,
    Embedder,
    database,
    mmd,
    nearest,
    parts,
    precision_recall,
    reader,
)
from workbench.errors import InputError
from workbench.lib.core.diffusion import Discrete


@pytest.fixture(scope="module")
def found():
    return parts(0)


def test_no_image_is_in_two_parts_and_the_folds_differ(found):
    assert sum(len(part.images) for part in found.values()) == 1797 and len(found["embedder"].images) == EMBEDDED
    assert abs(len(found["database"].images) - len(found["train"].images)) <= 1
    sets = {name: {tuple(row) for row in part.images.flatten(1).tolist()} for name, part in found.items()}
    assert not any(sets[a] & sets[b] for a in sets for b in sets if a < b)
    assert all(float(part.images.min()) >= -1 and float(part.images.max()) <= 1 for part in found.values())
    assert not torch.equal(parts(1)["train"].images[:50], found["train"].images[:50])
    kept = found["train"].only((8, 9))
    assert set(kept.digits.tolist()) == {8, 9} and len(kept.images) == len(kept.digits)


def test_the_embedder_is_frozen_and_finds_a_digit_among_its_own(found):
    embedder = Embedder(found["embedder"].images)
    images = found["train"].images.clone().requires_grad_()
    assert not embedder(images).requires_grad and embedder(images).shape == (len(images), WIDTH)
    base = database(found["database"], embedder)
    assert torch.equal(base.payload, found["database"].images)
    ids, _ = base.search(embedder(images), 4)
    assert (found["database"].digits[ids] == found["train"].digits[:, None]).double().mean() > 0.8
    with pytest.raises(InputError, match="width is 17"):
        Embedder(found["embedder"].images[:16], 17)


def test_batches_come_from_the_generator_and_evaluation_is_fixed(found):
    images, shown = found["train"].images, torch.zeros(len(found["train"].images), 1, WIDTH)
    task = DenoisingBeside({"train": (images, shown), "validation": (images, None)}, Discrete("linear-sqrt", 200), 0.5)
    one, again = (task.batch("train", 400, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.inputs, again.inputs) and 0.4 < one.dropped.double().mean() < 0.6
    first, second = ([batch.inputs for batch in task.batches("validation", 100)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert sum(map(len, first)) == len(images)


def test_mmd_is_nothing_for_one_kind_and_something_for_two(found):
    real, others = found["train"].images, found["database"].images
    assert abs(mmd(real, others)) < 0.005 < 0.02 < mmd(real[found["train"].digits == 1], others)
    kernel = lambda a, b, scale: torch.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / scale)  # noqa: E731
    a, b = torch.randn(6, 3).double(), torch.randn(5, 3).double()
    apart = ~torch.eye(5, dtype=torch.bool)
    scale = ((b[:, None] - b[None]) ** 2).sum(-1)[apart].median()
    expected = (
        (kernel(a, a, scale).sum() - 6) / 30 + (kernel(b, b, scale).sum() - 5) / 20 - 2 * kernel(a, b, scale).mean()
    )
    assert mmd(a, b) == pytest.approx(float(expected))


def test_distances_precision_and_recall_have_their_plain_meaning():
    line = torch.arange(6.0)[:, None]
    assert nearest(torch.tensor([[0.25], [9.0]]), line).tolist() == [0.25, 4.0]
    assert precision_recall(line, line, 1) == (1.0, 1.0)
    assert precision_recall(line[:3], line + 100, 1) == (0.0, 0.0)
    assert precision_recall(line[:2], line, 1) == (1.0, 0.5)  # 0, 1 and 2 are within reach of 0 and 1


def test_the_reader_reads_digits_that_it_has_not_seen(found):
    read = reader(found["train"])
    assert (read(found["test"].images) == found["test"].digits).double().mean() > 0.93
