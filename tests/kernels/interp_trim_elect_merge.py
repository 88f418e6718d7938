"""The Triton kernels of `trim_elect_merge` and `magnitude_threshold` under the interpreter; run by test_interpreter."""

import math

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels import dispatch, magnitude_threshold, trim_elect_merge
from workbench.kernels.trim_elect_merge import triton as path

WAYS = [(elect, divide) for elect in (None, "values", "weighted") for divide in (None, "count", "weights")]
WEIGHTS = [0.3, 1.0, -0.2, 0.7, 0.1]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(path, "BLOCK", 64)


def models(size: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Five models and their base; some differences are 0, some equal, some opposite."""
    generator = torch.Generator().manual_seed(size)
    tau = torch.randn(5, size, generator=generator, dtype=torch.float64).to(dtype)
    tau[1, ::3] = 0
    tau[2, 1::5] = -tau[3, 1::5]
    tau[:, 4::11] = 0
    base = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    return base + tau, base


def both(experts, base=None, **how):
    out = trim_elect_merge(experts, base, **how, backend="triton")
    assert dispatch.last_backend("trim_elect_merge") == "triton"
    return out, trim_elect_merge(experts, base, **how, backend="reference")


@pytest.mark.parametrize("elect, divide", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_it_is_the_reference_bit_for_bit(elect, divide, dtype):
    for size in (1, 128, 65):  # where it is odd, the models begin anywhere
        experts, base = models(size, dtype)
        for origin in (None, base):
            for thresholds in (None, [0.4, 0.0, 0.9, 0.2, math.inf]):
                how = {"weights": WEIGHTS, "thresholds": thresholds, "elect": elect, "divide": divide, "scale": 0.7}
                ours, theirs = both(experts, origin, **how)
                assert ours.dtype == dtype and torch.equal(ours, theirs)


def test_bfloat16_is_widened():
    """The last step of the interpreter cuts off what a GPU rounds."""
    experts, base = models(130, torch.bfloat16)
    ours, _ = both(experts, base, weights=WEIGHTS, thresholds=[0.3] * 5)
    wide = trim_elect_merge(experts.float(), base.float(), weights=WEIGHTS, thresholds=[0.3] * 5)
    assert torch.equal(ours.float(), (wide.view(torch.int32) & -(2**16)).view(torch.float32))


def test_a_given_result_and_models_anywhere():
    experts, base = models(65)
    expected = trim_elect_merge(experts, base, backend="reference")
    apart = [x.clone() for x in experts]
    assert path.places_of(apart)[1] and not path.places_of(list(experts))[1]
    for given in (apart, [x.view(5, 13).T.contiguous().T for x in experts]):
        ours = trim_elect_merge(given, base.view(given[0].shape), backend="triton")
        assert torch.equal(ours.flatten(), expected)
    for at in range(3):
        given = [*apart[:4], apart[4].clone()]
        origin = base.clone()
        result = (torch.full_like(base, torch.nan), origin, given[4])[at]
        assert trim_elect_merge(given, origin, out=result, backend="triton") is result
        assert torch.equal(result, expected)
    assert trim_elect_merge(experts[:, :0], backend="triton").shape == (0,)


@pytest.mark.parametrize("elect, divide", WAYS)
def test_a_nan_is_passed_on(elect, divide):
    experts, _ = models(70)
    experts[2, 67] = torch.nan
    out = trim_elect_merge(experts, thresholds=[0.5] * 5, elect=elect, divide=divide, backend="triton")
    assert out.isnan().nonzero().flatten().tolist() == [67]


def test_thresholds_are_those_of_a_sort():
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(203, generator=generator)
    equal = torch.randint(-3, 4, (203,), generator=generator).float()
    close = 1 + torch.randint(0, 9, (203,), generator=generator) * 2.0**-23  # the upper halves are the same
    small = plain * 1e-42
    large = torch.cat([plain * 1e38, torch.tensor([math.inf, -math.inf, -0.0, 0.0])])
    for x in (plain, equal, close, small, large, plain.bfloat16(), plain.half()):
        falling = x.float().abs().sort(descending=True).values.tolist()
        for k in (1, 2, 40, len(x) - 1, len(x)):
            assert magnitude_threshold(x, k, backend="triton") == falling[k - 1]
        assert magnitude_threshold(x, 0, backend="triton") == math.inf
    assert dispatch.last_backend("magnitude_threshold") == "triton"


def test_a_threshold_over_many_tensors_and_their_bases():
    experts, base = models(240)
    expected = (experts[0] - base).abs().sort(descending=True).values.tolist()
    parts = [[x[:100].view(4, 25), x[100:100], x[100:]] for x in (experts[0], base)]
    for k in (1, 48, 240):
        assert magnitude_threshold(parts[0], k, parts[1], backend="triton") == expected[k - 1]


def test_what_cannot_be_counted_is_named():
    for bad in (torch.nan, -torch.nan):
        with pytest.raises(InputError, match="has NaN but must have none"):
            magnitude_threshold(torch.tensor([1.0, bad] * 70), 1, backend="triton")
    with pytest.raises(InputError, match="asks for entry 25 from above but there are 24"):
        magnitude_threshold(torch.randn(24), 25, backend="triton")
    with pytest.raises(InputError, match=r"but magnitude_threshold got tensors of torch\.float64"):
        magnitude_threshold(torch.randn(24).double(), 5, backend="triton")


def test_registration():
    experts, base = models(33)
    given = (list(experts), base, WEIGHTS, [0.4] * 5, "values", "count", 0.7, torch.empty_like(base), "triton")
    torch.library.opcheck(torch.ops.workbench.trim_elect_merge.default, given)
