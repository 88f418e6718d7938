"""The networks of the page of sliders, by name: trained when they are first asked for, and then kept."""

from collections.abc import Callable, Iterator
from importlib import import_module

from workbench.errors import unknown
from workbench.sliders.networks import Network

SIZES = ("small", "smoke")
"""How long the networks are trained, the default first."""

NETWORKS = {
    "denoise": ("Faithful or sharp", "workbench.sliders.denoise"),
    "deblur": ("Several sharp answers", "workbench.sliders.deblur"),
}
"""Name -> title, and the module whose `open_network(size)` yields words on how far it is, and then the network."""


def open_network(name: str, size: str = SIZES[0]) -> Iterator[str | Network]:
    """Words on how far it is, then the network, which is trained once and then kept.

    Raises:
        InputError: an unknown name or size, or the images are not on this machine.
    """
    if name not in NETWORKS:
        raise unknown("network", name, NETWORKS)
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    opening: Callable[[str], Iterator[str | Network]] = import_module(NETWORKS[name][1]).open_network
    yield from opening(size)
