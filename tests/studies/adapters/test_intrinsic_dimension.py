"""The study of intrinsic dimension: what its arms train, and that its rule says what it says."""

import json
import math

import pytest
import torch

from workbench.lib.adapters.intrinsic_dimension import PROJECTIONS
from workbench.lib.core.train import TrainConfig, train
from workbench.studies.adapters.intrinsic_dimension import (
    ARMS,
    IMAGES,
    SHUFFLED,
    TRUE,
    WIDTHS,
    SideBySide,
    build,
    judge,
    run,
    task,
)
from workbench.studies.adapters.intrinsic_dimension import (
    PROJECTIONS as COMPARED,
)
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.1, -0.1, 0.05)
SIZES = {"width 16": 1482, "width 64": 8970, "width 128": 26122}


def judged(seeds=4, noise=1.0, missed=(), edge=0, **needed):
    needed = {name.replace("_", " "): value for name, value in needed.items()}
    rows = []
    for i, arm in enumerate(ARMS):
        for seed in range(seeds):
            d = needed.get(arm, {SHUFFLED: 700, TRUE: 70}.get(arm, 100)) * 2 ** (noise * NOISE[(seed + i) % 4])
            extra = {"d_int90": d, "reached": int(arm not in missed), "whole": 0.97, "dims": [50, 200]}
            extra |= {"accuracy": [0.8, 0.9], "at_edge": edge}
            rows.append(Row(arm, seed, SIZES.get(arm, 8970), 1, 1, 1, math.log2(d), extra))
    return judge(Rows(rows), {})


def test_it_reproduces_if_widths_and_projections_need_about_the_same_and_shuffled_labels_much_more():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(0, abs=0.15)
    assert result.claimed == (-math.log2(1.5), math.log2(1.5))
    assert result.details["compression"]["width 128"] == pytest.approx(261, rel=0.1)
    assert result.details["accuracy"]["width 16"] == pytest.approx([0.8, 0.9])
    assert (
        len(result.details["doublings"]) == 7
        and "mark" not in result.reason
        and "end of the sweep" not in result.reason
    )
    json.dumps(result.details)


@pytest.mark.parametrize("arm", [*WIDTHS, *COMPARED[1:]])
def test_it_does_not_reproduce_if_one_width_or_projection_needs_twice_as_much(arm):
    for other in (200, 50):
        assert judged(**{arm: other}).verdict == NOT_REPRODUCED
    assert judged(**{arm: 150}).verdict == NOT_RESOLVED  # at the margin itself
    assert judged(missed=[arm]).verdict == NOT_RESOLVED
    assert f"The mark was not reached by {arm} (4 of 4 seeds)" in judged(missed=[arm]).reason


def test_it_does_not_reproduce_if_shuffled_labels_are_not_much_harder():
    assert judged(**{SHUFFLED: 210}).verdict == NOT_REPRODUCED
    assert judged(**{SHUFFLED: 350}).verdict == NOT_RESOLVED
    assert judged(missed=[SHUFFLED]).verdict == REPRODUCED  # that needs more than was tried


def test_noise_resolves_nothing_and_ends_of_the_sweep_are_said():
    assert judged(noise=8).verdict == NOT_RESOLVED and judged(seeds=1).verdict == NOT_RESOLVED
    assert "at an end of the sweep for width 16 (4 of 4 seeds)" in judged(edge=1).reason


def test_arms_differ_in_what_they_say_and_their_subspaces_of_one_seed_lie_in_one_another():
    for arm, (width, projection, _) in ARMS.items():
        plain, small, large = (build(arm, 3, dims) for dims in (None, 5, 9))
        assert sum(p.numel() for p in plain.parameters()) == SIZES[f"width {width}"] == large.projection.size
        assert type(large.projection) is PROJECTIONS[projection]
        assert all(map(torch.equal, plain.parameters(), large.model.parameters()))
        v = torch.randn(5)
        assert torch.allclose(small.projection(v), large.projection(torch.cat([v, torch.zeros(4)])), atol=1e-5)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if "300" not in arm])
def test_side_by_side_every_member_is_trained_as_it_is_alone(arm):
    learned, config = task("all", 1), TrainConfig(5, 32, lr=1.0, weight_decay=0.0, clip=math.inf, eval_every=None)
    members = ((3, 0.5), (8, 0.1), (8, 2.0))
    together = SideBySide(build(arm, 1, 8), [d for d, _ in members])
    groups = [{"params": [v], "lr_scale": s} for v, (_, s) in zip(together.vthetas, members, strict=True)]
    train(together, learned, config, optimizer=torch.optim.Adam(groups, betas=(0.9, 0.95)))
    found = learned.accuracies(together, "test")
    for v, accuracy, (d, scale) in zip(together.vthetas, found, members, strict=True):
        alone = build(arm, 1, d)
        group = {"params": [alone.vtheta], "lr_scale": scale}
        train(alone, learned, config, optimizer=torch.optim.Adam([group], betas=(0.9, 0.95)))
        assert torch.allclose(alone.vtheta, v, rtol=1e-3, atol=1e-3) and v.norm() > 0.05
        assert accuracy == pytest.approx(learned.evaluate(alone, "test")["accuracy"], abs=0.02)
    assert learned.evaluate(together, "test")["accuracy"] == pytest.approx(sum(found) / 3)


def test_what_is_watched_is_what_members_add():
    together = SideBySide(build("width 16", 0, 8), [3, 8])
    with torch.no_grad():
        for v in together.vthetas:
            v.normal_()
    made = {name: pick(v) for name, v, pick in together.made_matrices()}
    assert len(made) == 2 * 3
    alone = build("width 16", 0, 3)
    change = alone.change(together.vthetas[0].detach())
    assert torch.allclose(made["0.layers.1.weight"], change["layers.1.weight"], atol=1e-5)


def test_the_images_that_are_learned_are_the_same_with_other_labels():
    whole, true, shuffled = (task(labels, 1).splits for labels in ("all", "true", "shuffled"))
    x, y = whole["train"]["digits"]
    for split in ("train", "validation", "test"):
        for labels in (true, shuffled):
            assert torch.equal(labels[split]["digits"][0], x[:IMAGES])
        assert torch.equal(true[split]["digits"][1], y[:IMAGES])
    drawn = shuffled["train"]["digits"][1]
    assert torch.equal(drawn.sort().values, y[:IMAGES].sort().values)
    assert (drawn == y[:IMAGES]).float().mean() < 0.2


def test_a_row_is_of_all_its_trainings():
    settings = {"dims": (3, 400), "dims_of_300": (3,), "rates": (0.3, 30.0), "whole_rates": (1e-3, 1e-1), "steps": 2}
    row = run("width 16", 0, settings)
    assert row.params == 1482 and row.steps == 2 * (1 + 2) and row.flops > 0
    assert row.metric == pytest.approx(math.log2(row.extra["d_int90"]))
    assert row.extra["dims"] == [3, 400] and len(row.extra["accuracy"]) == len(row.extra["best_rates"]) == 2
    reached = [d for d, a in zip((3, 400), row.extra["accuracy"], strict=True) if a >= 0.9 * row.extra["whole"]]
    assert row.extra["of_the_grid"] == (reached[0] if reached else None) and row.extra["reached"] == bool(reached)
