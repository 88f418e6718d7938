"""Tunable convolutions: linear in the mix, one setting or one a row, fused, converted, their losses, wrong input."""

import copy
import math

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn
from torch.nn import functional as F

from tests.draws import draw
from workbench.errors import InputError
from workbench.lib.core.budget import count_params
from workbench.lib.imaging.tunable_conv import (
    MultiLoss,
    TunableConv2d,
    TunableLinear,
    Tuned,
    fuse,
    knobs,
    make_tunable,
    sample_knobs,
    scales_of,
    tuned,
)

FORMS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"groups": 2, "bias": False},
    {"groups": 4, "stride": (1, 2), "padding": (2, 1), "dilation": (1, 2)},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (0, 2), "padding_mode": "circular", "groups": 2},
]
W = torch.tensor([[0.2, 0.9, 0.0], [1.0, 0.0, 0.0], [0.3, 0.3, 0.4], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])


def layer(form: dict, phi: str = "affine", seed: int = 0, n_knobs: int = 3) -> TunableConv2d:
    torch.manual_seed(seed)
    return TunableConv2d(4, 8, 3, n_knobs, phi, **form)


def plain(of: TunableConv2d, p: int, form: dict) -> nn.Conv2d:
    conv = nn.Conv2d(4, 8, 3, **form)
    with torch.no_grad():
        conv.weight.copy_(of.weight[p])
        if conv.bias is not None:
            conv.bias.copy_(of.bias[p])
    return conv


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip


def kernels(model: nn.Module) -> int:
    return sum(count_params(m) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


@pytest.mark.parametrize("phi", ["identity", "affine", "mlp"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_output_is_the_mix_of_what_each_kernel_gives(form: dict, phi: str):
    conv, x = layer(form, phi), draw(5, 4, 9, 14)
    a = conv.phi(W)
    of_each = torch.stack([plain(conv, p, form)(x) for p in range(3)], 1)  # (B, P, D, H, W)
    expected = torch.einsum("bp,bpdhw->bdhw", a, of_each)
    torch.testing.assert_close(conv(x, W), expected, atol=1e-6, rtol=1e-5)
    for row, w in enumerate(W):
        one = conv(x, w)
        torch.testing.assert_close(one[row], expected[row], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(conv.fuse(w)(x), one, atol=1e-6, rtol=1e-5)
    assert count_params(conv) == 3 * count_params(plain(conv, 0, form)) + count_params(conv.phi)
    assert count_params(conv.fuse(W[0])) == count_params(plain(conv, 0, form))


@pytest.mark.parametrize("shape", [(5, 6), (5, 2, 3, 6)])
def test_linear_layers_are_the_same(shape: tuple[int, ...]):
    for bias in (True, False):
        linear, x = TunableLinear(6, 4, 3, bias=bias), draw(*shape)
        expected = torch.stack([linear.fuse(w)(x[row]) for row, w in enumerate(W)])
        torch.testing.assert_close(linear(x, W), expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(linear(x, W[0])[0], expected[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_one_knob_at_one_is_the_convolution_to_the_last_bit(form: dict):
    conv, x = layer(form, "identity", n_knobs=1), draw(2, 4, 9, 14)
    assert torch.equal(conv(x, [1.0]), plain(conv, 0, form)(x))


def test_at_a_corner_one_kernel_alone_is_used_and_learns():
    conv, x = layer({"padding": 1}, "identity"), draw(2, 4, 8, 8)
    for w in (torch.tensor([0.0, 1.0, 0.0]), torch.tensor([[0.0, 1.0, 0.0]] * 2)):
        torch.testing.assert_close(conv(x, w), plain(conv, 1, {"padding": 1})(x), atol=1e-6, rtol=1e-5)
        conv.zero_grad()
        conv(x, w).square().sum().backward()
        for grad in (conv.weight.grad, conv.bias.grad):
            assert not grad[[0, 2]].any() and grad[1].all()


def test_the_gradient_of_a_kernel_is_its_share_of_the_gradient_of_the_mix():
    conv, x, w = layer({}, "affine"), draw(2, 4, 8, 8), torch.tensor([0.2, 0.9, 0.4])
    conv(x, w).pow(3).sum().backward()
    fused = conv.fuse(w)
    fused(x).pow(3).sum().backward()
    expected = conv.phi(w)[:, None, None, None, None] * fused.weight.grad
    torch.testing.assert_close(conv.weight.grad, expected, atol=1e-3, rtol=1e-4)


def test_gradients_are_right_by_differences():
    conv = TunableConv2d(2, 2, 2, 2, "affine").double()
    x, w = draw(2, 2, 3, 3).double().requires_grad_(), torch.tensor([[0.3, 0.6], [0.9, 0.1]]).double().requires_grad_()
    names = [name for name, _ in conv.named_parameters()]

    def call(x, w, *values):
        return torch.func.functional_call(conv, dict(zip(names, values, strict=True)), (x, w))

    assert torch.autograd.gradcheck(call, (x, w, *conv.parameters()))
    assert torch.autograd.gradcheck(call, (x, w[0].detach().requires_grad_(), *conv.parameters()))


def test_of_equal_kernels_a_mix_of_sum_one_makes_the_same():
    conv, x = TunableConv2d.of([nn.Conv2d(4, 8, 3)] * 3, "identity"), draw(1, 4, 8, 8)
    first, second = conv(x, [0.2, 0.3, 0.5]), conv(x, [0.0, 0.9, 0.1])
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)


def test_conversion_keeps_a_trained_network_and_its_parts():
    source, x = net(), draw(4, 1, 8, 8)
    before = copy.deepcopy(source.state_dict())
    made = make_tunable(source, 2, "identity", noise=0.0)
    torch.testing.assert_close(tuned(made, x, [0.4, 0.6]), source(x), atol=1e-6, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert isinstance(made[1], nn.GroupNorm) and made[3].plain["groups"] == 2
    assert count_params(made) == 2 * kernels(source) + count_params(source[1])
    assert count_params(make_tunable(source, 3)) == 3 * kernels(source) + count_params(source[1]) + 3 * (3 * 3 + 3)
    noisy = make_tunable(source, 2, noise=0.1)
    share = (noisy[6].weight[0] - source[6].weight).norm() / source[6].weight.norm()
    assert 0.03 < share < 0.3 and not torch.equal(noisy[6].weight[0], noisy[6].weight[1])


def test_what_is_converted_can_be_chosen_and_a_shared_layer_stays_one():
    made = make_tunable(net(), 2, filter=lambda name, layer: isinstance(layer, nn.Linear))
    assert isinstance(made[0], nn.Conv2d) and isinstance(made[6], TunableLinear)
    conv = nn.Conv2d(2, 2, 1)
    made = make_tunable(nn.Sequential(conv, nn.ReLU(), conv), 2)
    assert made[0] is made[2]
    fused = fuse(made, [0.1, 0.9])
    assert fused[0] is fused[2] and type(fused[0]) is nn.Conv2d
    assert isinstance(make_tunable(conv, 2), TunableConv2d)
    assert type(fuse(make_tunable(conv, 2), [0.1, 0.9])) is nn.Conv2d


def test_a_context_carries_the_knobs_and_leaves_none_behind():
    made, x = make_tunable(net(), 3).eval(), draw(5, 1, 8, 8)
    with knobs(made, W):
        mixed = made(x)
        with knobs(made, W[0]):
            inner = made(x)
        torch.testing.assert_close(made(x), mixed)
    for row, w in enumerate(W):
        torch.testing.assert_close(fuse(made, w)(x)[row], mixed[row], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inner[0], mixed[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ZeroDivisionError), knobs(made, W[0]):
        _ = 1 / 0
    with pytest.raises(InputError, match="no knobs are set"):
        made(x)
    at = Tuned(made, [0.2, 0.9, 0.0])
    torch.testing.assert_close(at(x), inner)
    torch.testing.assert_close(at(x, w=W), mixed)


def test_losses_are_weighted_by_the_knobs_of_each_image():
    def to_target(pred, target, x):
        return (pred - target).square().flatten(1).mean(1)

    def to_input(pred, target, x):
        return (pred - x).abs().flatten(1).mean(1)

    pred, target, x = (draw(3, 1, 4, 4, seed=seed) for seed in (1, 2, 3))
    losses = [to_target, to_input]
    objective, w = MultiLoss(losses, [2.0, 0.5]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.25]])
    one, two = to_target(pred, target, x), to_input(pred, target, x)
    expected = (2 * one[0] + 0.5 * two[1] + 0.5 * 2 * one[2] + 0.25 * 0.5 * two[2]) / 3
    loss, parts = objective(pred, target, x, w)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts, torch.stack([2 * one.mean(), 0.5 * two.mean()]))
    alike = MultiLoss(losses, scales_of(losses, [(pred[:2], target[:2], x[:2]), (pred[2:], target[2:], x[2:])]))
    torch.testing.assert_close(alike(pred, target, x, [1.0, 1.0])[1], torch.ones(2))


@pytest.mark.parametrize(("mode", "n_knobs"), [("cube", 1), ("cube", 2), ("cube", 5), ("simplex", 4), ("axis", 2)])
def test_knobs_are_drawn_where_they_belong(mode: str, n_knobs: int):
    def sample(seed: int) -> torch.Tensor:
        return sample_knobs(4000, n_knobs, mode, torch.Generator().manual_seed(seed))

    w = sample(0)
    assert w.shape == (4000, n_knobs) and ((w >= 0) & (w <= 1)).all() and w.any(1).all()
    assert torch.equal(w, sample(0)) and not torch.equal(w, sample(1))
    if mode != "cube":
        torch.testing.assert_close(w.sum(1), torch.ones(4000))
    torch.testing.assert_close(
        w.mean(0), torch.full((n_knobs,), 1 / n_knobs if mode != "cube" else 0.5), atol=0.03, rtol=0
    )
    corners = (w == 1).any(1) & (w.sum(1) == 1)
    assert corners.float().mean().item() == pytest.approx(0.1 if n_knobs == 2 else 0.0, abs=0.02)


def test_the_known_optimum_is_reached():
    """Losses |f - y|^2 and |f - x|^2 have (w1 E[y|x] + w2 x) / (w1 + w2) as the best f, at every pixel."""
    generator = torch.Generator().manual_seed(0)

    def images(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.randn(n, 1, 6, 6, generator=generator)
        return y + torch.randn(n, 1, 6, 6, generator=generator), y  # E[y|x] = x / 2

    objective = MultiLoss(
        [lambda f, y, x: (f - y).square().flatten(1).mean(1), lambda f, y, x: (f - x).square().flatten(1).mean(1)],
        [1.0, 1.0],
    )
    torch.manual_seed(0)
    model = make_tunable(nn.Conv2d(1, 1, 3, padding=1), 2)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 400)
        x, y = images(32)
        w = sample_knobs(32, 2, "axis", generator)
        loss, _ = objective(model(x, w), y, x, w)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, _ = images(64)
    kept, removed = model(x, [0.0, 1.0]), model(x, [1.0, 0.0])
    assert (kept - x).square().mean() < 1e-3
    assert (removed - x / 2).square().mean() < 0.01
    for u in (0.25, 0.5, 0.75):
        assert (model(x, [u, 1 - u]) - (u * removed + (1 - u) * kept)).square().mean() < 0.005


@pytest.mark.parametrize(
    ("w", "said"),
    [
        ([0.5], r"w is torch.float32 of shape \(1,\) but must be floating point, \(3,\)"),
        ([0.1, 0.2, 0.3, 0.4], "of shape"),
        (torch.rand(2, 2, 3), "of shape"),
        (torch.rand(0, 3), "of shape"),
        (torch.tensor([0, 1, 0]), "w is torch.int64"),
        ([0.5, 0.5, 1.2], "w has values from 0.5 to 1.2"),
        ([-0.1, 0.5, 0.5], "w has values"),
        ([math.nan, 0.5, 0.5], "w has values from nan"),
        (torch.rand(4, 3), "w has 4 rows but the layer is given 5"),
    ],
)
def test_wrong_knobs_are_refused(w, said: str):
    made, x = make_tunable(net(), 3), draw(5, 1, 8, 8)
    with pytest.raises(InputError, match=said), knobs(made, w):
        made(x)
    with pytest.raises(InputError, match=said):
        tuned(made, x, w)


def test_one_setting_is_needed_to_fuse():
    with pytest.raises(InputError, match="must be one setting"):
        fuse(make_tunable(net(), 3), W)
    with pytest.raises(InputError, match="no tunable layer"):
        fuse(net(), W[0])
    with pytest.raises(InputError, match="no tunable layer"), knobs(net(), W[0]):
        pass


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((2, 4, 8, 8), r"x has shape \(2, 4, 8, 8\) but must be \(batch, 3, height, width\)"),  # RGBA
        ((2, 1, 8, 8), "must be"),  # grey
        ((2, 3, 1, 8), "x is 1 x 8, with its padding 1 x 8, but must be at least 4 x 4"),
        ((2, 3, 3, 3), "x is 3 x 3"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...], said: str):
    conv = TunableConv2d(3, 2, 4, 2, stride=4)
    for w in ([0.5, 0.5], torch.rand(2, 2)):
        with pytest.raises(InputError, match=said):
            conv(draw(*shape), w)
    assert conv(draw(2, 3, 4, 9), [0.5, 0.5]).shape == (2, 2, 1, 2)


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (0, 1, 8, 8)])
def test_what_is_no_batch_of_images_is_refused(shape: tuple[int, ...]):
    with pytest.raises((InputError, TypeCheckError), match=r"images has shape"):
        tuned(make_tunable(net(), 2), torch.rand(shape), [0.5, 0.5])


def test_images_of_no_numbers_are_refused():
    for value in (math.nan, math.inf):
        with pytest.raises(InputError, match="NaN or infinite"):
            tuned(make_tunable(net(), 2), torch.full((1, 1, 8, 8), value), [0.5, 0.5])


def test_wrong_arguments_are_refused():
    for count in (0, -1, True):
        with pytest.raises(InputError, match="n_knobs is"):
            make_tunable(net(), count)
    with pytest.raises(InputError, match="phi 'afine' is unknown; did you mean 'affine'"):
        make_tunable(net(), 2, "afine")
    with pytest.raises(InputError, match="noise is -1"):
        make_tunable(net(), 2, noise=-1.0)
    with pytest.raises(InputError, match="no convolution or linear layer"):
        make_tunable(nn.ReLU(), 2)
    with pytest.raises(InputError, match="mode 'cub' is unknown"):
        sample_knobs(2, 2, "cub")
    with pytest.raises(InputError, match="rows, n_knobs are 2, 3"):
        sample_knobs(2, 3, "axis")
    loss = F.mse_loss
    with pytest.raises(InputError, match="scales has 1 numbers but must have one for each of 2"):
        MultiLoss([loss, loss], [1.0])
    with pytest.raises(InputError, match="scales are"):
        MultiLoss([loss], [0.0])
    with pytest.raises(InputError, match="losses have means"):
        scales_of([lambda pred, target, x: torch.zeros(2)], [(draw(2, 1), draw(2, 1), draw(2, 1))])
