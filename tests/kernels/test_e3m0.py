"""Four-bit codes on their CPU paths: the levels, the nearest of them, what cannot be kept, equal bits everywhere."""

import pytest
import torch

from tests.draws import draw
from workbench.errors import InputError
from workbench.kernels import dispatch, e3m0_pack, e3m0_unpack
from workbench.kernels.e3m0 import BLOCKS, SMALLEST, sizes

PATHS = ("reference", "cpu")
LEVELS = torch.tensor([0, 0.25, 0.5, 1, 2, 4, 8, 16], dtype=torch.float64)
paths = pytest.mark.parametrize("path", PATHS)


def there_and_back(x, block=128, path=None):
    codes, scales = e3m0_pack(x, block, backend=path)
    return e3m0_unpack(codes, scales, len(x), block, backend=path), codes, scales


def wide(n, seed=0):
    """Numbers over many orders of magnitude, so that every level is used."""
    return draw(n, seed=seed) * 2 ** (4 * draw(n, seed=seed + 1))


@paths
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 129, 1000])
def test_a_number_is_the_nearest_level_times_its_scale(n, block, path):
    x = wide(n)
    found, codes, scales = there_and_back(x, block, path)
    assert dispatch.last_backend("e3m0_pack") == dispatch.last_backend("e3m0_unpack") == path
    assert found.shape == x.shape and found.dtype == torch.float32
    assert (len(codes), len(scales)) == sizes(n, block) == (-(-n // 2), -(-n // block))
    of = scales.double().repeat_interleave(block)[:n]
    for start in range(0, n, block):
        assert scales[start // block] == x[start : start + block].abs().max() / 16
    nearest = ((x.double().abs() / of)[:, None] - LEVELS).abs().min(1).values if n else x.double()
    off = (found.double() - x.double()).abs()
    assert torch.allclose(off, nearest * of, rtol=1e-6, atol=0)
    large = x.abs() >= 0.25 * of
    assert (off[large] <= x.double().abs()[large] / 3 * (1 + 1e-6)).all()
    assert ((found == 0) | (found.sign() == x.sign())).all()
    if n == 1000 and block <= 128:
        assert {abs(v) for v in (found.double() / of).tolist()} == set(LEVELS.tolist())


@paths
def test_codes_by_hand(path):
    """A scale of 1; halfway goes down; the first of two is the lower half of a byte, and the last has none above it."""
    x = torch.tensor([16, -16, 0.25, -0.5, 1, -2, 4, -8, 0, 0.125, 0.1251, 0.375, 0.376, -11.9, 12, 12.1, -0.1])
    found, codes, scales = there_and_back(x, 64, path)
    assert scales.tolist() == [1.0]
    assert found.tolist() == [16, -16, 0.25, -0.5, 1, -2, 4, -8, 0, 0, 0.25, 0.25, 0.5, -8, 8, 16, 0]
    assert codes.tolist() == [0xF7, 0xA1, 0xC3, 0xE5, 0x00, 0x11, 0xE2, 0x76, 0x00]
    assert not found[-1].signbit()  # a negative number that is packed as zero is no negative zero


@paths
def test_what_was_unpacked_is_packed_as_it_was(path):
    for n in (1, 77, 1000):
        found, codes, scales = there_and_back(wide(n, seed=n), 64, path)
        again = e3m0_pack(found, 64, backend=path)
        assert torch.equal(again[0], codes) and torch.equal(again[1], scales)


@paths
def test_a_block_keeps_to_itself(path):
    x = wide(96)
    x[:32], x[40], x[70] = 0.0, torch.nan, torch.inf
    found, codes, scales = there_and_back(x, 16, path)
    bad = torch.zeros(96, dtype=torch.bool)
    bad[32:48] = bad[64:80] = True  # the blocks of the two
    assert found[bad].isnan().all() and not found[~bad].isnan().any()
    clean, clean_codes, _ = there_and_back(x[48:64], 16, path)
    assert torch.equal(found[48:64], clean) and torch.equal(codes[24:32], clean_codes)
    assert (found[:32] == 0).all() and (codes[:16] == 0).all() and (scales[:2] == 0).all()


@paths
def test_numbers_too_small_for_a_scale_are_zero(path):
    for factor, kept in ((1.0, True), (0.99, False)):
        x = torch.tensor([16.0, -1.0, 0.3]) * SMALLEST * factor
        found, codes, scales = there_and_back(x, 16, path)
        assert found.any() == codes.any() == scales.any() == kept
    assert not any(part.any() for part in there_and_back(torch.tensor([1e-45, -1e-45]), 16, path))


@pytest.mark.parametrize("block", [16, 128, 1024])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_paths_agree_to_the_last_bit(dtype, block):
    x = wide(5003).to(dtype)
    x[1000] = -torch.inf
    x[2000] = torch.nan
    ours, theirs = e3m0_pack(x, block), e3m0_pack(x, block, backend="reference")
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1].nan_to_num(7.0), theirs[1].nan_to_num(7.0))
    assert torch.equal(e3m0_pack(x.float(), block)[0], ours[0])
    found, expected = (e3m0_unpack(*ours, 5003, block, backend=path) for path in PATHS)
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(found.signbit(), expected.signbit())
    every = torch.arange(256).to(torch.uint8), torch.tensor([2.0, 3.0, 0.0, 1.0])
    assert torch.equal(*(e3m0_unpack(*every, 512, 128, backend=path) for path in PATHS))


@paths
def test_views_registration_and_compilation(path):
    x = wide(400)
    for ours, whole in zip(e3m0_pack(x[::3], 32, backend=path), e3m0_pack(x[::3].clone(), 32), strict=True):
        assert torch.equal(ours, whole)
    codes, scales = e3m0_pack(x, 32)
    torch.library.opcheck(torch.ops.workbench.e3m0_pack.default, (x, 32, path))
    torch.library.opcheck(torch.ops.workbench.e3m0_unpack.default, (codes, scales, 400, 32, path))
    compiled = torch.compile(lambda x: there_and_back(x, 32, path)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), there_and_back(x, 32)[0])


def test_it_has_no_gradient_and_says_so():
    found, _, _ = there_and_back(wide(40).requires_grad_())
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        found.sum().backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: e3m0_pack(torch.zeros(4).long()), r"x is torch.int64 of shape \(4,\) but must be floating point"),
        (lambda: e3m0_pack(torch.zeros(2, 2)), "of one dimension"),
        (lambda: e3m0_pack(torch.zeros(4).to(torch.float8_e5m2)), "two bytes at least"),
        (lambda: e3m0_pack(torch.zeros(4), 100), "block is 100 but must be one of 16, 32, 64"),
        (lambda: e3m0_pack(torch.zeros(4), backend="gpu"), "backend of e3m0_pack 'gpu' is unknown"),
        (lambda: e3m0_unpack(*e3m0_pack(torch.zeros(4)), 5), r"codes is torch.uint8 of shape \(2,\) but .*\(3,\)"),
        (lambda: e3m0_unpack(*e3m0_pack(torch.zeros(200)), 200, 256), r"scales is .* \(2,\) but must be .* \(1,\)"),
        (lambda: e3m0_unpack(torch.zeros(2), torch.zeros(1), 4), "codes is torch.float32"),
        (lambda: e3m0_unpack(*e3m0_pack(torch.zeros(0)), -1), "n is -1 but must be at least 0"),
        (lambda: torch.ops.workbench.e3m0_pack(torch.zeros(4), 5, "cpu"), "block is 5 but"),
        (lambda: torch.ops.workbench.e3m0_unpack(torch.zeros(1).byte(), torch.zeros(1), 3, 16, "cpu"), "codes is"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(call, message, unchecked):
    with pytest.raises(InputError, match=message):
        call()
