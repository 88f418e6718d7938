"""Gradients task by task: autograd's and torchjd's, at parameters, slices and places; what is no overlap stays so."""

import pytest
import torch
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.components import layer_components, trained
from workbench.lib.core.experts import GLU, GLUExperts
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routing import Context, Routing
from workbench.lib.measures.conflict import conflict_stats, cosine_matrix, gramians
from workbench.lib.measures.gradients import Place, size, task_gradients
from workbench.lib.measures.meters import ConflictMeter

D, E, TASKS = 6, 4, 3


class ByDomain(nn.Module):
    """Sends every token to the expert of its domain; has something to train that weighs it."""

    def __init__(self):
        super().__init__()
        self.n_experts, self.top_k, self.coefficients = E, 1, {}
        self.weight = nn.Parameter(torch.ones(E))

    def forward(self, x: Tensor, context: Context) -> Routing:
        return Routing.fixed(context.domain[:, None], self.weight[context.domain][:, None], E)


class Model(nn.Module):
    """An encoder, a mixture with a shared expert, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(5, D)
        self.ffn = MoELayer(ByDomain(), GLUExperts(E, D, 8), GLU(D, 8))
        self.head = nn.Linear(D, 2)
        self.double()

    def forward(self, x: Tensor, domain: int) -> Tensor:
        context = Context(domain=torch.full((len(x),), domain))
        h = self.encoder(x)
        return self.head(h + self.ffn(torch.tanh(h), context))


def losses_of(model: Model, domains=range(TASKS)):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TASKS, 12, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(TASKS, 12, 2, generator=generator, dtype=torch.float64)
    return {
        f"task{i}": lambda i=i, domain=domain: (model(x[i], domain) - y[i]).square().mean()
        for i, domain in enumerate(domains)
    }


def groups_of(model: Model):
    return {
        "encoder": trained(model.encoder),
        "encoded": [Place(model.encoder, D, output=True)],
        **layer_components("ffn", model.ffn, D),
    }


def cosines(rows: Tensor) -> Tensor:
    return cosine_matrix(rows @ rows.T)


def test_the_sum_of_task_gradients_is_the_gradient_of_the_summed_loss():
    model = Model()
    losses, groups = losses_of(model, (0, 0, 1)), groups_of(model)
    separate = task_gradients(losses, groups)
    together = task_gradients({"all": lambda: sum(loss() for loss in losses.values())}, groups)
    for name, rows in separate.items():
        assert rows.shape == (TASKS, size(groups[name])), name
        torch.testing.assert_close(rows.sum(0), together[name][0], msg=name)
    assert all(p.grad is None for p in model.parameters())


def test_a_component_has_the_gradients_that_autograd_gives():
    model = Model()
    loss = losses_of(model)["task1"]
    rows = task_gradients({"one": loss}, groups_of(model))
    model.zero_grad()
    loss().backward()
    experts = torch.cat([model.ffn.experts.gate_up.grad[1].flatten(), model.ffn.experts.down.grad[1].flatten()])
    torch.testing.assert_close(rows["ffn.experts.1"][0], experts)
    torch.testing.assert_close(rows["encoder"][0], torch.cat([p.grad.flatten() for p in model.encoder.parameters()]))
    torch.testing.assert_close(rows["ffn"][0], torch.cat([p.grad.flatten() for p in model.ffn.parameters()]))
    # adding a vector to what the encoder gives is adding it to its bias
    torch.testing.assert_close(rows["encoded"][0], model.encoder.bias.grad)


def test_a_place_is_the_sum_over_tokens_and_leaves_the_values_and_no_hook():
    model, seen = Model(), []
    loss = losses_of(model)["task0"]
    before = loss()
    with model.ffn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])):
        loss()
    hidden = seen[0].detach().requires_grad_()
    with model.ffn.register_forward_pre_hook(lambda module, inputs: (hidden, *inputs[1:])):
        expected = torch.autograd.grad(loss(), hidden)[0].sum(0)
    values = []
    rows = task_gradients({"one": lambda: values.append(loss()) or values[0]}, groups_of(model))
    torch.testing.assert_close(rows["ffn.input"][0], expected)
    assert torch.equal(values[0], before) and torch.equal(loss(), before)
    assert not model.ffn._forward_pre_hooks and not model.encoder._forward_hooks


def test_disjoint_experts_have_no_overlap_and_that_is_not_zero():
    model = Model()
    rows = task_gradients(losses_of(model), groups_of(model))
    off = ~torch.eye(TASKS, dtype=torch.bool)
    for expert in range(E):
        found = cosines(rows[f"ffn.experts.{expert}"])
        assert found[off].isnan().all(), expert
        assert found.diagonal().isnan().tolist() == [task != expert for task in range(TASKS)]
    for name in ("encoder", "encoded", "ffn.input", "ffn.shared"):
        assert not cosines(rows[name]).isnan().any(), name
    same = task_gradients(losses_of(model, (2, 2, 2)), groups_of(model))
    assert not cosines(same["ffn.experts.2"]).isnan().any()
    stats = ConflictMeter(groups_of(model)).measure({k: lambda half, v=v: v() for k, v in losses_of(model).items()})
    assert stats["ffn.experts.0"].n_pairs == 0 and stats["ffn.shared"].n_pairs == 3
    assert stats["ffn.input"].band == D**-0.5


def test_what_is_frozen_later_has_no_gradient():
    model = Model()
    groups = groups_of(model)
    model.encoder.requires_grad_(False)
    rows = task_gradients(losses_of(model), groups)
    assert not rows["encoder"].any() and cosines(rows["encoder"]).isnan().all()
    assert rows["encoded"].any() and rows["ffn.shared"].any()


def test_a_task_and_its_negation():
    model = Model()
    loss = losses_of(model)["task0"]
    rows = task_gradients({"a": loss, "copy": lambda: 2 * loss(), "not a": lambda: -loss()}, groups_of(model))
    for name in ("encoder", "ffn.input", "ffn.shared", "ffn.experts.0", "ffn.router"):
        assert cosines(rows[name])[0].tolist() == pytest.approx([1, 1, -1]), name


def test_components_of_a_dense_layer_and_without_what_a_task_has_alone():
    model = Model()
    assert set(layer_components("ffn", GLU(D, 8), D)) == {"ffn", "ffn.input"}
    shared = trained(model, [model.head])
    assert len(shared) == len(list(model.parameters())) - 2
    model.ffn.router.weight.requires_grad_(False)
    assert "ffn.router" not in layer_components("ffn", model.ffn, D)


def test_what_is_no_group_or_no_width_is_refused():
    model = Model()
    with pytest.raises(InputError, match="at least one parameter"):
        task_gradients(losses_of(model), {"nothing": []})
    with pytest.raises(InputError, match=r"width of a place is 5 but its hidden states have shape \(12, 6\)"):
        task_gradients(losses_of(model), {"input": [Place(model.ffn, 5)]})
    with pytest.raises(InputError, match="of a bank of 4 experts has shape"):
        layer_components("ffn", MoELayer(ByDomain(), _Bank(), None), D)


class _Bank(nn.Linear):
    n_experts = E

    def __init__(self):
        super().__init__(D, D)


def test_torchjd_agrees_on_gradients_gramians_and_on_what_is_a_conflict():
    pytest.importorskip("torchjd")
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import jac

    model = Model()
    groups = {name: group for name, group in groups_of(model).items() if name in ("encoder", "ffn.shared")}
    conflicts = []
    for scale in (1.0, -1.0):
        losses = losses_of(model, (0, 0, 0))
        losses["task2"] = losses["task0"]
        losses["task1"] = lambda loss=losses["task0"], scale=scale: scale * loss()
        rows = task_gradients(losses, groups)
        for name, group in groups.items():
            found = jac([loss() for loss in losses.values()], group, parallel_chunk_size=1)
            theirs = torch.cat([part.flatten(1) for part in found], 1)
            torch.testing.assert_close(rows[name], theirs)
            stats = conflict_stats(gramians([[row] for row in theirs], [[row] for row in theirs]))
            torch.testing.assert_close(stats.cosine, cosines(rows[name]))
            edited = not torch.allclose(PCGrad()(theirs), theirs.sum(0))  # it edits iff some pair conflicts
            assert edited == bool(stats.max_neg > 0)
            conflicts.append(edited)
    assert set(conflicts) == {True, False}
