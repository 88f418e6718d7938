"""The page of sliders: what it shows is what the network says, at once, and nonsense is refused by name."""

import math

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.lib import data
from workbench.sliders.networks import Answer, Network, checked
from workbench.sliders.opening import NETWORKS, open_network
from workbench.sliders.page import SlidersPage


@pytest.fixture(scope="module", params=NETWORKS)
def network(request) -> Network:
    data.get("photos")
    *said, network = open_network(request.param, "smoke")
    assert said and all(isinstance(words, str) for words in said) and isinstance(network, Network)
    return network


def setting(network: Network, **changed: float) -> dict[str, float]:
    return {knob.name: knob.value for knob in network.knobs} | changed


def test_it_answers_every_setting_with_images_and_a_curve(network):
    for values in ("low", "high", "value"):
        answer = network.answer(network.images - 1, {knob.name: getattr(knob, values) for knob in network.knobs})
        assert isinstance(answer, Answer)
        for image in (answer.given, answer.made, answer.truth):
            assert image is None or (image.ndim == 2 and 0 <= image.min() <= image.max() <= 1)
        numbers = [*answer.curve.chosen, *(value for point in answer.curve.points.values() for value in point)]
        assert np.isfinite(numbers).all() and len(answer.curve.points) > 1 and answer.measures


def test_every_knob_changes_what_it_says_and_the_same_setting_says_the_same(network):
    first = network.answer(0, setting(network))
    again = network.answer(0, setting(network))
    assert np.array_equal(first.made, again.made) and first.measures == again.measures
    for knob in network.knobs:
        other = knob.low if knob.value > (knob.low + knob.high) / 2 else knob.high
        changed = network.answer(0, setting(network, **{knob.name: other}))
        assert not np.array_equal(changed.made, first.made), knob.name
    assert not np.array_equal(network.answer(1, setting(network)).given, first.given)


def test_a_setting_that_is_none_is_named(network):
    knob = network.knobs[0]
    for wrong, said in (
        (setting(network, **{knob.name: knob.high + 1}), f"{knob.name} is {knob.high + 1}"),
        (setting(network, **{knob.name: math.nan}), f"{knob.name} is nan"),
        (setting(network, other=1.0), "setting has the knobs"),
        ({}, "setting has the knobs"),
    ):
        with pytest.raises(InputError, match=said):
            network.answer(0, wrong)
    with pytest.raises(InputError, match=f"image is {network.images}"):
        checked(network, network.images, setting(network))


def test_the_page_follows_its_knobs(until):
    data.get("photos")
    page = SlidersPage("deblur", "smoke")

    def ready() -> bool:
        page.poll()
        return page.answered is not None

    until(ready)
    before = page.answered
    page.sliders["output"].value = (page.sliders["output"].value + 1) % 10
    assert not np.array_equal(page.answered.made, before.made) and np.array_equal(page.answered.given, before.given)
    page.image.value = 1
    assert not np.array_equal(page.answered.given, before.given)
    assert "answered in" in page.status.object
    shown = [card.contents[0] for card in page.cards.values()]
    assert all("data:image/png;base64," in content for content in shown[:3]) and shown[3].layout.title.text


@pytest.mark.parametrize(
    ("given", "said"),
    [({"network": "debler"}, "did you mean 'deblur'"), ({"size": "huge"}, "size 'huge' is unknown")],
)
def test_a_page_of_nothing_is_named(given, said):
    with pytest.raises(InputError, match=said):
        SlidersPage(**given)


def test_a_network_is_found_by_its_name_alone():
    with pytest.raises(InputError, match="network 'x'"):
        next(open_network("x"))
    with pytest.raises(InputError, match="size 'x'"):
        next(open_network("deblur", "x"))
