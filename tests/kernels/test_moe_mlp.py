"""The expert layer as an operator: every path of a CPU against a loop over experts in float64, and what it keeps."""

import threading

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from workbench.errors import InputError
from workbench.kernels import RoutePlan, dispatch, memory, moe_mlp, threads
from workbench.kernels.moe_mlp import cpu, native

PATHS = ("reference", "cpu", "native", "grouped_mm")
SINGLE = ("native", "grouped_mm")  # take no float64
UP = {"swiglu": 2, "relu": 1}


def plan_of(routing: str, n_tokens: int, n_experts: int, top_k: int, seed: int = 0) -> RoutePlan:
    """Routings of several shapes: fixed, ragged (tokens without experts among them), all to one expert, one unused."""
    scores = torch.rand(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed))
    if routing == "one":
        return RoutePlan.build(torch.full((n_tokens,), n_experts - 1), n_experts, top_k=1)
    if routing == "unused":
        scores[:, 0] = 2.0  # sorts last
    if routing == "ragged":
        mask = scores < 0.5
        mask[1] = False
        return RoutePlan.build(mask.nonzero()[:, 1], n_experts, tok_offs=F.pad(mask.sum(1).cumsum(0), (1, 0)))
    return RoutePlan.build(scores.argsort(1)[:, :top_k].reshape(-1), n_experts, top_k=top_k)


def inputs_of(
    plan: RoutePlan, dim: int, hidden: int, activation: str = "swiglu", biased: bool = True, dtype=torch.float64, seed=0
) -> list[torch.Tensor]:
    """x, w1, w2, score[, b1, b2], leaves that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    n, up = plan.n_experts, UP[activation] * hidden
    shapes = [(plan.n_tokens, dim), (n, up, dim), (n, dim, hidden), (plan.n_pairs,)]
    shapes += [(n, up), (n, dim)] if biased else []
    made = [torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.5 for shape in shapes]
    return [t.to(dtype).requires_grad_() for t in made]


def loop(x, w1, w2, score, b1=None, b2=None, *, plan: RoutePlan, activation: str) -> torch.Tensor:
    """One expert at a time, differentiated by autograd."""
    out = torch.zeros_like(x)
    for e in range(plan.n_experts):
        rows = slice(int(plan.offs[e]), int(plan.offs[e + 1]))
        tokens, pairs = plan.tok[rows].long(), plan.order[rows].long()
        z = F.linear(x[tokens], w1[e], None if b1 is None else b1[e])
        gate, up = z.chunk(2, dim=1) if activation == "swiglu" else (z, None)
        hidden = F.silu(gate) * up if activation == "swiglu" else z.relu()
        y = F.linear(hidden, w2[e], None if b2 is None else b2[e])
        out = out.index_add(0, tokens, y * score[pairs, None].to(x.dtype))
    return out


def call(args: list[torch.Tensor], plan: RoutePlan, **options) -> torch.Tensor:
    x, w1, w2, score, *biases = args
    return moe_mlp(x, w1, w2, plan, score, *biases, **options)


def with_gradients(out: torch.Tensor, args: list[torch.Tensor]) -> list[torch.Tensor]:
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, args, grad)]


def operator_args(args: list[torch.Tensor], plan: RoutePlan, *rest: object) -> tuple:
    args = [*args, None, None][:6]
    return (*args, plan.order, plan.inv, plan.tok, plan.offs, plan.tok_offs, plan.top_k, *rest)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("routing", ["fixed", "ragged", "one", "unused"])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("biased", [True, False])
def test_output_and_gradients_equal_the_loop_in_float64(backend, routing, activation, biased):
    plan = plan_of(routing, 19, 5, 3)
    for dtype, tolerance in [(torch.float64, 1e-10), (torch.float32, 1e-5)]:
        if dtype == torch.float64 and backend in SINGLE:
            continue  # refused, see below
        args = inputs_of(plan, 8, 12, activation, biased, dtype)
        ours = with_gradients(call(args, plan, activation=activation, backend=backend), args)
        assert dispatch.last_backend("moe_mlp") == dispatch.last_backend("moe_mlp.backward") == backend
        again = with_gradients(call(args, plan, activation=activation, backend=backend), args)
        exact = [t.detach().double().requires_grad_() for t in args]
        theirs = with_gradients(loop(*exact, plan=plan, activation=activation), exact)
        for mine, repeated, expected in zip(ours, again, theirs, strict=True):
            assert mine.dtype == dtype and torch.equal(mine, repeated)
            assert torch.allclose(mine.double(), expected, rtol=tolerance, atol=tolerance * 10)
        for e in (plan.offs.diff() == 0).nonzero().flatten():
            assert not any(grad[e].any() for grad in (ours[2], ours[3], *ours[5:]))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_gradcheck(backend, activation):
    for routing in ("fixed", "ragged"):
        plan = plan_of(routing, 6, 3, 2)
        args = inputs_of(plan, 4, 3, activation)
        assert torch.autograd.gradcheck(lambda *a, p=plan: call(a, p, activation=activation, backend=backend), args)


@pytest.mark.parametrize("backend", ("reference", "cpu", "grouped_mm"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_half_precision_is_near_the_exact_result(backend, dtype, activation):
    """Three products in sequence, each rounded: a few units of the last place of the largest value."""
    plan = plan_of("fixed", 33, 4, 2)
    args = inputs_of(plan, 16, 8, activation, dtype=dtype)
    args[3] = args[3].detach().float().requires_grad_()  # scores stay in float32
    ours = with_gradients(call(args, plan, activation=activation, backend=backend), args)
    exact = [t.detach().double().requires_grad_() for t in args]
    theirs = with_gradients(loop(*exact, plan=plan, activation=activation), exact)
    for mine, expected, like in zip(ours, theirs, [args[0], *args], strict=True):
        assert mine.dtype == like.dtype
        assert (mine.double() - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("backend", PATHS)
def test_registration_and_compilation(backend):
    dtype = torch.float32 if backend in SINGLE else torch.float64
    for routing, biased in [("fixed", False), ("ragged", True)]:
        plan = plan_of(routing, 12, 4, 2)
        args = inputs_of(plan, 8, 4, biased=biased, dtype=dtype)
        for save in (True, False) if not any(t.requires_grad for t in args) else (True,):
            torch.library.opcheck(
                torch.ops.workbench.moe_mlp.default, operator_args(args, plan, "swiglu", backend, save)
            )
        plain = [t.detach() for t in args]
        torch.library.opcheck(torch.ops.workbench.moe_mlp.default, operator_args(plain, plan, "swiglu", backend, False))

    def loss(expert, *args):
        return call(args, RoutePlan.build(expert, 4, top_k=2), backend=backend).square().mean()

    expert = torch.rand(12, 4).argsort(1)[:, :2].reshape(-1)
    args = inputs_of(RoutePlan.build(expert, 4, top_k=2), 8, 4, dtype=dtype)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(expert, *args), args) for f in (compiled, loss))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("backend", PATHS)
def test_no_tokens_no_pairs_and_views(backend):
    for plan in (
        RoutePlan.build(torch.empty(0, dtype=torch.int64), 3, top_k=2),
        RoutePlan.build(torch.empty(0, dtype=torch.int64), 3, tok_offs=torch.zeros(5, dtype=torch.int64)),
    ):
        args = inputs_of(plan, 8, 4, dtype=torch.float32)
        out, *grads = with_gradients(call(args, plan, backend=backend), args)
        assert out.shape == (plan.n_tokens, 8) and not any(t.any() for t in (out, *grads))
    plan = plan_of("fixed", 9, 4, 2)
    args = inputs_of(plan, 8, 4, dtype=torch.float32)
    expected = with_gradients(call(args, plan, backend=backend), args)
    spaced = [torch.stack([t.detach(), t.detach()], -1)[..., 0].requires_grad_() for t in args]
    wide = torch.zeros(9, 32)
    wide[:, :8] = args[0].detach()
    for x in (spaced[0], wide[:, :8].requires_grad_()):
        views = [x, *spaced[1:]]
        assert not any(t.is_contiguous() for t in views)
        found = with_gradients(call(views, plan, backend=backend), views)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    summed = call(args, plan, backend=backend).sum()  # its gradient is an expanded scalar
    assert torch.isfinite(torch.autograd.grad(summed, args)[1]).all()


@pytest.mark.parametrize("backend", PATHS)
def test_tokens_outside_the_plan_are_not_read(backend):
    """NaN in a token without pairs reaches neither the output nor any other gradient."""
    plan = plan_of("ragged", 9, 4, 2)
    args = inputs_of(plan, 8, 4, dtype=torch.float32)
    poisoned = [t.detach().clone().requires_grad_() for t in args]
    poisoned[0].data[1] = float("nan")
    clean, found = (with_gradients(call(a, plan, backend=backend), a) for a in (args, poisoned))
    assert all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))
    assert not found[0][1].any() and not found[1][1].any()


@pytest.mark.parametrize("backend", PATHS)
def test_properties_of_a_mixture(backend):
    """One expert is a dense block; permuting tokens permutes outputs; fixed and variable K agree bit for bit."""
    plan = RoutePlan.build(torch.zeros(7, dtype=torch.int64), 1, top_k=1)
    x, w1, w2, _ = inputs_of(plan, 8, 4, biased=False, dtype=torch.float32)
    gate, up = (x @ w1[0].T).chunk(2, dim=1)
    dense = (F.silu(gate) * up) @ w2[0].T
    assert torch.allclose(moe_mlp(x, w1, w2, plan, torch.ones(7), backend=backend), dense, atol=1e-5)
    expert, order = torch.rand(7, 4).argsort(1)[:, :2], torch.randperm(7)
    plan = RoutePlan.build(expert.reshape(-1), 4, top_k=2)
    x, w1, w2, score = inputs_of(plan, 8, 4, biased=False, dtype=torch.float32)
    out = moe_mlp(x, w1, w2, plan, score, backend=backend)
    moved = RoutePlan.build(expert[order].reshape(-1), 4, top_k=2)
    assert torch.allclose(
        moe_mlp(x[order], w1, w2, moved, score.view(7, 2)[order].reshape(-1), backend=backend), out[order], atol=1e-5
    )
    ragged = RoutePlan.build(expert.reshape(-1), 4, tok_offs=torch.arange(0, 15, 2))
    assert torch.equal(moe_mlp(x, w1, w2, ragged, score, backend=backend), out)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("biased", [True, False])
def test_what_is_kept_for_the_backward_is_what_the_formula_says(backend, biased):
    """X, Z, weights, scores and plan: with I K fixed the first two do not depend on how fine the experts are."""
    n_tokens, dim, activations = 64, 16, set()
    for hidden, top_k in [(32, 1), (16, 2), (8, 4)]:
        n_experts = 4 * top_k
        plan = plan_of("fixed", n_tokens, n_experts, top_k)
        args = inputs_of(plan, dim, hidden, biased=biased, dtype=torch.float32)
        pairs = n_tokens * top_k
        weights = sum(t.numel() for t in args[1:3] + args[4:])
        rows = 4 * n_tokens * dim + 4 * pairs * 2 * hidden
        indices = 4 * (3 * pairs + n_experts + 1)
        found = memory.saved_bytes(lambda a=args, p=plan: call(a, p, backend=backend))
        assert found == rows + 4 * weights + 4 * pairs + indices
        activations.add(found - 4 * weights - 4 * pairs - indices)
    assert activations == {4 * n_tokens * dim + 4 * 64 * 64}
    with torch.no_grad():
        assert memory.saved_bytes(lambda: call(args, plan, backend=backend)) == 0


def test_threads_that_take_whole_experts_change_no_bit(monkeypatch):
    """Also with an expert too large to share, and one without rows; small problems stay in one thread."""
    if threads._controls() is None:
        pytest.skip("this build of torch cannot confine a thread to one core")
    monkeypatch.setattr(cpu, "SHARED", 0)
    used: list[int] = []
    share = threads.share
    monkeypatch.setattr(threads, "share", lambda items, work, n: (used.append(len(items)), share(items, work, n))[1])
    scores = torch.rand(64, 40, generator=torch.Generator().manual_seed(0))
    scores[:, 3] = -1.0  # sorts first: every token chooses expert 3
    scores[:, 5] = 2.0
    plan = RoutePlan.build(scores.argsort(1)[:, :3].reshape(-1), 40, top_k=3)
    for activation in UP:
        args = inputs_of(plan, 16, 8, activation, dtype=torch.float32)
        results = []
        for count in (1, 3):
            monkeypatch.setattr(threads, "available", lambda count=count: count)
            results.append(with_gradients(call(args, plan, activation=activation, backend="cpu"), args))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    busy = int((plan.offs.diff() > 0).sum())
    assert used == [busy - 1] * 4  # forward and backward of two activations, without expert 3
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("widths", [(1, 1), (37, 70), (64, 16), (530, 9), (5, 531)])
def test_native_takes_any_width_and_number_of_rows(widths, activation):
    """Beyond whole vectors, tiles, panels and depths; experts of 1 to 600 rows; threads change no bit."""
    sizes = [600, 0, 1, 7, 8, 65]
    expert = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    order = torch.randperm(len(expert), generator=torch.Generator().manual_seed(1))
    plan = RoutePlan.build(expert[order], len(sizes), top_k=1)
    args = [t.detach().requires_grad_() for t in inputs_of(plan, *widths, activation, dtype=torch.float32)]
    for t, width in zip(args[1:3], widths, strict=True):
        t.data *= width**-0.5
    ours = with_gradients(call(args, plan, activation=activation, backend="native"), args)
    exact = [t.detach().double().requires_grad_() for t in args]
    theirs = with_gradients(loop(*exact, plan=plan, activation=activation), exact)
    for mine, expected in zip(ours, theirs, strict=True):
        assert (mine.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_native_threads_change_no_bit(monkeypatch, activation):
    """With experts that are divided, experts that are taken whole, and one without rows."""
    if threads._controls() is None:
        pytest.skip("this build of torch cannot confine a thread to one core")
    monkeypatch.setattr(native, "SHARED", 0)
    monkeypatch.setattr(native, "LEAST", 16)
    scores = torch.rand(300, 40, generator=torch.Generator().manual_seed(0))
    scores[:, 3] = -1.0  # sorts first: every token chooses expert 3
    scores[:, 5] = 2.0
    plan = RoutePlan.build(scores.argsort(1)[:, :3].reshape(-1), 40, top_k=3)
    args = inputs_of(plan, 21, 18, activation, dtype=torch.float32)
    results = []
    for count in (1, 2, 3):
        monkeypatch.setattr(threads, "available", lambda count=count: count)
        results.append(with_gradients(call(args, plan, activation=activation, backend="native"), args))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("compiler")
def test_native_is_the_path_of_float32_and_refuses_others():
    plan = plan_of("fixed", 9, 4, 2)
    for dtype, path in [(torch.float32, "native"), (torch.float64, "cpu"), (torch.bfloat16, "cpu")]:
        args = inputs_of(plan, 8, 4, dtype=dtype)
        call(args, plan).sum().backward()
        assert dispatch.last_backend("moe_mlp") == dispatch.last_backend("moe_mlp.backward") == path
        if path == "cpu":
            with pytest.raises(InputError, match="backend is 'native' but moe_mlp got tensors of"):
                call(args, plan, backend="native")


def test_without_a_compiler_the_cpu_path_runs_and_is_recorded(monkeypatch):
    monkeypatch.setattr(dispatch.native, "obstacle", lambda source: "there is no C compiler")
    plan = plan_of("fixed", 9, 4, 2)
    args = inputs_of(plan, 8, 4, dtype=torch.float32)
    call(args, plan).sum().backward()
    assert dispatch.last_backend("moe_mlp") == dispatch.last_backend("moe_mlp.backward") == "cpu"
    with pytest.raises(InputError, match="backend is 'native' but moe_mlp cannot use it: there is no C compiler"):
        call(args, plan, backend="native")


def test_an_error_in_a_thread_reaches_the_caller():
    if threads._controls() is None:
        pytest.skip("this build of torch cannot confine a thread to one core")
    done = []

    def work(thread: int, item: int) -> None:
        if item == 3:
            raise RuntimeError("item 3")
        done.append(item)

    with pytest.raises(RuntimeError, match="item 3"):
        threads.share(range(8), work, 2)
    assert sorted(done) == [0, 1, 2, 4, 5, 6, 7]


def test_a_confined_thread_uses_one_core_and_shares_as_many_as_ever():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = threads.available()
        with threads.confined():
            assert threads.available() == expected
            with threads.confined():  # again inside changes nothing
                assert torch.get_num_threads() == (1 if expected == 2 else 2)
            assert torch.get_num_threads() == (1 if expected == 2 else 2)
        assert torch.get_num_threads() == 2 and threads.available() == expected
    finally:
        torch.set_num_threads(before)


def test_scratch_is_reused_within_a_thread_only():
    first = memory.scratch(((4, 4), torch.float32), ((3,), torch.float64))
    again = memory.scratch(((2, 2), torch.float32))
    assert first[0].data_ptr() == again[0].data_ptr() and first[1].dtype == torch.float64
    assert first[0].data_ptr() % memory.ALIGNMENT == first[1].data_ptr() % memory.ALIGNMENT == 0
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(memory.scratch(((2, 2), torch.float32))[0].data_ptr()))
    thread.start()
    thread.join()
    assert elsewhere[0] != first[0].data_ptr()
    memory.release()
    assert memory._threads.buffer is None


def test_under_autocast_the_products_are_in_half_precision_and_scores_are_not():
    plan = plan_of("fixed", 9, 4, 2)
    args = inputs_of(plan, 8, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(args, plan)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in args)
    assert torch.allclose(out.float(), call(args, plan), atol=0.1)


def test_frozen_inputs_get_no_gradient():
    plan = plan_of("fixed", 9, 4, 2)
    x, w1, w2, score, b1, b2 = inputs_of(plan, 8, 4)
    moe_mlp(x.detach(), w1, w2.detach(), plan, score.detach(), b1, b2).sum().backward()
    assert w1.grad is not None and b1.grad is not None and x.grad is None and w2.grad is None


def test_wrong_input_is_named():
    plan = plan_of("fixed", 9, 4, 2)
    x, w1, w2, score, b1, b2 = inputs_of(plan, 8, 4, dtype=torch.float32)
    odd = inputs_of(plan, 6, 4, dtype=torch.float32)
    exact = inputs_of(plan, 8, 4)
    big = RoutePlan.build(torch.tensor([0] * 18), 5, top_k=2)
    for case, message in [
        (lambda: moe_mlp(x[0], w1, w2, plan, score), r"x has shape \(8,\) but must be \(tokens, dim\)"),
        (lambda: moe_mlp(x[1:], w1, w2, plan, score), r"x has shape \(8, 8\) but must be \(9, 8\)"),
        (lambda: moe_mlp(x, w1[0], w2, plan, score), r"w1 has shape \(8, 8\) but must be \(4, 8, 8\)"),
        (lambda: moe_mlp(x, w1, w2[0], plan, score), r"w2 has shape \(8, 4\) but must be \(experts, dim, hidden\)"),
        (lambda: moe_mlp(x, w1, w2, big, score), r"w1 has shape \(4, 8, 8\) but must be \(5, 8, 8\), for a plan of 9"),
        (lambda: moe_mlp(x, w1, w2, plan, score[1:]), r"score has shape \(17,\) but must be \(18,\)"),
        (lambda: moe_mlp(x, w1, w2, plan, score, b1[:, 1:]), r"b1 has shape \(4, 7\) but must be \(4, 8\)"),
        (lambda: moe_mlp(x, w1, w2, plan, score, b1, b2[1:]), r"b2 has shape \(3, 8\)"),
        (lambda: moe_mlp(x, w1, w2, plan, score, activation="relu"), r"w1 has shape .* must be \(4, 4, 8\).*'relu'"),
        (lambda: moe_mlp(x, w1, w2, plan, score, activation="gelu"), "activation 'gelu' is unknown"),
        (lambda: moe_mlp(x.double(), w1, w2, plan, score), "w1 is torch.float32 but must be torch.float64, as x is"),
        (lambda: moe_mlp(x, w1, w2.half(), plan, score), "w2 is torch.float16 but must be torch.float32"),
        (lambda: moe_mlp(x, w1, w2, plan, score.half()), "score is torch.float16 but must be torch.float32"),
        (lambda: moe_mlp(x.long(), w1, w2, plan, score), "x is torch.int64 but must be one of torch.float64"),
        (lambda: moe_mlp(x, w1.to("meta"), w2, plan, score), "w1 is on meta but must be where x is, on cpu"),
        (lambda: moe_mlp(*(t.to("meta") for t in (x, w1, w2)), plan, score.to("meta")), "plan is on cpu but must be"),
        (lambda: call(exact, plan, backend="grouped_mm"), "backend is 'grouped_mm' but x is torch.float64"),
        (lambda: call(odd, plan, backend="grouped_mm"), "but dim is 6; for torch.float32 it must be divisible by 4"),
        (lambda: call(exact, plan, backend="fast"), "backend of moe_mlp 'fast' is unknown"),
    ]:
        with pytest.raises(InputError, match=message):
            case()


def test_huge_sizes_and_strides_on_meta_tensors():
    """Shapes alone, forward and backward: Z would have 2**41 numbers, and rows of x begin 2**33 apart."""
    n_tokens, dim, hidden, n_experts, top_k = 2**25, 4096, 4096, 64, 8
    expert = torch.empty(n_tokens * top_k, dtype=torch.int32, device="meta")
    plan = RoutePlan.build(expert, n_experts, top_k=top_k)
    x = torch.empty_strided((n_tokens, dim), (2**33, 1), device="meta").requires_grad_()
    w1 = torch.empty(n_experts, 2 * hidden, dim, device="meta", requires_grad=True)
    w2 = torch.empty(n_experts, dim, hidden, device="meta", requires_grad=True)
    score = torch.empty(expert.shape, device="meta", requires_grad=True)
    b1, b2 = (torch.empty(n_experts, n, device="meta", requires_grad=True) for n in (2 * hidden, dim))
    with FlopCounterMode(display=False) as counter:
        out = moe_mlp(x, w1, w2, plan, score, b1, b2, backend="cpu")
        out.sum().backward()
    assert out.shape == x.shape and out.stride() == (dim, 1)
    for t in (x, w1, w2, score, b1, b2):
        assert t.grad.shape == t.shape and t.grad.is_contiguous()
    assert counter.get_total_flops() == 3 * 6 * expert.numel() * hidden * dim
    assert plan.tiles(128)[0].shape == (expert.numel() // 128 + n_experts,)


def test_operations_are_counted():
    plan = plan_of("fixed", 9, 4, 2)
    for activation, factor in [("swiglu", 6), ("relu", 4)]:
        args = inputs_of(plan, 8, 4, activation)
        with FlopCounterMode(display=False) as counter:
            call(args, plan, activation=activation).sum().backward()
        assert counter.get_total_flops() == 3 * factor * 18 * 4 * 8
