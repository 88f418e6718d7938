"""WaveMix: the block by hand, its parameters, its receptive field, controls with its state, tasks, and wrong input."""

import pytest
import torch
from torch.nn import functional as F

from tests.draws import draw
from workbench.errors import InputError
from workbench.kernels import haar_dwt2, haar_idwt2
from workbench.lib.core.budget import count_params
from workbench.lib.core.wavelets import random_orthogonal
from workbench.lib.search.wavemix import MIXERS, WaveBlock, WaveMix, band_energy

FORMS = [
    {"up": up, "levels": levels, "mixer": mixer}
    for up, levels, mixer in [
        ("deconv", 1, "haar"),
        ("deconv", 3, "haar"),
        ("upsample", 2, "unshuffle"),
        ("pixelshuffle", 2, "average"),
        ("upsample", 2, "orthogonal"),
    ]
] + [{"mode": "parallel", "levels": levels} for levels in (1, 2, 4)]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_block_keeps_the_shape_and_knows_no_neighbour_in_the_batch(form):
    block, x = WaveBlock(16, **form).eval(), draw(3, 16, 16, 32)
    out = block(x)
    assert out.shape == x.shape
    torch.testing.assert_close(torch.cat([block(one) for one in x.split(1)]), out)


def test_a_block_of_one_level_by_hand():
    block, x = WaveBlock(8, ff=12, mult=3).eval(), draw(2, 8, 6, 4)
    mlp, up, norm = block.ups[0]
    z = haar_dwt2(F.conv2d(x, block.reduce.weight, block.reduce.bias))
    z = F.conv2d(F.gelu(F.conv2d(z, mlp[0].weight, mlp[0].bias)), mlp[3].weight, mlp[3].bias)
    z = F.conv_transpose2d(z, up.weight, up.bias, stride=2, padding=1)
    torch.testing.assert_close(block(x), norm(z))


def test_nested_levels_by_hand():
    block, x = WaveBlock(8, levels=2, up="upsample").eval(), draw(2, 8, 8, 4)
    first = haar_dwt2(block.reduce(x))
    second = haar_dwt2(first[:, :2])  # of LL alone, once; LL stays among the bands of its level
    torch.testing.assert_close(block.bands(x), [first, second])
    torch.testing.assert_close(block(x), block.ups[0](torch.cat([first, block.ups[1](second)], 1)))


def test_parameters_by_formula():
    def one(c, m, ff):
        return c * c // 4 + c // 4 + m * c * c + m * c + m * c * ff + ff + 16 * ff * c + c + 2 * c

    assert count_params(WaveBlock(64)) == one(64, 2, 64) == 83_344
    assert count_params(WaveBlock(16, ff=20, mult=3)) == one(16, 3, 20)
    c, m, ff = 16, 2, 16

    def level(c_in, c_out):
        return c_in * m * c + m * c + m * c * ff + ff + 16 * ff * c_out + 3 * c_out

    expected = c * c // 4 + c // 4 + level(3 * c // 2, c) + level(3 * c // 2, c // 2) + level(c, c // 2)
    assert count_params(WaveBlock(c, levels=3)) == expected
    assert MIXERS["haar"] is haar_dwt2


@pytest.mark.parametrize("mixer", [name for name in MIXERS if name != "haar"])
def test_the_controls_have_the_state_of_haar(mixer):
    make = {"dim": 8, "depth": 1, "levels": 2, "stride": 2}
    ours, theirs = WaveMix(1, 3, **make), WaveMix(1, 3, mixer=mixer, **make)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = draw(2, 1, 8, 8)
    assert not torch.allclose(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("mixer", ["haar", "unshuffle", "orthogonal"])
def test_transforms_keep_energy_and_average_is_what_haar_has_of_ll(mixer):
    x = draw(2, 3, 4, 6, dtype=torch.float64)
    bands = MIXERS[mixer](x)
    assert bands.shape == (2, 12, 2, 3)
    assert torch.allclose(bands.square().sum(), x.square().sum(), rtol=1e-12)
    assert torch.allclose(MIXERS["average"](x), haar_dwt2(x)[:, :3].repeat(1, 4, 1, 1))


def test_one_linear_map_of_the_bands_leads_from_any_transform_to_haar():
    """Why one level of Haar and of another invertible transform are the same functions."""
    x = draw(1, 2, 4, 4, dtype=torch.float64)
    for mixer in ("unshuffle", "orthogonal"):
        units = MIXERS[mixer](haar_idwt2(torch.eye(4, dtype=x.dtype).view(4, 4, 1, 1))).flatten(1)  # rows: Haar's bands
        bands = MIXERS[mixer](x).unflatten(1, (4, 2))
        back = torch.einsum("ij,bjchw->bichw", torch.linalg.inv(units.T), bands).flatten(1, 2)
        assert torch.allclose(back, haar_dwt2(x), atol=1e-12)
    q = random_orthogonal(x)
    assert torch.allclose(q @ q.T, torch.eye(4, dtype=x.dtype), atol=1e-12) and torch.equal(q, random_orthogonal(x))


@pytest.mark.parametrize(("levels", "reach"), [(1, 6), (2, 14), (3, 30)])
def test_the_receptive_field_doubles_with_every_level(levels, reach):
    """A pixel is seen by its cell of side 2^l, and each transposed convolution on the way up adds neighbours."""
    block, x = WaveBlock(8, levels=levels).eval().double(), draw(1, 8, 64, 64, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(block(x)[0, :, 32, 32].sum(), x)
    seen = grad[0].abs().sum(0).nonzero()
    rows, columns = (seen.max(0).values - seen.min(0).values + 1).tolist()
    assert rows == columns and 2**levels < rows <= reach


def test_with_its_last_norm_at_zero_a_layer_is_the_identity():
    model = WaveMix(1, 3, dim=8, depth=2, levels=2, stride=2)
    for block in model.blocks:
        torch.nn.init.zeros_(block.ups[0][-1].weight)
    maps = model.features(draw(2, 1, 8, 8))
    assert all(torch.equal(later, maps[0]) for later in maps[1:]) and len(maps) == 3


@pytest.mark.parametrize(("stem", "stride"), [("patch", 4), ("patch", 1), ("strided", 2), ("strided", 1)])
def test_every_task_has_its_size(stem, stride):
    made = {"dim": 8, "depth": 1, "stem": stem, "stride": stride}
    x = draw(2, 3, 16, 24)
    assert WaveMix(3, 5, **made)(x).shape == (2, 5)
    assert WaveMix(3, 5, task="segment", **made)(x).shape == (2, 5, 16, 24)
    model = WaveMix(3, 3, task="sr", **made)
    assert model(x).shape == (2, 3, 32, 48)
    torch.nn.init.zeros_(model.head[-1].weight), torch.nn.init.zeros_(model.head[-1].bias)
    assert torch.equal(model(x), F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False))


def test_shares_of_energy():
    block = WaveBlock(8, levels=2).eval()
    shares = band_energy(block, draw(2, 8, 8, 8))
    assert shares.shape == (2, 4) and torch.allclose(shares.sum(1), torch.ones(2))
    assert torch.allclose(band_energy(block, torch.ones(1, 8, 8, 8))[:, 0], torch.ones(2))  # no detail


def test_wrong_input_is_named():
    block = {"dim": 8, "depth": 1, "stride": 2}
    for call, said in [
        (lambda: WaveBlock(10), "dim is 10 but must be a multiple of 4"),
        (lambda: WaveBlock(8, levels=0), "levels is 0 but must be at least 1"),
        (lambda: WaveBlock(8, dropout=1.0), "dropout is 1.0 but"),
        (lambda: WaveBlock(8, up="deconvolution"), "up 'deconvolution' is unknown"),
        (lambda: WaveBlock(8, mixer="har"), "mixer 'har' is unknown; did you mean 'haar'"),
        (lambda: WaveBlock(8, ff=8, up="upsample"), "ff is 8 but up is 'upsample'"),
        (lambda: WaveBlock(8, up="upsample", mode="parallel"), "up is 'upsample' but must be 'deconv'"),
        (lambda: WaveBlock(8, levels=3, mode="parallel"), "levels is 3 but must divide dim"),
        (lambda: WaveBlock(8, levels=2)(torch.zeros(1, 8, 6, 8)), "x is 6 x 8 but .* multiples of 4"),
        (lambda: WaveBlock(8)(torch.zeros(1, 8, 0, 8)), "x is 0 x 8 but"),
        (lambda: WaveMix(1, 2, **block)(torch.zeros(1, 1, 6, 8)), "images are 6 x 8 but .* multiples of 4"),
        (lambda: WaveMix(1, 2, 8, 1)(torch.zeros(1, 1, 2, 2)), "images are 2 x 2 but .* multiples of 8"),
        (lambda: WaveMix(1, 2, **block)(torch.zeros(1, 3, 8, 8)), r"must be \(B, 1, H, W\)"),
        (lambda: WaveMix(1, 2, 8, 1, task="segment", stride=3), "stride is 3 but must be a power of two"),
        (lambda: WaveMix(1, 3, 8, 1, task="sr"), "n_out is 3 but must be in_ch, which is 1"),
        (lambda: WaveMix(1, 3, 8, 0), "depth is 0 but must be at least 1"),
        (lambda: WaveMix(1, 3, 8, 1, stem="pach"), "stem 'pach' is unknown; did you mean 'patch'"),
    ]:
        with pytest.raises(InputError, match=said):
            call()
