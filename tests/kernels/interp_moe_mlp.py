"""The expert layer's Triton kernels under the interpreter; run by test_interpreter in a process of its own."""

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels import RoutePlan, dispatch, moe_mlp
from workbench.kernels.moe_mlp import triton as path
from workbench.kernels.moe_mlp.triton import ROWS, TILES, Tile

DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3}
dtypes = pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
UP = {"swiglu": 2, "relu": 1}
kinds = pytest.mark.parametrize("activation", list(UP))
BLOCK = 16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16, so that a few narrow experts have several tiles and tails in every direction."""
    for size in (2, 4):
        monkeypatch.setitem(ROWS, size, BLOCK)
    for key, tile in TILES.items():
        monkeypatch.setitem(TILES, key, Tile(*(min(length, BLOCK) for length in tile[:3]), *tile[3:]))


def grouped(counts, top_k=1):
    """A plan with this many pairs for each expert, in an order that mixes them."""
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    mixed = torch.randperm(len(expert), generator=torch.Generator().manual_seed(0))
    return RoutePlan.build(expert[mixed], len(counts), top_k=top_k)


def ragged(pairs, n_experts):
    """A plan with this many pairs for each token."""
    expert = torch.randint(n_experts, (sum(pairs),), generator=torch.Generator().manual_seed(0))
    return RoutePlan.build(expert, n_experts, tok_offs=torch.tensor([0, *pairs]).cumsum(0))


def draw(plan, dim, hidden, activation="swiglu", biased=False, dtype=torch.float32, score_dtype=torch.float32):
    """x, w1, w2, score[, b1, b2], leaves that want gradients."""
    generator = torch.Generator().manual_seed(1)
    n, up = plan.n_experts, UP[activation] * hidden
    shapes = [(plan.n_tokens, dim), (n, up, dim), (n, dim, hidden), (plan.n_pairs,)]
    shapes += [(n, up), (n, dim)] if biased else []
    made = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    made[1], made[2], made[3] = made[1] / dim**0.5, made[2] / hidden**0.5, made[3].to(score_dtype)
    return [t.requires_grad_() for t in made]


def run(args, plan, activation, backend):
    """The output and the gradients of all arguments."""
    x, w1, w2, score, *rest = args
    out = moe_mlp(x, w1, w2, plan, score, *rest, activation=activation, backend=backend)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, args, grad)]


def check(args, plan, activation="swiglu"):
    """By Triton within the tolerance of the reference in float64, relative to the largest value; what Triton gave."""
    ours = run(args, plan, activation, "triton")
    assert dispatch.last_backend("moe_mlp") == dispatch.last_backend("moe_mlp.backward") == "triton"
    exact = run([t.detach().double().requires_grad_() for t in args], plan, activation, "reference")
    names = ("out", "dx", "dw1", "dw2", "dscore", "db1", "db2")[: len(ours)]
    for name, mine, expected, like in zip(names, ours, exact, [args[0], *args], strict=True):
        assert mine.dtype == like.dtype and mine.shape == like.shape, name
        error = (mine.double() - expected).abs().amax() / expected.abs().amax()
        assert error <= DTYPES[args[0].dtype], (name, float(error))
    return ours


@pytest.mark.parametrize(
    ("dtype", "activation", "biased"),
    [
        (torch.float32, "swiglu", False),
        (torch.float32, "relu", True),
        (torch.float16, "swiglu", True),
        (torch.float16, "relu", False),
    ],
)  # every two of them together: the type is that of loads and stores, whatever is computed between
def test_output_and_gradients_with_experts_of_every_size(dtype, activation, biased):
    """No row, one row, and the edges of a tile; widths that no block divides."""
    plan = grouped([0, 1, BLOCK - 1, BLOCK, BLOCK + 1], top_k=7)
    ours = check(draw(plan, 20, 17, activation, biased, dtype), plan, activation)
    for gradient in (ours[2], ours[3], *ours[5:]):
        assert not gradient[0].any()


def test_one_expert_with_all_rows_and_more_tiles_than_share_columns():
    plan = grouped([0, 9 * BLOCK + 1])
    check(draw(plan, 17, 17), plan)


def test_widths_of_whole_blocks_and_narrower_than_one():
    plan = grouped([5, 3], top_k=2)
    for dim, hidden in [(BLOCK, BLOCK), (3, 5)]:
        check(draw(plan, dim, hidden, biased=True), plan)


@dtypes
def test_any_number_of_pairs_and_scores_of_the_type_of_x(dtype):
    plan = ragged([2, 0, 3, 1, 0, 4], 3)
    args = draw(plan, 20, 8, dtype=dtype, score_dtype=dtype)
    ours = check(args, plan)
    assert not ours[0][[1, 4]].any() and not ours[1][[1, 4]].any()


def test_rows_of_x_that_lie_apart():
    plan = grouped([5, 3], top_k=2)
    args = draw(plan, 20, 8)
    spaced = torch.full((plan.n_tokens, 50), float("nan"))
    spaced[:, :20] = args[0].detach()
    expected = run(args, plan, "swiglu", "triton")
    for x in (spaced[:, :20], args[0].detach().T.contiguous().T):
        assert not x.is_contiguous()
        ours = run([x.requires_grad_(), *args[1:]], plan, "swiglu", "triton")
        assert all(map(torch.equal, ours, expected))


def test_a_row_of_x_that_begins_past_2_to_the_31(far_rows):
    plan = grouped([2, 1])
    args = draw(plan, 20, 8, dtype=torch.float16)
    far = far_rows(args[0].detach()).requires_grad_()
    ours, expected = (run([x, *args[1:]], plan, "swiglu", "triton") for x in (far, args[0]))
    assert all(map(torch.equal, ours, expected))


@kinds
def test_two_runs_are_bit_equal_and_inference_gives_the_same(activation):
    plan = grouped([0, 7, BLOCK + 1], top_k=3)
    args = draw(plan, 20, 17, activation, biased=True)
    first, second = run(args, plan, activation, "triton"), run(args, plan, activation, "triton")
    assert all(map(torch.equal, first, second))
    x, w1, w2, score, b1, b2 = (t.detach() for t in args)
    out, z = path.forward(x, w1, w2, plan, score, b1, b2, activation, False)
    assert z is None and torch.equal(out, first[0])


@pytest.fixture
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@kinds
def test_what_the_plan_does_not_cover_reaches_nothing(activation, fresh_memory_is_nan):
    """NaN in tokens without pairs, experts without rows, rows after the last and every buffer before it is written."""
    expert = torch.tensor([1, 3, 3, 1, 3, 1, 1])  # of five experts; token 0 and expert 0 stand where masked loads point
    plan = RoutePlan.build(expert, 5, tok_offs=torch.tensor([0, 0, 2, 4, 4, 7, 7]))
    clean = [t.detach() for t in draw(plan, 20, 17, activation, biased=True)]
    poisoned = [t.clone() for t in clean]
    poisoned[0][[0, 3, 5]] = float("nan")
    for tensor in (poisoned[1], poisoned[2], poisoned[4], poisoned[5]):
        tensor[[0, 2, 4]] = float("nan")
    grad = torch.randn(clean[0].shape, generator=torch.Generator().manual_seed(9))
    bad_grad = grad.clone()
    bad_grad[[0, 3, 5]] = float("nan")
    results = []
    for (x, w1, w2, score, b1, b2), dout in ((clean, grad), (poisoned, bad_grad)):
        out, z = path.forward(x, w1, w2, plan, score, b1, b2, activation, True)
        longer = torch.cat([z, torch.full((2 * BLOCK, z.shape[1]), float("nan"))])[: plan.n_pairs]
        results.append([out, z, *path.backward(dout, x, longer, w1, w2, plan, score, b1, b2, activation)])
    for ours, expected in zip(*results, strict=True):
        assert ours.isfinite().all() and torch.equal(ours, expected)


def test_no_pairs_and_no_tokens():
    for plan, tokens in ((ragged([0, 0, 0], 2), 3), (grouped([0, 0]), 0)):
        for t in run(draw(plan, 6, 4, biased=True), plan, "swiglu", "triton"):
            assert not t.any()
        assert plan.n_tokens == tokens


def test_float64_is_refused():
    plan = grouped([2, 1])
    args = draw(plan, 6, 4, dtype=torch.float64)
    with pytest.raises(InputError, match="it must be float32, bfloat16 or float16"):
        run(args, plan, "swiglu", "triton")


def test_registration():
    plan = grouped([2, 1])
    for activation, biased in (("swiglu", True), ("relu", False)):
        args = [*draw(plan, 5, 4, activation, biased), None, None][:6]
        rest = (plan.order, plan.inv, plan.tok, plan.offs, plan.tok_offs, plan.top_k, activation, "triton", True)
        torch.library.opcheck(torch.ops.workbench.moe_mlp.default, (*args, *rest))
