"""A tunable network for noisy photographs: how faithful, how sharp, chosen while one looks."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

from workbench.beds import restoration
from workbench.beds.pretrained import pretrained
from workbench.lib.core import tunable
from workbench.lib.core.task import psnr
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.imaging import tunable_conv
from workbench.sliders.networks import Answer, Curve, Knob, Network, checked
from workbench.sliders.windows import IMAGES, windows
from workbench.studies.imaging.tunable_conv import PRESETS, Axis, contrast, network

SIDE = 64
GRID = np.linspace(0, 1, 11)
STEPS = {"small": 800, "smoke": 5}


class FaithfulOrSharp:
    """The network, and windows of photographs that it has not seen."""

    system = "tunable-conv"
    about = (
        "One network whose kernels are mixed by the same knobs that weighted its losses as it trained. All the way "
        "faithful is least wrong pixel by pixel and smooth; all the way sharp has the contrast of the photograph and "
        "has to invent what the noise has covered."
    )
    images = IMAGES
    knobs = (
        Knob("faithful", 0, 1, 0.5, 0.01, "0 is sharp"),
        Knob("noise", 0, 50, 25, 1, "deviation, of 255"),
    )

    def __init__(self, model: tunable_conv.Tuned, photographs: list[np.ndarray]):
        self.model, self.photographs = model.eval(), photographs

    @torch.no_grad()
    def answer(self, image: int, setting: Mapping[str, float]) -> Answer:
        chosen = checked(self, image, setting)
        u, clean = chosen["faithful"], self.photographs[image] / 255
        noise = np.random.default_rng(image).standard_normal(clean.shape) * chosen["noise"] / 255
        truth, given = (torch.from_numpy(part).float()[None, None] for part in (clean, (clean + noise).clip(0, 1)))
        every = torch.tensor([[v, 1 - v] for v in (*GRID, u)], dtype=torch.float32)
        outputs = self.model(given.expand(len(every), -1, -1, -1), w=every)  # the whole curve, and the chosen point
        quality = psnr(outputs, truth.expand_as(outputs)).tolist()
        rough = (contrast(outputs).mean((1, 2, 3)) / contrast(truth).mean()).tolist()
        points = {f"{v:g}": point for v, *point in zip(GRID, rough, quality, strict=False)}
        curve = Curve(
            "The compromises for this image",
            "local contrast, of the photograph's",
            "PSNR, dB",
            {name: tuple(point) for name, point in points.items()},
            (rough[-1], quality[-1]),
            line=True,
        )
        measures = {
            "PSNR of what was given": f"{psnr(given, truth).item():.2f} dB",
            "of what is made": f"{quality[-1]:.2f} dB",
            "its local contrast": f"{rough[-1]:.0%} of the photograph's",
        }
        return Answer(given[0, 0].numpy(), outputs[-1, 0].clamp(0, 1).numpy(), clean, measures, curve)


def open_network(size: str) -> Iterator[str | Network]:
    """Words on how far it is, then the network.

    Raises:
        InputError: the photographs are not on this machine.
    """
    yield "drawing what it trains on"
    noisy = restoration.make(800, 24, ways=("noise",))
    yield "one network for all compromises, trained once and then kept"
    settings = PRESETS["small"]

    def build() -> nn.Module:
        torch.manual_seed(0)
        return network("tunable", settings)

    def teach(model: nn.Module) -> None:
        train(model, Axis(noisy), TrainConfig(STEPS[size], 16, settings["rate"], weight_decay=0.0))

    recipe = {"steps": STEPS[size], "settings": settings, "data": noisy.manifest["crops"]}
    model = pretrained("sliders-denoise", recipe, build, teach, [tunable, tunable_conv, restoration])
    yield FaithfulOrSharp(model, windows(SIDE))
