"""What a network with knobs is, and what it says to an image at a setting of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from numpy import ndarray

from workbench.errors import InputError


@dataclass(frozen=True)
class Knob:
    """A number that one chooses: `low` to `high`, in steps of `step`, at first `value`."""

    name: str
    low: float
    high: float
    value: float
    step: float = 0.05
    about: str = ""


@dataclass(frozen=True)
class Curve:
    """What there is to choose between, for the image on show: points by name, and where the chosen one lies.

    Attributes:
        line: whether the points come one after the other.
    """

    title: str
    x: str
    y: str
    points: Mapping[str, tuple[float, float]]
    chosen: tuple[float, float]
    line: bool = False


@dataclass(frozen=True)
class Answer:
    """What a network says.

    Attributes:
        given, made, truth: images (H, W) of values 0 to 1; no truth where nobody knows it.
        measures: what is measured of it, in words and numbers with their units.
    """

    given: Float[ndarray, "H W"]
    made: Float[ndarray, "H W"]
    truth: Float[ndarray, "H W"] | None
    measures: Mapping[str, str]
    curve: Curve


@runtime_checkable
class Network(Protocol):
    """A trained network with knobs.

    Attributes:
        system: the catalogue's slug of what it is an example of.
        about: what it is and what its knobs do, in a sentence or two.
        knobs: what one may choose.
        images: how many images there are to choose from.
    """

    system: str
    about: str
    knobs: tuple[Knob, ...]
    images: int

    def answer(self, image: int, setting: Mapping[str, float]) -> Answer:
        """What it says to an image at a setting of its knobs, in a small part of a second."""


def checked(network: Network, image: int, setting: Mapping[str, float]) -> dict[str, float]:
    """A setting in which each knob has a number within its range.

    Raises:
        InputError: an image that is not there, a knob that is missing or unknown, or a number out of its range.
    """
    if not 0 <= image < network.images:
        raise InputError(f"image is {image} but must be 0 to {network.images - 1}")
    knobs = {knob.name: knob for knob in network.knobs}
    if wrong := set(setting) ^ set(knobs):
        raise InputError(f"setting has the knobs {sorted(setting)} but must have {sorted(knobs)}: {sorted(wrong)}")
    for name, knob in knobs.items():
        if not knob.low <= setting[name] <= knob.high:
            raise InputError(f"{name} is {setting[name]} but must be {knob.low:g} to {knob.high:g}")
    return {name: float(setting[name]) for name in knobs}
