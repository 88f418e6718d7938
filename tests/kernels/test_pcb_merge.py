"""Merging by parameter competition on both paths, against a loop in float64, and the exact properties of the method."""

import math

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels import dispatch, pcb_merge
from workbench.kernels.pcb_merge import Bounds, native, pcb_bounds, pcb_piece
from workbench.kernels.pcb_merge.reference import checked_ends

PATHS = ("reference", "native")


@pytest.fixture(autouse=True)
def _pieces(monkeypatch):
    monkeypatch.setattr(native, "PIECE", 700)


def differences(n: int, size: int, seed: int = 0) -> torch.Tensor:
    tau = torch.randn(n, size, generator=torch.Generator().manual_seed(seed))
    tau[0, ::17] = 0
    return tau


def ranks(size: int, kept: float = 0.2, clipped: float = 0.01) -> dict:
    low = int(clipped * size)
    return {"clip": (low, size - 1 - low), "drop": size - 1 - int(kept * size)}


def loop(tau, clip, drop, scale) -> list[float]:
    rows, n = tau.double().tolist(), len(tau)
    clipped, place = [], []
    for row in rows:
        low, high = (sorted(map(abs, row))[rank] for rank in clip)
        sizes = [min(max(abs(t), low), high) for t in row]
        signs = [(t > 0) - (t < 0) for t in row]
        clipped.append([s * a for s, a in zip(signs, sizes, strict=True)])
        place.append([s * (a - low) / (high - low) for s, a in zip(signs, sizes, strict=True)])
    shares = []
    for row in place:
        score = [math.exp(n * g * g) * sum(math.tanh(g * other[j]) for other in place) for j, g in enumerate(row)]
        least, most = sorted(score)[drop], max(score)
        shares.append([(s - least) / (most - least) if s > least else 0.0 for s in score])
    return [
        sum(w * s[j] * c[j] for w, s, c in zip(scale, shares, clipped, strict=True))
        / (sum(s[j] for s in shares) or 1.0)
        for j in range(len(rows[0]))
    ]


@pytest.mark.parametrize("n, size", [(3, 50), (1, 33), (5, 16)])
def test_equals_the_loop(n, size):
    tau, scale = differences(n, size), [0.8 + 0.1 * i for i in range(n)]
    expected = torch.tensor(loop(tau, **ranks(size), scale=scale), dtype=torch.float64)
    exact = pcb_merge(tau.double(), **ranks(size), scale=scale)
    assert dispatch.last_backend("pcb_merge") == "reference" and torch.allclose(exact, expected, atol=1e-12)
    for path in PATHS:
        out = pcb_merge(tau, **ranks(size), scale=scale, backend=path)
        assert dispatch.last_backend("pcb_merge") == path and torch.allclose(out.double(), expected, atol=1e-5)


@pytest.mark.parametrize("n", [2, 8, 40])
def test_the_native_path_is_as_near_as_it_says(n):
    size = 5000
    tau = differences(n, size)
    base = torch.randn(size)
    native, reference = (pcb_merge(tau + base, base, **ranks(size), backend=path) for path in reversed(PATHS))
    gap = nearness((tau + base) - base, **ranks(size))
    assert gap.median() > 1e-3  # else nothing is said
    apart = (native - reference).abs() / tau.abs().max()
    assert bool((apart <= 1e-5 / gap + 1e-6).all())  # and the sum with the base is rounded


def nearness(tau, clip, drop) -> torch.Tensor:
    """(P,) how near the nearest score of each parameter is to the one that drops, in parts of what it is the sum of."""
    tau, n = tau.double(), len(tau)
    low, high = (tau.abs().sort(1).values[:, rank, None] for rank in clip)
    place = tau.sign() * (tau.abs().clamp(low, high) - low) / (high - low)
    pairs = torch.tanh(place[:, None] * place) * torch.exp(n * place[:, None] ** 2)
    score, terms = pairs.sum(1), pairs.abs().sum(1)
    least = score.sort(1).values[:, drop, None]
    return ((score - least).abs() / (terms + least.abs())).amin(0)


@pytest.mark.parametrize("path", PATHS)
def test_properties(path):
    size = 2000
    how = ranks(size) | {"backend": path}
    one = differences(1, size)
    merged = pcb_merge(one, **how)
    low, high = one[0].abs().sort().values[list(how["clip"])]
    clipped = one[0].sign() * one[0].abs().clamp(low, high)
    kept = merged != 0
    assert int(kept.sum()) == int(0.2 * size)  # those above the rank that drops
    assert torch.allclose(merged[kept], clipped[kept], rtol=1e-6)
    same = pcb_merge(one.repeat(3, 1), **how)
    assert torch.allclose(same[same != 0], clipped[same != 0], rtol=1e-6)

    tau = differences(4, size, seed=1)
    merged = pcb_merge(tau, **how)
    assert torch.allclose(pcb_merge(tau.flip(0), **how), merged, atol=1e-5)
    assert torch.equal(pcb_merge(-tau, **how), -merged)
    assert torch.equal(pcb_merge(4 * tau, **how), 4 * merged)
    assert torch.allclose(pcb_merge(tau, **how, scale=2.0), 2 * merged)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(2))
    assert torch.equal(pcb_merge(tau[:, order], **how), merged[order])

    opposite = torch.cat([one, -one])  # nobody wins: every score is 0
    assert torch.equal(pcb_merge(opposite, **how), torch.zeros(size))


@pytest.mark.parametrize("path", PATHS)
def test_threads_types_and_registration(path):
    tau = differences(3, 3000)
    how = ranks(3000)
    merged, before = pcb_merge(tau, **how, backend=path), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(pcb_merge(tau, **how, backend=path), merged)
    finally:
        torch.set_num_threads(before)
    half = tau.bfloat16()
    expected = pcb_merge(half.float(), **how, backend=path).bfloat16()
    assert torch.equal(pcb_merge(list(half), **how, backend=path), expected)
    given = (list(tau), torch.ones(3000), [10, 2900], 2000, [1.0] * 3, path)
    torch.library.opcheck(torch.ops.workbench.pcb_merge.default, given)


def test_wrong_input_is_named(compiler):
    tau = differences(2, 20)
    how = {"clip": (1, 18), "drop": 10}
    for call, message in [
        (lambda: pcb_merge(tau[None], **how), "must be .params,., at least one"),
        (lambda: pcb_merge(tau[:, :0], **how), "at least one"),
        (lambda: pcb_merge(torch.randn(65, 20), **how), "experts has 65 models but must have at most 64"),
        (lambda: pcb_merge(tau, **how | {"clip": (6, 5)}), r"clip is \(6, 5\) but must be two ranks of 0 to 19"),
        (lambda: pcb_merge(tau, **how | {"clip": (1, 20)}), "two ranks of 0 to 19"),
        (lambda: pcb_merge(tau, **how | {"drop": 20}), "drop is 20 but must be a rank of 0 to 19"),
        (lambda: pcb_merge(tau, **how, scale=[1.0]), "scale has 1 numbers"),
        (lambda: pcb_merge(tau, **how, scale=math.nan), "scale is .* must be one finite number, or 2"),
        (lambda: pcb_merge(tau, tau, **how), "base is torch.float32 of shape"),
        (lambda: pcb_piece(tau[0], Bounds([0], [1], [0], [1]), [1.0]), r"tau is of shape \(20,\) but must be"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    few = torch.zeros(20)
    few[3] = 2.0
    endless = tau[0].clone()
    endless[:4] = math.inf
    for path in PATHS:
        for row, message in [
            (few, r"experts\[1\] - base has magnitudes of 0 to 2 but 0 at both ranks of clip.*it must clip less"),
            (endless, r"experts\[1\] - base has magnitude inf at the upper rank of clip but must be finite"),
            (tau[0] * math.nan, "has NaN"),
        ]:
            with pytest.raises(InputError, match=message):
                pcb_merge([tau[0], row], **how, backend=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [0.0, 0.5])
def test_a_row_of_one_magnitude_has_no_say(path, size):
    """Its place between the clipped magnitudes is 0 / 0; in whatever its signs are, nothing of it stands out."""
    tau = differences(2, 500)
    flat = size * differences(2, 500, seed=4)[1].sign()
    how = ranks(500) | {"backend": path}
    three = pcb_merge([*tau, flat], **how)
    assert torch.equal(three, pcb_merge([*tau, torch.zeros(500)], **how))
    assert three.isfinite().all() and three.any()
    for rows in ([flat], [flat, flat]):
        assert not pcb_merge(rows, **how).any()
    base = torch.randn(500)
    assert torch.equal(pcb_merge([base, base], base, **how), base)
    assert torch.equal(pcb_merge([torch.ones(1)], clip=(0, 0), drop=0, backend=path), torch.zeros(1))


@pytest.mark.parametrize("path", PATHS)
def test_where_one_is_left_it_counts_wholly_however_small_its_share(path):
    """Shares are down to 1e-20 and below: a divisor that is kept from being so small would take it for nothing."""
    tau = torch.linspace(1e-3, 1, 1000).repeat(40, 1)
    merged = pcb_merge(tau, clip=(0, 999), drop=0, backend=path)
    torch.testing.assert_close(merged[1:], tau[0, 1:])
    assert merged[0] == 0


class Pieces:
    """Something that is read anew each time."""

    def __init__(self, tau: torch.Tensor, *sizes: int):
        self.tau, self.sizes, self.read = tau, sizes, 0

    def __iter__(self):
        self.read += 1
        return iter(self.tau.split(self.sizes, dim=1))


@pytest.mark.parametrize("path", PATHS)
def test_in_pieces_it_is_the_same(path):
    tau, scale = differences(5, 3000), [1.0, 0.5, 2.0, 0.0, -1.0]
    how = ranks(3000)
    tau[4] = 0.25
    sizes = tau.abs().sort(1).values
    low, high = zip(*(checked_ends(i, sizes[i, [0, *how["clip"], 2999]].tolist()) for i in range(5)), strict=True)
    pieces = Pieces(tau, 1000, 1, 1203, 796)
    bounds = pcb_bounds(pieces, low, high, how["drop"], backend=path)
    assert pieces.read == (3 if path == "native" else 2) and bounds.least[4] == bounds.most[4] == 0
    merged = torch.cat([pcb_piece(part, bounds, scale, backend=path) for part in pieces])
    whole = pcb_merge(tau, **how, scale=scale, backend=path)
    if path == "native":
        assert torch.equal(merged, whole)
    else:  # torch rounds the last numbers of a row otherwise than the others
        gap = nearness(tau[:4], **how)
        assert bool(((merged - whole).abs() <= 1e-5 / gap + 1e-6).all())
