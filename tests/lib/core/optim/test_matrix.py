"""What an optimiser of matrices does with every kind of parameter and gradient, and what its state dict holds."""

import copy

import pytest
import torch
from torch import nn

from tests.draws import draw
from workbench.errors import InputError
from workbench.lib.core import checkpoint
from workbench.lib.core.optim import GaLoreAdamW, MatrixOptimizer, matrix_shape, parameter_groups


class Sign(MatrixOptimizer):
    """The plainest one: the sign of the summed gradient; it keeps what it was given."""

    def __init__(self, params, lr=0.1, weight_decay=0.0):
        super().__init__(params, lr, weight_decay, (0.9, 0.999), 1e-8)
        self.seen = []

    def fresh(self, shape, group, **where):
        return {"sum": torch.zeros(shape, **where), "count": torch.zeros((), dtype=torch.int32)}

    def direction(self, grad, state, group):
        self.seen.append(tuple(grad.shape))
        state["sum"] += grad
        state["count"] += 1
        return state["sum"].sign()


def given(*shape, seed=0, **options):
    p = nn.Parameter(draw(*shape, seed=seed, **options))
    p.grad = draw(*shape, seed=seed + 1, **options)
    return p


@pytest.mark.parametrize(
    ("shape", "options", "seen"),
    [
        ((5, 3), {}, (5, 3)),
        ((4, 5, 3), {}, (4, 5, 3)),
        ((4, 5, 3), {"stacked": False}, (4, 15)),
        ((4, 5, 3, 2), {}, (4, 30)),
        ((4, 5, 3, 2, 2), {}, (4, 60)),
        ((5,), {}, None),
        ((), {}, None),
        ((5, 3), {"matrix": False}, None),
        ((5, 3), {"max_side": 4}, None),
        ((5, 4), {"max_side": 5}, (5, 4)),
        ((0, 3), {}, None),
    ],
)
def test_what_is_a_matrix(shape, options, seen):
    p = given(*shape)
    optimizer = Sign([{"params": [p]} | options])
    before, direction = p.detach().clone(), p.grad.sign()
    optimizer.step()
    assert optimizer.seen == ([] if seen is None else [seen])
    assert matrix_shape(p, optimizer.param_groups[0]) == (None if seen is None else torch.Size(seen))
    if seen is not None:
        assert torch.equal(p.detach(), before - 0.1 * direction)


def test_all_else_has_the_step_of_torchs_adamw_to_the_bit():
    ours, theirs = ([given(7), given(5, 3)] for _ in range(2))
    optimizer = Sign([{"params": ours, "matrix": False}], weight_decay=0.3)
    peer = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.3)
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad, b.grad = (draw(*a.shape, seed=step) for _ in range(2))
        optimizer.step()
        peer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["exp_avg_sq"], peer.state[b]["exp_avg_sq"])


def test_decay_is_decoupled_and_reads_its_group_at_each_step():
    p = given(5, 3)
    optimizer, before, sign = Sign([p], weight_decay=0.5), p.detach().clone(), p.grad.sign()
    optimizer.param_groups[0]["lr"] = 0.2
    optimizer.step()
    assert torch.allclose(p, (1 - 0.2 * 0.5) * before - 0.2 * sign, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_a_gradient_that_is_not_finite_changes_nothing_at_all(value, where):
    params = [given(5, 3), given(4)]
    optimizer = Sign(params)
    optimizer.step()
    params[where].grad.view(-1)[1] = value
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    with pytest.raises(FloatingPointError, match=r"gradients of 1 of 2 parameters .* shape \((5, 3|4,)\): no step"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    for i, entries in state["state"].items():
        for key, value in entries.items():
            assert torch.equal(optimizer.state_dict()["state"][i][key], value), (i, key)


def test_a_gradient_that_is_huge_is_finite():
    p = given(5, 3)
    p.grad.fill_(3e38)  # its norm is not
    before = p.detach().clone()
    Sign([p]).step()
    assert torch.equal(p.detach(), before - 0.1)


def test_none_and_zero_gradients():
    idle, still = given(5, 3), given(5, 3)
    idle.grad, still.grad = None, torch.zeros(5, 3)
    optimizer, before = GaLoreAdamW([idle, still], rank=2), still.detach().clone()
    optimizer.step()
    assert not optimizer.state[idle] and torch.equal(still, before)
    assert all(t.isfinite().all() for t in optimizer.state[still].values())
    still.grad = draw(5, 3)
    optimizer.step()
    assert still.isfinite().all() and not torch.equal(still, before)


def test_a_closure_computes_the_gradients_once_and_its_loss_comes_back():
    p, calls = nn.Parameter(draw(5, 3)), []
    optimizer = Sign([p])

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == calls[0] and len(calls) == 1


def test_half_precision_keeps_its_state_in_float32():
    p = given(5, 3, dtype=torch.bfloat16)
    optimizer = Sign([p])
    optimizer.step()
    assert p.dtype == torch.bfloat16 and optimizer.state[p]["sum"].dtype == torch.float32
    again = Sign([given(5, 3, dtype=torch.bfloat16)])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (state,) = again.state.values()
    assert torch.equal(state["sum"], optimizer.state[p]["sum"]) and state["sum"].dtype == torch.float32
    assert state["count"].dtype == torch.int32  # torch's own loading makes both of the parameter's type


def test_a_state_of_another_shape_is_refused_before_anything_changes():
    source, target = Sign([given(5, 3), given(4)]), Sign([given(5, 4), given(4)])
    source.step()
    target.step()
    before = copy.deepcopy(target.state_dict()["state"])
    with pytest.raises(InputError, match=r"parameter 0, of shape \(5, 4\), count \(\), step \(\), sum \(5, 3\) but it"):
        target.load_state_dict(source.state_dict())
    assert all(torch.equal(target.state_dict()["state"][i][k], v) for i, e in before.items() for k, v in e.items())
    with pytest.raises(InputError, match=r"parameter 1, .* exp_avg \(4,\)"):
        Sign([given(5, 3), given(6)]).load_state_dict(source.state_dict())
    with pytest.raises(InputError, match="without 'rank', so it is of another optimiser"):
        GaLoreAdamW([given(5, 3), given(4)], rank=2).load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match="parameter group"):  # torch's own words
        Sign([given(5, 3)]).load_state_dict(source.state_dict())


def test_a_checkpoint_holds_all_of_it(tmp_path):
    def trained(steps, folder=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
        optimizer = GaLoreAdamW(model.parameters(), rank=2, projector="dct", update_gap=2, remap=True)
        if folder is not None:
            checkpoint.load(folder, model, optimizer)
        for step in steps:
            for i, p in enumerate(model.parameters()):
                p.grad = draw(*p.shape, seed=10 * step + i)
            optimizer.step()
        return model, optimizer

    whole, _ = trained(range(6))
    checkpoint.save(tmp_path, 3, *trained(range(3)))
    rest, _ = trained(range(3, 6), tmp_path)
    assert checkpoint.weights_digest(whole) == checkpoint.weights_digest(rest)


def test_groups_of_a_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.line, self.plane = nn.Embedding(9, 6), nn.Conv1d(2, 3, 4), nn.Conv2d(2, 3, 2)
            self.bank, self.head = nn.Parameter(torch.zeros(2, 3, 4)), nn.Linear(6, 9)
            self.position = nn.Parameter(torch.zeros(5, 6))
            self.frozen = nn.Linear(2, 2).requires_grad_(False)
            self.tied = nn.Linear(6, 9, bias=False)
            self.tied.weight = self.embedding.weight

    model = Model()
    groups = parameter_groups(model, 0.1, heads=["head", "position"])
    shapes = [[tuple(p.shape) for p in group.pop("params")] for group in groups]
    assert shapes == [[(2, 3, 4), (3, 2, 2, 2)], [(3, 2, 4)], [(5, 6), (9, 6)], [(9, 6), (3,), (3,), (9,)]]
    assert groups == [
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "stacked": False},
        {"weight_decay": 0.1, "matrix": False},
        {"weight_decay": 0.0, "matrix": False},
    ]
    optimizer = GaLoreAdamW(parameter_groups(model, heads=["head"]), rank=2)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 9
    with pytest.raises(InputError, match=r"heads has \['haed'\]"):
        parameter_groups(model, heads=["haed"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": -1.0}, "lr is -1.0 but must be finite"),
        ({"lr": torch.nan}, "lr is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"rank": 4}, r"rank is 4 but must be from 1 to 3, the smaller side of a matrix \(5, 3\)"),
        ({"rank": 0}, "rank is 0"),
        ({"update_gap": 0}, "update_gap is 0"),
        ({"projector": "svdd"}, "projector 'svdd' is unknown; did you mean 'svd'"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(InputError, match=said):
        GaLoreAdamW([given(5, 3)], **({"rank": 2} | options))
    optimizer = GaLoreAdamW([given(5, 3)], rank=2)
    with pytest.raises(InputError, match=said):
        optimizer.add_param_group({"params": [given(5, 3)]} | options)
    assert len(optimizer.param_groups) == 1


def test_wrong_gradients_are_named():
    p = nn.Parameter(draw(5, 3))
    p.grad = draw(5, 3).to_sparse()
    with pytest.raises(InputError, match="sparse or complex"):
        Sign([p]).step()
    with pytest.raises(InputError, match="but matrices must be real numbers"):
        Sign([nn.Parameter(torch.zeros(5, 3, dtype=torch.complex64))])


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (30, 4, 2, 2)])
def test_a_convolution_with_its_channels_last_makes_the_same_step(shape):
    plain, last = given(*shape), given(*shape)
    last.data, last.grad = (t.to(memory_format=torch.channels_last) for t in (last.data, last.grad))
    for p in (plain, last):
        optimizer = GaLoreAdamW([p], rank=3)
        optimizer.step()
        optimizer.step()
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last.detach(), plain.detach().clone())


def test_a_state_dict_of_another_optimiser_or_of_options_that_do_not_fit_changes_nothing():
    p = given(5, 4)
    optimizer = GaLoreAdamW([p], rank=3)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(InputError, match="without 'matrix', so it is of another optimiser"):
        optimizer.load_state_dict(torch.optim.AdamW([p]).state_dict())
    with pytest.raises(InputError, match="rank is 5 but must be from 1 to 4"):  # nothing was made yet: no shapes to see
        optimizer.load_state_dict(GaLoreAdamW([given(6, 6)], rank=5).state_dict())
    assert optimizer.state_dict() == before
    optimizer.step()
