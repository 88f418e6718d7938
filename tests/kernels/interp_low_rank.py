"""The low-rank bank's Triton kernels under the interpreter; run by test_interpreter in a process of its own."""

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels import dispatch
from workbench.kernels.low_rank import low_rank
from workbench.kernels.low_rank import triton as path
from workbench.kernels.low_rank.order import pack
from workbench.kernels.low_rank.triton import ROWS, TILES, Tile
from workbench.kernels.plan import RoutePlan

DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3}
dtypes = pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
BLOCK = 16
NAMES = ("out", "dx", "da", "db", "dscore")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16, so that a few narrow experts have several tiles and tails in every direction."""
    for size in (2, 4):
        monkeypatch.setitem(ROWS, size, BLOCK)
    for key, tile in TILES.items():
        monkeypatch.setitem(TILES, key, Tile(*(min(length, BLOCK) for length in tile[:3]), *tile[3:]))


def grouped(counts, top_k=1):
    """Experts of the pairs, so many of each, in an order that mixes them; and how many pairs a token has."""
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    mixed = torch.randperm(len(expert), generator=torch.Generator().manual_seed(0))
    return expert[mixed], {"top_k": top_k}


def ragged(pairs, n_experts):
    """The same with this many pairs for each token."""
    expert = torch.randint(n_experts, (sum(pairs),), generator=torch.Generator().manual_seed(0))
    return expert, {"tok_offs": torch.tensor([0, *pairs]).cumsum(0)}


def draw(expert, tokens, n_experts, widths=(20, 17), rank=3, dtype=torch.float32, score_dtype=torch.float32):
    """x, a, b, score, leaves that want gradients."""
    generator = torch.Generator().manual_seed(1)
    n_tokens = len(expert) // tokens["top_k"] if "top_k" in tokens else len(tokens["tok_offs"]) - 1
    shapes = [(n_tokens, widths[0]), (n_experts, rank, widths[0]), (n_experts, widths[1], rank), (len(expert),)]
    made = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    made[1], made[2], made[3] = made[1] / widths[0] ** 0.5, made[2] / rank**0.5, made[3].to(score_dtype)
    return [t.requires_grad_() for t in made]


def run(args, expert, tokens, backend):
    """The output and the gradients of all arguments."""
    x, a, b, score = args
    out = low_rank(x, a, b, expert, score, **tokens, backend=backend)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, args, grad)]


def check(args, expert, tokens):
    """By Triton within the tolerance of the reference in float64, relative to the largest value; what Triton gave."""
    ours = run(args, expert, tokens, "triton")
    assert dispatch.last_backend("low_rank") == dispatch.last_backend("low_rank.backward") == "triton"
    exact = run([t.detach().double().requires_grad_() for t in args], expert, tokens, "reference")
    for name, mine, expected, like in zip(NAMES, ours, exact, [args[0], *args], strict=True):
        assert mine.dtype == like.dtype, name
        error = (mine.double() - expected).abs().amax() / expected.abs().amax()
        assert error <= DTYPES[args[0].dtype], (name, float(error))
    return ours


@dtypes
def test_output_and_gradients_with_experts_of_every_size(dtype):
    """No row, one row, and the edges of a tile; widths and a rank that no block divides."""
    expert, tokens = grouped([0, 1, BLOCK - 1, BLOCK, BLOCK + 1], top_k=7)
    ours = check(draw(expert, tokens, 5, dtype=dtype), expert, tokens)
    assert not ours[2][0].any() and not ours[3][0].any()


def test_one_expert_with_all_rows_and_a_rank_above_the_least_that_is_contracted():
    expert, tokens = grouped([0, 3 * BLOCK + 1])
    check(draw(expert, tokens, 2, rank=19), expert, tokens)


def test_widths_of_whole_blocks_and_narrower_than_one():
    expert, tokens = grouped([5, 3], top_k=2)
    for widths in [(BLOCK, 2 * BLOCK), (3, 5)]:
        check(draw(expert, tokens, 2, widths, rank=1), expert, tokens)


@dtypes
def test_any_number_of_pairs_and_scores_of_the_type_of_x(dtype):
    expert, tokens = ragged([2, 0, 3, 1, 0, 4], 3)
    ours = check(draw(expert, tokens, 3, dtype=dtype, score_dtype=dtype), expert, tokens)
    assert not ours[0][[1, 4]].any() and not ours[1][[1, 4]].any()


def test_two_runs_are_bit_equal_views_and_inference_give_the_same():
    expert, tokens = grouped([0, 7, BLOCK + 1], top_k=3)
    args = draw(expert, tokens, 3)
    first, second = run(args, expert, tokens, "triton"), run(args, expert, tokens, "triton")
    assert all(map(torch.equal, first, second))
    views = [t.detach().mT.contiguous().mT.requires_grad_() if t.ndim > 1 else t for t in args]
    assert not any(t.is_contiguous() for t in views[:3])
    assert all(map(torch.equal, run(views, expert, tokens, "triton"), first))
    with torch.no_grad():
        x, a, b, score = args
        assert torch.equal(low_rank(x, a, b, expert, score, **tokens, backend="triton"), first[0])


@pytest.fixture
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def test_what_the_pairs_do_not_cover_reaches_nothing(fresh_memory_is_nan):
    """NaN in tokens without pairs, experts without rows, and every buffer before it is written."""
    expert = torch.tensor([1, 3, 3, 1, 3, 1, 1])  # of five experts; token 0 and expert 0 stand where masked loads point
    tok_offs = torch.tensor([0, 0, 2, 4, 4, 7, 7])
    clean = [t.detach() for t in draw(expert, {"tok_offs": tok_offs}, 5)]
    poisoned = [t.clone() for t in clean]
    poisoned[0][[0, 3, 5]] = float("nan")
    for tensor in poisoned[1:3]:
        tensor[[0, 2, 4]] = float("nan")
    grad = torch.randn(6, 17, generator=torch.Generator().manual_seed(9))
    bad_grad = grad.clone()
    bad_grad[[0, 3, 5]] = float("nan")
    results = []
    for (x, a, b, score), dout in ((clean, grad), (poisoned, bad_grad)):
        out, codes, index = path.forward(x, a, b, score, expert, tok_offs, None, True)
        assert torch.equal(index, pack(RoutePlan.build(expert, 5, tok_offs=tok_offs)))
        results.append([out, *path.backward(dout, x, codes, a, b, score, expert, index, tok_offs, None, (True,) * 4)])
    for ours, expected in zip(*results, strict=True):
        assert ours.isfinite().all() and torch.equal(ours, expected)


def test_no_pairs_and_no_tokens():
    for (expert, tokens), n_tokens in ((ragged([0, 0, 0], 2), 3), (grouped([0, 0]), 0)):
        args = draw(expert, tokens, 2)
        assert args[0].shape[0] == n_tokens
        assert not any(t.any() for t in run(args, expert, tokens, "triton"))


def test_what_the_kernels_cannot_do_is_refused():
    expert, tokens = grouped([2, 1])
    with pytest.raises(InputError, match=r"backend is 'triton' but x is torch\.float64"):
        run(draw(expert, tokens, 2, dtype=torch.float64, score_dtype=torch.float64), expert, tokens, "triton")
    with pytest.raises(InputError, match="backend is 'triton' but rank is 129; it must be at most 128"):
        run(draw(expert, tokens, 2, (130, 130), rank=129), expert, tokens, "triton")


def test_registration():
    expert, tokens = grouped([2, 1])
    args = draw(expert, tokens, 2, (5, 4), rank=2)
    torch.library.opcheck(torch.ops.workbench.low_rank.default, (*args, expert, None, 1, "triton", True))
