"""Base models: trained once for a recipe, then read; a damaged file is trained again."""

import pytest
import torch
from torch import nn

from workbench.beds import symbol_maps
from workbench.beds.pretrained import cached_path, pretrained
from workbench.lib.core.train import attended, is_attended


@pytest.fixture(autouse=True)
def home(empty_home):
    empty_home.mkdir()
    return empty_home


def test_a_recipe_is_trained_once_and_another_one_anew():
    trained = []

    def make(recipe):
        def teach(model):
            trained.append(nn.init.normal_(model.weight))

        return pretrained("base", recipe, lambda: nn.Linear(3, 2), teach)

    before = torch.get_rng_state()
    first = make({"seed": 1, "steps": 5})
    assert torch.equal(torch.get_rng_state(), before)  # whoever asks first draws the same numbers as who asks second
    second = make({"steps": 5, "seed": 1})
    assert len(trained) == 1 and not second.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    make({"seed": 1, "steps": 6})
    assert len(trained) == 2
    path = cached_path("base", {"seed": 1, "steps": 5})
    path.write_bytes(path.read_bytes()[:60])
    make({"seed": 1, "steps": 5})
    assert len(trained) == 3  # a damaged file is no model


def test_the_code_that_decides_the_weights_is_part_of_the_recipe():
    assert cached_path("base", {}) != cached_path("base", {}, [symbol_maps])


def test_a_home_that_cannot_be_written_costs_no_result(home, monkeypatch):
    (home / "models").write_text("a file where the folder should be")
    assert isinstance(pretrained("base", {}, lambda: nn.Linear(3, 2), lambda model: None), nn.Linear)


def test_nobody_attends_the_training_of_a_bed_but_that_of_a_part_of_a_study_always(home):
    trained = []

    def teach(model):
        trained.append(is_attended())

    def attend(state):
        raise AssertionError("no training begins here")

    def make(watched):
        return pretrained("part", {}, lambda: nn.Linear(3, 2), teach, watched=watched)

    with attended(attend):
        make(watched=True)  # not kept, for whoever attends may have changed it
        assert not list(home.rglob("*.safetensors"))
        make(watched=False)
        make(watched=False)
        make(watched=True)
    make(watched=True)  # without an attendant it is kept like any other
    assert trained == [True, False, True]
