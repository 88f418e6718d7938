"""AsCAN: layouts by number and order, what they weigh and cost, and the U-Net of the same cells."""

from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from workbench.errors import InputError
from workbench.lib.core.budget import count_params
from workbench.lib.core.cells import FusedMBConv, TransformerCell
from workbench.lib.search.ascan import LAYOUTS, HybridNet, HybridUNet, layouts, macs, match_params

BLOCKS = (2, 2, 2, 2)


def net(stages, dims=(8, 16, 16, 24), **options) -> HybridNet:
    torch.manual_seed(0)
    return HybridNet(stages, dims, 9, 1, **options)


def test_cells_come_in_the_order_of_the_letters():
    kinds = [[type(cell) for cell in stage] for stage in net(("C", "CCT", "CT", "TT")).stages]
    c, t = FusedMBConv, TransformerCell
    assert kinds == [[c], [c, c, t], [c, t], [t, t]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_and_products_are_what_the_formulas_say(name: str):
    stages, dims = LAYOUTS[name], (8, 16, 16, 24)
    model = net(stages, dims).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 1, 32, 32))
    assert macs(model) == counter.get_total_flops() // 2
    assert count_params(model) == params(stages, dims)
    assert [tuple(f.shape[1:]) for f in model.features(torch.randn(2, 1, 32, 32))] == [
        (8, 16, 16), (16, 8, 8), (16, 4, 4), (24, 2, 2)
    ]  # fmt: skip


def params(stages, dims) -> int:
    """Every weight, norm, bias and position code, by hand."""
    total = 9 * dims[0] * (1 + dims[0]) + 4 * dims[0] + 2 * dims[-1] + 9 * dims[-1] + 9
    width = dims[0]
    for level, (stage, d) in enumerate(zip(stages, dims, strict=True)):
        for place, letter in enumerate(stage):
            side = 16 // 2**level
            if letter == "C":
                total += 36 * width**2 + 4 * width * d + 2 * 4 * width + 2 * d
            else:
                leads = width != d or (level and not place)
                total += 12 * d**2 + 13 * d + d // 8 * (2 * side - 1) ** 2 + (9 * width * d + 2 * d if leads else 0)
            width = d
    return total


def test_as_many_cells_of_each_kind_weigh_the_same_and_cost_by_where_attention_is():
    dims, late, early = (16,) * 4, net(("CC", "CC", "TT", "TT"), (16,) * 4), net(("TT", "TT", "CC", "CC"), (16,) * 4)
    weights = [sum(p.numel() for n, p in m.named_parameters() if p.ndim == 2 or p.ndim == 4) for m in (late, early)]
    leads = 9 * 16 * 16  # a stage that begins with T is led to by a convolution, all but the first
    assert weights[0] - 2 * leads == weights[1] - leads
    assert macs(early) - macs(late) == sum(
        sign * (2 * (12 * n * 256 + 2 * n * n * 16) - 2 * 40 * n * 256)
        for n, sign in ((256, 1), (64, 1), (16, -1), (4, -1))
    ) + leads * (64 - 16 - 4)
    assert len(dims) == 4


def test_layouts_are_all_those_that_there_are():
    every = set(layouts(BLOCKS, "all"))
    assert every == {tuple("C" * (2 - t) + "T" * t for t in late) for late in product(range(3), repeat=4)}
    kinds = {kind: set(layouts(BLOCKS, kind)) for kind in ("asymmetric", "symmetric", "reversed")}
    assert kinds["symmetric"] == {("CC",) * 4, ("CT",) * 4, ("TT",) * 4}
    assert len(kinds["asymmetric"]) == len(kinds["reversed"]) == 15 - 3
    assert {stages[::-1] for stages in kinds["asymmetric"]} == kinds["reversed"]
    assert not kinds["asymmetric"] & kinds["reversed"] and LAYOUTS["asymmetric"] in kinds["asymmetric"]
    assert LAYOUTS["reversed"] in kinds["reversed"] and LAYOUTS["symmetric"] in kinds["symmetric"]
    uneven = set(layouts((1, 2, 4), "symmetric"))
    assert uneven == {("C", "CC", "CCCC"), ("T", "TT", "TTTT")}


def test_every_layout_is_brought_within_five_percent_of_a_budget():
    for stages in layouts((1, 2, 2, 1), "asymmetric"):
        dims = match_params(stages, 60_000, 9, 1)
        assert list(dims) == sorted(dims)
        assert count_params(net(stages, dims)) == pytest.approx(60_000, rel=0.05)


def test_the_unet_gives_an_image_of_the_same_size_and_is_mirrored():
    torch.manual_seed(0)
    model = HybridUNet(("CC", "CCT", "CT"), (8, 16, 16), cond_dim=5)
    for size in (8, 24):
        x = torch.randn(2, 1, size, 2 * size)
        assert model(x, torch.tensor([3.0, 700.0]), torch.randn(2, 3, 5)).shape == x.shape
    down, up = ([[type(cell).__name__ for cell in stage] for stage in part] for part in (model.down, model.up))
    assert up == [stage[::-1] for stage in down[::-1]]


def test_the_unet_hears_time_and_condition_until_it_may_not():
    torch.manual_seed(0)
    model = HybridUNet(("C", "CT"), (8, 16), cond_dim=5).eval()
    x, time = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0])
    told, other = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    assert not torch.allclose(model(x, time, told), model(x, time + 50, told))
    assert not torch.allclose(model(x, time, told), model(x, time, other))
    for module in model.modules():
        if hasattr(module, "cross"):
            torch.nn.init.zeros_(module.cross.out_proj.weight)
    assert torch.equal(model(x, time, told), model(x, time, other))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: net(("CX", "C", "C", "T")), "stages has 'CX'"),
        (lambda: net(("C", "", "C", "T")), "stages has ''"),
        (lambda: net(("C", "T")), "must have one width for each of the 2 stages"),
        (lambda: net(("C", "C", "C", "T"), size=24), "size is 24 but must be a multiple of 16"),
        (lambda: net(("C", "C", "C", "T"), size=8), "size is 8 but must be a multiple of 16"),
        (lambda: net(("C", "C", "C", "T"), stem_stride=4), "stem_stride is 4"),
        (lambda: net(("C", "C", "C", "T"))(torch.randn(1, 1, 16, 16)), "images are"),
        (lambda: list(layouts((2, 2), "mixed")), "mixed"),
        (lambda: list(layouts((2, 0))), "blocks is"),
        (lambda: match_params(("CC",) * 4, 100, 9), "budget is 100"),
        (lambda: match_params(("CC",) * 5, 60_000, 9), "ratio is"),
        (lambda: HybridUNet(("C", "T"), (8, 12), 5), "multiples of 8"),
        (
            lambda: HybridUNet(("C", "T"), (8, 8), 5)(torch.randn(1, 1, 6, 8), torch.ones(1), torch.ones(1, 1, 5)),
            "images",
        ),
    ],
)
def test_what_cannot_be_is_refused(build, said: str):
    with pytest.raises(InputError, match=said):
        build()
