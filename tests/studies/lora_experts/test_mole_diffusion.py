"""The study of MoLE and its scenes: what is drawn, what is judged, and what the rule says."""

import json

import pytest
import torch

from workbench.errors import InputError
from workbench.studies.core import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Row
from workbench.studies.lora_experts import glyph_scenes as scenes
from workbench.studies.lora_experts.mole_diffusion import ARMS, GATES, PRESETS, STUDY, experts, judge

NOISE = (0.0, 0.002, -0.001)
ERROR = {"base": 0.6, "tuned": 0.5, "joint": 0.52, "merged": 0.48, "local": 0.42, "global": 0.45, "mole": 0.4}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def judged(seeds=3, noise=None, background=0.05, **error):
    rows = []
    for i, (arm, value) in enumerate((ERROR | error).items()):
        for seed in range(seeds):
            own = (noise or {}).get(arm, [0.5 * i * part for part in NOISE])[seed]
            ground = (background if arm == "mole" else 0.05) + NOISE[seed] * (1 + i)
            extra = {"background": ground, "face": value, "hand": value, "box_auc": [0.9, 0.9], "absent": [0.0, 0.0]}
            extra |= {"scales": (1.0, 1.0), "sweep": {part: [0.6, 0.5] for part in scenes.PARTS}}
            rows.append(Row(arm, seed, 1, 1, 1, 1, value + NOISE[seed] + own, extra))
    return judge(rows, {})


def test_mole_diffusion_study_reproduces_if_gates_beat_merging_and_leave_the_background():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(-0.08, abs=0.005)
    json.dumps(result.details)


def test_mole_diffusion_study_does_not_reproduce_on_the_other_side():
    assert judged(mole=0.7).verdict == NOT_REPRODUCED
    assert judged(merged=0.3).verdict == NOT_REPRODUCED
    assert judged(background=0.5).verdict == NOT_REPRODUCED
    same = {"mole": (0.0, 0.001, 0.0), "merged": (0.001, 0.0, 0.001)}
    assert judged(mole=0.48, noise=same).verdict == NOT_REPRODUCED  # equivalent


def test_mole_diffusion_study_resolves_nothing_if_an_interval_includes_zero():
    assert judged(noise={"mole": (0.3, -0.3, 0.3)}).verdict == NOT_RESOLVED
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_glyph_scenes_have_their_digits_inside_the_boxes():
    drawn = scenes.draw_scenes("scenes", "train", 50, generator(), (0.0, 0.0))
    assert drawn.images.shape == (50, 1, 24, 24) and drawn.boxes().sum((-2, -1)).unique().tolist() == [64]
    assert (drawn.condition[:, 0] < 5).all() and (drawn.condition[:, 1] >= 5).all()
    few = scenes.handwritings("train", True)
    for crops, condition in zip(drawn.crops(), drawn.condition, strict=True):
        for crop, digit in zip(crops, condition.tolist(), strict=True):
            # the fuller a pixel, the less of the canvas shows, and the canvas is within 2 of it
            own, other = (
                [bool(((crop - ink).abs() <= 2 * (1 - ink) + 1e-5).all()) for ink in few[d]]
                for d in (digit, (digit + 1) % 10)
            )
            assert any(own) and not any(other)


def test_glyph_scenes_without_a_part_say_so_and_show_none():
    drawn = scenes.draw_scenes("scenes", "train", 20, generator(), (1.0, 0.0))
    assert (drawn.condition[:, 0] == scenes.MISSING).all() and (drawn.condition[:, 1] != scenes.MISSING).all()
    assert drawn.crops()[:, 0].max() < drawn.crops()[:, 1].max()
    faces = scenes.draw_scenes("faces", "train", 20, generator())
    assert (faces.condition[:, 1] == scenes.MISSING).all()
    with pytest.raises(InputError, match="kind"):
        scenes.draw_scenes("feet", "train", 1, generator())
    with pytest.raises(InputError, match="size"):
        scenes.draw_scenes("faces", "train", 0, generator())


def test_glyph_scenes_noise_is_what_the_schedule_says():
    share = scenes.signal(torch.arange(1, scenes.LEVELS + 1))
    assert (share.diff() <= 0).all() and share[0] > 0.999 and share[-1] < 1e-3
    images, noise, time = torch.randn(4, 1, 24, 24), torch.randn(4, 1, 24, 24), torch.full((4,), 100)
    noised = scenes.add_noise(images, noise, time)
    s = scenes.signal(torch.tensor(100))
    assert torch.allclose(noised, s.sqrt() * images + (1 - s).sqrt() * noise)


def test_glyph_scenes_are_judged_on_handwritings_that_nobody_trains_on():
    train = {tuple(image.flatten().tolist()) for digit in scenes.handwritings("train", False) for image in digit}
    for split in ("validation", "test"):
        held = {tuple(image.flatten().tolist()) for digit in scenes.handwritings(split, False) for image in digit}
        assert len(held & train) < 0.02 * len(held)
    task = scenes.GlyphScenes("pretraining", 8)
    one, two = (task.fixed("test") for _ in range(2))
    assert torch.equal(one[0].images, two[0].images) and torch.equal(one[1], two[1])


def test_glyph_scenes_inpainting_leaves_the_rest_alone():
    torch.manual_seed(0)
    model = scenes.Denoiser((8, 8, 8))
    drawn = scenes.draw_scenes("scenes", "test", 3, generator(), (0.0, 0.0))
    made = scenes.inpaint(model, drawn, 3, 0)
    inside = drawn.boxes().any(1, keepdim=True)
    assert torch.equal(made[~inside], drawn.images[~inside]) and not torch.equal(made[inside], drawn.images[inside])


@pytest.mark.study
def test_glyph_scenes_classifier_reads_the_crops(home):
    model = scenes.classifier({"classifier_steps": 150})
    drawn = scenes.draw_scenes("scenes", "test", 60, generator(), (0.0, 0.0))
    right = model(drawn.crops().flatten(0, 1)).argmax(-1) == drawn.condition.flatten()
    assert right.double().mean() > 0.6


@pytest.mark.study
def test_mole_diffusion_study_experts_are_kept(home):
    settings = PRESETS["smoke"]
    first, again = experts(settings, 0), experts(settings, 0)
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(one[name][i], other[name][i]) for name in one for i in (0, 1))
    assert not torch.equal(*(lora["blocks.0.ffn.down"][1] for lora in first))


@pytest.mark.study
def test_mole_diffusion_study_runs_twice_the_same(home):
    results = [STUDY.execute("smoke") for _ in range(2)]
    for one, other in zip(*(result.rows for result in results), strict=True):
        assert (one.metric, one.extra, one.flops) == (other.metric, other.extra, other.flops)
    rows = {row.arm: row for row in results[0].rows}
    assert list(rows) == list(ARMS)
    for arm in GATES:
        assert torch.tensor(rows[arm].extra["maps"]).shape == (2, 12, 12)
        assert all(0 <= value <= 1 for value in rows[arm].extra["box_auc"])
    trained = {arm: rows[arm].extra["trained"] for arm in GATES}
    assert trained["mole"] == trained["local"] + trained["global"]
    json.dumps(results[0].to_dict())
