"""PR-MoE and its students: the residual layer, the sizes of pyramids, a gate in float32, and a teacher that leaves."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.budget import count_params
from workbench.lib.core.capacity import Capacity
from workbench.lib.core.experts import GLU, GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routing import Context
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import TrainConfig, steps, train
from workbench.lib.data.types import TextDomains
from workbench.lib.serving.deepspeed_moe import (
    PLACES,
    FloatGate,
    ResidualMoE,
    StagedDistillation,
    block_params,
    distillation_loss,
    every_other,
    feed_forward,
    pyramid_experts,
)

D, H, E = 16, 8, 6


def tokens(n: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def residual(n_experts: int = E, capacity: Capacity | None = PLACES, seed: int = 0) -> ResidualMoE:
    torch.manual_seed(seed)
    (layer,) = feed_forward([n_experts], D, H, capacity=capacity)
    return layer


# -- the residual layer


def test_it_is_the_experts_and_the_mlp_weighed_by_the_learned_coefficients():
    layer, x = residual(), tokens()
    layer.eval()
    routing = layer.router(x)
    routing.kept = PLACES.kept(routing, training=False)
    c = torch.softmax(x @ layer.coefficient.weight.T + layer.coefficient.bias, dim=-1)
    expected = c[:, :1] * layer.experts(x, routing.served()) + c[:, 1:] * layer.shared(x)
    torch.testing.assert_close(layer(x), expected)
    assert 0 < (~routing.kept).sum() < len(x)  # what finds no place has the MLP, weighed as ever
    lost = ~routing.kept
    torch.testing.assert_close(layer(x)[lost], (c[:, 1:] * layer.shared(x))[lost])


@pytest.mark.parametrize(("logits", "part"), [((-1e4, 1e4), "shared"), ((1e4, -1e4), "experts")])
def test_with_a_forced_coefficient_it_is_one_of_its_parts_to_the_bit(logits: tuple[float, float], part: str):
    layer, x = residual(capacity=None), tokens()
    with torch.no_grad():
        layer.coefficient.weight.zero_()
        layer.coefficient.bias.copy_(torch.tensor(logits))
    expected = layer.shared(x) if part == "shared" else layer.experts(x, layer.router(x))
    assert torch.equal(layer(x), expected)


def test_a_single_expert_without_a_limit_is_an_mlp_whose_gate_is_one():
    torch.manual_seed(0)
    (layer,) = feed_forward([1], D, H, residual=False, capacity=None)
    x, mlp = tokens(), GLU(D, H)
    with torch.no_grad():
        mlp.gate_up.weight.copy_(layer.experts.gate_up[0])
        mlp.down.weight.copy_(layer.experts.down[0])
    assert torch.equal(layer.router(x).weight, torch.ones(len(x)))
    torch.testing.assert_close(layer(x), mlp(x))


def test_coefficients_learn_and_so_does_every_part():
    layer = residual().train()
    layer(tokens(200)).square().mean().backward()
    assert layer.coefficient.weight.grad.any() and layer.coefficient.bias.grad.any()
    assert layer.shared.down.weight.grad.any() and layer.experts.down.grad.any()
    assert layer.router.projection.weight.grad.any()


def test_the_gate_is_in_float32_whatever_the_hidden_states_are():
    torch.manual_seed(0)
    gate, x = FloatGate(D, E, 1), tokens(500).bfloat16()
    with torch.no_grad():
        gate.projection.weight.copy_(gate.projection.weight.bfloat16())
    routing = gate.bfloat16()(x)
    wide = gate.float()(x.float())
    assert routing.logits.dtype == routing.weight.dtype == torch.float32
    assert torch.equal(routing.logits, wide.logits) and torch.equal(routing.expert, wide.expert)
    rounded = F.linear(x, gate.projection.weight.bfloat16())  # as it would be computed in their type
    assert not torch.equal(rounded.argmax(-1), routing.expert)
    assert FloatGate(D, E, 1).double()(x.double()).logits.dtype == torch.float64


def test_the_gate_sees_jitter_in_training_alone():
    gate, x = FloatGate(D, E, 1, jitter=0.1), tokens()
    torch.manual_seed(0)
    wanted = F.linear(x * torch.empty_like(x).uniform_(0.9, 1.1), gate.projection.weight)
    torch.manual_seed(0)
    assert torch.equal(gate(x).logits, wanted)
    assert torch.equal(gate.eval()(x).logits, F.linear(x, gate.projection.weight))


def test_the_loss_counts_what_was_chosen_before_anything_was_dropped():
    layer, x = residual(), tokens(100)
    layer.train()
    context = Context()
    layer(x, context)
    gates = torch.softmax(x @ layer.router.projection.weight.T, dim=-1)
    share = F.one_hot(gates.argmax(-1), E).float().mean(0)
    torch.testing.assert_close(context.aux, 0.01 * E * (gates.mean(0) * share).sum())


# -- pyramids and their size


def test_a_pyramid_has_more_in_its_last_layers():
    assert pyramid_experts(12, 32, 64, 2) == [32] * 10 + [64] * 2  # 350M + PR-MoE-32/64 of the paper
    assert pyramid_experts(3, 4, 8, 0) == [4, 4, 4] and pyramid_experts(2, 4, 8, 2) == [8, 8]
    assert every_other([4, 8]) == [0, 4, 0, 8]


@pytest.mark.parametrize(
    ("given", "said"),
    [((0, 4, 8, 0), "n_moe_layers, base, last are 0"), ((2, 0, 8, 1), "are 2, 0"), ((2, 4, 8, 3), "n_last is 3")],
)
def test_a_pyramid_that_is_none_is_refused(given: tuple[int, ...], said: str):
    with pytest.raises(InputError, match=said):
        pyramid_experts(*given)
    with pytest.raises(InputError, match=r"experts is \[2, -1\]"):
        feed_forward([2, -1], D, H)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("experts", [[], [0], [1], [16] * 4, [4, 4, 8, 16], [0, 4, 0, 4, 0, 4, 0, 8], [2, 2, 2, 6, 9]])
def test_the_formula_is_the_size(experts: list[int], residual: bool):
    blocks = feed_forward(experts, D, H, residual=residual)
    assert block_params(experts, D, H, residual) == count_params(nn.ModuleList(blocks))
    model = DecoderLM(32, D, len(blocks), 2, lambda layer: nn.Identity(), seq_len=8)
    rest = count_params(model)
    for block, made in zip(model.blocks, blocks, strict=True):
        block.ffn = made
    assert count_params(model) == rest + block_params(experts, D, H, residual)


def test_the_sizes_of_the_paper():
    """350M + MoE-128 and PR-MoE-32/64 have 13B and 4B parameters; 24 layers of width 1024, blocks of two matrices."""
    dense, block = 350e6, 2 * 1024 * 4096
    whole = dense + 12 * 127 * block
    pyramid = dense + sum(n * block for n in pyramid_experts(12, 32, 64, 2))
    assert whole / 1e9 == pytest.approx(13, abs=0.2) and pyramid / 1e9 == pytest.approx(4, abs=0.2)


# -- students


class Counted(nn.Module):
    """A model that counts its forward passes, and in which mode they were."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.calls = model, []

    def forward(self, x: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        self.calls.append((self.training, torch.is_grad_enabled()))
        return self.model(x, context)


def bytes_task() -> LanguageModelling:
    text = torch.arange(400, dtype=torch.uint8) % 31
    splits = {split: {"a": text} for split in ("train", "validation", "test")}
    return LanguageModelling(TextDomains("counting", ("a",), splits, {}), 8)


def decoder(experts: list[int], seed: int) -> DecoderLM:
    torch.manual_seed(seed)
    blocks = feed_forward(experts, D, H)
    return DecoderLM(256, D, len(blocks), 2, lambda layer: blocks[layer], seq_len=8)


def test_the_loss_of_a_teacher_is_that_of_the_formula_and_nothing_for_oneself():
    student, teacher = tokens(30, 2).view(3, 10, D), tokens(30, 3).view(3, 10, D)
    for tau in (1.0, 2.0):
        p, q = torch.softmax(teacher / tau, -1), torch.softmax(student / tau, -1)
        expected = tau**2 * (p * (p / q).log()).sum(-1).mean()
        torch.testing.assert_close(distillation_loss(student, teacher, tau), expected)
    assert distillation_loss(student, student.clone()).item() == 0
    with pytest.raises(InputError, match=r"teacher has logits \(3, 9, 16\) but must have \(3, 10, 16\)"):
        distillation_loss(student, teacher[:, 1:])


def test_after_its_stage_no_teacher_runs_any_more():
    task, teacher, student = bytes_task(), Counted(decoder(every_other([2, 4]), 1)), decoder([*every_other([4]), 0], 2)
    teacher.train()
    staged, calls = StagedDistillation(task, teacher, stop_step=2), []
    for state in steps(student, staged, TrainConfig(4, 4, eval_every=2), [staged]):
        calls.append((state.step, len(teacher.calls)))
    assert calls == [(1, 1), (2, 2), (3, 2), (4, 2)]  # evaluations among them
    assert teacher.calls == [(False, False)] * 2 and teacher.training and teacher.model.training
    assert all(p.grad is None for p in teacher.parameters())


def test_beside_the_task_the_teacher_adds_its_loss_to_the_auxiliary_ones_until_it_stops():
    task, teacher, student = bytes_task(), decoder(every_other([2, 4]), 1).eval(), decoder([*every_other([4]), 0], 2)
    batch = task.batch("train", 4, torch.Generator().manual_seed(0))
    staged = StagedDistillation(task, teacher, stop_step=3, beta=0.5, tau=2.0)
    with pytest.raises(InputError, match="step is None: a StagedDistillation is given to the training as its task and"):
        staged.loss(student, batch)

    def losses(task: LanguageModelling) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(4)  # of what the gate draws
        loss, context = task.loss(student, batch)
        return loss, context.aux

    plain, aux = losses(task)
    with torch.no_grad():
        torch.manual_seed(4)
        kl = distillation_loss(student(batch.inputs), teacher(batch.inputs), 2.0)
    for step in (0, 2):
        staged.step = step
        loss, more = losses(staged)
        assert torch.equal(loss, plain)
        torch.testing.assert_close(more, aux + 0.5 * kl)
    for step in (3, 4):
        staged.step = step
        loss, more = losses(staged)
        assert torch.equal(loss, plain) and torch.equal(more, aux)
    staged.step = 0
    assert staged.evaluate(student, "test") == task.evaluate(student, "test")


def test_a_student_resumes_with_the_teacher_where_it_was():
    """Steps are those of the training, not of the task: what goes on at step 3 has none any more."""
    task, teacher, student = bytes_task(), Counted(decoder(every_other([2, 4]), 1)), decoder([*every_other([4]), 0], 2)
    staged = StagedDistillation(task, teacher, stop_step=3)
    train(student, staged, TrainConfig(5, 4, eval_every=None), [staged], start=3)
    assert teacher.calls == []


@pytest.mark.parametrize(("options", "said"), [({"beta": 0.0}, "beta is 0"), ({"tau": -1.0}, "tau is -1")])
def test_weights_that_are_none_are_refused(options: dict[str, float], said: str):
    with pytest.raises(InputError, match=said):
        StagedDistillation(bytes_task(), decoder([0], 0), 3, **options)
    with pytest.raises(InputError, match="stop_step is -1"):
        StagedDistillation(bytes_task(), decoder([0], 0), -1)


def test_a_student_of_a_good_teacher_learns_faster():
    """Counting bytes: what a teacher that knows the rule says is worth more than the bytes alone."""
    task = bytes_task()
    teacher = decoder(every_other([2]), 1)
    train(teacher, task, TrainConfig(150, 8, lr=1e-2, eval_every=None))
    found = []
    for stop in (0, 15):
        student = decoder([0], 2)
        staged = StagedDistillation(task, teacher, stop, beta=4.0)
        train(student, staged, TrainConfig(15, 8, lr=1e-2, warmup=2, eval_every=None), [staged])
        found.append(task.evaluate(student, "test")["bits_per_byte"])
    assert math.isfinite(found[0]) and found[1] < found[0]


def test_a_layer_without_a_fixed_mlp_is_the_usual_one():
    (layer,) = feed_forward([4], D, H, residual=False, top_k=2)
    assert type(layer) is MoELayer and layer.shared is None and layer.top_k == 2
    assert isinstance(layer.experts, GLUExperts) and layer.capacity == PLACES == Capacity(1.0, "random", minimum=4)
