"""The table of architectures: what is in it, and that its command makes it."""

import json

import pytest

from workbench.beds import architectures
from workbench.beds.architectures import SEEDS, SPACE, alone, chosen, main, make, table


def test_the_table_is_of_the_architectures_that_are_drawn():
    assert [(truth.arch, truth.alike) for truth in table()] == chosen()
    for truth in table():
        assert truth.params == SPACE.params(truth.arch) and truth.macs == SPACE.macs(truth.arch)
    values = sorted(truth.accuracy for truth in table())
    assert values[-1] - values[0] > 0.1  # room for a ranking


def test_the_command_makes_a_table_that_is_read_back(monkeypatch: pytest.MonkeyPatch, tmp_path):
    archs = chosen()[:2]
    monkeypatch.setattr(architectures, "chosen", lambda: archs)
    monkeypatch.setattr(architectures, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(architectures, "alone", lambda arch, seed, steps: 0.1 * seed)
    main([])
    assert json.loads((tmp_path / "table.json").read_text()) == json.loads(json.dumps(make()))
    found = table(tmp_path / "table.json")
    assert [one.arch for one in found] == [arch for arch, _ in archs]
    assert found[0].accuracies == (0.0, 0.1, 0.2) and len(found[0].accuracies) == SEEDS


def test_a_network_is_trained_by_its_seed_alone():
    assert alone((0, 0, 0, 0, 0), 1, 2) == alone((0, 0, 0, 0, 0), 1, 2)
