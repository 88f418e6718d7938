"""NEAS: diversity, the scores of operators, shrinking, and evolution under a limit."""

import math

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.core.search.evolution import exhaust, top
from workbench.lib.core.search.genomes import EnsembleGenome, PathSpace, sample_genome
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.types import Arrays
from workbench.lib.search.neas import EnsembleClassification, KPathSupernet
from workbench.lib.search.neas_shrink import (
    MODES,
    Seen,
    Shrinking,
    candidates,
    cheapest,
    cosine_distance,
    disagreement,
    jensen_shannon,
    of_networks,
    path_diversity,
    rate,
    score_operators,
    scores_of,
    shrink,
)

SPACE = PathSpace(1, 20, 5, widths=(4, 4), strides=(2, 1), stem=4, head=8)


def data(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 20, generator=torch.Generator().manual_seed(3)), torch.arange(n) % 5


def said(n: int, seed: int = 0) -> list[Seen]:
    generator = torch.Generator().manual_seed(seed)
    genomes = [sample_genome(SPACE.everything, 2, generator) for _ in range(n)]
    numbers = torch.rand(n, 3, generator=generator).tolist()
    return [Seen(genome, u, (a, b)) for genome, (u, a, b) in zip(genomes, numbers, strict=True)]


def test_diversity_is_zero_of_equal_paths_symmetric_and_bounded():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 7, 6, generator=generator)
    assert path_diversity(torch.stack([a, a]), torch.stack([b, b], 1)) == 0
    assert path_diversity(a[None], b[:, None]) == 0
    assert cosine_distance(a, b) == pytest.approx(1 - float(torch.cosine_similarity(a, b).mean()), abs=1e-6)
    assert cosine_distance(a, b) == cosine_distance(b, a) and cosine_distance(a, -a) == pytest.approx(2)
    assert jensen_shannon(a, b) == pytest.approx(jensen_shannon(b, a)) and 0 < jensen_shannon(a, b) < math.log(2)
    far = torch.tensor([[1000.0, 0]])
    assert jensen_shannon(far, far.flip(1)) == pytest.approx(math.log(2)) and jensen_shannon(a, a) == 0


def test_scores_are_what_the_formula_says():
    seen = [
        Seen(EnsembleGenome(0, ((0, 0), (1, 0))), 1.0, (0.5, 0.0)),
        Seen(EnsembleGenome(0, ((1, 0), (2, 0))), 3.0, (0.9, 0.0)),
        Seen(EnsembleGenome(2, ((2, 0), (2, 0))), 5.0, (0.0, 0.0)),
    ]
    scores = scores_of(seen, ((0, 1, 2, 3), (0,)), lam=2.0)
    assert [scores[0, op][0] for op in range(3)] == [1, 2, 4]
    assert [scores[0, op][1] for op in range(3)] == pytest.approx([0.5, 0.7, 0.9])
    sd_u = torch.tensor([1.0, 2, 4]).std(correction=0)
    want = [(u - 7 / 3) / sd_u + 2 * (d - 0.7) / (0.08 / 3) ** 0.5 for u, d in ((1, 0.5), (2, 0.7), (4, 0.9))]
    assert [scores[0, op][2] for op in range(3)] == pytest.approx([float(value) for value in want])
    assert math.isnan(scores[0, 3][0]) and scores[0, 3][2] == 0  # no ensemble has it
    assert math.isnan(scores[1, 0][1]) and scores[1, 0][2] == 0  # alone in its layer


def test_without_weight_potential_alone_ranks_and_new_names_change_no_score():
    seen, kept = said(40), SPACE.everything
    plain = scores_of(seen, kept, 0.0)
    for layer, ops in enumerate(kept):
        by_score = sorted(ops, key=lambda op, layer=layer: plain[layer, op][2])
        assert by_score == sorted(ops, key=lambda op, layer=layer: plain[layer, op][0])
    names = {op: 5 - op for op in range(6)} | {-1: -1}
    renamed = []
    for one in seen:
        paths = tuple(tuple(names[op] for op in path) for path in one.genome.paths)
        renamed.append(Seen(EnsembleGenome(one.genome.split, paths), one.potential, one.diversity))
    before, after = scores_of(seen, kept), scores_of(renamed, kept)
    assert all(after[layer, names[op]] == pytest.approx(score, nan_ok=True) for (layer, op), score in before.items())


def test_shrinking_is_nested_and_stops_at_the_floor():
    kept = SPACE.everything
    for round_ in range(8):
        scores = {(layer, op): float((op * 7 + round_) % 5) for layer, ops in enumerate(kept) for op in ops}
        smaller = shrink(kept, scores)
        assert shrink(kept, scores) == smaller
        for before, after in zip(kept, smaller, strict=True):
            assert set(after) <= set(before) and len(after) == max(2, len(before) - 1)
        kept = smaller
    assert [len(ops) for ops in kept] == [2, 2]
    assert shrink(((0, 1, 2),), {(0, 0): 2.0, (0, 1): 1.0, (0, 2): 1.0}) == ((0, 2),)
    with pytest.raises(InputError, match="floor 0"):
        shrink(kept, {}, floor=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_supernet_shrinks_while_it_trains(mode: str):
    x, y = data()
    splits = dict.fromkeys(("train", "validation", "test"), (x, y))
    task = EnsembleClassification(Arrays("made", splits, tuple("abcde"), {"made": {}}))

    def shrunk() -> KPathSupernet:
        torch.manual_seed(0)
        supernet = KPathSupernet(SPACE)
        train(supernet, task, TrainConfig(4, 8, eval_every=None), [Shrinking(mode, (2, 3), x[:10], x, y, n=6)])
        return supernet

    first, second = shrunk(), shrunk()
    gone = 0 if mode == "none" else 2
    assert [len(ops) for ops in first.kept] == [6 - gone, 7 - gone] and first.kept == second.kept
    states = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


def test_rating_leaves_the_supernet_as_it_trains():
    supernet, (x, y) = KPathSupernet(SPACE), data()
    genome, state = cheapest(SPACE.everything, 2, SPACE), torch.get_rng_state()
    value = rate(supernet, genome, x, x, y)
    assert supernet.training and all(module.training for module in supernet.modules())
    assert torch.equal(torch.get_rng_state(), state) and value == rate(supernet, genome, x, x, y)
    scores = score_operators(supernet, x[:10], x, y, 4, generator=torch.Generator().manual_seed(0))
    assert set(scores) == {(layer, op) for layer, ops in enumerate(SPACE.everything) for op in ops}
    for bad in (lambda: score_operators(supernet, x, x, y, 0), lambda: Shrinking("best", (1,), x, x, y)):
        with pytest.raises(InputError, match=r"n is 0|mode 'best' is unknown"):
            bad()


@pytest.mark.parametrize(("k", "splits"), [(1, None), (2, None), (2, (1,)), (3, (0,))])
def test_evolution_keeps_to_the_limit_and_to_what_is_kept(k: int, splits: tuple[int, ...] | None):
    kept = ((0, 2, 5), (-1, 1, 4))
    limit = round(1.3 * cheapest(kept, k, SPACE, splits).macs(SPACE))

    def searched() -> dict[EnsembleGenome, float]:
        asked = candidates(kept, k, SPACE, limit, splits=splits, population=6, parents=3, generations=3)
        return exhaust(asked, lambda genome: float(genome.macs(SPACE)))

    rated = searched()
    assert list(rated) == list(searched()) and len(rated) > 1
    for genome in rated:
        assert genome.macs(SPACE) <= limit and genome.k == k
        assert all(path[layer] in kept[layer] for path in genome.paths for layer in range(2))
        assert splits is None or genome.split in splits
    assert top(rated, 1)[0].macs(SPACE) == max(rated.values())


def test_a_limit_that_nothing_meets_is_refused_in_words():
    with pytest.raises(InputError, match=r"max_macs is 100 but no ensemble of 2 paths meets it: the cheapest"):
        candidates(SPACE.everything, 2, SPACE, 100)


def test_members_that_differ_disagree():
    logits = torch.tensor([[[1.0, 0], [0, 1]], [[1, 0], [1, 0]]])
    assert disagreement(logits) == 0.5 and disagreement(logits[:, :1]) == 0
    nets, (x, _) = [KPathSupernet(SPACE), KPathSupernet(SPACE)], data()
    assert of_networks(nets, x).shape == (40, 4, 5)
