"""D2MoE's routers of bits: what they choose, what they cost, how they learn and that nothing else does."""

import pytest
import torch
from torch import nn

from tests.draws import draw
from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.simulation.hardware import Hardware
from workbench.lib.core.simulation.traces import zipf_markov
from workbench.lib.core.simulation.workload import Workload
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import TrainConfig
from workbench.lib.serving import d2moe
from workbench.lib.serving.d2moe import (
    BitBudget,
    BitRouter,
    Distilled,
    NestedQuantizer,
    bits_wanted,
    budget_of,
    by_rank,
    dual_routed,
    mean_bits,
    nested_banks,
    requests,
    set_price,
    train_bit_router,
)

WIDTH, EXPERTS = 16, 4


def model_of(top_k: int = 2) -> DecoderLM:
    torch.manual_seed(0)

    def ffn(_: int) -> nn.Module:
        return MoELayer(LinearRouter(WIDTH, EXPERTS, top_k, coefficients={"lbl": 0.01}), GLUExperts(EXPERTS, WIDTH, 8))

    return DecoderLM(256, WIDTH, 2, 2, ffn, 12).eval()


@pytest.fixture(scope="module")
def model() -> DecoderLM:
    return model_of()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(256, (6, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def banks(model, tokens) -> dict:
    return nested_banks(model, tokens, NestedQuantizer(group=16))


@pytest.fixture(scope="module")
def task() -> LanguageModelling:
    return LanguageModelling(data.load("text-domains", domains=("python",), cap=16_384), 12)


@torch.no_grad()
def statically(model: DecoderLM, banks: dict, level: int) -> DecoderLM:
    """The model with the weights of one level in the place of its own."""
    made = model_of()
    made.load_state_dict(model.state_dict())
    for name, layer in moe_layers(made).items():
        layer.experts.gate_up.copy_(banks[name].gate_up.dequant(level))
        layer.experts.down.copy_(banks[name].down.dequant(level))
    return made


@pytest.mark.parametrize("level", [2, 4, 8])
def test_one_width_is_the_model_of_that_width_bit_for_bit(model, banks, tokens, level):
    exact = statically(model, banks, level)(tokens)
    assert torch.equal(dual_routed(model, banks, (level,))(tokens), exact)
    several = dual_routed(model, banks, (2, 4, 8)).eval()
    with requests(several, least=level, extra=0.0 if level == 8 else 1e3):  # all must, or all may not afford more
        assert torch.equal(several(tokens), exact)
        assert mean_bits(several, tokens) == level


def test_a_mixture_of_widths_is_the_sum_of_its_pairs(model, banks):
    student, (name, layer) = dual_routed(model, banks, (2, 4)).eval(), next(iter(moe_layers(model).items()))
    experts = moe_layers(student)[name].experts
    nn.init.normal_(experts.router.head.weight, generator=torch.Generator().manual_seed(3))
    x = draw(9, WIDTH)
    with torch.no_grad():
        routing = layer.router(x)
        y = experts(x, routing)
    assert set(experts.bits.flatten().tolist()) == {2.0, 4.0}
    for token in range(9):
        total = 0
        for slot in range(2):
            expert, level = int(routing.indices[token, slot]), int(experts.bits[token, slot])
            gate_up, down = (part[expert].dequant(level) for part in (banks[name].gate_up, banks[name].down))
            gate, up = (gate_up @ x[token]).chunk(2)
            total = total + routing.weights[token, slot] * (down @ (nn.functional.silu(gate) * up))
        assert torch.allclose(y[token], total, atol=1e-5)


def test_what_was_not_chosen_has_a_gradient_too():
    torch.manual_seed(0)
    router = BitRouter(5, 2, (2, 4, 8)).train()
    x, gates = draw(30, 5), torch.rand(30, 2)
    share = router(x, gates)
    assert torch.equal(share.sum(-1).round(), torch.ones(30, 2)) and set(share.detach().round().unique().tolist()) == {
        0,
        1,
    }
    (share * torch.tensor([1.0, 0.0, 0.0])).sum().backward()
    assert (router.head.bias.grad != 0).all()
    router.eval()
    share = router(x, gates)
    assert torch.equal(share, router(x, gates)) and torch.equal(share[..., 0], torch.ones(30, 2))  # exactly
    router.head.bias.grad = None
    (share * torch.tensor([1.0, 0.0, 0.0])).sum().backward()
    assert (router.head.bias.grad != 0).all()


def test_the_price_and_the_classes_of_requests_move_the_choice():
    router = BitRouter(3, 1, (2, 3, 4), BitBudget(3.0)).eval()
    x, gates = torch.zeros(4, 3), torch.ones(4, 1)
    with torch.no_grad():
        router.head.bias.copy_(torch.tensor([0.0, 0.5, 0.8]))

    def bits() -> list[int]:
        return (router(x, gates) @ torch.tensor([2.0, 3.0, 4.0])).flatten().int().tolist()

    assert bits() == [4] * 4
    router.budget.price.fill_(0.4)
    assert bits() == [3] * 4
    with requests(router, extra=torch.tensor([0.0, 0.2, -0.2, 0.0]), least=torch.tensor([0, 0, 0, 4])):
        assert bits() == [3, 2, 4, 4]
    assert bits() == [3] * 4
    with requests(router, least=9):  # nothing is as good
        assert bits() == [4] * 4


def test_the_multiplier_follows_the_target():
    budget = BitBudget(3.0, multiplier=0.5, rate=0.1)
    budget.count(torch.tensor([[4.0, 4.0]]))
    budget.count(torch.tensor([[3.0, 3.0]]))
    budget.after_step()
    assert float(budget.multiplier) == pytest.approx(0.5 * torch.exp(torch.tensor(0.05)).item())
    budget.after_step()  # nothing was counted since
    assert float(budget.multiplier) == pytest.approx(0.5 * torch.exp(torch.tensor(0.05)).item())


def test_training_changes_the_routers_of_bits_alone_and_lowers_the_divergence(model, banks, task):
    student = dual_routed(model, banks, (2, 4), target=4.0)  # which are not short of bits
    before = {name: value.clone() for name, value in student.state_dict().items()}

    def divergence() -> float:
        batch = task.batch("train", 16, torch.Generator().manual_seed(5))
        with torch.no_grad():
            return float(Distilled(task, model).loss(student.eval(), batch)[0])

    first = divergence()
    state = train_bit_router(student, model, task, TrainConfig(30, 8, lr=0.1, warmup=2, eval_batches=1))
    assert state.metrics["bits_per_byte"] > 0
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert all(".experts.router." in name for name in changed) and any(name.endswith("head.bias") for name in changed)
    assert divergence() < 0.8 * first
    assert all(p.grad is None for p in model.parameters())


def test_the_loss_is_the_divergence_from_the_teacher_and_the_price_of_bits(model, banks, task):
    whole, batch = dual_routed(model, banks, (2, 8)), task.batch("train", 4, torch.Generator().manual_seed(0))
    teacher = statically(model, banks, 8)
    with requests(whole, least=8):
        loss, context = Distilled(task, teacher).loss(whole.train(), batch)
        assert float(loss) == pytest.approx(0, abs=1e-6)
        assert float(context.aux.detach()) == pytest.approx(float(budget_of(whole).multiplier) * 8 / 8)
        loss, context = Distilled(task, teacher).loss(whole.eval(), batch)
        assert float(loss) == pytest.approx(0, abs=1e-6) and context.aux == 0.0
    exact, other = teacher(batch.inputs).log_softmax(-1), model(batch.inputs).log_softmax(-1)
    with requests(whole, least=8):
        loss, _ = Distilled(task, model).loss(whole.eval(), batch)
    assert float(loss) == pytest.approx(float((other.exp() * (other - exact)).sum(-1).mean()), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(("target", "low"), [(3.0, 2.8), (2.0, 2.0), (4.0, 3.9)])
def test_the_price_is_where_the_bits_come_to_the_target_from_below(model, banks, tokens, target, low):
    student = dual_routed(model, banks, (2, 3, 4), target=target)
    for module in student.modules():
        if isinstance(module, BitRouter):
            nn.init.normal_(module.head.weight, generator=torch.Generator().manual_seed(2))
    found = set_price(student, tokens)
    assert low <= found <= target and mean_bits(student, tokens) == found


def test_what_requests_want_is_what_the_model_routes(model, banks, tokens):
    student = dual_routed(model, banks, (2, 4))
    trace = bits_wanted(student, tokens, "here")
    assert len(trace.steps) == tokens.shape[1] and trace.requests == len(tokens)
    assert all(sum(job.tokens for job in layer) == 2 * len(tokens) for step in trace.steps for layer in step)
    assert {job.expert[0] for job in trace.jobs()} == {0, 1}


def test_students_are_saved_and_loaded(model, banks, tokens):
    one, other = (dual_routed(model, banks, (2, 4), target=3.0).eval() for _ in range(2))
    nn.init.normal_(next(m for m in one.modules() if isinstance(m, BitRouter)).head.bias)
    budget_of(one).price.fill_(0.25)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(tokens), other(tokens)) and float(budget_of(other).price) == 0.25


def test_bits_by_rank():
    trace = zipf_markov(0, prompts=2, prompt=1, generated=2, layers=1, experts=4, top_k=3)
    made = by_rank(trace, (2, 4))
    assert "no router" not in made.source and made.source.endswith("bits by rank")
    first = trace.chosen()[:, 0, 0]
    wanted = {job.expert[1]: job.bits for job in made.steps[0][0]}
    assert all(wanted[int(expert)] == 4 for expert in first[:, 0])
    assert set(wanted.values()) <= {2, 4}


def test_simulating_a_machine_says_what_it_was_calibrated_by():
    machine = Hardware.from_dict(
        {
            "name": "here",
            "basis": "specified",
            "source": "a test",
            "device": {"flops": 1e12, "memory_bytes": 1e9, "memory_bandwidth": 1e11},
            "disk": {"bandwidth": 1e9, "latency_seconds": 1e-4},
        }
    )
    trace = zipf_markov(0, prompts=3, prompt=2, generated=4, layers=2, experts=4, top_k=2)
    found = d2moe.simulate(machine, Workload(trace, expert_bytes=2e6, budget_bytes=6e6))
    assert found.basis == "simulated, calibrated by here (specified)" and found.rows[0]["policy"] == "hebf"
    rows = {row["policy"]: row for row in found.rows}
    assert set(rows) == {"hebf", "fifo", "whole", "johnson", "progressive"}
    assert all(row["peak_bytes"] <= 6e6 for row in found.rows) and rows["whole"]["bits_used"] == 8
    assert rows["hebf"]["tokens_per_second"] > rows["whole"]["tokens_per_second"]
    faster = Hardware.from_dict(machine.to_dict() | {"disk": {"bandwidth": 1e10, "latency_seconds": 1e-5}})
    again = d2moe.simulate(faster, Workload(trace, 2e6, 6e6)).rows[0]
    assert again["tokens_per_second"] > rows["hebf"]["tokens_per_second"]
    alone = zipf_markov(0, prompts=1, prompt=0, generated=2, layers=2, experts=4, top_k=1)  # one token a layer
    assert {row["bits_used"] for row in d2moe.simulate(machine, Workload(alone, 2e6, 6e6)).rows} == {4, 8, 2}
    linked = {key: value for key, value in machine.to_dict().items() if key != "disk"}
    with pytest.raises(InputError, match="must have link"):
        d2moe.simulate(Hardware.from_dict(linked), Workload(trace, 2e6, 6e6))
    linked["link"] = machine.to_dict()["disk"]
    assert d2moe.simulate(Hardware.from_dict(linked), Workload(trace, 2e6, 6e6)).rows == found.rows


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BitRouter(4, 2, (4, 2)), r"widths is \(4, 2\) but must be one or more rising"),
        (lambda: BitRouter(4, 2, ()), r"widths is \(\)"),
        (lambda: BitRouter(4, 2, (2,), temperature=0.0), "temperature is 0.0"),
        (lambda: BitBudget(0.0), "target, multiplier and rate are 0.0"),
        (lambda: nested_banks(nn.Linear(2, 2), torch.zeros(1, 1).long(), NestedQuantizer()), "model has no MoE layer"),
        (lambda: budget_of(nn.Linear(2, 2)), "model has no router of bits"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_widths_and_targets_that_there_are_not(model, banks):
    with pytest.raises(InputError, match="level is 1 but must be from 2 to 8"):
        dual_routed(model, banks, (1, 4))
    with pytest.raises(InputError, match="target is 5 but must be from 2 to 4 bits"):
        dual_routed(model, banks, (2, 4), target=5)
