"""Muon++: the size of every update, the bound on the weights, torch's Muon as an oracle, features at every width."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from tests.draws import draw
from workbench.errors import InputError
from workbench.kernels.newton_schulz import CEILING
from workbench.lib.core.optim import parameter_groups
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.low_rank.muon_pp import (
    SCALES,
    MuonPP,
    SpectralMonitor,
    coord_check,
    norm_bound,
    orthogonalised,
    polar,
    spectral_init_,
)
from workbench.lib.measures.operators import power_iteration

SHAPES = [(12, 12), (6, 20), (20, 6), (1, 9), (9, 1), (3, 5, 8)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def given(*shape, seed=0, dtype=torch.float32):
    return nn.Parameter(draw(*shape, seed=seed, dtype=dtype))


def rms_norm(w):
    """|W|_R of each matrix, exactly."""
    return torch.linalg.matrix_norm(w, 2) * (w.shape[-1] / w.shape[-2]) ** 0.5


def stepped(p, grads, **options):
    """The weights before and after every step."""
    optimizer, found = MuonPP([p], **options), [p.detach().clone()]
    for grad in grads:
        p.grad = grad
        optimizer.step()
        found.append(p.detach().clone())
    return found


# -- the update


@shapes
def test_every_update_has_the_spectral_size_whatever_the_gradient(shape):
    for seed, scale in enumerate((1e-12, 1.0, 1e12)):
        low_rank = draw(*shape[:-1], 1, seed=seed) @ draw(*shape[:-2], 1, shape[-1], seed=seed + 9)
        grads = [scale * draw(*shape, seed=seed), scale * low_rank, -scale * draw(*shape, seed=seed + 3)]
        for precision, slack in (("full", 0.0), ("bfloat16", 0.02)):
            weights = stepped(nn.Parameter(torch.zeros(shape)), grads, lr=0.25, precision=precision)
            for before, after in pairwise(weights):
                norm = rms_norm(after - before) / 0.25
                assert (norm >= 0.68 - slack).all() and (norm <= CEILING + slack).all()


@shapes
@pytest.mark.parametrize(
    "options", [{"exact_norm": True}, {"exact_norm": True, "precision": "full"}, {"ns_steps": None}]
)
def test_exact_norms(shape, options):
    weights = stepped(nn.Parameter(torch.zeros(shape)), [draw(*shape, seed=s) for s in range(3)], lr=0.25, **options)
    for before, after in pairwise(weights):
        assert torch.allclose(rms_norm(after - before) / 0.25, torch.ones(shape[:-2]), atol=1e-3)


@shapes
def test_the_polar_factor_is_the_steepest_descent_under_the_spectral_norm(shape):
    """<G, dW> is the nuclear norm of G, the most that a matrix of spectral norm 1 can have."""
    grad = draw(*shape, dtype=torch.float64)
    (before, after) = stepped(
        given(*shape, dtype=torch.float64), [grad], lr=0.5, momentum=0.0, ns_steps=None, scale="none"
    )
    step = (before - after) / 0.5
    assert torch.allclose((grad * step).sum((-2, -1)), torch.linalg.matrix_norm(grad, "nuc"), atol=1e-9)
    assert torch.allclose(torch.linalg.matrix_norm(step, 2), torch.ones(shape[:-2], dtype=torch.float64))
    other = orthogonalised(draw(*shape, dtype=torch.float64, seed=1))
    other = other / torch.linalg.matrix_norm(other, 2, keepdim=True)
    assert ((grad * other).sum((-2, -1)) < (grad * step).sum((-2, -1))).all()


def test_the_polar_factor_of_what_lacks_rank():
    thin = draw(6, 2, dtype=torch.float64) @ draw(2, 9, dtype=torch.float64)
    values = torch.linalg.svdvals(polar(thin))
    assert torch.allclose(values, torch.tensor([1, 1, 0, 0, 0, 0], dtype=torch.float64), atol=1e-9)
    assert torch.equal(polar(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_momentum_and_its_look_ahead():
    grads, mu, shape = [draw(5, 7, seed=s, dtype=torch.float64) for s in range(4)], 0.9, (5, 7)
    for nesterov in (True, False):
        weights = stepped(
            nn.Parameter(torch.zeros(shape, dtype=torch.float64)), grads, lr=0.1, momentum=mu, nesterov=nesterov,
            precision="full",
        )  # fmt: skip
        m, w = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        for grad, found in zip(grads, weights[1:], strict=True):
            m = mu * m + grad
            w = w - 0.1 * (5 / 7) ** 0.5 * orthogonalised(grad + mu * m if nesterov else m)
            assert torch.allclose(found, w, atol=1e-12)
    plain = MuonPP([given(5, 7)], momentum=0.0)
    plain.param_groups[0]["params"][0].grad = draw(5, 7)
    plain.step()
    assert plain.state_bytes() == 0


@pytest.mark.parametrize(("scale", "adjust"), [("jordan", "original"), ("rms", "match_rms_adamw")])
@pytest.mark.parametrize("shape", [(24, 24), (10, 40), (40, 10)], ids=str)
@pytest.mark.parametrize("nesterov", [True, False])
def test_torchs_muon_makes_the_same_steps(scale, adjust, shape, nesterov):
    """Up to the rounding of its products in bfloat16, with its convention of decay, which is ours."""
    ours, theirs = given(*shape), given(*shape)
    how = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.2, "nesterov": nesterov}
    optimizer, peer = MuonPP([ours], scale=scale, **how), torch.optim.Muon([theirs], adjust_lr_fn=adjust, **how)
    for step in range(5):
        ours.grad, theirs.grad = draw(*shape, seed=step + 1), draw(*shape, seed=step + 1)
        a, b = ours.detach().clone(), theirs.detach().clone()
        optimizer.step()
        peer.step()
        a, b = (w.detach() - (1 - 0.03 * 0.2) * before for w, before in ((ours, a), (theirs, b)))
        assert (a - b).norm() < 0.04 * b.norm()
    assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_the_scales():
    assert SCALES["spectral"](4, 9) == pytest.approx(2 / 3) and SCALES["spectral"](9, 4) == 1.5
    assert SCALES["jordan"](4, 9) == 1 and SCALES["jordan"](9, 4) == 1.5
    assert SCALES["rms"](4, 9) == SCALES["rms"](9, 4) == pytest.approx(0.6)
    for size in (3, 64):
        assert SCALES["spectral"](size, size) == SCALES["jordan"](size, size) == SCALES["none"](size, size) == 1
    same = [stepped(given(8, 8), [draw(8, 8)], scale=scale)[1] for scale in ("spectral", "jordan", "none")]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])


@shapes
def test_a_transposed_layer_is_trained_as_the_transposed_one(shape):
    """All but the scale, which is that of the other shape."""
    grads = [draw(*shape, seed=s, dtype=torch.float64) for s in range(3)]
    w, t = (given(*shape, dtype=torch.float64), nn.Parameter(draw(*shape, dtype=torch.float64).mT.contiguous()))
    how = {"scale": "none", "precision": "full"}
    ours, turned = stepped(w, grads, **how), stepped(t, [grad.mT.contiguous() for grad in grads], **how)
    assert torch.allclose(ours[-1], turned[-1].mT, atol=1e-12)


# -- the weights


@pytest.mark.parametrize("decay", [0.0, 0.5, 5.0])
def test_the_bound_holds_at_every_step_of_a_real_training(decay):
    class Problem(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(24, 32, bias=False), nn.Linear(32, 6, bias=False)])

        def forward(self, x):
            return self.layers[1](torch.relu(self.layers[0](x)))

    torch.manual_seed(0)
    model, x, y = Problem(), draw(64, 24), draw(64, 6, seed=1)
    for layer in model.layers:
        spectral_init_(layer.weight)
    optimizer = MuonPP(model.parameters(), weight_decay=decay, precision="full")
    rates = [0.1 * (1 - step / 60) for step in range(60)]
    bounds, losses = norm_bound(1.0, rates, decay), []
    for step, lr in enumerate(rates):
        optimizer.param_groups[0]["lr"] = lr
        before = [layer.weight.detach().clone() for layer in model.layers]
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for layer, old in zip(model.layers, before, strict=True):
            weight = layer.weight.detach()
            assert rms_norm(weight) <= bounds[step + 1] * (1 + 1e-5)
            update = rms_norm(weight - (1 - lr * decay) * old) / lr
            assert 0.68 - 1e-3 <= update <= CEILING + 1e-3
    assert decay > 1 or losses[-1] < 0.5 * losses[0]
    assert max(bounds) <= (1 + CEILING * sum(rates) if decay == 0 else max(1, CEILING / decay)) + 1e-9
    assert decay == 0 or CEILING / decay < 1.21 / decay


def test_the_bound_is_reached_where_all_gradients_are_alike():
    """One direction, of one singular value that the quintic takes to the same number at every step: bound and norm go
    together, so no smaller ceiling than that number would do."""
    grad = torch.zeros(4, 4)
    grad[0, 0] = 1.0
    reach = float(orthogonalised(grad)[0, 0])
    weights = stepped(nn.Parameter(torch.zeros(4, 4)), [grad] * 20, lr=0.1, weight_decay=0.5, precision="full")
    bound = norm_bound(0.0, [0.1] * 20, 0.5, ceiling=reach)
    assert [float(rms_norm(w)) for w in weights] == pytest.approx(bound, abs=1e-5)
    assert norm_bound(2.0, [0.1, 0.2], 1.0, 1.0) == pytest.approx([2.0, 1.9, 0.8 * 1.9 + 0.2])


@pytest.mark.parametrize("shape", [(7, 7), (5, 30), (30, 5), (4, 3, 3, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("kappa", [1.0, 0.3])
def test_a_spectral_start_has_its_norm_exactly(shape, kappa):
    weight = torch.empty(shape)
    assert spectral_init_(weight, kappa, torch.Generator().manual_seed(0)) is weight
    matrix = weight.flatten(1)
    assert float(rms_norm(matrix)) == pytest.approx(kappa, rel=1e-5)
    estimate = power_iteration(matrix, steps=300, generator=torch.Generator().manual_seed(1)).value
    assert float(estimate) * (matrix.shape[1] / matrix.shape[0]) ** 0.5 <= kappa * (1 + 1e-5)
    again = spectral_init_(torch.empty(shape), kappa, torch.Generator().manual_seed(0))
    assert torch.equal(weight, again)


def test_a_standard_start_has_another_norm_for_each_shape():
    for o, i in ((256, 256), (32, 512), (512, 32)):
        torch.manual_seed(0)
        norm = float(rms_norm(nn.Linear(i, o).weight.detach()))
        assert norm == pytest.approx((1 + (i / o) ** 0.5) / 3**0.5, rel=0.08)


# -- features


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        sizes = [4, width, width, 10]
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in pairwise(sizes))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


def coordinates(widths, scale="spectral", start=True):
    x, y = draw(64, 4), torch.randint(10, (64,), generator=torch.Generator().manual_seed(0))

    def make(width):
        torch.manual_seed(0)
        net = Net(width)
        for layer in net.layers if start else ():
            spectral_init_(layer.weight)
        return net, MuonPP(net.parameters(), lr=0.1, scale=scale, precision="full")

    return coord_check(make, lambda net: nn.functional.cross_entropy(net(x), y), widths)


def test_features_and_their_changes_are_as_large_at_every_width():
    found = coordinates((64, 128, 256, 512))
    hidden = ("layers.0", "layers.1")
    assert all(abs(found.slopes("size")[name]) < 0.1 for name in hidden)
    assert all(abs(found.slopes("change")[name]) < 0.1 for name in (*hidden, "layers.2"))
    grown = coordinates((64, 128, 256, 512), "rms").slopes()
    assert grown["layers.1"] > 0.35 and grown["layers.2"] > 0.6  # sqrt(w), and w for the readout
    assert coordinates((64, 128, 256, 512), "jordan").slopes()["layers.2"] > 0.35


def test_coordinates_are_what_they_are_said_to_be():
    found = coordinates((8, 16))
    torch.manual_seed(0)
    net = Net(8)
    for layer in net.layers:
        spectral_init_(layer.weight)
    assert found.size["layers.0"][0] == pytest.approx(float(net.layers[0](draw(64, 4)).detach().square().mean().sqrt()))
    assert found.widths == (8, 16) and len(found.change["layers.2"]) == 2
    for call, said in [
        (lambda: coordinates((8,)), r"widths are \(8,\) but must be at least two"),
        (lambda: coordinates((8, 4)), "ascending"),
        (lambda: coord_check(coordinates, coordinates, (8, 16), steps=0), "steps is 0"),
        (lambda: found.slopes("sise"), "what 'sise' is unknown; did you mean 'size'"),
    ]:
        with pytest.raises(InputError, match=said):
            call()


# -- adaptive


def adaptive(net, **options):
    optimizer = MuonPP(net.parameters(), lr=0.05, adaptive=True, precision="full", **options)
    return optimizer, optimizer.observe(net, rows=64)


def test_where_no_layer_is_wide_there_is_nothing_to_adapt():
    """X of an O x I matrix with O >= I has orthonormal columns: it makes every h as long as it was."""
    x = draw(32, 8)
    update = polar(draw(20, 8, seed=1)) * (20 / 8) ** 0.5
    assert float((x @ update.T).square().mean() / x.square().mean()) == pytest.approx(1, rel=1e-4)


def test_adaptive_steps_stretch_the_data_alike():
    """On fixed rows and gradients the step of each layer is (ref / stretch) times the plain one, clipped."""
    torch.manual_seed(0)
    net, plain = (nn.Sequential(nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)) for _ in range(2))
    plain.load_state_dict(net.state_dict())
    optimizer, handles = adaptive(net, momentum=0.0)
    peer = MuonPP(plain.parameters(), lr=0.05, momentum=0.0, precision="full")
    x = draw(128, 64)
    for step in range(3):
        for model, made in ((net, optimizer), (plain, peer)):
            if step < 2:
                model(x)
            for i, layer in enumerate(model):
                layer.weight.grad = draw(*layer.weight.shape, seed=i)
            old = [layer.weight.detach().clone() for layer in model]
            made.step()
            changes = [layer.weight.detach() - before for layer, before in zip(model, old, strict=True)]
            if model is net:
                ours = changes
        ratios = [float(a.norm() / b.norm()) for a, b in zip(ours, changes, strict=True)]
        if step == 0:
            assert ratios == pytest.approx([1, 1], rel=1e-5)
            first = [float(optimizer.state[p]["first_stretch"]) for p in net.parameters()]
            rows, weight = x[::2], ours[0] / 0.05
            assert first[0] == pytest.approx(
                float((rows @ weight.T).square().mean().sqrt() / rows.square().mean().sqrt()), rel=1e-4
            )
            assert first[0] < 0.5 < 0.7 < first[1]  # the wide one stretches a random vector by about 1/4
        else:
            kept = [float(optimizer.state[p]["stretch"]) for p in net.parameters()]
            wanted = [min(max(math.sqrt(first[0] * first[1]) / s, 1 / 3), 3) for s in kept]
            assert ratios == pytest.approx(wanted, rel=1e-3) and ratios[0] > 1 > ratios[1]
    for handle in handles:
        handle.remove()
    seen = dict(optimizer._seen)
    net(x + 1)
    assert all(torch.equal(optimizer._seen[p], rows) for p, rows in seen.items())


def test_adaptive_refuses_what_it_has_not_seen_and_changes_nothing():
    net = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False))
    optimizer = MuonPP(net.parameters(), adaptive=True)
    before = [p.detach().clone() for p in net.parameters()]
    net(draw(5, 6)).sum().backward()
    with pytest.raises(InputError, match=r"adaptive is on for a parameter \(4, 6\) but nothing was seen"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True)) and not optimizer.state
    with pytest.raises(InputError, match=r"bank of matrices \(2, 3, 4\)"):
        MuonPP([given(2, 3, 4)], adaptive=True)
    with pytest.raises(InputError, match="rows is 0"):
        optimizer.observe(net, rows=0)


def test_an_adaptive_run_goes_on_bit_for_bit():
    def fresh():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 12, bias=False), nn.Tanh(), nn.Linear(12, 3, bias=False))
        return net, adaptive(net)[0]

    def go(net, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            net(draw(9, 16, seed=step)).square().mean().backward()
            optimizer.step()

    whole, part, rest = fresh(), fresh(), fresh()
    go(*whole, range(6))
    go(*part, range(3))
    rest[0].load_state_dict(part[0].state_dict())
    rest[1].load_state_dict(copy.deepcopy(part[1].state_dict()))
    go(*rest, range(3, 6))
    for a, b in zip(whole[0].parameters(), rest[0].parameters(), strict=True):
        assert torch.equal(a, b)


# -- all else


def test_zero_gradients_and_odd_parameters():
    params = [
        given(5, 3),
        given(4),
        given(2, 3, 4, seed=2),
        given(2, 3, 2, 2, seed=3),
        given(4, 4, dtype=torch.bfloat16),
    ]
    optimizer, before = MuonPP(params), [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    for i, p in enumerate(params):
        p.grad = draw(*p.shape, seed=i, dtype=p.dtype)
    optimizer.step()
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert [set(optimizer.state[p]) for p in params[:2]] == [{"step", "momentum"}, {"step", "exp_avg", "exp_avg_sq"}]
    assert optimizer.state[params[4]]["momentum"].dtype == torch.float32
    image = params[3].detach() - before[3]
    assert 0.6 < float(rms_norm(image.flatten(1)) / 0.02) < 1.21  # a convolution is one matrix (O, I h w)


def test_groups_of_a_model_take_what_muon_is_not_for_out_of_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.middle, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)

    model = Model()
    optimizer = MuonPP(parameter_groups(model, 0.1, ["head"]))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    matrices = [name for name, p in model.named_parameters() if "momentum" in optimizer.state[p]]
    assert matrices == ["middle.weight"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"momentum": 1.0}, "momentum is 1.0 but must be at least 0 and below 1"),
        ({"ns_steps": 0}, "ns_steps is 0 but must be a whole number"),
        ({"scale": "spectrall"}, "scale 'spectrall' is unknown; did you mean 'spectral'"),
        ({"precision": "float16"}, "precision 'float16' is unknown"),
        ({"lr": -1.0}, "lr is -1.0"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(InputError, match=said):
        MuonPP([given(5, 3)], **options)
    for call, words in [
        (lambda: MuonPP([{"params": [given(5, 3)], "ns_steps": 2.0}]), "ns_steps is 2.0"),
        (lambda: spectral_init_(torch.empty(3, 3), 0.0), "kappa is 0.0"),
        (lambda: spectral_init_(torch.empty(3)), "must be a matrix or a convolution"),
        (lambda: SpectralMonitor(0), "every is 0"),
    ]:
        with pytest.raises(InputError, match=words):
            call()


def test_the_monitor_records_what_happened():
    from workbench.lib import data
    from workbench.lib.core.task import Classification

    class Digits(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(64, 20, bias=False), nn.Linear(20, 10, bias=False)

        def forward(self, x, context=None):
            return self.last(torch.relu(self.first(x.flatten(1))))

    torch.manual_seed(0)
    model, task, monitor = Digits(), Classification(data.load("digits")), SpectralMonitor(every=3)
    optimizer = MuonPP(model.parameters(), precision="full")
    train(model, task, TrainConfig(7, 16, lr=0.05, warmup=0, eval_every=None), [monitor], optimizer=optimizer)
    assert set(monitor.found) == {"first", "last"}
    for name, layer in (("first", model.first), ("last", model.last)):
        found = monitor.found[name]
        assert [one.step for one in found] == [0, 3, 6]
        assert found[-1].weight == pytest.approx(float(rms_norm(layer.weight.detach())), rel=1e-5)
        assert all(0.67 < one.update < 1.21 and 0 < one.alignment <= 1 + 1e-6 for one in found)
        assert all(1 <= one.stable_rank <= 20 for one in found)
    assert not model.first._forward_pre_hooks and not model.last._forward_pre_hooks


def test_a_copy_of_an_adaptive_optimiser_has_seen_nothing_and_says_so():
    layer = nn.Linear(6, 4, bias=False)
    optimizer = MuonPP(layer.parameters(), adaptive=True)
    optimizer.observe(layer)
    layer(draw(6)).sum().backward()  # one row, without a batch
    optimizer.step()
    twin, made = copy.deepcopy((layer, optimizer))
    twin.weight.grad = torch.ones(4, 6)
    with pytest.raises(InputError, match="nothing was seen that went into its layer"):
        made.step()
    made.observe(twin)
    twin(draw(3, 6))
    made.step()
