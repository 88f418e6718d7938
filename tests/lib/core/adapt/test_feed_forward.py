"""What is a feed-forward block and what only looks like one: by its parts, and by what it computes."""

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from tests.lib.core.adapt.test_every_adapter import ADAPTERS, language_model
from workbench.lib.core.adapt import adapt
from workbench.lib.core.adapt.feed_forward import FeedForward, find_feed_forward, recognise

D, H = 8, 12


class Block(nn.Module):
    """A block of other people: linear layers by shape, and what its forward makes of them."""

    def __init__(self, shapes: dict[str, tuple[int, int]], compute, **parts):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Linear(*shape))
        for name, part in parts.items():
            setattr(self, name, part)
        self.compute = [compute]  # no attribute of its own that could be called

    def forward(self, x: Tensor) -> Tensor:
        return self.compute[0](self, x)


def plain(compute, **parts) -> Block:
    return Block({"fc1": (D, H), "fc2": (H, D)}, compute, **({"act": nn.GELU()} | parts))


def gated(compute, **parts) -> Block:
    shapes = {"gate_proj": (D, H), "up_proj": (D, H), "down_proj": (H, D)}
    return Block(shapes, compute, **({"act_fn": nn.SiLU()} | parts))


def fused(compute) -> Block:
    return Block({"wi": (D, 2 * H), "wo": (H, D)}, compute)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.chunk(2, -1)


BLOCKS = {
    "plain": lambda: plain(lambda m, x: m.fc2(m.act(m.fc1(x)))),
    "narrow": lambda: Block({"fc1": (D, H), "fc2": (H, 5)}, lambda m, x: m.fc2(m.act(m.fc1(x))), act=nn.ReLU()),
    "gated": lambda: gated(lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x))),
    "crossed": lambda: gated(lambda m, x: m.down_proj(m.act_fn(m.up_proj(x)) * m.gate_proj(x))),
    "backwards": lambda: Block({"out": (D, D), "into": (D, D)}, lambda m, x: m.out(F.silu(m.into(x)))),
    "functional": lambda: fused(lambda m, x: m.wo(F.silu(halves(m.wi(x))[0]) * halves(m.wi(x))[1])),
    "function": lambda: plain(lambda m, x: m.fc2(m.act(m.fc1(x))), act=torch.tanh),
    "idle": lambda: plain(lambda m, x: m.fc2(m.drop(m.act(m.fc1(x)))), drop=nn.Dropout(0.0)),
    "softmax": lambda: plain(lambda m, x: m.fc2(m.act(m.fc1(x))), act=nn.Softmax(-1)),
    "geglu": lambda: nn.Sequential(nn.Linear(D, 2 * H), nn.GLU(), nn.Linear(H, D)),
}
OTHERS = {
    "multiplied": (lambda: plain(lambda m, x: 0.3 * m.fc2(m.act(m.fc1(x)))), "something else"),
    "multiplied gate": (
        lambda: gated(lambda m, x: m.down_proj(m.act_fn(2 * m.gate_proj(x)) * m.up_proj(x))),
        "something else",
    ),
    "clamped": (lambda: plain(lambda m, x: m.fc2(m.act(m.fc1(x)).clamp(max=20))), "something else"),
    "residual": (lambda: plain(lambda m, x: x + m.fc2(m.act(m.fc1(x)))), "something else"),
    "zero": (lambda: zeroed(plain(lambda m, x: 0.3 * m.fc2(m.act(m.fc1(x))))), "something else"),
    "normed": (lambda: plain(lambda m, x: m.fc2(m.norm(m.act(m.fc1(x)))), norm=nn.LayerNorm(H)), "holds norm"),
    "scaled": (lambda: plain(lambda m, x: m.s * m.fc2(m.act(m.fc1(x))), s=nn.Parameter(torch.ones(1))), "holds s"),
    "other half": (lambda: fused(lambda m, x: m.wo(F.silu(halves(m.wi(x))[1]) * halves(m.wi(x))[0])), None),
    "drops out": (lambda: plain(lambda m, x: m.fc2(m.d(m.act(m.fc1(x)))), d=nn.Dropout(0.5)), "drops out 0.5"),
    "drops out in words": (lambda: plain(lambda m, x: F.dropout(m.fc2(m.act(m.fc1(x))), 0.5, m.training)), "else"),
    "attends": (
        lambda: plain(
            lambda m, x: m.fc2(m.act(m.fc1(m.a(x, x, x)[0]))), a=nn.MultiheadAttention(D, 2, batch_first=True)
        ),
        "holds a",
    ),
    "sequential": (lambda: nn.Sequential(nn.Linear(D, H), nn.LayerNorm(H), nn.Linear(H, D)), None),
}
RANDOM = ("drops out", "drops out in words")


def zeroed(block: Block) -> Block:
    nn.init.zeros_(block.fc2.weight), nn.init.zeros_(block.fc2.bias)
    return block


@pytest.mark.parametrize("kind", BLOCKS)
def test_what_is_a_block_is_computed_as_it_is(kind):
    torch.manual_seed(0)
    module, x = BLOCKS[kind](), torch.randn(5, D)
    block = find_feed_forward(module)
    torch.testing.assert_close(block.linears[block.down](block.activate(*block.hidden(x))), module(x))
    assert block.elementwise is (kind not in ("softmax", "geglu"))


@pytest.mark.parametrize("kind", OTHERS)
def test_what_only_looks_like_a_block_is_told_why(kind):
    make, reason = OTHERS[kind]
    found = recognise(make())
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("kind", ["clamped", "drops out in words", "zero", "plain"])
def test_looking_at_a_module_leaves_nothing_behind(kind):
    module = ({name: make for name, (make, _) in OTHERS.items()} | BLOCKS)[kind]().train()
    module.fc2.eval()
    calls = []
    module.fc1.register_forward_hook(lambda *seen: calls.append(seen))
    before = copy.deepcopy(module.state_dict())
    state = torch.get_rng_state()
    recognise(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in module.modules()] == [m is not module.fc2 for m in module.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    module(torch.randn(2, D))
    assert len(calls) == 1  # of this call, by the hook that is still there


class Every(nn.Module):
    """All of the above side by side, and a batch norm whose statistics would tell of a call."""

    def __init__(self):
        super().__init__()
        made = {name: make() for name, make in BLOCKS.items()}
        made |= {name: make() for name, (make, _) in OTHERS.items() if name not in RANDOM}
        made["counts"] = plain(lambda m, x: m.fc2(m.n(m.act(m.fc1(x)).mT).mT), n=nn.BatchNorm1d(H))
        self.parts = nn.ModuleDict(made)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts.values()], -1)


@pytest.mark.parametrize("slug", ADAPTERS)
def test_whatever_the_blocks_compute_an_adapted_model_starts_as_it_is(slug):
    torch.manual_seed(0)
    model, x = Every(), 3 * torch.randn(2, 5, D)
    adapted = copy.deepcopy(model)
    made = adapt(adapted, slug)
    for training in (False, True):
        y, expected = adapted.train(training)(x), model.train(training)(x)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    whole = {name for name in made.layers if name.count(".") == 1}
    if type(made.adapter).feed_forward is ADAPTERS["lora"].feed_forward:
        assert not whole and not made.by_layer
    else:
        expected = set(BLOCKS) - ({"softmax", "geglu"} if slug == "dynamic-dino" else set())
        assert whole == {f"parts.{name}" for name in expected}
        assert made.by_layer.keys() == {f"parts.{n}" for n, (_, why) in OTHERS.items() if why and n not in RANDOM} | {
            "parts.counts"
        }
        assert made.report()["by_layer"] == made.by_layer


SIZES = {"vocab_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 16}


def opt() -> nn.Module:
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 2, "word_embed_proj_dim": 16, "dropout": 0.0}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**SIZES, **sizes))


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    return transformers.YolosModel(
        transformers.YolosConfig(**sizes, image_size=[8, 8], patch_size=4, num_detection_tokens=2)
    )


@pytest.mark.parametrize(
    ("make", "places"),
    [
        (lambda: language_model("bert"), ["encoder.layer.0.output.dense"]),  # spread over two modules
        (vit, ["encoder.layer.0.output.dense"]),  # the same, without a function of the layer's for it
        (lambda: language_model("gpt2"), ["h.0.mlp"]),
        (lambda: language_model("llama"), ["model.layers.0.mlp"]),
        (lambda: language_model("mixtral"), [f"model.layers.0.mlp.experts.{e}" for e in range(4)]),
        (opt, []),  # the block's layers are the decoder layer's own
    ],
)
def test_the_blocks_of_models_of_transformers(make, places):
    adapted = adapt(make(), "mixlora", rank=2)
    assert [name for name, layer in adapted.layers.items() if hasattr(layer, "block")] == places
    assert places or adapted.by_layer == {"model.decoder.layers.0": "holds self_attn (OPTAttention) as well"}


class Between(nn.Module):
    """BERT's two modules, with something done in between."""

    def __init__(self, between):
        super().__init__()
        self.intermediate = nn.Sequential(nn.Linear(D, H), nn.GELU())
        self.output, self.between = nn.Module(), [between]
        self.output.dense = nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.output.dense(self.between[0](self, self.intermediate(x)))


def test_two_modules_are_one_block_only_where_one_gives_what_the_other_is_given():
    assert isinstance(recognise(Between(lambda m, h: h)), FeedForward)
    for between in (lambda m, h: 2 * h, lambda m, h: F.dropout(h, 0.5, m.training)):
        assert "is given what intermediate gives" in recognise(Between(between))
