"""HyTra: which paths are legal, counted, and that a block runs each of them."""

import itertools

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.core.train import TrainConfig
from workbench.lib.data.types import Arrays
from workbench.lib.search.bossnas import EnsembleBootstrap, PathTower
from workbench.lib.search.bossnas_hytra import (
    SCALE_OF,
    FabricLayer,
    fabric_block,
    legal_paths,
    scales_left,
    search_fabric,
)
from workbench.lib.search.bossnas_search import BlockwiseConfig
from workbench.lib.search.bossnas_views import TwoViews


@pytest.mark.parametrize(("n_scales", "every", "restricted"), [(4, 131, 51), (3, 115, 99), (2, 80, 80), (1, 16, 16)])
def test_the_published_counts(n_scales: int, every: int, restricted: int):
    paths = legal_paths(n_scales)
    assert len(paths) == len({*paths}) == every and len(legal_paths(n_scales, kind="restricted")) == restricted
    for path in paths:
        scales = [SCALE_OF[op] for op in path]
        assert max(scales) < n_scales and all(a - b in (0, 1) for a, b in itertools.pairwise(scales))
        assert scales_left(path) == scales[-1] + 1
    assert {*legal_paths(n_scales, kind="restricted")} <= {*paths}


def test_a_block_runs_every_path_and_halves_maps_where_the_scale_falls():
    torch.manual_seed(0)
    block = fabric_block((16, 8), layers=2)
    x = torch.randn(2, 8, 8, 8)
    assert len(block.paths) == 12 and block.d_outs() == [8, 16]
    for path in block.paths:
        y = block(x, path)
        scale = SCALE_OF[path[-1]]
        assert y.shape == (2, (16, 8)[scale], 4 + 4 * scale, 4 + 4 * scale)
    with pytest.raises(InputError, match="but must be one of the 12 legal ones"):
        block(x, (0, 2))


def test_a_block_is_trained_on_paths_of_the_legal_list():
    torch.manual_seed(0)
    block = fabric_block((16, 8), layers=2)
    model = EnsembleBootstrap(PathTower([], block, (8, 16, 8)), 4, 16)
    losses = model(torch.randn(4, 2, 8, 8, 8))
    losses.sum().backward()
    drawn = block.draw(4)
    assert losses.shape == (4,) and len({*drawn}) == 4 and {*drawn} <= {*block.paths}


def test_a_search_goes_on_with_the_scales_that_are_left():
    images = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    task = TwoViews(Arrays("noise", {"train": (images, torch.arange(24) % 2)}, tuple("ab"), {}))
    config = BlockwiseConfig(TrainConfig(2, 8, eval_every=None), 0.9, (8, 16, 8), 16, rated=8)
    torch.manual_seed(0)
    ratings, blocks = search_fabric(task, config, (16, 8), (2, 1, 1))
    scales = [SCALE_OF[op] for op in itertools.chain(*ratings.best)]
    assert all(a - b in (0, 1) for a, b in itertools.pairwise([1, *scales]))  # one legal path through all blocks
    for before, block in zip(ratings.best, blocks[1:], strict=False):
        assert block.paths == legal_paths(scales_left(before), 1, "restricted")
    assert ratings.count == sum(len(block.paths) for block in blocks)
    torch.manual_seed(0)
    assert search_fabric(task, config, (16, 8), (2, 1, 1))[0] == ratings


def test_wrong_spaces_are_refused():
    with pytest.raises(InputError, match="n_scales is 5 but must be from 1 to 4"):
        legal_paths(5)
    with pytest.raises(InputError, match="kind 'some' is unknown"):
        legal_paths(2, kind="some")
    with pytest.raises(InputError, match="layers is 0"):
        legal_paths(2, 0)
    with pytest.raises(InputError, match="widths is"):
        FabricLayer((8, 8))
