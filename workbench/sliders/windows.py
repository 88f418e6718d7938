"""Grey windows of the photographs that nothing is trained on, for the networks of the page to answer."""

import numpy as np

from workbench.beds.restoration import pool
from workbench.lib import data

IMAGES = 8
DULL, DARK = 40.0, 60.0  # of 255: a window of a lesser deviation or mean shows little


def windows(side: int) -> list[np.ndarray]:
    """`IMAGES` windows (side, side) of 0 to 255, always the same.

    Raises:
        InputError: the photographs are not on this machine.
    """
    images = pool(data.load("photos").splits["test"], 1)
    draw, found = np.random.default_rng(0), []
    while len(found) < IMAGES:
        image = images[sorted(images)[len(found) % len(images)]][0]
        top, left = (draw.integers(edge - side + 1) for edge in image.shape)
        window = image[top : top + side, left : left + side]
        if window.std() > DULL and window.mean() > DARK:
            found.append(window)
    return found
