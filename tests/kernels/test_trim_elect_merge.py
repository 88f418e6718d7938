"""Trim, elect and merge on every path of a CPU, against a loop over the numbers, and exact thresholds."""

import math

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels import dispatch, magnitude_threshold, trim_elect_merge
from workbench.kernels.trim_elect_merge import native

PATHS = ("reference", "cpu", "native")
WAYS = [(elect, divide) for elect in (None, "values", "weighted") for divide in (None, "count", "weights")]
WEIGHTS = [0.3, 1.0, -0.2, 0.7, 0.1]


def models(size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Five models and their base; some differences are 0, some equal, some opposite."""
    generator = torch.Generator().manual_seed(seed)
    tau = torch.randn(5, size, generator=generator, dtype=torch.float64).to(dtype)
    tau[1, ::3] = 0
    tau[2, 1::5] = -tau[3, 1::5]
    tau[:, 4::11] = 0
    base = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    return base + tau, base


def loop(experts, base, weights, thresholds, elect, divide, scale) -> torch.Tensor:
    out = []
    for j in range(experts.shape[1]):
        origin = 0.0 if base is None else float(base[j])
        tau = [float(x[j]) - origin for x in experts]
        kept = [abs(t) >= limit for t, limit in zip(tau, thresholds, strict=True)]
        if elect is not None:
            vote = sum(t * (w if elect == "weighted" else 1) for t, w, k in zip(tau, weights, kept, strict=True) if k)
            sign = -1 if vote < 0 else 1
            kept = [k and t * sign > 0 for t, k in zip(tau, kept, strict=True)]
        total = sum(w * t for t, w, k in zip(tau, weights, kept, strict=True) if k)
        by = {None: 1, "count": sum(kept), "weights": sum(w for w, k in zip(weights, kept, strict=True) if k)}[divide]
        out.append(origin + scale * total / (by or 1))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("elect, divide", WAYS)
@pytest.mark.parametrize("based", [False, True])
def test_the_reference_is_the_loop(elect, divide, based):
    experts, base = models(67, dtype=torch.float64)
    if not based:
        experts, base = experts - base, None
    for thresholds in ([0.0] * 5, [0.5, 0.1, 0.9, 0.0, math.inf]):
        how = {"weights": WEIGHTS, "elect": elect, "divide": divide, "scale": 0.7}
        out = trim_elect_merge(experts, base, thresholds=thresholds, **how, backend="reference")
        expected = loop(experts, base, WEIGHTS, thresholds, elect, divide, 0.7)
        assert torch.allclose(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("elect, divide", WAYS)
def test_all_paths_agree_bit_for_bit(elect, divide, monkeypatch):
    monkeypatch.setattr(native, "PIECE", 64)
    for size in (1, 15, 16, 63, 64, 65, 257):
        experts, base = models(size, seed=size)
        for origin in (None, base):
            for thresholds in (None, [0.4, 0.0, 0.9, 0.2, math.inf]):
                how = {"weights": WEIGHTS, "thresholds": thresholds, "elect": elect, "divide": divide, "scale": 0.7}
                first, *others = (trim_elect_merge(experts, origin, **how, backend=path) for path in PATHS)
                assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_widened_and_rounded_once(dtype):
    experts, base = models(130, dtype=dtype)
    for path in PATHS if dtype != torch.float64 else PATHS[:2]:
        out = trim_elect_merge(experts, base, weights=WEIGHTS, thresholds=[0.3] * 5, backend=path)
        wide = torch.promote_types(dtype, torch.float32)
        expected = trim_elect_merge(experts.to(wide), base.to(wide), weights=WEIGHTS, thresholds=[0.3] * 5)
        assert out.dtype == dtype and torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("path", PATHS)
def test_shapes_views_lists_and_a_given_result(path):
    experts, base = models(60)
    expected = trim_elect_merge(experts, base, backend=path)
    assert dispatch.last_backend("trim_elect_merge") == path
    cut = [x.view(6, 10).T.contiguous().T for x in experts]
    assert torch.equal(trim_elect_merge(cut, base.view(6, 10), backend=path), expected.view(6, 10))
    for result in (torch.full_like(base, torch.nan), base.clone(), None):
        given = [*experts[:4], experts[4].clone()]
        result = given[4] if result is None else result  # the result may stand where a model stood
        assert trim_elect_merge(given, base, out=result, backend=path) is result and torch.equal(result, expected)
    assert trim_elect_merge(experts[:, :0], backend=path).shape == (0,)


@pytest.mark.parametrize("path", PATHS)
def test_one_model_and_equal_models_come_back_and_scale_0_is_the_base(path):
    base = torch.randn(50)
    tau = torch.randn(50)
    one = trim_elect_merge([tau], backend=path)
    assert torch.equal(one, tau)
    assert torch.allclose(trim_elect_merge([base + tau] * 3, base, backend=path), base + tau, atol=1e-6)
    assert torch.equal(trim_elect_merge([base + tau], base, scale=0.0, backend=path), base)
    mean = trim_elect_merge([tau, base], elect=None, backend=path)
    assert torch.equal(mean, (tau + base) / 2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("elect, divide", WAYS)
def test_a_nan_is_passed_on(path, elect, divide):
    experts, _ = models(40)
    experts[2, 7] = torch.nan
    out = trim_elect_merge(experts, thresholds=[0.5] * 5, elect=elect, divide=divide, backend=path)
    assert out.isnan().nonzero().flatten().tolist() == [7]


def test_peft_merges_as_we_do():
    ties = pytest.importorskip("peft.utils.merge_utils").ties
    tau = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.5, 1.0, 0.2, 0.9])
    thresholds = [magnitude_threshold(x, 200) for x in tau]
    for path in PATHS:
        ours = trim_elect_merge(tau, weights=weights, thresholds=thresholds, backend=path)
        assert torch.allclose(ours, ties(list(tau), weights, 0.2), atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_registration_and_compilation(path):
    experts, base = models(33)
    given = (list(experts), base, WEIGHTS, [0.4] * 5, "values", "count", 0.7, torch.empty_like(base), path)
    torch.library.opcheck(torch.ops.workbench.trim_elect_merge.default, given)


@pytest.fixture
def tables(monkeypatch):
    """Small tensors in several pieces, and by counts though a sort would be quicker."""
    monkeypatch.setattr(native, "PIECE", 50)
    monkeypatch.setattr(native, "SMALL", 0)


@pytest.mark.parametrize("path", ["reference", "native"])
def test_thresholds_are_those_of_a_sort(path, tables):
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(203, generator=generator)
    equal = torch.randint(-3, 4, (203,), generator=generator).float()
    close = 1 + torch.randint(0, 9, (203,), generator=generator) * 2.0**-23  # the upper halves are the same
    small = plain * 1e-42
    large = torch.cat([plain * 1e38, torch.tensor([math.inf, -math.inf, -0.0, 0.0])])
    for x in (plain, equal, close, small, large, plain.bfloat16()):
        falling = x.float().abs().sort(descending=True).values.tolist()
        for k in (1, 2, 40, 100, len(x) - 1, len(x)):
            assert magnitude_threshold(x, k, backend=path) == falling[k - 1]
        assert magnitude_threshold(x, 0, backend=path) == math.inf
    assert dispatch.last_backend("magnitude_threshold") == path


@pytest.mark.parametrize("path", ["reference", "native"])
def test_a_threshold_over_many_tensors_and_their_bases(path, tables):
    experts, base = models(240)
    expected = (experts[0] - base).abs().sort(descending=True).values.tolist()

    class Files:
        def __init__(self, x):
            self.x = x

        def __iter__(self):
            return iter([self.x[:100].view(4, 25), self.x[100:100], self.x[100:]])

    for k in (1, 48, 240):
        assert magnitude_threshold(experts[0], k, base, backend=path) == expected[k - 1]
        assert magnitude_threshold(Files(experts[0]), k, Files(base), backend=path) == expected[k - 1]


def test_threads_and_a_small_tensor_find_the_same(monkeypatch):
    monkeypatch.setattr(native, "PIECE", 100)
    x, before = torch.randn(3001), torch.get_num_threads()
    found = set()
    try:
        for count, small in ((1, 0), (2, 0), (1, 10**6)):
            torch.set_num_threads(count)
            monkeypatch.setattr(native, "SMALL", small)
            found.add((magnitude_threshold(x, 600, backend="native"), magnitude_threshold(x, 7, backend="native")))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_wrong_input_is_named(compiler):
    x = torch.randn(3, 8)
    nan = torch.tensor([1.0, torch.nan])
    for call, message in [
        (lambda: trim_elect_merge([]), "experts must be one or more tensors"),
        (lambda: trim_elect_merge(torch.tensor(1.0)), "experts must be one or more tensors"),
        (lambda: trim_elect_merge(x.long()), "experts are torch.int64 but must be floating point"),
        (lambda: trim_elect_merge([x[0], x[1, :4]]), r"experts\[1\] is torch.float32 of shape \(4,\)"),
        (lambda: trim_elect_merge([x[0], x[1].double()]), r"experts\[1\] is torch.float64"),
        (lambda: trim_elect_merge(x, x), "base is torch.float32 of shape"),
        (lambda: trim_elect_merge(x, out=x), "out is torch.float32 of shape"),
        (lambda: trim_elect_merge(x, out=torch.randn(16)[::2]), "out has strides .2,. but must be contiguous"),
        (lambda: trim_elect_merge(x, weights=[1.0]), "weights has 1 numbers but there are 3 experts"),
        (lambda: trim_elect_merge(x, weights=torch.tensor(1.0)), "weights has 1 numbers"),
        (lambda: trim_elect_merge(x, weights=[1, 1, math.inf]), "weights is .* but must be finite"),
        (lambda: trim_elect_merge(x, thresholds=[0, 0, math.nan]), "thresholds is .* must not have NaN"),
        (lambda: trim_elect_merge(x, scale=math.nan), "scale is nan but must be finite"),
        (lambda: trim_elect_merge(x, elect="value"), "elect 'value' is unknown; did you mean 'values'"),
        (lambda: trim_elect_merge(x, divide="sum"), "divide 'sum' is unknown"),
        (lambda: trim_elect_merge(x.double(), backend="native"), "must be torch.float32"),
        (lambda: magnitude_threshold(x, 25), "asks for entry 25 from above but there are 24"),
        (lambda: magnitude_threshold(x, -1), "k is -1"),
        (lambda: magnitude_threshold(x, 0.2), "k is 0.2"),
        (lambda: magnitude_threshold([], 0), "experts has no tensor"),
        (lambda: magnitude_threshold(iter([x]), 1), "is an iterator but must be something that can be gone through"),
        (lambda: magnitude_threshold([x, x], 1, [x]), "experts and base differ in length"),
        (lambda: magnitude_threshold([x, x.double()], 1), "experts has torch.float64 on cpu beside torch.float32"),
        (lambda: magnitude_threshold(nan, 1, backend="native"), "has NaN but must have none"),
        (lambda: magnitude_threshold(nan, 1, backend="reference"), "has NaN but must have none"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


def test_a_nan_is_found_by_counting(tables):
    with pytest.raises(InputError, match="has NaN"):
        magnitude_threshold(torch.tensor([1.0, -torch.nan] * 99), 1, backend="native")
