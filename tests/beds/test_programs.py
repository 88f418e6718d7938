"""The small tasks of images that programs are tried on, the record of the examples, and the sandbox for the rules'."""

import json

import pytest
import torch

from workbench.beds import programs
from workbench.errors import InputError
from workbench.lib.core.sandbox import Sandbox
from workbench.lib.search.fsap import corpus
from workbench.lib.search.fsap_programs import PLANS, RECORD


@pytest.mark.parametrize("name", programs.SETS)
def test_images_are_few_and_the_same_each_time(name: str):
    found, again = (programs.images(name, 3, train=50, asked=20) for _ in range(2))
    assert found.x.shape == (50, 1, 8, 8) and found.asked.shape == (20, 1, 8, 8) and found.name == name
    assert torch.equal(found.x, again.x) and torch.equal(found.truth, again.truth)
    assert int(found.y.max()) < found.classes and not torch.equal(found.x, programs.images(name, 4, 50, 20).x)


def test_an_unknown_set_is_named():
    with pytest.raises(InputError, match="name 'digits' is unknown; did you mean 'digit'"):
        programs.images("digits", 0)


def test_the_record_has_every_example_on_every_set():
    kept = json.loads(RECORD.read_text())
    assert kept["folds"] == list(programs.FOLDS) and kept["images"] == programs.TRAIN
    for name in programs.SETS:
        assert kept["accuracy"][name].keys() == PLANS.keys()
        assert all(0 < example.accuracy < 1 for example in corpus(name))


def test_the_sandbox_of_the_process_is_one_and_comes_back(monkeypatch):
    made = []

    class Stub(Sandbox):
        entered = True

        def __enter__(self):
            made.append(self)
            return self

    monkeypatch.setattr(programs, "Sandbox", Stub)
    monkeypatch.setattr(programs, "_open", [])
    first = programs.own_sandbox()
    assert programs.own_sandbox() is first and first.limits.seconds == programs.PATIENCE and first.allow_weaker
    first.entered = False
    assert programs.own_sandbox() is not first and len(made) == 2
