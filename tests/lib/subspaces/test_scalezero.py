"""ScaleZero: a gate that learns or not, stages that change no output and train what they say, and their controller."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.attention import Attention
from workbench.lib.core.components import layer_components
from workbench.lib.core.models import Block
from workbench.lib.core.observe import observing
from workbench.lib.core.routing import Context
from workbench.lib.measures.conflict import cosine_matrix
from workbench.lib.measures.gradients import task_gradients
from workbench.lib.subspaces.scalezero import (
    DPSController,
    Gate,
    SharedRoutedMoE,
    StagedLoRALinear,
    StageEvent,
    add_stages,
    enter_stage,
)

D, E = 8, 8
X = torch.randn(30, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mixture(**options) -> SharedRoutedMoE:
    torch.manual_seed(0)
    layer = SharedRoutedMoE(D, **{"n_experts": E, "d_hidden": 12} | options).double()
    nn.init.normal_(layer.router.projection.weight, std=1.0)
    return layer


# -- the mixture


def test_one_expert_alone_is_the_plain_feed_forward():
    layer = mixture(n_experts=1, n_shared=0)
    w1, w3 = layer.experts[0].gate_up.weight.chunk(2)
    expected = (F.silu(X @ w1.T) * (X @ w3.T)) @ layer.experts[0].down.weight.T
    torch.testing.assert_close(layer(X), expected)


def test_all_experts_with_the_full_softmax_are_the_dense_mixture():
    layer = mixture(top_k=E)
    weights = torch.softmax(X @ layer.router.projection.weight.T, -1)
    dense = sum(weights[:, e, None] * layer.experts[e](X) for e in range(E))
    torch.testing.assert_close(layer(X), dense + layer.shared(X))


@pytest.mark.parametrize("gate_norm", ["full", "selected"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_token_passes_its_top_experts_by_their_weights(gate_norm, top_k):
    layer = mixture(top_k=top_k, gate_norm=gate_norm)
    logits = X @ layer.router.projection.weight.T
    rows = []
    for x, row in zip(X, logits, strict=True):
        chosen = row.topk(top_k).indices
        weights = torch.softmax(row, 0)[chosen] if gate_norm == "full" else torch.softmax(row[chosen], 0)
        rows.append(sum(w * layer.experts[int(e)](x) for w, e in zip(weights, chosen, strict=True)))
    torch.testing.assert_close(layer(X), torch.stack(rows) + layer.shared(X))


@pytest.mark.parametrize(
    ("gate_norm", "top_k", "learns"),
    [("selected", 1, False), ("full", 1, True), ("selected", 2, True), ("full", 2, True)],
)
def test_the_released_gate_of_one_expert_has_no_gradient_at_all(gate_norm, top_k, learns):
    layer = mixture(top_k=top_k, gate_norm=gate_norm)
    layer(X).square().sum().backward()
    gradient = layer.router.projection.weight.grad
    assert bool(gradient.any()) == learns  # not a small one: none
    if not learns:
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_gate_may_be_told_the_task():
    layer = mixture(n_tasks=3)
    tasks = torch.arange(30) % 3
    with observing([layer], lambda routing, _: routing.indices[:, 0]) as seen:
        layer(X, Context(domain=tasks))
        layer(X, Context(domain=(tasks + 1) % 3))
    assert not torch.equal(*seen[layer])
    for wrong in (None, tasks[:5], tasks + 1):
        with pytest.raises(InputError, match="must hold a task from 0 to 2 for each of 30 tokens"):
            layer(X, Context(domain=wrong))


def test_tasks_on_disjoint_experts_have_no_overlap_there_and_the_shared_one_is_as_it_was():
    layer = mixture()
    with torch.no_grad():
        layer.router.projection.weight.zero_()
        layer.router.projection.weight[0, 0], layer.router.projection.weight[1, 0] = 9.0, -9.0
    rows = {"left": X[X[:, 0] > 0], "right": X[X[:, 0] < 0]}
    losses = {name: lambda x=x: (layer(x) - x).square().mean() for name, x in rows.items()}
    groups = layer_components("ffn", layer, D)
    cosine = {name: cosine_matrix(g @ g.T) for name, g in task_gradients(losses, groups).items()}
    assert all(cosine[f"ffn.experts.{e}"][0, 1].isnan() for e in range(E))
    assert cosine["ffn.experts.0"][0, 0] == 1 and cosine["ffn.experts.1"][1, 1] == 1
    parameters = list(layer.shared.parameters())
    a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(loss(), parameters)]) for loss in losses.values())
    torch.testing.assert_close(cosine["ffn.shared"][0, 1], F.cosine_similarity(a, b, dim=0))


# -- stages


def staged(**options) -> StagedLoRALinear:
    torch.manual_seed(0)
    return StagedLoRALinear(nn.Linear(D, 6), **{"rank": 3, "alpha": 1.5, "n_adapters": 3} | options).double()


def shaken(layer: nn.Module) -> nn.Module:
    """What is trained now, moved."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, dtype=parameter.dtype)
    return layer


def test_a_switch_changes_no_output():
    layer = staged()
    for stage in (1, 2, 3):
        before = layer(X)
        layer.set_stage(stage)
        assert float((layer(X) - before).detach().abs().max()) < 1e-6
        shaken(layer)
        assert float((layer(X) - before).detach().abs().max()) > 1e-3


def test_the_effective_weight_is_what_is_written_and_reproduces_the_forward():
    layer = staged()
    for stage in range(4):
        layer.set_stage(stage)
        shaken(layer)
        scales = [1 + 0.2 * math.tanh(v.item()) for v in layer.logits]
        expected = scales[0] * layer.linear.weight
        for j in range(1, stage + 1):
            update = layer.b[j - 1] @ layer.a[j - 1]
            expected = expected + scales[j] * 0.5 * update
            assert torch.linalg.matrix_rank(update) <= 3
        torch.testing.assert_close(layer.effective_weight(), expected)
        torch.testing.assert_close(layer(X), X @ expected.T + layer.linear.bias)
        assert bool(((layer.scales() > 0.8) & (layer.scales() < 1.2)).all())
        assert layer.form_now()["stage"] == stage


def test_dropout_is_of_the_adapters_input_and_in_training_alone():
    layer = staged(dropout=0.5)
    layer.set_stage(1)
    shaken(layer)
    layer.eval()
    torch.testing.assert_close(layer(X), F.linear(X, layer.effective_weight(), layer.linear.bias))
    layer.train()
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        drawn.append(layer(X))
    assert not torch.equal(*drawn)
    torch.manual_seed(0)
    dropped = layer.dropout(X)
    scales = layer.scales()
    expected = F.linear(X, scales[0] * layer.linear.weight, layer.linear.bias)
    torch.testing.assert_close(drawn[0], expected + scales[1] * 0.5 * dropped @ layer.a[0].T @ layer.b[0].T)


TABLE = {
    0: {"linear.weight", "linear.bias"},
    1: {"a.0", "b.0", "logits.0"},
    2: {"a.1", "b.1", "logits.0", "logits.1"},
    3: {"a.2", "b.2", "logits.0", "logits.1", "logits.2"},
}


class Own(nn.Linear):
    """A linear layer that may do more than one does."""


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Linear(D, D)
        self.block = Block(D, SharedRoutedMoE(D, 2, d_hidden=6), Attention(D, 2, causal=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.embedding(x), Context())


def test_each_stage_trains_its_row_of_the_table_and_nothing_else_moves_or_decays():
    model = nn.ModuleDict({"trunk": Trunk(), "head": nn.Linear(D, D)})
    names = add_stages(model["trunk"], ["*.attention.*", "*.experts.*"], rank=2, alpha=2.0, n_adapters=3)
    assert len(names) == 2 + 2 * 2
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    trunk, x = model["trunk"], X.float()[None]
    for stage in range(4):
        enter_stage(trunk, stage)
        trained = {name for name, p in trunk.named_parameters() if p.requires_grad}
        expected = {f"{name}.{part}" for name in names for part in TABLE[stage]}
        expected -= {name for name in expected if name.endswith(".bias")}  # these layers have none
        others = {n for n, _ in trunk.named_parameters() if not any(n.startswith(f"{name}.") for name in names)}
        assert trained == (expected | others if stage == 0 else expected)
        before = copy.deepcopy(model.state_dict())
        for _ in range(10):
            optimizer.zero_grad()
            model["head"](trunk(x)).square().mean().backward()
            optimizer.step()
        after = model.state_dict()
        moved = {n.removeprefix("trunk.") for n in after if not torch.equal(before[n], after[n])}
        moved.discard("head.weight"), moved.discard("head.bias")  # of no transformer, and trained all the time
        assert moved <= trained, stage
        if stage:  # a gradient reaches every adapter that is now trained
            assert {n for n in trained if ".b." in n and ".attention." in n} <= moved


def test_stale_gradients_go_when_a_stage_begins():
    layer = staged()
    layer(X).sum().backward()
    assert layer.linear.weight.grad is not None
    layer.set_stage(1)
    assert layer.linear.weight.grad is None and layer.linear.bias.grad is None


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: staged(rank=7), "rank is 7"),
        (lambda: staged(n_adapters=0), "n_adapters is 0"),
        (lambda: staged(scale_range=1.0), "scale_range 1.0"),
        (lambda: staged().set_stage(4), "stage is 4 but must be between 0 and 3"),
        (lambda: StagedLoRALinear(Own(2, 2), 1, 1.0, 1), "is a Own but must be an nn.Linear"),
        (lambda: add_stages(Trunk(), "*.atention.*", 2, 2.0, 1), "no linear layer of the model has a name"),
        (lambda: enter_stage(Trunk(), 1), "Trunk without a StagedLoRALinear"),
        (lambda: mixture(gate_norm="selcted"), "did you mean 'selected'"),
        (lambda: mixture(n_shared=-1), "n_shared are 12 and -1"),
        (lambda: Gate(D, E, 1, n_tasks=-1), "n_tasks is -1"),
        (lambda: mixture(top_k=E + 1), "top_k is 9"),
    ],
)
def test_bad_options_are_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()


# -- the controller


def play(returns_by_step: dict[int, list[float]], **options) -> DPSController:
    controller = DPSController(**{"n_tasks": 6, "n_stages": 4, "min_stage0": 10, "max_stage": 1000} | options)
    for step, returns in returns_by_step.items():
        controller.update(returns, [1.0] * controller.n_tasks, step)
    return controller


def solving(n: int, of: int = 6) -> list[float]:
    return [1.0] * n + [0.0] * (of - n)


@pytest.mark.parametrize("unsolved", range(1, 8))
@pytest.mark.parametrize("adapters", [1, 2, 3])
def test_a_switch_takes_exactly_its_share_of_what_is_unsolved(unsolved, adapters):
    share = max(1, math.ceil(unsolved / adapters))
    controller = DPSController(unsolved, adapters + 1, 0, 1000)
    assert controller.quota == share
    if share > 1:
        assert controller.update(solving(share - 1, unsolved), [1.0] * unsolved, 1) is None
    event = controller.update(solving(share, unsolved), [1.0] * unsolved, 2)
    if share == unsolved:  # nobody is left for whom a stage could begin
        assert event is None and not controller.active_tasks
    else:
        assert event == StageEvent(1, 2, tuple(range(share)), "solved")


def test_no_stage_is_skipped_and_the_first_lasts():
    controller = play({5: solving(5)})
    assert controller.stage == 0 and controller.active_tasks == [5]
    controller.update(solving(5), [1.0] * 6, 10)
    assert controller.stage == 1 and [event.stage for event in controller.events] == [1]
    late = play({step: solving(0) for step in (5, 10, 40, 70, 100, 130)}, max_stage=30, min_stage0=60)
    assert [(e.stage, e.step, e.why) for e in late.events] == [(1, 70, "time"), (2, 100, "time"), (3, 130, "time")]
    assert late.quota is None and late.update(solving(3), [1.0] * 6, 900) is None  # the last one has no end


def test_solved_tasks_never_return():
    controller = play({10: solving(2), 20: solving(0), 30: solving(0)})
    assert controller.active_tasks == [2, 3, 4, 5] and controller.solved_at == {0: 10, 1: 10}
    assert controller.stage == 1 and controller.quota == 2
    nan = [math.nan] * 2 + [1.0] * 2 + [0.0] * 2  # what is over is not looked at
    assert controller.update(nan, [1.0] * 6, 40).solved == (2, 3)
    assert controller.stage == 2 and controller.quota == 2
    assert controller.update(solving(5), [1.0] * 6, 50) is None
    assert controller.update(solving(6), [1.0] * 6, 5000) is None  # nobody is left
    assert controller.stage == 2 and controller.active_tasks == []


def test_a_log_plays_again():
    generator = torch.Generator().manual_seed(0)
    log = {step: torch.rand(6, generator=generator).mul(1.2).tolist() for step in range(0, 300, 7)}
    one, two = (play(log, max_stage=60) for _ in range(2))
    assert one.events == two.events and one.solved_at == two.solved_at and len(one.events) > 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda c: c.update([0.0] * 5, [1.0] * 6, 1), "have 5 and 6 values, not 6"),
        (lambda c: c.update([math.nan] * 6, [1.0] * 6, 1), "task 0 is not a number"),
        (lambda c: (c.update([0.0] * 6, [1.0] * 6, 4), c.update([0.0] * 6, [1.0] * 6, 3)), "step is 3"),
        (lambda c: DPSController(0, 2, 0, 1), "n_tasks is 0"),
        (lambda c: DPSController(1, 0, 0, 1), "n_stages is 0"),
        (lambda c: DPSController(1, 1, 0, 0), "max_stage is 0"),
    ],
)
def test_what_a_controller_refuses(call, said):
    with pytest.raises(InputError, match=said):
        call(play({}))


def test_a_state_dict_of_a_later_stage_says_what_trains():
    there, here = (StagedLoRALinear(nn.Linear(6, 4), 2, 2.0, 3) for _ in range(2))
    there.set_stage(2)
    here.load_state_dict(there.state_dict())
    trained = [name for name, p in here.named_parameters() if p.requires_grad]
    assert (
        trained
        == [name for name, p in there.named_parameters() if p.requires_grad]
        == ["a.1", "b.1", "logits.0", "logits.1"]
    )
    frozen = copy.deepcopy(there).requires_grad_(False)  # as an average of weights is
    frozen.load_state_dict(there.state_dict())
    assert not any(p.requires_grad for p in frozen.parameters())


def test_a_layer_in_two_places_is_replaced_in_both_and_once():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"first": shared, "second": shared})
    assert add_stages(model, "*", 2, 2.0, 1) == ["first"]
    assert model["first"] is model["second"] and model["first"].linear is shared
    with pytest.raises(InputError, match="no linear layer of the model has a name that matches"):
        add_stages(model, "*", 2, 2.0, 1)
    with pytest.raises(InputError, match="no linear layer"):
        add_stages(shared, "*", 2, 2.0, 1)  # it cannot be replaced in itself
