"""The bank of low-rank updates as an operator: every path of a CPU against a loop over experts in float64."""

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.kernels import RoutePlan, dispatch, memory
from workbench.kernels.low_rank import cheaper_dense, cpu, kept, low_rank
from workbench.kernels.low_rank.order import pack, quick, unpack

operator = importlib.import_module("workbench.kernels.low_rank")
native = importlib.import_module("workbench.kernels.low_rank.native")
PATHS = ("reference", "dense", "cpu")  # of any type
ALL = (*PATHS, "native")
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def pairs_of(routing: str, n_tokens: int, n_experts: int, top_k: int = 2, seed: int = 0) -> tuple[torch.Tensor, dict]:
    """Experts of the pairs, and how many each token has.

    Fixed, even (equally many for every expert), ragged (a token without experts among them), all to one expert, one
    expert unused.
    """
    scores = torch.rand(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed))
    if routing == "one":
        return torch.full((n_tokens,), n_experts - 1), {"top_k": 1}
    if routing == "even":
        order = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(seed))
        return order % n_experts, {"top_k": 1}
    if routing == "unused":
        scores[:, 0] = 2.0  # sorts last
    if routing == "ragged":
        mask = scores < 0.5
        mask[1] = False
        return mask.nonzero()[:, 1], {"tok_offs": F.pad(mask.sum(1).cumsum(0), (1, 0))}
    return scores.argsort(1)[:, :top_k].reshape(-1), {"top_k": top_k}


ROUTINGS = ("fixed", "even", "ragged", "one", "unused")


def inputs_of(expert: torch.Tensor, n_tokens: int, n_experts: int, dtype=torch.float64, widths=(8, 12), rank=3) -> list:
    """x, a, b, score, leaves that want gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(n_tokens, widths[0]), (n_experts, rank, widths[0]), (n_experts, widths[1], rank), (len(expert),)]
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    ]


def loop(x, a, b, score, expert, tokens) -> torch.Tensor:
    """One expert at a time, differentiated by autograd."""
    counts = torch.full((len(x),), tokens["top_k"]) if "top_k" in tokens else tokens["tok_offs"].diff()
    token = torch.arange(len(x)).repeat_interleave(counts)
    out = x.new_zeros(len(x), b.shape[1])
    for e in range(len(a)):
        at = expert == e
        out = out.index_add(0, token[at], (x[token[at]] @ a[e].T @ b[e].T) * score[at, None].to(x.dtype))
    return out


def with_gradients(out: torch.Tensor, args: list[torch.Tensor]) -> list[torch.Tensor]:
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, args, grad)]


def widest(backend: str) -> torch.dtype:
    return torch.float32 if backend == "native" else torch.float64


def call(args, expert, tokens, backend=None) -> torch.Tensor:
    return low_rank(*args[:3], expert, args[3], **tokens, backend=backend)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("n_tokens", [20, 400])  # lists that are filled up, and lists that are not
def test_output_and_gradients_equal_the_loop_in_float64(backend, routing, n_tokens):
    n_experts = 5
    expert, tokens = pairs_of(routing, n_tokens, n_experts)
    for dtype, tolerance in [(torch.float64, 1e-11), (torch.float32, 1e-5)]:
        if backend == "native" and dtype != torch.float32:
            continue
        args = inputs_of(expert, n_tokens, n_experts, dtype)
        ours, again = (with_gradients(call(args, expert, tokens, backend), args) for _ in range(2))
        assert dispatch.last_backend("low_rank") == dispatch.last_backend("low_rank.backward") == backend
        exact = [t.detach().double().requires_grad_() for t in args]
        theirs = with_gradients(loop(*exact, expert, tokens), exact)
        for mine, repeated, expected, like in zip(ours, again, theirs, [args[0], *args], strict=True):
            assert mine.dtype == like.dtype and torch.equal(mine, repeated)
            assert (mine.double() - expected).abs().max() <= tolerance * expected.abs().max()
        for e in set(range(n_experts)) - set(expert.tolist()):
            assert not ours[2][e].any() and not ours[3][e].any()


@pytest.mark.parametrize("backend", PATHS)
def test_gradcheck(backend):
    for routing in ("fixed", "ragged", "even"):
        expert, tokens = pairs_of(routing, 6, 3)
        args = inputs_of(expert, 6, 3, widths=(4, 3), rank=2)
        assert torch.autograd.gradcheck(lambda *a, e=expert, t=tokens: call(a, e, t, backend), args)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_half_precision_is_near_the_exact_result(backend, dtype):
    """Two products in sequence, each rounded: a few units of the last place of the largest value."""
    for routing in ("fixed", "even"):
        expert, tokens = pairs_of(routing, 30, 5)
        args = inputs_of(expert, 30, 5, dtype)
        args[3] = args[3].detach().float().requires_grad_()  # scores stay in float32
        ours = with_gradients(call(args, expert, tokens, backend), args)
        exact = [t.detach().double().requires_grad_() for t in args]
        theirs = with_gradients(loop(*exact, expert, tokens), exact)
        for mine, expected, like in zip(ours, theirs, [args[0], *args], strict=True):
            assert mine.dtype == like.dtype
            assert (mine.double() - expected).abs().max() < 4 * EPS[dtype] * expected.abs().max()


@pytest.mark.parametrize("backend", ALL)
def test_registration_and_compilation(backend):
    for routing in ("even", "ragged"):
        expert, tokens = pairs_of(routing, 10, 4)
        args = inputs_of(expert, 10, 4, widest(backend))
        rest = (expert, tokens.get("tok_offs"), tokens.get("top_k"), backend)
        torch.library.opcheck(torch.ops.workbench.low_rank.default, (*args, *rest, True))
        torch.library.opcheck(torch.ops.workbench.low_rank.default, (*(t.detach() for t in args), *rest, False))

        def loss(x, a, b, score, expert=expert, tokens=tokens):
            return call([x, a, b, score], expert, tokens, backend).square().sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for ours, theirs in zip(*(torch.autograd.grad(f(*args), args) for f in (compiled, loss)), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ALL)
def test_the_dispatcher_and_the_direct_way_give_the_same_bits(backend):
    expert, tokens = pairs_of("fixed", 20, 4)
    args = inputs_of(expert, 20, 4, widest(backend))
    direct = with_gradients(call(args, expert, tokens, backend), args)
    found = torch.ops.workbench.low_rank(*args, expert, None, 2, backend, True)
    assert found[1].shape == kept(20, 40, 4, 3, backend, True)[0]
    for ours, theirs in zip(with_gradients(found[0], args), direct, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ALL)
def test_views_and_integers_of_either_size(backend):
    expert, tokens = pairs_of("ragged", 20, 4)
    args = inputs_of(expert, 20, 4, widest(backend))
    expected = with_gradients(call(args, expert, tokens, backend), args)
    views = [t.detach().mT.contiguous().mT.requires_grad_() for t in args[:3]]
    views.append(torch.stack([args[3].detach()] * 2, 1)[:, 0].requires_grad_())
    assert not any(t.is_contiguous() for t in views)
    short = {name: value.int() for name, value in tokens.items()}
    found = with_gradients(call(views, expert.int(), short, backend), views)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ALL)
def test_no_pairs_and_no_tokens(backend):
    none = torch.empty(0, dtype=torch.int64)
    for n_tokens, tokens in ((3, {"tok_offs": torch.zeros(4, dtype=torch.int64)}), (0, {"top_k": 2})):
        args = inputs_of(none, n_tokens, 2, widest(backend))
        found = with_gradients(call(args, none, tokens, backend), args)
        assert found[0].shape == (n_tokens, 12) and not any(t.any() for t in found)


@pytest.mark.parametrize("backend", ["reference", "cpu", "native"])
@pytest.mark.parametrize("n_tokens", [21, 401])
def test_nan_stays_where_it_was(backend, n_tokens):
    """NaN in a token reaches its own output and its own experts' gradients, also where lists are filled up."""
    expert, tokens = pairs_of("even", n_tokens, 5)
    clean = inputs_of(expert, n_tokens, 5, widest(backend))
    poisoned = [t.detach().clone().requires_grad_() for t in clean]
    poisoned[0].data[n_tokens - 1] = float("nan")
    hit = int(expert[n_tokens - 1])
    results = [with_gradients(call(args, expert, tokens, backend), args) for args in (clean, poisoned)]
    for name, ours, expected in zip(("out", "dx", "da", "db", "dscore"), *reversed(results), strict=True):
        whole = torch.arange(5) != hit if name in ("da", "db") else torch.arange(n_tokens) != n_tokens - 1
        assert torch.equal(ours[whole], expected[whole]), name
    assert results[1][2][hit].isnan().any()


def test_lists_are_filled_up_only_where_they_are_short_and_even():
    def filled(counts: list[int]) -> bool:
        expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        return cpu._filled(quick(expert, len(expert), len(counts), None, 1), len(expert)) is not None

    assert filled([3, 5, 4]) and filled([1, 1]) and filled([cpu.LONGEST] * 2)
    assert not filled([0, 3, 3]) and not filled([1, 1, 1, 9]) and not filled([cpu.LONGEST + 1] * 2)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_quick_order_is_that_of_a_plan(routing):
    for n_tokens in (10, 2000):  # above `order.MANY` pairs they are sorted as 16-bit numbers
        expert, tokens = pairs_of(routing, n_tokens, 4)
        plan = RoutePlan.build(expert, 4, **tokens)
        index = torch.from_numpy(quick(expert, n_tokens, 4, tokens.get("tok_offs"), tokens.get("top_k")))
        assert torch.equal(index, pack(plan))
        again = unpack(index, n_tokens, len(expert), 4, tokens.get("tok_offs"), tokens.get("top_k"))
        for name in ("order", "inv", "tok", "offs", "tok_offs"):
            ours, theirs = getattr(again, name), getattr(plan, name)
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.usefixtures("compiler")
def test_the_path_is_chosen_by_cost_type_and_device(monkeypatch):
    def dense(n_tokens: int, n_experts: int, rank: int, top_k: int = 1, width: int = 512) -> bool:
        a, b = torch.empty(n_experts, rank, width, device="meta"), torch.empty(n_experts, width, rank, device="meta")
        return cheaper_dense(n_tokens, n_tokens * top_k, a, b)

    assert dense(2048, 1, 64) and dense(2048, 8, 2) and dense(2048, 8, 8, top_k=4) and dense(8, 8, 8)
    assert not dense(2048, 64, 8) and not dense(2048, 8, 64, top_k=2)

    def chosen(dtype, n_experts: int) -> tuple[str, ...]:
        expert, tokens = pairs_of("fixed", 50, n_experts, 1)
        args = inputs_of(expert, 50, n_experts, dtype, (256, 256), rank=8)
        with dispatch.recording() as seen:
            call(args, expert, tokens)
            call(args, expert, tokens, "grouped").sum().backward()
        return tuple(path for _, path in seen)

    for n_experts in (2, 400):
        assert chosen(torch.float32, n_experts) == ("native",) * 3
        assert chosen(torch.float64, n_experts) == ("dense" if n_experts == 2 else "cpu", "cpu", "cpu")
    for module in (operator, dispatch.native):  # as where there is no compiler
        monkeypatch.setattr(module, "obstacle", lambda source: "none here")
    for n_experts in (2, 400):
        assert chosen(torch.float32, n_experts) == ("dense" if n_experts == 2 else "cpu", "cpu", "cpu")


@pytest.mark.parametrize("backend", ALL)
def test_what_is_kept_for_the_backward(backend):
    """The arguments, and either codes of all experts or four integers a pair."""
    expert, tokens = pairs_of("fixed", 64, 4)
    args = inputs_of(expert, 64, 4, torch.float32)
    found = memory.saved_bytes(lambda: call(args, expert, tokens, backend), exclude=[*args, expert])
    assert found == (4 * 64 * 4 * 3 if backend == "dense" else 4 * (3 * 128 + 5))
    with torch.no_grad():
        assert memory.saved_bytes(lambda: call(args, expert, tokens, backend)) == 0


def test_under_autocast_the_products_are_in_half_precision_and_scores_are_not():
    expert, tokens = pairs_of("fixed", 9, 4)
    args = inputs_of(expert, 9, 4, torch.float32)
    for backend in PATHS:
        with torch.autocast("cpu", torch.bfloat16):
            out = call(args, expert, tokens, backend)
        assert out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out.float().square().sum(), args)
        assert all(grad.dtype == torch.float32 for grad in grads)
        expected = call(args, expert, tokens, backend)
        assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_frozen_inputs_get_no_gradient():
    expert, tokens = pairs_of("fixed", 9, 4)
    x, a, b, score = inputs_of(expert, 9, 4)
    call([x.detach(), a, b.detach(), score.detach()], expert, tokens).sum().backward()
    assert a.grad is not None and x.grad is None and b.grad is None and score.grad is None


def test_operations_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    expert, tokens = pairs_of("fixed", 9, 4)
    args = inputs_of(expert, 9, 4, torch.float32)
    once = 2 * 3 * (8 + 12)  # of one row and expert
    routed = 3 * 18 * once + 18 * 2 * 3 * 8
    for backend, expected in (("dense", 3 * 36 * once), ("cpu", routed), ("native", routed)):
        with FlopCounterMode(display=False) as counter:
            call(args, expert, tokens, backend).sum().backward()
        assert counter.get_total_flops() == expected


def test_wrong_input_is_named():
    expert = pairs_of("fixed", 9, 4)[0]
    x, a, b, score = inputs_of(expert, 9, 4, torch.float32)
    beyond, below = expert.clone(), expert.clone()
    beyond[3], below[3] = 4, -1
    offs = torch.arange(0, 19, 2)
    falling = offs.clone()
    falling[4] = 30
    for case, message in [
        (lambda: low_rank(x[0], a, b, expert, score, top_k=2), r"x is torch.float32 of shape \(8,\) but must be"),
        (lambda: low_rank(x.long(), a, b, expert, score, top_k=2), "x is torch.int64"),
        (lambda: low_rank(x[:, 1:], a, b, expert, score, top_k=2), r"a and b have shapes \(4, 3, 8\) and \(4, 12, 3\)"),
        (lambda: low_rank(x, a[1:], b, expert, score, top_k=2), r"must be \(experts, rank, 8\)"),
        (lambda: low_rank(x, a, b[..., 1:], expert, score, top_k=2), r"and \(experts, d_out, rank\)"),
        (lambda: low_rank(x, a.double(), b, expert, score, top_k=2), "a and b are torch.float64 and torch.float32"),
        (lambda: low_rank(x, a, b, expert.float(), score, top_k=2), "expert is torch.float32 .* must be integers"),
        (lambda: low_rank(x, a, b, expert, score[1:], top_k=2), r"score is torch.float32 of shape \(17,\)"),
        (lambda: low_rank(x, a, b, expert, score.half(), top_k=2), "score is torch.float16"),
        (lambda: low_rank(x, a.to("meta"), b, expert, score, top_k=2), "a is on meta but must be where x is, on cpu"),
        (lambda: low_rank(x, a, b, expert, score), "top_k is None and tok_offs not given; give exactly one"),
        (lambda: low_rank(x, a, b, expert, score, top_k=2, tok_offs=offs), "top_k is 2 and tok_offs given"),
        (lambda: low_rank(x, a, b, expert, score, top_k=3), "top_k is 3 but 9 tokens have 18 pairs"),
        (lambda: low_rank(x, a, b, expert, score, tok_offs=offs[1:]), r"tok_offs is torch.int64 of shape \(9,\)"),
        (lambda: low_rank(x, a, b, expert, score, tok_offs=offs + 1, backend="cpu"), "tok_offs must rise from 0"),
        (lambda: low_rank(x, a, b, expert, score, tok_offs=offs + 1, backend="grouped"), "tok_offs must rise from 0"),
        (lambda: low_rank(x, a, b, expert, score, tok_offs=offs.flip(0), backend="grouped"), "tok_offs must rise"),
        (lambda: low_rank(x, a, b, expert, score, tok_offs=falling, backend="grouped"), "tok_offs must rise"),
        (lambda: call([t.double() for t in (x, a, b, score)], expert, {"top_k": 2}, "native"), "be torch.float32"),
        (lambda: low_rank(x, a, b, expert, score, top_k=2, backend="fast"), "backend of low_rank 'fast' is unknown"),
        (lambda: low_rank(x, a, b, expert, score, top_k=2, backend="triton"), "backend is 'triton' but low_rank"),
    ]:
        with pytest.raises(InputError, match=message):
            case()
    for backend in (*PATHS, None):
        for wrong, message in ((beyond, "from 0 to 4 but all must be from 0 to"), (below, "from -1 to 3 but all must")):
            for which in ({"top_k": 2}, {"tok_offs": offs}):
                with pytest.raises(InputError, match=message):
                    low_rank(x, a, b, wrong, score, **which, backend=backend)


# the native path

SHAPES = [  # tokens, experts, top_k, widths, rank: tiles that are filled and that are not
    (1, 1, 1, (1, 1), 1),
    (100, 4, 1, (17, 33), 8),
    (77, 3, 2, (100, 131), 17),
    (300, 6, 3, (64, 64), 9),
    (40, 50, 2, (512, 500), 4),
    (33, 2, 1, (16, 16), 70),
    (500, 3, 3, (48, 96), 12),
]


@pytest.mark.parametrize("n_tokens, n_experts, top_k, widths, rank", SHAPES)
def test_native_tiles_of_any_size_in_any_number_of_threads(n_tokens, n_experts, top_k, widths, rank, monkeypatch):
    expert, tokens = pairs_of("fixed", n_tokens, n_experts, top_k)
    args = inputs_of(expert, n_tokens, n_experts, torch.float32, widths, rank)
    exact = [t.detach().double().requires_grad_() for t in args]
    theirs = with_gradients(loop(*exact, expert, tokens), exact)
    monkeypatch.setattr(native, "SHARED", 0)
    found = []
    for count in (1, 2, 3):
        monkeypatch.setattr(native.threads, "available", lambda count=count: count)
        found.append(with_gradients(call(args, expert, tokens, "native"), args))
    for ours, two, three, expected in zip(*found, theirs, strict=True):
        assert torch.equal(ours, two) and torch.equal(ours, three)
        assert (ours.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_native_gradients_do_not_depend_on_which_are_wanted():
    expert, tokens = pairs_of("fixed", 50, 4)
    args = inputs_of(expert, 50, 4, torch.float32)
    every = with_gradients(call(args, expert, tokens, "native"), args)[1:]
    for one, expected in zip(args, every, strict=True):
        some = [t if t is one else t.detach() for t in args]
        assert torch.equal(with_gradients(call(some, expert, tokens, "native"), [one])[1], expected)


@pytest.mark.usefixtures("compiler")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc fills fresh memory on request")
def test_memory_of_the_native_path_is_never_seen():
    """The same sums where the C library fills fresh memory with numbers near the largest there are, as without."""
    code = """
import torch
from workbench.kernels.low_rank import low_rank
torch.manual_seed(0)
for n_tokens, width, rank in ((9, 5, 3), (150, 70, 8), (40, 33, 17)):
    shapes = (n_tokens, width), (4, rank, width), (4, width + 1, rank), (n_tokens,)
    args = [torch.randn(shape, requires_grad=True) for shape in shapes]
    expert = torch.randint(3, (n_tokens,))
    out = low_rank(*args[:3], expert, args[3], top_k=1, backend="native")
    print([t.double().sum().item() for t in (out, *torch.autograd.grad(out.sin().sum(), args))])
"""
    clean, filled = (
        subprocess.run(
            [sys.executable, "-c", code],
            check=True, capture_output=True, text=True, env={**os.environ, **more},
        ).stdout
        for more in ({}, {"MALLOC_PERTURB_": "128"})
    )  # fmt: skip
    assert clean == filled and "nan" not in clean


def test_native_without_memory_says_so(monkeypatch):
    expert, tokens = pairs_of("fixed", 5, 3)
    args = inputs_of(expert, 5, 3, torch.float32)
    full = SimpleNamespace(order=native._library().order, forward=lambda job: 1)
    monkeypatch.setattr(native, "_library", lambda: full)
    with pytest.raises(MemoryError, match="low_rank found no memory for the scratch of forward"):
        call(args, expert, tokens, "native")


@pytest.mark.parametrize("backend", ALL)
def test_transforms_of_functions_are_refused(backend):
    """Also where nothing wants a gradient."""
    expert, tokens = pairs_of("fixed", 5, 3)
    x, *rest = [t.detach() for t in inputs_of(expert, 5, 3, widest(backend))]
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        call([forward_ad.make_dual(x, x), *rest], expert, tokens, backend)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.vmap(lambda one: call([one, *rest], expert, tokens, backend))(x.expand(2, *x.shape))
