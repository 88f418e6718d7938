"""`workbench search bossnas`: all architectures that meet a limit, the best first, and on from where it was."""

import json
from itertools import islice

import pytest
import torch

from workbench.beds.architectures import SPACE
from workbench.cli import main
from workbench.studies.search import bossnas_search
from workbench.studies.search.bossnas_search import search


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bossnas_search.BossnasSearch.__init__, "__defaults__", (0, None, 2))


def test_the_same_command_knows_what_was_rated(home, capsys):
    words = ["search", "bossnas", "--budget", "0.5", "--max-macs", "18000", "--json"]
    found = [(main(words), json.loads(capsys.readouterr().out))[1] for _ in range(2)]
    assert found[1]["ended"] and found[1]["kept"] == found[0]["rated"] == found[1]["rated"]
    assert found[0]["rated"] == sum(SPACE.macs(arch) <= 18_000 for arch in SPACE.every())
    assert found[0]["front"] == found[1]["front"] and all(one["cost"] <= 18_000 for one in found[0]["front"])


def test_the_best_comes_first_and_has_the_best_path_of_each_block():
    made, said = search(1, None), []
    with torch.random.fork_rng():
        made.restore(made.prepare(lambda *told: said.append(told)))
    assert [told[0] for told in said] == [1, 2, 3, 4, 5, 6] and said[-1] == (6, 6, "block 3")
    asked = list(islice(made.asked(), 50))
    ratings = [made.rate(arch) for arch in asked]
    assert asked[0] == sum(made.ratings.best, ()) and ratings == sorted(ratings, reverse=True)


def test_a_limit_that_nothing_meets_is_one_line(home, capsys):
    assert main(["search", "bossnas", "--max-macs", "5"]) == 2
    assert "max_macs is 5 but no architecture meets it: the cheapest has" in capsys.readouterr().err
    assert not (home / "searches").exists()
