"""Evolution that asks for ratings, and a search that is kept."""

import json

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.core.search.evolution import evolve, exhaust, front, top
from workbench.lib.core.search.kept import go_on, read


def bits(generator: torch.Generator, n: int = 12) -> tuple[int, ...]:
    return tuple(torch.randint(2, (n,), generator=generator).tolist())


def cross(a: tuple, b: tuple, generator: torch.Generator) -> tuple:
    return tuple(x if coin else y for x, y, coin in zip(a, b, bits(generator, len(a)), strict=True))


def flip(a: tuple, generator: torch.Generator) -> tuple:
    place = int(torch.randint(len(a), (), generator=generator))
    return tuple(1 - bit if place == i else bit for i, bit in enumerate(a))


def test_evolution_climbs_asks_once_and_is_repeatable():
    def searched(seed: int, generations: int = 12) -> dict:
        return exhaust(evolve(bits, cross, flip, seed=seed, population=12, parents=4, generations=generations), sum)

    found = searched(0)
    assert max(found.values()) == 12 and found == searched(0) and list(found) != list(searched(1))
    assert 12 * 3 < len(found) <= 12 * 12 and len(searched(0, 1)) == 12


def test_evolution_ends_where_nothing_is_new():
    found = exhaust(evolve(lambda g: bits(g, 3), cross, flip, generations=None), sum)
    assert len(found) == 8 and top(found, 1) == [(1, 1, 1)]


def test_a_search_without_an_end_draws_where_parents_have_nothing_new():
    def still(a: tuple, *others) -> tuple:
        return a

    sizes = {"population": 10, "parents": 2}
    assert len(exhaust(evolve(bits, still, still, generations=5, **sizes), sum)) == 10
    found = exhaust(evolve(lambda g: bits(g, 5), still, still, generations=None, **sizes), sum)
    assert len(found) == 32


@pytest.mark.parametrize("wrong", [{"parents": 0}, {"parents": 9, "population": 8}, {"generations": 0}])
def test_sizes_that_are_none_are_refused(wrong: dict):
    with pytest.raises(InputError, match="must be"):
        next(evolve(bits, cross, flip, **wrong))


def test_the_front_is_what_nothing_dominates():
    points = {"a": (1, 1), "b": (2, 3), "c": (2, 2), "d": (3, 3), "e": (4, 5), "f": (1, 1)}
    assert front(points) == ["a", "b", "e"] and front({}) == []


class Bits:
    """A search for ones; `stop_at` is the number of ratings behind which it is interrupted."""

    rating, cost = "ones", "place"

    def __init__(self, seed: int = 0, stop_at: int | None = None):
        self.settings, self.stop_at, self.made, self.prepared = {"seed": seed}, stop_at, 0, 0

    def prepare(self, report):
        self.prepared += 1
        return {"weight": torch.ones(1)}

    def restore(self, prepared):
        self.weight = float(prepared["weight"])

    def asked(self):
        return evolve(bits, cross, flip, seed=self.settings["seed"], population=5, parents=2, generations=4)

    def rate(self, candidate):
        if self.made == self.stop_at:
            raise KeyboardInterrupt
        self.made += 1
        return self.weight * sum(candidate)

    def cost_of(self, candidate):
        return candidate.index(1) if 1 in candidate else 99

    def encode(self, candidate):
        return list(candidate)


def test_a_search_goes_on_to_where_one_without_a_stop_ends(tmp_path):
    whole = go_on(Bits(), tmp_path / "whole", 60)
    assert whole.ended and whole.kept == 0 and len(whole.rated) == 20
    with pytest.raises(KeyboardInterrupt):
        go_on(Bits(stop_at=7), tmp_path / "stopped", 60)
    file = tmp_path / "stopped" / "rated.jsonl"
    assert len(read(file)) == 7
    with file.open("a") as lines:
        lines.write("[[1, 0], 3")  # killed within a line
    rest = Bits()
    found = go_on(rest, tmp_path / "stopped", 60)
    assert (found.rated, found.kept, rest.prepared, rest.made) == (whole.rated, 7, 0, 13)
    assert file.read_bytes() == (tmp_path / "whole" / "rated.jsonl").read_bytes()
    costs = [cost for _, cost, _ in found.front]
    assert costs == sorted(costs) and found.front[-1][2] == max(rating for *_, rating in found.rated)


def test_without_time_nothing_is_rated_and_another_search_is_refused(tmp_path):
    found = go_on(Bits(), tmp_path, 0)
    assert (found.rated, found.ended, found.front) == ([], False, [])
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 0}
    with pytest.raises(InputError, match="other settings"):
        go_on(Bits(seed=1), tmp_path, 1)


def test_one_process_at_a_time(tmp_path):
    class Nested(Bits):
        def prepare(self, report):
            with pytest.raises(InputError, match="another process"):
                go_on(Bits(), tmp_path, 1)
            return super().prepare(report)

    go_on(Nested(), tmp_path, 1)
