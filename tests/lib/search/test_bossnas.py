"""BossNAS: fair paths, the ensemble's target, what gets a gradient, the moving average, ratings and their sum."""

import copy
import itertools
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from workbench.errors import InputError
from workbench.lib.core.observe import observing
from workbench.lib.core.train import TrainConfig
from workbench.lib.data.types import Arrays
from workbench.lib.search.bossnas import (
    BlockSupernet,
    EnsembleBootstrap,
    PathTower,
    WidthChoice,
    WidthNet,
    WidthSpace,
    alignment,
    fair_paths,
    momentum_at,
    width_blocks,
)
from workbench.lib.search.bossnas_search import (
    BlockRatings,
    Blockwise,
    BlockwiseConfig,
    rate_all,
    rate_architecture,
    rate_paths,
    search_blockwise,
)
from workbench.lib.search.bossnas_views import TwoViews, image_views, signal_views

SPACE = WidthSpace(1, 24, 5, (2, 3, 4), (2, 1, 2), (2, 1), kernel=3)
NECK = (4, 8, 6)


def made(seed: int = 0, n_paths: int = 3, ensemble: bool = True) -> EnsembleBootstrap:
    """The second block behind a path of the first."""
    torch.manual_seed(seed)
    first, second = width_blocks(SPACE)
    return EnsembleBootstrap(PathTower([(first, (1, 2))], second, NECK), n_paths, 8, None, ensemble)


def views(n: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 2, 24, generator=torch.Generator().manual_seed(seed))


def task() -> TwoViews:
    generator = torch.Generator().manual_seed(0)
    rows = {split: (torch.randn(40, 24, generator=generator), torch.arange(40) % 5) for split in ("train", "test")}
    return TwoViews(Arrays("noise", rows, tuple("abcde"), {}))


CONFIG = BlockwiseConfig(TrainConfig(3, 8, eval_every=None), 0.9, NECK, 8, rated=16)


@pytest.mark.parametrize(("n_ops", "layers"), [(1, 1), (4, 2), (8, 5)])
def test_fair_paths_use_every_operator_of_every_layer_once(n_ops: int, layers: int):
    paths = fair_paths(n_ops, layers, torch.Generator().manual_seed(0))
    assert paths.shape == (n_ops, layers)
    assert all(column.sort().values.tolist() == list(range(n_ops)) for column in paths.unbind(1))


def test_the_target_of_an_ensemble():
    model = made()
    first = views()[:, 0]
    paths = model.online.block.paths
    own = torch.stack([F.normalize(model.target(first, path), dim=-1) for path in paths])
    torch.testing.assert_close(model.targets(first, paths), own.mean(0).expand_as(own))
    torch.testing.assert_close(model.targets(first, [(1,)] * 3)[0], own[1])
    torch.testing.assert_close(made(ensemble=False).targets(first, paths), own)


@pytest.mark.parametrize("ensemble", [True, False])
def test_one_path_is_byol(ensemble: bool):
    model, x, path = made(n_paths=1, ensemble=ensemble), views(), (2,)
    first, second = x.unbind(1)
    expected = 0.0
    for one, other in ((first, second), (second, first)):
        q = F.normalize(model.predict(model.online(one, path)), dim=-1)
        z = F.normalize(model.target(other, path), dim=-1)
        expected = expected + (q - z).square().sum(-1).mean() - 2  # BYOL's loss but for a constant
    torch.testing.assert_close(model(x, None, [path])[0], expected, atol=1e-5, rtol=0)


def test_the_loss_has_its_ends_where_all_aligns_and_no_length():
    q = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    assert float(alignment(q, q)) == pytest.approx(-2) and float(alignment(q, -q)) == pytest.approx(2)
    other = q.flip(0)
    torch.testing.assert_close(alignment(3.7 * q, other), alignment(q, other))
    assert -2 < float(alignment(q, other)) < 2
    losses = made()(views())
    assert losses.shape == (3,) and (losses.abs() <= 4).all()


def test_gradients_reach_every_operator_of_the_block_and_nothing_else():
    model = made()
    model(views()).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.online.block.parameters())
    assert all(p.grad is not None for p in [*model.online.adapters.parameters(), *model.predict.parameters()])
    assert all(p.grad is None for p in [*model.online.prefix.parameters(), *model.target.parameters()])


def test_the_target_starts_equal_and_follows():
    model = made()
    pairs = list(zip(model.online.parameters(), model.target.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    with torch.no_grad():
        for p in model.online.parameters():
            if p.requires_grad:
                p.add_(1)
    before = [b.clone() for _, b in pairs]
    model.follow(1.0)
    assert all(torch.equal(b, kept) for (_, b), kept in zip(pairs, before, strict=True))
    model.follow(0.75)
    for (a, b), kept in zip(pairs, before, strict=True):
        torch.testing.assert_close(b, 0.75 * kept + 0.25 * a)
    model.follow(0.0)
    assert all(torch.equal(a, b) for a, b in pairs)
    steps = [momentum_at(step, 10, 0.9) for step in range(10)]
    assert steps[0] == pytest.approx(0.9) and steps[-1] == 1 and steps == sorted(steps)


def test_ratings_depend_on_no_order_and_change_nothing():
    model = made()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    found = rate_paths(model, views(), views(seed=2))
    assert rate_paths(model, views(), views(seed=2)) == found
    model.online.block.paths.reverse()
    turned = rate_paths(model, views(), views(seed=2))
    assert {*turned} == {*found} and all(turned[path] == pytest.approx(found[path], abs=1e-6) for path in found)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(-4 <= score <= 4 for score in found.values()) and model.training
    assert rate_paths(model, views(), views(seed=2), recalibrated=False) != found


def test_a_rating_is_against_the_centre_of_all_paths():
    model, x, seen = made(), views(), views(seed=2)
    found = rate_paths(model, x, seen, recalibrated=False)
    model.eval()
    with torch.no_grad():
        every = [[model.target(view, path) for path in model.online.block.paths] for view in x.unbind(1)]
        c1, c2 = (torch.stack(one).mean(0) for one in every)
        q1, q2 = (model.predict(model.online(view, (0,))) for view in x.unbind(1))
    assert found[(0,)] == pytest.approx(float(alignment(q1, c2) + alignment(q2, c1)), abs=1e-6)


def test_the_best_architecture_is_the_best_path_of_each_block():
    torch.manual_seed(0)
    ratings = search_blockwise(width_blocks(SPACE), task(), CONFIG)
    assert ratings.count == 9 + 3 and [len(scores) for scores in ratings.scores] == [9, 3]
    archs = SPACE.every()
    rated = rate_all(SPACE, ratings, archs)
    best = archs[min(range(len(archs)), key=rated.__getitem__)]
    assert best == tuple(itertools.chain(*ratings.best)) and min(rated) >= 0
    torch.manual_seed(0)
    assert search_blockwise(width_blocks(SPACE), task(), CONFIG) == ratings


def test_the_frozen_prefix_stays_as_it_is():
    torch.manual_seed(0)
    first, second = width_blocks(SPACE)
    search = Blockwise(task(), CONFIG)
    search.add(first)
    kept = copy.deepcopy(dict(first.named_parameters()))
    search.add(second)
    assert all(torch.equal(p, kept[name]) for name, p in first.named_parameters())
    assert first.layers[0].weight.grad is not None  # it was trained before


def test_both_nets_are_rated_behind_the_prefix_of_the_target():
    torch.manual_seed(3)
    model, (other, _) = made(), width_blocks(SPACE)
    second = copy.deepcopy(model.online)
    second.prefix[0] = other
    behind = EnsembleBootstrap(model.online, 3, 8, [other])
    behind.predict = model.predict
    alike = EnsembleBootstrap(second, 3, 8)
    alike.predict = model.predict
    assert rate_paths(behind, views(), views(seed=2)) == rate_paths(alike, views(), views(seed=2))
    assert rate_paths(behind, views(), views(seed=2)) != rate_paths(model, views(), views(seed=2))


def test_paths_are_announced_as_a_router_announces_experts():
    model = made()
    with observing([model.taken]) as seen:
        model(views(), None, [(0,), (2,), (1,)])
    ((routing, _),) = seen[model.taken]
    assert routing.n_experts == 3 and routing.indices.tolist() == [[0], [2], [1]]


def test_a_choice_computes_what_a_convolution_of_its_width_does():
    torch.manual_seed(0)
    choice, x = WidthChoice(4, (2, 3), 3, 2), torch.randn(5, 3, 9)
    expected = choice.norms[1](F.conv1d(x, choice.weight[:3, :3], None, 2, 1)).relu()
    torch.testing.assert_close(choice(x, 1), expected)
    assert choice(x, 0).shape == (5, 2, 5)


@pytest.mark.parametrize("space", [SPACE, WidthSpace(3, 8, 5, (4, 6), (2, 1), (1, 1), 3, 2)])
def test_parameters_and_multiplications(space: WidthSpace):
    for arch in space.every()[::5]:
        net = WidthNet(arch, space)
        assert sum(p.numel() for p in net.parameters()) == space.params(arch)
        with FlopCounterMode(display=False) as counter:
            net(torch.randn(1, space.channels, *[space.size] * space.dims))
        assert counter.get_total_flops() == 2 * space.macs(arch)


@pytest.mark.parametrize(("x", "spoil"), [(torch.ones(3, 24), signal_views), (torch.ones(3, 2, 8, 8), image_views)])
def test_views_move_and_spoil(x: torch.Tensor, spoil):
    two = spoil(x, torch.Generator().manual_seed(0))
    assert two.shape == (3, 2, *x.shape[1:]) and not torch.equal(two[:, 0], two[:, 1])
    assert torch.equal(two, spoil(x, torch.Generator().manual_seed(0)))
    cut = (two == 0).flatten(2).sum(2)
    assert (cut == (6 if x.ndim == 2 else 2 * 2 * 2)).all()


def test_inputs_have_two_views_and_no_label():
    batch = task().batch("train", 4, torch.Generator().manual_seed(0))
    assert batch.inputs.shape == (4, 2, 24) and not batch.targets.any()
    assert not any(batch.targets.any() for batch in task().batches("test", 16))
    with pytest.raises(InputError, match=r"data has inputs of shape \[5\] but"):
        TwoViews(Arrays("short", {"train": (torch.zeros(4, 5), torch.arange(4) % 2)}, tuple("ab"), {}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"widths": (4, 2)}, "widths is"),
        ({"blocks": (2, 2)}, "blocks is"),
        ({"kernel": 4}, "kernel is 4"),
        ({"size": 3}, "size is 3 but must be at least 4"),
        ({"dims": 3}, "dims is 3"),
    ],
)
def test_wrong_spaces_are_refused(change: dict, said: str):
    good = {"channels": 1, "size": 24, "n_classes": 5, "widths": (2, 3), "strides": (2, 1, 2), "blocks": (2, 1)}
    with pytest.raises(InputError, match=said):
        WidthSpace(**good | change)


def test_what_is_not_of_the_space_is_refused():
    with pytest.raises(InputError, match="arch is"):
        SPACE.split((0, 3, 0))
    with pytest.raises(InputError, match="n_ops is 0"):
        fair_paths(0, 2)
    with pytest.raises(InputError, match="path is"):
        width_blocks(SPACE)[0](torch.randn(2, 1, 24), (0, 3))
    with pytest.raises(InputError, match="paths holds"):
        BlockSupernet([WidthChoice(1, (2, 3), 3)], [(2,)])
    with pytest.raises(InputError, match="n_paths is 4 but must be from 1 to the 3"):
        made(n_paths=4)
    with pytest.raises(InputError, match="first is"):
        momentum_at(0, 2, math.nan)
    ratings = BlockRatings([{(0, 0): -1.0}, {(1,): 0.0}])
    assert rate_architecture([(0, 0), (1,)], ratings) == 7
    with pytest.raises(InputError, match="path of block 1 is"):
        rate_architecture([(0, 0), (0,)], ratings)
    with pytest.raises(InputError, match="paths has 1 blocks but 2 are rated"):
        rate_architecture([(0, 0)], ratings)
