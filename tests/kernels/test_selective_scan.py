"""The selective scan on its CPU paths: equal to the recurrence, gradients, parts of a sequence, layouts, threads."""

from functools import partial

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels import dispatch, selective_scan, threads
from workbench.kernels.memory import saved_bytes
from workbench.kernels.selective_scan import kept_shape, native, reference

PATHS = ("reference", "native")
NAMES = ("x", "delta", "a", "b", "c", "d", "z", "state")
SHAPES = [(2, 3, 2, 70), (1, 16, 1, 1), (2, 17, 5, 64), (2, 40, 16, 130), (1, 140, 7, 65), (1, 1, 3, 129)]


def draw(batch=2, channels=5, states=3, steps=20, dtype=torch.float32, seed=0):
    """The arguments, all of which want gradients."""
    torch.manual_seed(seed)
    cube, row = (batch, channels, steps), (batch, states, steps)
    shapes = cube, cube, (channels, states), row, row, (channels,), cube, (batch, channels, states)
    given = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    given[2] = -given[2].abs()
    return [tensor.to(dtype).requires_grad_() for tensor in given]


def plain(x, delta, a, b, c, d, z, state):
    """The recurrence in the type of a, for autograd to differentiate."""
    return reference.forward(x, delta, a, b, c, d, z, state, False)[:2]


def results(function, given, seed=1):
    """y, the last state and all gradients of both."""
    y, last = function(*given)
    torch.manual_seed(seed)
    grads = torch.randn(y.shape, dtype=torch.float64), torch.randn(last.shape, dtype=torch.float64)
    grads = [grad.to(out.dtype) for grad, out in zip(grads, (y, last), strict=True)]
    return [y, last, *torch.autograd.grad((y, last), given, grads)]


def close(found, wanted, tolerance):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=tolerance, atol=tolerance * max(1, float(b.detach().abs().max()))
        )


def wide(given):
    return [tensor.detach().double().requires_grad_() for tensor in given]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_the_reference_are_those_of_autograd(shape):
    given = draw(*shape, dtype=torch.float64)
    close(results(selective_scan, given), results(plain, given), 1e-12)
    assert dispatch.last_backend("selective_scan.backward") == "reference"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_native_path_is_the_reference(shape, compiler):
    given = draw(*shape)
    found = results(selective_scan, given)
    assert dispatch.last_backend("selective_scan") == dispatch.last_backend("selective_scan.backward") == "native"
    close(found, results(plain, wide(given)), 2e-6)


def test_one_channel_and_state_by_hand():
    """Steps of log 2 with softplus, a = -1: half of the state is left."""
    delta = torch.zeros(1, 1, 3, dtype=torch.float64)
    x, one = torch.tensor([[[1.0, 2.0, 4.0]]]).double(), torch.ones(1, 1, 3).double()
    z = torch.full_like(x, 50.0)  # the gate is open: silu(z) = z
    y, last = selective_scan(x, delta, -torch.ones(1, 1), one, one, torch.zeros(1), z, torch.full((1, 1, 1), 8.0))
    log2 = torch.tensor(2.0).double().log()
    h = [4 + log2, 2 + log2 / 2 + 2 * log2, 1 + log2 / 4 + log2 + 4 * log2]
    torch.testing.assert_close(y[0, 0], 50 * torch.stack(h))
    torch.testing.assert_close(last[0, 0, 0], h[-1])


def test_gradcheck():
    assert torch.autograd.gradcheck(selective_scan, draw(2, 2, 2, 4, torch.float64))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("parts", [[1, 1, 1], [64, 64, 2], [63, 66, 1], [130]])
def test_parts_of_a_sequence_give_the_whole(path, parts):
    given = draw(2, 19, 4, sum(parts))
    *steps, state = given
    outs, at = [], 0
    for part in parts:
        cut = [
            tensor if name in "ad" else tensor[..., at : at + part] for name, tensor in zip(NAMES, steps, strict=False)
        ]
        y, state = selective_scan(*cut, state, backend=path)
        outs.append(y)
        at += part
    whole = results(partial(selective_scan, backend=path), given)
    close(results(lambda *_: (torch.cat(outs, -1), state), given), whole, 3e-6)


def test_no_state_is_a_state_of_zeros():
    *given, state = draw()
    for found, wanted in zip(selective_scan(*given), selective_scan(*given, torch.zeros_like(state)), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("path", PATHS)
def test_layouts_change_nothing_and_are_kept(path):
    given = draw(3, 21, 4, 70)
    plainly = results(partial(selective_scan, backend=path), given)

    def channels_last(tensor):
        return tensor.detach().transpose(1, 2).contiguous().transpose(1, 2)

    def apart(tensor):
        return torch.stack([tensor.detach()] * 2, -1)[..., 0]

    for layout in (channels_last, apart):
        laid = [layout(tensor).requires_grad_() if tensor.ndim == 3 else tensor for tensor in given]
        found = results(partial(selective_scan, backend=path), laid)
        if path == "native":
            assert all(torch.equal(a, b) for a, b in zip(found, plainly, strict=True))
        close(found, plainly, 1e-6)
    laid = [channels_last(tensor) if tensor.ndim == 3 else tensor for tensor in given]
    assert selective_scan(*laid, backend=path)[0].stride() == laid[0].stride()
    halves = torch.randn(2, 21, 140).chunk(2, 2)  # as a projection gives them: slices of rows
    laid[0], laid[1], laid[6] = halves[0], halves[1], halves[0]
    laid[3:5], laid[7] = [tensor[:2] for tensor in laid[3:5]], laid[7][:2]
    whole = [tensor.contiguous() for tensor in laid]
    close(selective_scan(*laid, backend=path), selective_scan(*whole, backend=path), 1e-6)


def test_threads_change_no_bit(monkeypatch, compiler):
    given = draw(2, 200, 5, 70)
    alone = results(selective_scan, given)
    shared, share = [], threads.share
    monkeypatch.setattr(native, "WORTH", 1)
    monkeypatch.setattr(threads, "share", lambda items, *rest: (shared.append(items), share(items, *rest)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(results(selective_scan, given), alone, strict=True))
    finally:
        torch.set_num_threads(before)
    assert len(shared) == (2 if threads._controls() else 0)
    assert all(torch.equal(a, b) for a, b in zip(results(selective_scan, given), alone, strict=True))


def test_what_is_kept_for_the_backward_does_not_hold_the_states():
    given = draw(2, 32, 16, 256)
    kept = saved_bytes(lambda: selective_scan(*given), exclude=given)
    wanted = 4 * torch.Size(kept_shape(given[0], given[2])).numel()
    assert kept == wanted == 4 * 2 * 32 * 16 * 4  # a 64th of (B, I, N, L)
    assert dispatch.last_backend("selective_scan") in PATHS


def test_nothing_is_kept_where_no_gradient_is_wanted():
    given = [tensor.detach() for tensor in draw()]
    assert torch.ops.workbench.selective_scan(*given, "reference", False)[2].shape == (0,)
    with torch.no_grad():
        assert not selective_scan(*draw())[0].requires_grad


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 3, 2, 0), (2, 0, 2, 5), (2, 3, 2, 1)], ids=str)
def test_edges(path, shape):
    given = draw(*shape)
    y, last, *grads = results(partial(selective_scan, backend=path), given)
    assert y.shape == given[0].shape and [g.shape for g in grads] == [t.shape for t in given]
    if shape[3] == 0:  # the state goes on as it is, in memory of its own
        assert torch.equal(last, given[7]) and last.data_ptr() != given[7].data_ptr()


@pytest.mark.parametrize("path", PATHS)
def test_one_output_alone_has_gradients(path):
    given = draw()
    y, last = selective_scan(*given, backend=path)
    close(
        torch.autograd.grad(y.sum(), given, retain_graph=True),
        torch.autograd.grad(plain(*given)[0].sum(), given),
        1e-5,
    )
    found = torch.autograd.grad(last.sum(), given, allow_unused=True)
    assert not any(found[NAMES.index(name)].any() for name in ("c", "d", "z"))


@pytest.mark.parametrize("path", PATHS)
def test_extreme_values(path):
    """Steps that are nothing or very long, gates that are shut: as the recurrence in float64, and no NaN."""
    given = [tensor.detach() for tensor in draw(1, 16, 2, 6)]
    given[1][..., 0], given[1][..., 1], given[1][..., 2] = -200.0, 300.0, -20.0
    given[6][..., 3], given[6][..., 4] = -200.0, 200.0
    given = [tensor.requires_grad_() for tensor in given]
    close(results(partial(selective_scan, backend=path), given), results(plain, wide(given)), 2e-6)
    small = torch.full((1, 1, 1), -60.0)  # softplus to relative precision, where 1 + exp(x) is 1
    zero, one = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    state = selective_scan(one, small, zero[0], one, one, zero[0, 0], one, backend=path)[1]
    torch.testing.assert_close(state, small.exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_a_number_stays_in_its_channel_and_later(path):
    given = [tensor.detach() for tensor in draw(2, 20, 3, 70)]
    clean, _ = selective_scan(*given, backend=path)
    given[0][1, 4, 66] = torch.nan
    y, last = selective_scan(*given, backend=path)
    assert y[1, 4, 66:].isnan().all() and last[1, 4].isnan().all()
    y[1, 4, 66:] = clean[1, 4, 66:]
    assert torch.equal(y, clean)
    delta = given[1].clone()
    delta[0, 0, 0] = torch.nan
    assert selective_scan(clean, delta, *given[2:], backend=path)[0][0, 0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_its_states_in_float32(dtype):
    x, delta, a, b, c, d, z, state = (tensor.detach() for tensor in draw(steps=70))
    half = [tensor.to(dtype) for tensor in (x, delta, b, c, z)]
    y, last = selective_scan(half[0], half[1], a, half[2], half[3], d, half[4], state)
    assert y.dtype == dtype and last.dtype == torch.float32
    exact = [tensor.float() for tensor in half]
    wanted = selective_scan(exact[0], exact[1], a, exact[2], exact[3], d, exact[4], state)
    assert torch.equal(
        y, selective_scan(exact[0], exact[1], a, *exact[2:4], d, exact[4], state, backend="reference")[0].to(dtype)
    )
    torch.testing.assert_close(last, wanted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_registration_and_compilation(path):
    given = draw(2, 18, 3, 5)
    for tensors in (given, [t.detach().mT.contiguous().mT.requires_grad_() if t.ndim == 3 else t for t in given]):
        torch.library.opcheck(torch.ops.workbench.selective_scan.default, (*tensors, path, True))
    y, last, kept = torch.ops.workbench.selective_scan(*given, path, True)
    given_back = [tensor.detach() for tensor in (torch.ones_like(y), last, *given[:-1], kept)]
    torch.library.opcheck(torch.ops.workbench.selective_scan_backward.default, (*given_back, path))
    compiled = torch.compile(partial(selective_scan, backend=path), fullgraph=True, backend="aot_eager")
    assert all(
        torch.equal(a, b)
        for a, b in zip(results(compiled, given), results(partial(selective_scan, backend=path), given), strict=True)
    )


@pytest.mark.parametrize("grad", [True, False])
def test_under_vmap_it_is_each_for_itself(grad, compiler):
    given = [tensor.detach() for tensor in draw()]
    with torch.set_grad_enabled(grad):
        xs = torch.stack([given[0], 2 * given[0]])
        found = torch.func.vmap(lambda x: selective_scan(x, *given[1:])[0])(xs)
        assert torch.equal(found, torch.stack([selective_scan(x, *given[1:])[0] for x in xs]))


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_mode_derivative_is_refused_and_not_zero(name):
    given = {key: tensor.detach() for key, tensor in zip(NAMES, draw(), strict=True)}
    with pytest.raises(InputError, match=f"{name} has a forward-mode tangent but selective_scan has"):
        torch.func.jvp(
            lambda tensor: selective_scan(**given | {name: tensor})[0], (given[name],), (torch.ones_like(given[name]),)
        )


def test_wrong_input_is_named(compiler):
    given = dict(zip(NAMES, (tensor.detach() for tensor in draw()), strict=True))

    def call(backend=None, **others):
        return lambda: selective_scan(*(given | others).values(), backend=backend)

    raw = torch.ops.workbench
    kept, outs = torch.zeros(2, 1, 3, 5), (given["x"], given["state"])
    tensors = [given[name] for name in NAMES[:-1]]
    for wrong, message in [
        (call(x=torch.zeros(2, 5)), r"x is torch.float32 of shape \(2, 5\) but must be \(batch, channels, steps\)"),
        (call(x=torch.zeros(2, 5, 20).long()), "x is torch.int64"),
        (call(delta=torch.zeros(2, 5, 19)), r"delta has shape \(2, 5, 19\) but must be \(2, 5, 20\)"),
        (call(z=torch.zeros(2, 20, 5)), "z has shape"),
        (call(a=torch.zeros(4, 3)), r"a has shape \(4, 3\) but must be \(5, states\)"),
        (call(a=torch.zeros(5, 0)), "one state at least"),
        (call(b=torch.zeros(2, 4, 20)), r"b has shape \(2, 4, 20\) but must be \(2, 3, 20\)"),
        (call(c=torch.zeros(2, 20, 3)), "c has shape"),
        (call(d=torch.zeros(6)), "d has shape"),
        (call(state=torch.zeros(1, 5, 3)), r"state has shape \(1, 5, 3\) but must be \(2, 5, 3\)"),
        (call(b=given["b"].double()), "b is torch.float64 but must be torch.float32, as x is"),
        (call(a=torch.zeros(5, 3).long()), "a is torch.int64"),
        (call(d=given["d"].to("meta")), "d is on meta but must be where x is"),
        (call("cuda"), "backend of selective_scan 'cuda' is unknown"),
        (call("native", **{k: v.double() for k, v in given.items()}), "they must be torch.float32"),
        (lambda: raw.selective_scan(*tensors, given["state"][:1], "native", True), "state has shape"),
        (lambda: raw.selective_scan(*tensors, given["state"].double(), "native", True), "state is torch.float64"),
        (lambda: raw.selective_scan_backward(*outs, *tensors, kept[:1], "native"), "kept is .* must be .*2, 1, 3, 5"),
        (lambda: raw.selective_scan_backward(outs[0][:1], outs[1], *tensors, kept, "native"), "grad is"),
        (lambda: raw.selective_scan_backward(outs[0], outs[1][:1], *tensors, kept, "native"), "grad_last has shape"),
    ]:
        with pytest.raises(InputError, match=message):
            wrong()
