"""The study of Maestro: networks are what their arms say, validation takes the smallest, the rule says what it says."""

import json

import pytest
import torch

from workbench.lib import data
from workbench.lib.core.budget import count_params
from workbench.lib.core.task import Classification
from workbench.lib.low_rank.maestro import extract, ordered_layers
from workbench.studies.core import row_settings
from workbench.studies.low_rank import maestro as study
from workbench.studies.low_rank.maestro import ARMS, DENSE, FACTORS, FIXED, MAESTRO, PRESETS, SVD, Chosen, build, judge
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.002, -0.002, 0.001)


def judged(seeds=4, loss=0.0, share=0.3, quarter=0.0, eighth=0.0):
    rows = []
    for i, arm in enumerate(ARMS):
        for seed in range(seeds):
            noise, mine = NOISE[(seed + i) % 4], arm == MAESTRO
            nested = [0.9, 0.9 + noise - quarter * mine, 0.8 + noise - eighth * mine]
            extra = {"share": share + noise if mine else 1.0, "nested": nested, "nested_own": nested, "ranks": [12, 9]}
            extra |= {"rate": 0.1, "at_edge": 0, "weight": 1e-3}
            rows.append(Row(arm, seed, 1, 1, 1, 1, 0.97 + noise - loss * mine, extra))
    return judge(Rows(rows), {})


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ({}, REPRODUCED),
        ({"loss": -0.02, "quarter": -0.2, "eighth": -0.2}, REPRODUCED),
        ({"loss": 0.02}, NOT_REPRODUCED),
        ({"share": 0.6}, NOT_REPRODUCED),
        ({"quarter": 0.02}, NOT_REPRODUCED),
        ({"eighth": 0.02}, NOT_REPRODUCED),
        ({"loss": 0.01}, NOT_RESOLVED),
        ({"share": 0.5}, NOT_RESOLVED),
        ({"eighth": 0.01}, NOT_RESOLVED),
    ],
)
def test_half_the_size_at_kept_accuracy_and_nested_networks_no_worse_than_the_svd(found: dict, verdict: str):
    result = judged(**found)
    assert result.verdict == verdict
    assert result.effect == pytest.approx(-found.get("loss", 0.0), abs=0.002)
    json.dumps(result.details)


def test_one_seed_resolves_nothing():
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_networks_of_one_seed_start_as_the_same_function():
    x = torch.rand(5, 1, 8, 8)
    dense = build(DENSE, 3)
    for arm in (FACTORS, MAESTRO):
        torch.testing.assert_close(build(arm, 3)(x), dense(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(build(DENSE, 4)(x), dense(x))
    layers = ordered_layers(build(MAESTRO, 3).network)
    assert [layer.full_rank for layer in layers.values()] == [64, 128]  # not the head
    fixed = build(FIXED, 3, {"layers.1": 5, "layers.3": 7})
    assert count_params(fixed) == 5 * 192 + 7 * 256 + 256 + 1290
    torch.testing.assert_close(fixed(x), extract(build(FACTORS, 3), {"layers.1": 5, "layers.3": 7})(x))


def test_of_networks_as_good_as_the_best_the_smallest_is_taken(monkeypatch):
    """Networks that reach what is said here."""
    settings = {"rates": (0.1, 0.2), "weights": (1e-2, 1e-3), "steps": 1}
    scores = {(0.1, 1e-2): (0.90, 3), (0.2, 1e-2): (0.965, 9), (0.1, 1e-3): (0.968, 30), (0.2, 1e-3): None}

    def learned(arm, seed, settings, rate, weight=0.0, ranks=None):
        if arm == MAESTRO and scores[rate, weight] is None:
            raise FloatingPointError("diverged")
        network = build(FACTORS, 0)
        score, rank = scores[rate, weight or 1e-3] or (0.5, 30)
        for layer in ordered_layers(network).values():
            layer.cut(rank)
        network.score = score
        return network

    monkeypatch.setattr(study, "learned", learned)
    monkeypatch.setattr(Classification, "evaluate", lambda self, model, split="validation": {"accuracy": model.score})
    chosen = study.choose(MAESTRO, 0, settings)
    assert isinstance(chosen, Chosen) and (chosen.rate, chosen.weight, chosen.validation) == (0.2, 1e-2, 0.965)
    assert study.choose(FACTORS, 0, settings).validation == 0.968
    scores.update(dict.fromkeys(scores))
    with pytest.raises(FloatingPointError, match="maestro diverges at every rate"):
        study.choose(MAESTRO, 0, settings)


def test_a_training_that_loses_a_layer_is_as_lost_as_one_that_diverges(monkeypatch):
    monkeypatch.setattr(study, "EPS", 1e3)
    settings = row_settings(PRESETS["smoke"]) | {"steps": 20}
    with pytest.raises(FloatingPointError, match=r"step 19: .* cannot be shrunk: eps is 1000\.0 but must be at most"):
        study.learned(MAESTRO, 0, settings, 0.1, weight=1e-4)


@pytest.mark.study
def test_rows_hold_the_networks_that_their_arms_say(smoke):
    rows = smoke("maestro").rows
    for seed in range(2):
        of = {row.arm: row for row in rows if row.seed == seed}
        dense, ours = of[DENSE].params, of[MAESTRO]
        assert dense == 26122 and of[FIXED].params == of[SVD].params == ours.params
        assert ours.extra["share"] == ours.params / dense and max(ours.extra["ranks"]) < 128
        assert of[FACTORS].extra["ranks"] == [64, 128]
        sizes = [192 * first + 256 * second for first, second in ours.extra["nested_ranks"]]
        assert sizes == sorted(sizes, reverse=True) and sizes[-1] + 1546 <= dense / 8
        assert len(of[SVD].extra["nested"]) == len(of[SVD].extra["nested_own"]) == 3
    # the SVD of the dense network as it was trained, at these ranks
    network = study.learned(DENSE, 0, row_settings(PRESETS["smoke"]), 0.03)
    ranks = dict(zip(("layers.1", "layers.3"), rows.arm(MAESTRO)[0].extra["nested_ranks"][1], strict=True))
    task = Classification(data.load("digits", fold=0))
    for name, rank in ranks.items():
        layer = network.get_submodule(name)
        u, s, v = torch.linalg.svd(layer.weight.detach())
        with torch.no_grad():
            layer.weight.copy_(u[:, :rank] * s[:rank] @ v[:rank])
    found = rows.arm(SVD)[0].extra["nested"][1]
    assert task.evaluate(network, "test")["accuracy"] == pytest.approx(found, abs=0.003)
