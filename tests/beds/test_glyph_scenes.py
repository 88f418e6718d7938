"""Glyph scenes: what is drawn, what is judged, and how drawn digits are measured."""

import pytest
import torch
from torch import nn

from workbench.beds import glyph_drawing as drawing
from workbench.beds import glyph_scenes as scenes
from workbench.beds.glyph_denoiser import Denoiser
from workbench.errors import InputError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


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
    model = Denoiser((8, 8, 8))
    drawn = scenes.draw_scenes("scenes", "test", 3, generator(), (0.0, 0.0))
    made = drawing.inpaint(model, drawn, 3, 0)
    inside = drawn.boxes().any(1, keepdim=True)
    assert torch.equal(made[~inside], drawn.images[~inside]) and not torch.equal(made[inside], drawn.images[inside])


def test_glyph_scenes_without_a_part_are_the_same_elsewhere():
    task = scenes.GlyphScenes("scenes", 12)
    whole, noise = task.fixed("validation")
    for e, part in enumerate(scenes.PARTS):
        without, same = task.fixed("validation", missing=part)
        box = whole.boxes()[:, e : e + 1]
        assert torch.equal(noise, same) and torch.equal(whole.images[~box], without.images[~box])
        assert (without.condition[:, e] == scenes.MISSING).all()
        assert torch.equal(without.condition[:, 1 - e], whole.condition[:, 1 - e])
        assert whole.images[box].mean() > without.images[box].mean() + 0.1


def test_glyph_scenes_task_is_the_error_inside_each_region():
    task = scenes.GlyphScenes("scenes", 6)

    class Silent(nn.Module):
        """Says that there is no noise, and is wrong by all of it."""

        def forward(self, x, time, condition, context=None):
            return torch.zeros_like(x)

    found = task.evaluate(Silent(), "test")
    drawn, noise = task.fixed("test")
    for i, region in enumerate(scenes.REGIONS):
        expected = noise[:, 0][drawn.regions()[:, i]].square().mean().item()
        assert found[region] == pytest.approx(expected, rel=1e-6)
        assert found[f"{region}@100"] == pytest.approx(expected, rel=1e-6)
    assert found["part_error"] == pytest.approx((found["face"] + found["hand"]) / 2)
    assert (
        drawn.regions().sum(1).max() == 1 and drawn.regions().any(1).all()
    )  # boxes never overlap, nothing is left out


class Knowing(nn.Module):
    """Knows the images, and so the noise."""

    def __init__(self, images):
        super().__init__()
        self.images = images

    def forward(self, x, time, condition, context=None):
        share = scenes.signal(time).view(-1, 1, 1, 1)
        return (x - share.sqrt() * self.images) / (1 - share).sqrt()


def test_glyph_scenes_drawn_by_one_who_knows_them_are_the_scenes():
    task = scenes.GlyphScenes("scenes", 20)
    drawn, _ = task.fixed("test")
    made = drawing.inpaint(Knowing(drawn.images), drawn, 8, 0)
    torch.testing.assert_close(made, drawn.images, atol=1e-3, rtol=0)
    torch.manual_seed(0)
    judge = drawing.make_classifier()
    found = drawing.drawn(Knowing(drawn.images), judge, task, 8, 0)
    right = judge(drawn.crops().flatten(0, 1)).argmax(-1) == drawn.condition.flatten()
    assert found["drawn_right"] == pytest.approx(right.double().mean().item(), abs=0.06)
    assert found["drawn_distance"] == pytest.approx(0.0, abs=1e-3)
    assert (
        drawing.drawn(Knowing(-drawn.images), judge, task, 8, 0)["drawn_distance"] > 10 * found["drawn_distance"] + 0.1
    )


def test_glyph_scenes_distance_of_two_gaussians():
    a = torch.randn(400, 3, generator=generator(), dtype=torch.float64)
    shift, scale = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])
    assert drawing.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert drawing.frechet_distance(a, a + shift) == pytest.approx(5.0, abs=1e-9)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(a.T.cov())).T  # covariance 1
    assert drawing.frechet_distance(a, a * scale) == pytest.approx(((scale - 1) ** 2).sum().item(), abs=1e-6)


@pytest.mark.study
def test_glyph_scenes_classifier_reads_the_crops():
    model = drawing.classifier({"classifier_steps": 150})
    drawn = scenes.draw_scenes("scenes", "test", 60, generator(), (0.0, 0.0))
    right = model(drawn.crops().flatten(0, 1)).argmax(-1) == drawn.condition.flatten()
    assert right.double().mean() > 0.6
