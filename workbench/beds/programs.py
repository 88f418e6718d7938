"""Small tasks of images for programs that are written and tried: three of scikit-learn's digits, few images each.

`python -m workbench.beds.programs` tries the example programs of `fsap` on them, which is what its prompts say of the
examples: means over `FOLDS` folds that no study uses, kept in `lib/search/fsap_corpus.json`.
"""

import argparse
import atexit
import json
import statistics

import torch

from workbench.errors import unknown
from workbench.lib import data
from workbench.lib.core.sandbox import Limits, Sandbox
from workbench.lib.search.fsap import TRIAL, Images, evaluate
from workbench.lib.search.fsap_programs import PLANS, RECORD, write
from workbench.sealed import sealed_file

SETS = ("digit", "rotation", "permuted")
"""Which digit it is; by how much it is turned; which digit, with the pixels in another order."""
TRAIN, ASKED = 600, 300
FOLDS = range(1000, 1003)
PATIENCE = 600.0
"""Seconds for a program of the package's own rules, which none of them needs: a busy machine is to change no row."""

_open: list[Sandbox] = []


def own_sandbox() -> Sandbox:
    """The sandbox of this process for programs that the package's own rules have written, started once.

    For these alone it is content with less than the filter of system calls. It is no place for programs of others.
    """
    if not _open or not _open[0].entered:
        _open[:] = [Sandbox(TRIAL, Limits(seconds=PATIENCE), allow_weaker=True).__enter__()]
        atexit.register(_open[0].close)
    return _open[0]


def images(name: str, fold: int, train: int = TRAIN, asked: int = ASKED) -> Images:
    """One of `SETS`: the first images of the training and of the test split of a fold, 8 x 8.

    Raises:
        InputError: the name is unknown.
    """
    if name not in SETS:
        raise unknown("name", name, SETS)
    found = data.load("digits", task=name, fold=fold)
    (x, y), (other, truth) = (found.splits[split] for split in ("train", "test"))
    return Images(name, x[:train], y[:train], other[:asked], truth[:asked], len(found.classes))


def measure() -> dict[str, dict[str, float]]:
    """Data set -> example -> its accuracy after one epoch."""
    table: dict[str, dict[str, float]] = {}
    for name in SETS:
        folds = [images(name, fold) for fold in FOLDS]
        table[name] = {}
        for example, plan in PLANS.items():
            pairs = zip(FOLDS, folds, strict=True)
            tried = [evaluate(write(plan), found, own_sandbox(), fold) for fold, found in pairs]
            if wrong := [outcome for outcome, _ in tried if not outcome.ok]:
                raise RuntimeError(f"example {example} on {name}: {wrong[0].kind}, {wrong[0].detail}")
            table[name][example] = round(statistics.fmean(accuracy for _, accuracy in tried), 4)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workbench.beds.programs", description="Try the example programs.")
    parser.add_argument("--keep", action="store_true", help="write the record")
    args = parser.parse_args()
    found = {"accuracy": measure(), "images": TRAIN, "folds": list(FOLDS), "torch": torch.__version__}
    print(json.dumps(found, indent=1))
    if args.keep:
        with sealed_file(RECORD) as path:
            path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
