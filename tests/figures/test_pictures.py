"""Pictures of any side in a grid: each at its place, of one size, coloured by its own largest magnitude."""

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.figures.pictures import pictures


def test_every_picture_has_its_place_and_its_own_scale():
    small, large = np.array([[-4.0, 0.0], [1.0, 2.0]]), np.zeros((4, 4))
    figure = pictures([[small, large], [large, small]], ["a", "b"], ["x", "y"], title="t")
    tiles = figure.data
    assert len(tiles) == 4 and [tile.showscale for tile in tiles] == [True, False, False, False]
    assert np.asarray(tiles[0].z).min() == -1 and np.asarray(tiles[0].customdata).min() == -4
    assert not np.asarray(tiles[1].z).any()
    for tile, (x, y) in zip(tiles, [(0, 0), (1, 0), (0, 1), (1, 1)], strict=True):
        assert np.mean(tile.x) == pytest.approx(x) and np.mean(tile.y) == pytest.approx(y)
        assert np.abs(np.asarray(tile.x) - x).max() < 0.5
    assert list(figure.layout.yaxis.ticktext) == ["a", "b"]


def test_images_have_one_scale_from_black_to_white():
    figure = pictures([[np.full((2, 2), 0.5), np.eye(2)]], ["a"], ["x", "y"], title="t", grey=(0, 1))
    for tile, value in zip(figure.data, (0.5, 1), strict=True):
        assert (tile.zmin, tile.zmax) == (0, 1) and np.asarray(tile.z).max() == value
        assert [colour for _, colour in tile.colorscale] == ["black", "white"]
    with pytest.raises(InputError, match="white must be above black"):
        pictures([[np.eye(2)]], ["a"], ["x"], title="t", grey=(1, 1))


@pytest.mark.parametrize(
    ("maps", "said"),
    [
        ([[np.zeros((2, 2))]], "rows of"),
        ([[np.zeros((2, 2)), np.zeros((2, 3))]], r"of \(2, 3\) but all must be square"),
    ],
)
def test_what_cannot_be_drawn_is_refused(maps, said):
    with pytest.raises(InputError, match=said):
        pictures(maps, ["a"], ["x", "y"], title="t")
