"""LoRA-Mixer: the two phases, LoRAs from elsewhere, and what each sign of the entropy term does."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from workbench.errors import InputError
from workbench.lib.core.adapt import adapt, load_adapter
from workbench.lib.core.adapt.peft import read_loras, write_peft
from workbench.lib.core.experts import GLU
from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.routing import Context
from workbench.lib.lora_experts.lora_mixer import (
    MixerRouter,
    from_loras,
    set_phase,
    specialization_balance_loss,
    to_loras,
)

WIDTH, EXPERTS = 8, 3
X = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def double():
    """Everything is made in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Attention(nn.Module):
    """Separate projections, as transformers has them."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.o_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, other=None):
        other = x if other is None else other
        scores = self.q_proj(x) @ self.k_proj(other).transpose(-1, -2)
        return self.o_proj(scores.softmax(-1) @ self.v_proj(other))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = Attention()

    def forward(self, x, other=None):
        return self.attention(x, other)


def lora(seed: int, rank: int = 2, names=("q_proj", "k_proj", "v_proj", "o_proj"), scale: float = 0.7):
    """The LoRAs of one task."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 2

    return {f"attention.{name}": (drawn(rank, WIDTH), drawn(WIDTH, rank), scale) for name in names}


def mixed(net: nn.Module | None = None, loras=None, **options):
    """An adapted model of three experts, with routers that say something."""
    net = net or Net()
    adapted = from_loras(net, loras or [lora(seed) for seed in range(EXPERTS)], **options)
    torch.manual_seed(7)
    for layer in adapted.layers.values():
        nn.init.normal_(layer.router.projection.weight)
    return net, adapted


def alone(part) -> nn.Module:
    """The net with one LoRA merged into its weights."""
    net = Net()
    with torch.no_grad():
        for name, (a, b, scale) in part.items():
            net.get_submodule(name).weight += scale * b @ a
    return net


def test_lora_mixer_hard_phase_is_the_lora_of_the_label_alone():
    net, adapted = mixed(freeze_experts=False, phase="hard")
    one, single = mixed(loras=[lora(1)], freeze_experts=False, phase="hard")
    with adapted.given(task=1), single.given(task=0):
        torch.testing.assert_close(net(X), alone(lora(1))(X), atol=1e-12, rtol=1e-12)
        net(X).square().sum().backward()
        one(X).square().sum().backward()
    for name, layer in adapted.layers.items():
        bank, reference = layer.experts, single.layers[name].experts
        torch.testing.assert_close(bank.a.grad[1], reference.a.grad[0], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(bank.b.grad[1], reference.b.grad[0], atol=1e-12, rtol=1e-12)
        assert not bank.a.grad[[0, 2]].any() and not bank.b.grad[[0, 2]].any()
        assert all(p.grad is None and not p.requires_grad for p in layer.router.parameters())
    assert adapted.losses() == {}


def test_lora_mixer_hard_phase_routes_each_row_by_its_own_label():
    net, adapted = mixed(phase="hard", freeze_experts=False)
    with adapted.given(task=[2, 0]):
        y = net(X)
    for row, task in enumerate((2, 0)):
        torch.testing.assert_close(y[row], alone(lora(task))(X[row : row + 1])[0], atol=1e-12, rtol=1e-12)


def test_lora_mixer_without_a_label_the_hard_phase_is_an_error_and_the_soft_one_is_not():
    net, adapted = mixed(phase="hard", freeze_experts=False)
    with pytest.raises(InputError, match="task is not given but the hard phase routes by it"):
        net(X)
    with (
        pytest.raises(InputError, match="task holds 3 but must be between 0 and experts - 1 = 2"),
        adapted.given(task=3),
    ):
        net(X)
    set_phase(adapted, "soft", freeze_experts=True)
    free = net(X)
    with adapted.given(task=1):  # the soft phase is told nothing
        assert torch.equal(net(X), free)


@pytest.mark.parametrize("router", ["block", "projection"])
@pytest.mark.parametrize("training", [True, False])
def test_lora_mixer_soft_phase_forced_to_one_hot_is_the_hard_phase(router, training):
    net, adapted = mixed(router=router)
    for layer in adapted.layers.values():
        layer.router.projection = nn.Linear(WIDTH, EXPERTS)
        nn.init.zeros_(layer.router.projection.weight)
        layer.router.projection.bias.data = torch.tensor([0.0, 0.0, 800.0])
    net.train(training)
    torch.testing.assert_close(net(X), alone(lora(2))(X), atol=1e-12, rtol=1e-12)


def test_lora_mixer_all_experts_kept_is_the_dense_fusion_and_fewer_are_not():
    net, adapted = mixed(top_k=EXPERTS)
    dense = net.train()(X)
    torch.testing.assert_close(net.eval()(X), dense, atol=1e-12, rtol=1e-12)
    for layer in adapted.layers.values():
        layer.router.set_top_k(2)
    assert not torch.allclose(net.eval()(X), dense)
    torch.testing.assert_close(net.train()(X), dense, atol=0, rtol=0)  # training stays dense
    seen = []
    adapted.layers["attention.q_proj"].observe(lambda layer, routing, context: seen.append(routing))
    net.eval()(X)
    torch.testing.assert_close(seen[0].weights.sum(1), torch.ones(10))
    assert seen[0].top_k == 2 and seen[0].probs.shape == (10, EXPERTS)


def test_lora_mixer_soft_fusion_is_the_formula():
    _, adapted = mixed(router="projection")
    layer, x = adapted.layers["attention.v_proj"], X[0]
    gates = (x @ layer.router.projection.weight.T).softmax(-1)
    parts = [lora(e)["attention.v_proj"] for e in range(EXPERTS)]
    expected = layer.base(x) + sum(gates[:, e, None] * (scale * x @ a.T @ b.T) for e, (a, b, scale) in enumerate(parts))
    torch.testing.assert_close(layer.train()(x), expected, atol=1e-12, rtol=1e-12)


def test_lora_mixer_loras_from_elsewhere_are_exported_as_they_came():
    parts = [lora(0, 2, scale=0.5), lora(1, 3, scale=2.0), lora(2, 1, names=("q_proj",))]
    net, adapted = mixed(loras=parts)
    for given, kept in zip(parts, to_loras(adapted), strict=True):
        assert given.keys() == kept.keys()
        for name, (a, b, scale) in given.items():
            assert torch.equal(kept[name][0], a) and torch.equal(kept[name][1], b) and kept[name][2] == scale
    set_phase(adapted, "hard")
    for task, part in enumerate(parts):
        with adapted.given(task=task):
            torch.testing.assert_close(net(X), alone(part)(X), atol=1e-12, rtol=1e-12)


def test_lora_mixer_takes_peft_folders_and_their_alpha(tmp_path):
    parts = [lora(e, e + 1) for e in range(2)]
    for e, part in enumerate(parts):
        banks = {name: LowRankExperts.from_loras([triple]) for name, triple in part.items()}
        write_peft(banks, tmp_path / str(e))
    adapted = from_loras(Net(), [tmp_path / "0", tmp_path / "1"])
    for part, kept in zip(parts, to_loras(adapted), strict=True):
        for name, (a, b, scale) in part.items():
            assert torch.equal(kept[name][0], a) and torch.equal(kept[name][1], b)
            assert kept[name][2] == pytest.approx(scale)
    again = {name: LowRankExperts.from_loras([triple]) for name, triple in to_loras(adapted)[1].items()}
    write_peft(again, tmp_path / "again")
    for name, (a, b, scale) in read_loras(tmp_path / "again").items():
        assert torch.equal(a, parts[1][name][0]) and torch.equal(b, parts[1][name][1])
        assert scale == pytest.approx(parts[1][name][2])


@pytest.mark.parametrize("sign", [1, -1])
def test_lora_mixer_balance_loss_at_uniform_and_its_gradient(sign):
    experts, top_k, alpha, lam = 4, 2, 0.3, 0.2
    uniform = torch.full((6, experts), 1 / experts)
    loss, parts = specialization_balance_loss(uniform, top_k, alpha, lam, sign)
    assert parts["balance"].item() == pytest.approx(1 / experts)
    assert parts["entropy"].item() == pytest.approx(math.log(experts))
    assert loss.item() == pytest.approx(alpha / experts + sign * lam * math.log(experts))
    prob = torch.randn(6, experts, generator=torch.Generator().manual_seed(0)).softmax(-1)
    prob.requires_grad_()
    specialization_balance_loss(prob, top_k, alpha, lam, sign)[0].backward()
    for row, column in ((0, 0), (3, 2), (5, 1)):
        step = torch.zeros_like(prob)
        step[row, column] = 1e-6
        with torch.no_grad():
            ends = [specialization_balance_loss(prob + s * step, top_k, alpha, lam, sign)[0].item() for s in (1, -1)]
        assert prob.grad[row, column].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize(("sign", "entropy"), [(-1, math.log(4)), (1, 0.0)])
def test_lora_mixer_printed_sign_goes_to_uniform_and_described_sign_to_one_hot(sign, entropy):
    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        specialization_balance_loss(logits.softmax(-1), 2, 0.0, 1.0, sign)[0].backward()
        optimizer.step()
    assert specialization_balance_loss(logits.softmax(-1), 2, 0.0, 1.0)[1]["entropy"].item() == pytest.approx(
        entropy, abs=0.01
    )


def test_lora_mixer_a_probability_of_zero_adds_no_entropy_and_has_a_finite_gradient():
    logits = torch.tensor([[0.0, 200.0, 0.0], [1.0, 0.0, -300.0]], dtype=torch.float32, requires_grad=True)
    loss, parts = specialization_balance_loss(logits.softmax(-1), 1, 0.01, 0.01)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all() and gradient.any()
    torch.testing.assert_close(parts["entropy"], torch.special.entr(logits.softmax(-1)).sum(-1).mean())


def test_lora_mixer_masked_tokens_change_no_loss():
    prob = torch.rand(6, 3).softmax(-1)
    mask = torch.tensor([True, True, False, True, False, True])
    other = prob.clone()
    other[~mask] = torch.tensor([1.0, 0.0, 0.0])
    values = [specialization_balance_loss(p, 2, 0.5, 0.5, 1, mask)[0] for p in (prob, other)]
    assert torch.equal(*values) and torch.equal(values[0], specialization_balance_loss(prob[mask], 2, 0.5, 0.5)[0])


def test_lora_mixer_told_losses_are_weighed_by_their_coefficients_once_a_block():
    for router, deciders in (("block", 1), ("projection", 4)):
        net, adapted = mixed(router=router, balance=0.3, entropy=0.2, entropy_sign=-1)
        seen = []
        for layer in adapted.layers.values():
            layer.observe(lambda layer, routing, context, seen=seen: seen.append(routing))
        net.train()(X)
        assert sum(bool(routing.losses) for routing in seen) == deciders and len(seen) == 4
        expected = sum(
            specialization_balance_loss(routing.probs, 3, 0.3, 0.2, -1)[0] for routing in seen if routing.losses
        )
        torch.testing.assert_close(sum(adapted.losses().values()), expected)


def test_lora_mixer_frozen_experts_leave_the_routers_alone_to_train():
    net, adapted = mixed()
    before = copy.deepcopy(net.state_dict())
    assert {name.split(".", 2)[2] for name in adapted.named_parameters()} == {"router.projection.weight"}
    optimizer = adapted.optimizer(0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (net.train()(X).square().sum() + sum(adapted.losses().values())).backward()
        optimizer.step()
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".router." in name for name in changed)


def test_lora_mixer_preserving_penalty_is_zero_at_the_start_and_pulls_back():
    net, adapted = mixed(freeze_experts=False, preserve=0.25, balance=0.0, entropy=0.0)
    net.train()(X)
    assert adapted.losses()["preserve"].item() == 0.0
    bank = adapted.layers["attention.o_proj"].experts
    start = bank.a.detach().clone()
    with torch.no_grad():
        bank.a += 0.1 * torch.randn_like(bank.a)
    net(X)
    (gradient,) = torch.autograd.grad(adapted.losses()["preserve"], bank.a)
    torch.testing.assert_close(gradient, 2 * 0.25 * (bank.a.detach() - start), atol=1e-12, rtol=1e-9)
    set_phase(adapted, "soft")  # another phase, another start
    net(X)
    assert adapted.losses()["preserve"].item() == 0.0


def test_lora_mixer_has_a_block_decide_once_on_its_input():
    net, adapted = mixed()
    seen = {}
    for name, layer in adapted.layers.items():
        layer.observe(lambda layer, routing, context, name=name: seen.setdefault(name, routing))
    net.train()(X)
    first = seen["attention.q_proj"]
    assert all(torch.equal(routing.probs, first.probs) for routing in seen.values()) and len(seen) == 4
    assert len({id(layer.router) for layer in adapted.layers.values()}) == 1
    assert adapted.layers["attention.q_proj"].block.routing is None  # nothing of the forward is kept
    seen.clear()
    net(X, X[:, :3].clone())  # a cross-attention: keys and values are tokens of their own
    assert [seen[f"attention.{part}_proj"].n_tokens for part in "qkvo"] == [10, 6, 6, 10]
    assert torch.equal(seen["attention.o_proj"].probs, seen["attention.q_proj"].probs)
    seen.clear()
    net(X, X.flip(1).clone())  # as many of them, and still others
    assert not torch.equal(seen["attention.k_proj"].probs, seen["attention.q_proj"].probs)


class KeysFirst(Attention):
    """Keys and values are made before the queries, and no output layer follows, as in LUKE."""

    def __init__(self):
        super().__init__()
        del self.o_proj

    def forward(self, x, other=None):
        key, value = self.k_proj(x), self.v_proj(x)
        return (self.q_proj(x) @ key.transpose(-1, -2)).softmax(-1) @ value


def test_lora_mixer_keeps_no_decision_that_a_checkpoint_would_find_again():
    net = Net()
    net.attention = KeysFirst()
    names = [f"{part}_proj" for part in "qkv"]
    net, adapted = mixed(net, [lora(seed, names=names) for seed in range(EXPERTS)])
    net.train()
    expected = torch.autograd.grad(net(X).sin().sum(), adapted.parameters())
    assert adapted.layers["attention.q_proj"].block.routing is None
    for _ in range(2):  # a backward pass, and another over the same forward
        y = checkpoint(net.attention, X, use_reentrant=False)
        grads = torch.autograd.grad(y.sin().sum(), adapted.parameters(), retain_graph=True)
        torch.testing.assert_close(grads, expected)
        torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), adapted.parameters()), expected)


def test_lora_mixer_parameters_are_what_the_formula_says():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            for name, d_out in (("q", 4096), ("k", 1024), ("v", 1024), ("o", 4096)):
                setattr(self, f"{name}_proj", nn.Linear(4096, d_out, bias=False, device="meta"))
            for name, d_in, d_out in (("gate", 4096, 14336), ("up", 4096, 14336), ("down", 14336, 4096)):
                setattr(self, f"{name}_proj", nn.Linear(d_in, d_out, bias=False, device="meta"))

    # an attention and a feed-forward block of Llama 3 8B
    sums = {("q", "k", "v", "o"): 26_624, ("gate", "up", "down"): 55_296}
    for parts, total in sums.items():
        model = nn.ModuleDict({"layer": Layer()})
        adapted = adapt(model, "lora-mixer", [f"*.{part}_proj" for part in parts], experts=2, rank=3)
        inputs = 4096 if "q" in parts else 2 * 4096 + 14336  # of the routers: one, or one each
        assert adapted.report()["added"] == 2 * 3 * total + 2 * inputs
    ratio = 26_624 / 55_296
    assert ratio == pytest.approx(0.4815, abs=1e-4)  # what "48% of the parameters" is


class StateSpace(nn.Module):
    """A diagonal selective scan: h_t = exp(-d_t) h_{t-1} + d_t u_t, y = out(h * silu(z))."""

    def __init__(self, d_model: int = WIDTH):
        super().__init__()
        self.in_proj = nn.Linear(d_model, 2 * d_model)
        self.rate = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x):
        u, z = self.in_proj(x).chunk(2, dim=-1)
        d = nn.functional.softplus(self.rate(u))
        h, states = torch.zeros_like(u[:, 0]), []
        for t in range(x.shape[1]):
            h = torch.exp(-d[:, t]) * h + d[:, t] * u[:, t]
            states.append(h)
        return self.out_proj(torch.stack(states, 1) * nn.functional.silu(z))


def test_lora_mixer_works_inside_a_state_space_block():
    torch.manual_seed(0)
    net = nn.ModuleDict({"mixer": StateSpace()})
    x, base = X, copy.deepcopy(net["mixer"])
    adapted = adapt(net, "lora-mixer", "*_proj", experts=2, rank=2, phase="hard")
    for layer in adapted.layers.values():
        nn.init.normal_(layer.experts.b)
    with adapted.given(task=1):
        y = net["mixer"](x)
    with torch.no_grad():
        base.in_proj.weight += adapted.layers["mixer.in_proj"].experts.delta(1)
        base.out_proj.weight += adapted.layers["mixer.out_proj"].experts.delta(1)
    torch.testing.assert_close(y, base(x), atol=1e-12, rtol=1e-12)
    set_phase(adapted, "soft")
    (net["mixer"].train()(x).square().sum() + sum(adapted.losses().values())).backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters())
    assert len({id(layer.router) for layer in adapted.layers.values()}) == 1


def test_lora_mixer_trains_in_the_workbenchs_decoder_and_is_told_the_task_by_the_context():
    torch.manual_seed(0)
    model = DecoderLM(16, 12, 2, 2, lambda layer: GLU(12, 16), 6)
    adapted = adapt(model, "lora-mixer", ["*.qkv", "*.out"], experts=2, phase="hard")
    tokens = torch.randint(16, (3, 6))
    context = Context(domain=torch.tensor([0, 1, 1]).repeat_interleave(6))
    model(tokens, context).square().mean().backward()
    assert all(p.grad is not None for p in adapted.parameters()) and context.aux == 0.0
    set_phase(adapted, "soft", freeze_experts=True)
    context = Context()
    model.train()(tokens, context)
    assert context.aux.item() > 0


def test_lora_mixer_shares_the_routers_of_transformers_attention():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2)
    model, tokens = transformers.LlamaForCausalLM(config).eval(), torch.randint(30, (2, 7))
    before = model(input_ids=tokens).logits
    adapted, seen = adapt(model, "lora-mixer", "*.self_attn.*", experts=3, rank=2), []
    torch.testing.assert_close(model(input_ids=tokens).logits, before, atol=1e-12, rtol=1e-12)
    for layer in adapted.layers.values():
        layer.observe(lambda layer, routing, context: seen.append(routing))
    (model.train()(input_ids=tokens, labels=tokens).loss + sum(adapted.losses().values())).backward()
    assert len(adapted.layers) == 8 and len({id(layer.router) for layer in adapted.layers.values()}) == 2
    assert sum(bool(routing.losses) for routing in seen) == 2 and all(p.grad is not None for p in adapted.parameters())


@pytest.mark.parametrize("phase", ["hard", "soft"])
def test_lora_mixer_is_saved_and_loaded_in_its_phase(tmp_path, phase):
    net, adapted = mixed(preserve=0.1, router="projection", freeze_experts=False)
    set_phase(adapted, phase)
    with torch.no_grad():
        adapted.layers["attention.q_proj"].experts.a.add_(0.1)
    adapted.save(tmp_path / "kept")
    again = Net()
    loaded = load_adapter(again, tmp_path / "kept")
    with adapted.given(task=2), loaded.given(task=2):
        torch.testing.assert_close(net(X), again(X), atol=0, rtol=0)
        torch.testing.assert_close(loaded.losses(), adapted.losses())
    before, after = adapted.layers["attention.q_proj"], loaded.layers["attention.q_proj"]
    assert torch.equal(after.start_a, before.start_a) and torch.equal(after.ranks, before.ranks)
    assert after.drift().item() > 0 and set(loaded.named_parameters()) == set(adapted.named_parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adapt(Net(), "lora-mixer", top_k=5), "top_k is 5 but must be between 1 and n_experts = 4"),
        (lambda: adapt(Net(), "lora-mixer", phase="sfot"), "phase 'sfot' is unknown; did you mean 'soft'"),
        (lambda: adapt(Net(), "lora-mixer", router="blok"), "router 'blok' is unknown; did you mean 'block'"),
        (lambda: adapt(Net(), "lora-mixer", entropy_sign=0), "entropy_sign is 0 but must be 1"),
        (lambda: adapt(Net(), "lora-mixer", entropy=-0.1), "entropy is -0.1 but must be at least 0"),
        (lambda: adapt(Net(), "lora-mixer", preserve=-1.0), "preserve is -1.0 but must be at least 0"),
        (
            lambda: adapt(Net(), "lora-mixer", rank=9),
            "rank is 9 but must be between 1 and the layer's smaller width, 8",
        ),
        (lambda: adapt(Net(), "lora-mixer", rank={"a": 2}), "rank names a but must name attention.q_proj as well"),
        (lambda: from_loras(Net(), []), "loras is empty"),
        (
            lambda: from_loras(Net(), [lora(0), {"attention.w": lora(0)["attention.q_proj"]}]),
            "attention.w of expert 1 is no Linear of the model",
        ),
        (
            lambda: from_loras(Net(), [{"attention.q_proj": (torch.ones(2, 7), torch.ones(8, 2), 1.0)}]),
            r"attention.q_proj of expert 0 has A \(2, 7\), B \(8, 2\) but the layer \(8, 8\)",
        ),
        (lambda: set_phase(mixed()[1], "hard", freeze_experts=True), "freeze_experts is True but the hard phase"),
        (lambda: set_phase(mixed()[1], "warm"), "phase 'warm' is unknown"),
        (lambda: specialization_balance_loss(torch.full((2, 2), 0.5), 3, 0.1, 0.1), "top_k is 3"),
        (
            lambda: specialization_balance_loss(torch.full((2, 2), 0.5), 1, 0.1, 0.1, 1, torch.zeros(2).bool()),
            "no token",
        ),
    ],
)
def test_lora_mixer_names_wrong_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_lora_mixer_refuses_a_diverged_router():
    router = MixerRouter(4, 2, 2)
    with pytest.raises(InputError, match="NaN or infinite"):
        router(torch.full((1, 4), float("nan")), Context())
