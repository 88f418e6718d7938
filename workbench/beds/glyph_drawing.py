"""Digits that a denoiser draws into the two boxes of a scene, see `glyph_scenes`, and a fixed judge of them."""

import sys
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds import glyph_scenes
from workbench.beds.glyph_scenes import CLASSES, LEVELS, GlyphScenes, Scenes, add_noise, draw_scenes, signal
from workbench.beds.pretrained import pretrained
from workbench.lib.core.modes import evaluating


def inpaint(model: nn.Module, scenes: Scenes, steps: int, seed: int) -> Tensor:
    """Draw the two boxes of scenes whose rest is given: DDIM (Song et al. 2021, 2010.02502), eta 0, and after each step
    everything outside the boxes is put back at its level of noise. No guidance."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(scenes.images.shape, generator=generator)
    inside = scenes.boxes().any(1, keepdim=True)
    times = torch.linspace(LEVELS, 0, steps + 1).round().long()
    x = noise.clone()
    with evaluating(model):
        for now, after in pairwise(times):
            time = now.expand(len(x))
            known = add_noise(scenes.images, noise, time)
            x = torch.where(inside, x, known)
            predicted, share = model(x, time, scenes.condition), signal(now)
            clean = ((x - (1 - share).sqrt() * predicted) / share.sqrt()).clamp(-1.5, 1.5)
            x = add_noise(clean, (x - share.sqrt() * clean) / (1 - share).sqrt(), after.expand(len(x)))
    return torch.where(inside, x, scenes.images)


def drawn(model: nn.Module, judge: nn.Sequential, task: GlyphScenes, steps: int, seed: int) -> dict[str, float]:
    """How good the digits are that a denoiser draws into the boxes of the test scenes.

    Args:
        judge: a classifier of crops, see `classifier`; its values before the last layer are the features.

    Returns:
        drawn_right: share that the classifier reads as the wanted digit. drawn_distance: Fréchet distance of their
        features from those of the scenes' own digits (Heusel et al. 2017, 1706.08500).
    """
    scenes, _ = task.fixed("test")
    crops = [scenes.crops(images).flatten(0, 1) for images in (inpaint(model, scenes, steps, seed), scenes.images)]
    with torch.no_grad():
        right = judge(crops[0]).argmax(-1) == scenes.condition.flatten()
        distance = frechet_distance(*(judge[:-1](part).double() for part in crops))
    return {"drawn_right": float(right.double().mean()), "drawn_distance": distance}


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Of two Gaussians with the means and covariances of the rows of a (rows, features) and of b."""
    covariances = a.T.cov(), b.T.cov()
    # the eigenvalues of a product of two covariances are real and not negative, but for rounding
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    spread = covariances[0].trace() + covariances[1].trace() - 2 * root
    return float((a.mean(0) - b.mean(0)).square().sum() + spread)


def make_classifier() -> nn.Sequential:
    """Digit of an 8 x 8 crop; the 16 values before its last layer are its features."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, CLASSES)
    )


def classifier(settings: Mapping[str, Any]) -> nn.Module:
    """Taught on crops of sharp scenes with all handwritings of the training split; from the cache where it is."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return make_classifier()

    def teach(model: nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        generator = torch.Generator().manual_seed(0)
        for _ in range(settings["classifier_steps"]):
            scenes = draw_scenes("scenes", "train", 32, generator, (0.0, 0.0), few=False)
            optimizer.zero_grad()
            F.cross_entropy(model(scenes.crops().flatten(0, 1)), scenes.condition.flatten()).backward()
            optimizer.step()

    recipe = {"steps": settings["classifier_steps"], "data": GlyphScenes("scenes").manifest}
    return pretrained("glyph-classifier", recipe, build, teach, [glyph_scenes, sys.modules[__name__]])
