"""MoLE for diffusion: two gates an expert, on linear layers and on convolutions."""

import copy
import math

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.adapt import adapt, load_adapter
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Batch
from workbench.lib.core.train import TrainConfig
from workbench.lib.lora_experts.mole_diffusion import GatedConv2d, attach_mole, scale_sweep, train_region_expert

D, D_OUT, RANKS = 6, 5, (2, 3)
X = torch.randn(3, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def double():
    """Everything is made in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(D, D_OUT)

    def forward(self, x):
        return self.layer(x)


class Conv(nn.Module):
    """A convolution, and a linear layer over channels after it."""

    def __init__(self, kernel: int = 3, stride: int = 1, padding: int = 1):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, kernel, stride, padding)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.conv(x).movedim(1, -1)).movedim(-1, 1)


def lora(seed: int, shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]], scale: float = 0.6):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(*a, generator=generator) / 2, torch.randn(*b, generator=generator) / 2, scale)
        for name, (a, b) in shapes.items()
    }


def linear_loras():
    return [lora(e, {"layer": ((rank, D), (D_OUT, rank))}, 0.5 + e) for e, rank in enumerate(RANKS)]


def conv_loras(kernel: int = 3):
    return [
        lora(e, {"conv": ((rank, 4, kernel, kernel), (8, rank, 1, 1)), "out": ((rank, 8), (3, rank))}, 0.5 + e)
        for e, rank in enumerate(RANKS)
    ]


def merged(net: nn.Module, loras) -> nn.Module:
    with torch.no_grad():
        for part in loras:
            for name, (a, b, scale) in part.items():
                net.get_submodule(name).weight += scale * torch.einsum("or,r...->o...", b.flatten(1), a)
    return net


def set_gates(adapted, bias: float) -> None:
    with torch.no_grad():
        for layer in adapted.layers.values():
            for gate in (layer.router.local, layer.router.pooled):
                gate.weight.zero_(), gate.bias.fill_(bias)


CASES = [
    (Linear, linear_loras, X),
    (Conv, conv_loras, IMAGES),
    (lambda: Conv(3, 2, 1), conv_loras, IMAGES),
    (lambda: Conv(3, 1, 0), conv_loras, IMAGES),
]


@pytest.mark.parametrize(("make", "loras", "x"), CASES)
def test_mole_diffusion_open_gates_are_both_loras_added_and_shut_ones_the_base(make, loras, x):
    net = make()
    adapted = attach_mole(net, loras())
    set_gates(adapted, 800.0)
    torch.testing.assert_close(net(x), merged(make(), loras())(x), atol=1e-12, rtol=1e-12)
    set_gates(adapted, -800.0)
    torch.testing.assert_close(net(x), make()(x), atol=1e-14, rtol=0)  # rounding of the layer after


@pytest.mark.parametrize(("make", "loras", "x"), CASES[:2])
def test_mole_diffusion_is_the_formula(make, loras, x):
    net = make()
    adapted = attach_mole(net, loras())
    for name, layer in adapted.layers.items():
        inputs = x if name != "out" else layer_input(net, name, x)
        tokens = inputs if inputs.ndim == 3 else inputs.flatten(1, 2) if name == "out" else inputs.flatten(2).mT
        local = torch.stack(
            [
                (tokens @ w + c).sigmoid()
                for w, c in zip(layer.router.local.weight, layer.router.local.bias, strict=True)
            ],
            -1,
        )
        expected = layer.base(inputs)
        for e, part in enumerate(loras()):
            a, b, scale = part[name]
            bare = copy.deepcopy(layer.base)
            bare.bias.data.zero_()
            bare.weight.data = scale * torch.einsum("or,r...->o...", b.flatten(1), a)
            added = bare(inputs)
            flat = added.flatten(2).mT if name == "conv" else added.flatten(1, -2)
            gate = (flat.mean(1) @ layer.router.pooled.weight[e] + layer.router.pooled.bias[e]).sigmoid()
            product = flat * local[:, :, e, None] * gate[:, None, None]
            expected = expected + (product.mT if name == "conv" else product).reshape(added.shape)
        torch.testing.assert_close(layer(inputs), expected, atol=1e-12, rtol=1e-12)


def layer_input(net, name, x):
    kept = []
    handle = net.get_submodule(name).register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    net(x)
    handle.remove()
    return kept[0].detach()


@pytest.mark.parametrize(("make", "loras", "x"), CASES[:2])
def test_mole_diffusion_trains_the_gates_alone(make, loras, x):
    net = make()
    adapted = attach_mole(net, loras())
    net(x).square().sum().backward()
    trained = {name for name, p in net.named_parameters() if p.grad is not None}
    assert trained == set(adapted.named_parameters()) and all(".router." in name for name in trained)
    assert all(p.grad.any() for p in adapted.parameters())
    widths = [(D, D_OUT)] if make is Linear else [(4, 8), (8, 3)]
    assert adapted.report()["trained"] == sum(2 * (d_in + 1) + 2 * (d_out + 1) for d_in, d_out in widths)


def test_mole_diffusion_starts_at_a_quarter_of_the_strength():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(256, 256))
    part = {"0": (torch.randn(8, 256) / 16, torch.randn(256, 8) / 8, 1.0)}
    adapted = attach_mole(net, [part, part])
    local, pooled = adapted.layers["0"].gates(torch.randn(4, 32, 256))
    assert (local * pooled[:, None]).mean().item() == pytest.approx(0.25, abs=0.05)


def test_mole_diffusion_pooling_commutes_with_linear_experts():
    net = Linear()
    bank = attach_mole(net, linear_loras()).layers["layer"].experts
    outputs = bank.outputs(X.flatten(0, 1)).unflatten(0, X.shape[:2]).mean(1)
    torch.testing.assert_close(outputs, bank.outputs(X.mean(1)), atol=1e-12, rtol=1e-12)


def test_mole_diffusion_pools_the_real_outputs_of_a_padded_convolution():
    layer = attach_mole(Conv(), conv_loras()).layers["conv"]
    kernels = torch.stack([layer.experts.delta(e) for e in range(2)])
    real = torch.stack([nn.functional.conv2d(IMAGES, k, padding=1).mean((2, 3)) for k in kernels], 1)
    short = torch.einsum("eochw,bc->beo", kernels, IMAGES.mean((2, 3)))  # what the identity of linear layers would give
    gates = [
        ((mean * layer.router.pooled.weight).sum(-1) + layer.router.pooled.bias).sigmoid() for mean in (real, short)
    ]
    torch.testing.assert_close(layer.gates(IMAGES)[1], gates[0], atol=1e-12, rtol=1e-12)
    assert not torch.allclose(*gates, atol=1e-3)


def test_mole_diffusion_gates_do_not_compete():
    adapted = attach_mole(Linear(), linear_loras())
    set_gates(adapted, 800.0)
    local, pooled = adapted.layers["layer"].gates(X)
    assert torch.equal(local, torch.ones(3, 7, 2)) and torch.equal(pooled, torch.ones(3, 2))


def test_mole_diffusion_tokens_move_local_gates_and_leave_global_ones():
    layer = attach_mole(Linear(), linear_loras()).layers["layer"]
    order = torch.randperm(7, generator=torch.Generator().manual_seed(4))
    (local, pooled), (moved, same) = layer.gates(X), layer.gates(X[:, order])
    torch.testing.assert_close(moved, local[:, order], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(same, pooled, atol=1e-12, rtol=1e-12)


def test_mole_diffusion_convolution_of_one_pixel_is_the_linear_layer():
    net = Conv(kernel=1, padding=0)
    conv = attach_mole(net, conv_loras(1)).layers["conv"]
    plain = nn.Sequential(nn.Linear(4, 8))
    plain[0].weight.data, plain[0].bias.data = conv.base.weight[:, :, 0, 0].data, conv.base.bias.data
    loras = [{"0": (part["conv"][0][:, :, 0, 0], part["conv"][1], part["conv"][2])} for part in conv_loras(1)]
    linear = attach_mole(plain, loras).layers["0"]
    linear.router.load_state_dict(conv.router.state_dict())
    y = linear(IMAGES.movedim(1, -1))
    torch.testing.assert_close(conv(IMAGES), y.movedim(-1, 1), atol=1e-12, rtol=1e-12)
    assert conv(IMAGES).shape == (2, 8, 6, 5)  # no square map is assumed


def test_mole_diffusion_global_gate_reads_the_experts_output():
    layer = attach_mole(Linear(), linear_loras()).layers["layer"]
    with torch.no_grad():
        layer.experts.b[1] = 0
    _, pooled = layer.gates(X)
    assert torch.equal(pooled[:, 1], layer.router.pooled.bias[1].sigmoid().expand(3)) and pooled[:, 0].std() > 0


def test_mole_diffusion_scale_of_the_experts_counts():
    net = Linear()
    adapted = attach_mole(net, linear_loras(), local_gate=False, global_gate=False)
    strong = net(X) - adapted.layers["layer"].base(X)
    adapted.remove()
    halved = [{name: (a, b, scale / 2) for name, (a, b, scale) in part.items()} for part in linear_loras()]
    adapted = attach_mole(net, halved, local_gate=False, global_gate=False)
    torch.testing.assert_close(net(X) - adapted.layers["layer"].base(X), strong / 2)


@pytest.mark.parametrize("gates", [(True, False), (False, True), (False, False)])
def test_mole_diffusion_gates_can_be_switched_off(gates):
    net = Linear()
    adapted = attach_mole(net, linear_loras(), *gates)
    local, pooled = adapted.layers["layer"].gates(X)
    assert ((local == 1).all(), (pooled == 1).all()) == (not gates[0], not gates[1])
    if any(gates):
        with pytest.raises(InputError, match="cannot be merged back"):
            adapted.merge_back()
    else:  # two LoRAs at a fixed strength are one matrix
        expected = net(X)
        torch.testing.assert_close(adapted.merge_back()(X), expected)


def test_mole_diffusion_rows_without_a_token_axis_stay_apart():
    net = Linear()
    adapted = attach_mole(net, linear_loras())
    local, pooled = adapted.layers["layer"].gates(X[0])
    assert local.shape == (7, 1, 2) and pooled.shape == (7, 2)
    together = net(X[0])
    torch.testing.assert_close(together[2:3], net(X[0, 2:3]), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(net(X[0, 2]), together[2], atol=1e-12, rtol=1e-12)


def test_mole_diffusion_images_stay_apart_and_axes_between_are_tokens():
    net = Linear()
    attach_mole(net, linear_loras())
    torch.testing.assert_close(net(X)[1:2], net(X[1:2]), atol=1e-12, rtol=1e-12)
    grid = torch.cat([X, X[:, :1]], 1).unflatten(1, (2, 4))
    torch.testing.assert_close(net(grid).flatten(1, 2), net(grid.flatten(1, 2)), atol=1e-12, rtol=1e-12)


def test_mole_diffusion_announces_all_experts_with_the_product_of_the_gates():
    net = Conv()
    adapted, seen = attach_mole(net, conv_loras()), []
    layer = adapted.layers["conv"]
    layer.observe(lambda layer, routing, context: seen.append(routing))
    net(IMAGES)
    local, pooled = layer.gates(IMAGES)
    assert seen[0].n_tokens == 2 * 30 and (layer.n_experts, layer.top_k) == (2, 2)
    torch.testing.assert_close(seen[0].dense(), (local * pooled[:, None]).flatten(0, 1))


def test_mole_diffusion_new_experts_change_nothing_and_are_trained_with_their_gates():
    net = Conv()
    adapted = adapt(net, "mole-diffusion", convs="conv")
    torch.testing.assert_close(net(IMAGES), Conv()(IMAGES), atol=1e-14, rtol=0)
    assert isinstance(net.conv, GatedConv2d) and adapted.layers["conv"].experts.rank == 8
    assert {name.split(".")[1] for name in adapted.named_parameters()} == {"router", "experts"}
    assert not any(p.requires_grad for p in net.conv.base.parameters())
    adapted.remove()
    assert type(net.conv) is nn.Conv2d and all(p.requires_grad for p in net.parameters())


def test_mole_diffusion_is_saved_and_loaded(tmp_path):
    net = Conv()
    adapted = attach_mole(net, conv_loras())
    adapted.save(tmp_path / "kept")
    again = Conv()
    loaded = load_adapter(again, tmp_path / "kept")
    torch.testing.assert_close(again(IMAGES), net(IMAGES), atol=0, rtol=0)
    assert set(loaded.named_parameters()) == set(adapted.named_parameters())
    assert loaded.layers["conv"].ranks.tolist() == list(RANKS)


class Denoising:
    """Guess 0.3 of the input: a task for the stages below."""

    metric, unit, higher_is_better, name, domains, manifest = "error", "", False, "denoising", ("all",), {}

    def batch(self, split, size, generator, domain=None):
        x = torch.randn(size, 4, D, generator=generator)
        return Batch(x, 0.3 * x[..., :D_OUT], torch.zeros(size, dtype=torch.long))

    def batches(self, split, size):
        yield self.batch(split, size, torch.Generator().manual_seed(9))

    def loss(self, model, batch):
        return (model(batch.inputs) - batch.targets).square().mean(), Context()

    def evaluate(self, model, split="validation", max_batches=None):
        with torch.no_grad():
            return {"error": float(self.loss(model, next(self.batches(split, 64)))[0])}


def test_mole_diffusion_stages_train_an_expert_and_sweep_its_scale():
    net, task = Linear(), Denoising()
    before = copy.deepcopy(net.state_dict())
    part = train_region_expert(net, task, TrainConfig(100, 16, 0.03, weight_decay=0.0), rank=4, alpha=2)
    assert net.state_dict().keys() == before.keys() and all(
        torch.equal(value, before[name]) for name, value in net.state_dict().items()
    )
    assert part["layer"][0].shape == (4, D) and part["layer"][2] == 0.5 and part["layer"][1].any()
    errors = scale_sweep(net, [part], (0.0, 1.0, 8.0), lambda model: task.evaluate(model)["error"])
    assert errors[1.0] < 0.8 * errors[0.0] and errors[1.0] < errors[8.0] < math.inf
    assert type(net.layer) is nn.Linear


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attach_mole(Linear(), []), "loras is empty"),
        (
            lambda: attach_mole(Linear(), [lora(0, {"lier": ((2, D), (D_OUT, 2))})]),
            "lier of expert 0 is no Linear or Conv2d",
        ),
        (lambda: attach_mole(Conv(), [{"conv": conv_loras()[0]["conv"]}]), "of the convolutions conv alone"),
        (
            lambda: attach_mole(Conv(5), conv_loras()),
            r"conv of expert 0 has A \(2, 4, 3, 3\), B \(8, 2, 1, 1\) but the layer \(8, 4, 5, 5\)",
        ),
        (lambda: adapt(Conv(), "mole-diffusion", convs=["cov*"]), r"convs 'cov\*' is unknown; did you mean 'conv'"),
        (
            lambda: adapt(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Linear(3, 3)), "mole-diffusion", convs="*"),
            "1 group",
        ),
        (lambda: adapt(Conv(), "mole-diffusion", convs="*", rank={"out": 2}), "rank names out but must name conv"),
        (lambda: adapt(Conv(), "mole-diffusion", rank=4), "rank is 4 but must be between 1 and"),
        (
            lambda: adapt(Conv(), "mole-diffusion", convs="*", rank={"out": 2, "conv": 9}),
            "rank 9 but rank must be 1 to 8",
        ),
    ],
)
def test_mole_diffusion_names_wrong_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
