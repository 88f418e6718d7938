"""Several outputs for a blurred photograph: which motion it was, how noisy it is, and which answer is looked at."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

from workbench.beds import moving_crops
from workbench.beds.pretrained import pretrained
from workbench.lib.core import nafnet
from workbench.lib.core.nafnet import NAFNet
from workbench.lib.core.task import psnr
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.imaging import multi_output_deblur
from workbench.lib.imaging.multi_output_deblur import MultiOutput
from workbench.sliders.networks import Answer, Curve, Knob, Network, checked
from workbench.sliders.windows import IMAGES, windows
from workbench.studies.imaging.multi_output_deblur import Deblurring, report

SIDE, HEADS = 64, 4
STEPS = {"small": 1500, "smoke": 5}


class SeveralAnswers:
    """The network, and windows of photographs that it has not seen."""

    system = "multi-output-deblur"
    about = (
        "A network with four outputs, of which only the best was penalised as it trained, and the means of their "
        "pairs. A window of a photograph moves by as many pixels as you say, and its frames are added up: the sharp "
        "frame may be any of them, and each output has its own. Which is right takes the truth to know."
    )
    images = IMAGES

    def __init__(self, model: MultiOutput, windows: list[np.ndarray], first: int):
        """`first` is the output that is shown first."""
        self.model, self.windows = model.eval(), windows
        self.knobs = (
            Knob("output", 0, len(model.pairs) - 1, first, 1, f"of {len(model.pairs)}, from 0"),
            Knob("motion", 0, moving_crops.REACH, moving_crops.REACH, 1, "pixels to either side"),
            Knob("direction", 0, 180, 30, 5, "degrees"),
            Knob("noise", 0, 20, 1, 1, "deviation, of 255"),
        )

    @torch.no_grad()
    def answer(self, image: int, setting: Mapping[str, float]) -> Answer:
        chosen = checked(self, image, setting)
        frames = self._frames(image, int(chosen["motion"]), chosen["direction"])
        noise = np.random.default_rng(image).standard_normal((SIDE, SIDE)) * chosen["noise"]
        given = torch.from_numpy((frames.mean(0) + noise).clip(0, 255) / 255).float()
        truth = torch.from_numpy(frames[len(frames) // 2] / 255).float()
        outputs = self.model(given[None, None])[0, :, 0]
        found = psnr(outputs, truth.expand_as(outputs)).tolist()
        apart = (outputs - outputs.mean(0)).square().flatten(1).mean(1).sqrt().mul(255).tolist()
        k = int(chosen["output"])
        names = [f"head {i}" if i == j else f"heads {i}, {j}" for i, j in self.model.pairs.tolist()]
        curve = Curve(
            "The outputs for this image",
            "distance from the mean of all, of 255",
            "PSNR, dB",
            dict(zip(names, zip(apart, found, strict=True), strict=True)),
            (apart[k], found[k]),
        )
        measures = {
            "shown": names[k],
            "PSNR of what was given": f"{psnr(given[None], truth[None]).item():.2f} dB",
            "of this output": f"{found[k]:.2f} dB",
            "of the best one": f"{max(found):.2f} dB, {names[found.index(max(found))]}",
        }
        return Answer(given.numpy(), outputs[k].clamp(0, 1).numpy(), truth.numpy(), measures, curve)

    def _frames(self, image: int, reach: int, degrees: float) -> np.ndarray:
        """(frames, SIDE, SIDE) of 0 to 255: windows along a line, a pixel apart."""
        angle, most = math.radians(degrees), moving_crops.REACH
        frames = []
        for step in range(-reach, reach + 1):
            top, left = (most + round(step * part(angle)) for part in (math.sin, math.cos))
            frames.append(self.windows[image][top : top + SIDE, left : left + SIDE])
        return np.stack(frames)


def open_network(size: str) -> Iterator[str | Network]:
    """Words on how far it is, then the network.

    Raises:
        InputError: the photographs are not on this machine.
    """
    yield "drawing what it trains on"
    task = moving_crops.make(1600, 24, moving_crops.REACH)
    yield "the network with several outputs, trained once and then kept"

    def build() -> nn.Module:
        torch.manual_seed(0)
        return MultiOutput(NAFNet(1, 8, out_ch=HEADS), HEADS)

    def teach(model: nn.Module) -> None:
        train(model, Deblurring(task), TrainConfig(STEPS[size], 16, 5e-3, weight_decay=1e-3))

    recipe = {"steps": STEPS[size], "data": task.manifest["crops"]["sha256"], "heads": HEADS}
    model = pretrained("sliders-deblur", recipe, build, teach, [nafnet, multi_output_deblur])
    yield SeveralAnswers(model, windows(SIDE + 2 * moving_crops.REACH), report(model, task, "validation").best_single)
