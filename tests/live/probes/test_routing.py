"""Routing decisions are counted exactly, once, and only where they should be."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from workbench.lib.core.expert_choice import ExpertChoiceRouter
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.routers import HashRouter
from workbench.lib.core.routing import Context, Routing
from workbench.live.probes import find
from workbench.live.probes.routing import RoutingProbe

E, K, D = 4, 2, 16


def probe(module: nn.Module, domains: int = 0, vocabulary: int | None = None) -> RoutingProbe:
    return RoutingProbe(module, find.blocks(module), {"domain": domains}, vocabulary)


def recorded(module: nn.Module) -> dict[str, list[tuple[Routing, Context]]]:
    """What an observer of one's own sees."""
    seen = {name: [] for name in moe_layers(module)}
    for name, moe in moe_layers(module).items():
        moe.observe(lambda _, routing, context, name=name: seen[name].append((routing, context)))
    return seen


def test_counts_are_those_of_the_training_batches(model, task):
    module, batches = model(), [task.batch("train", 5, torch.Generator().manual_seed(s)) for s in (1, 2)]
    counts, seen = probe(module, domains=3, vocabulary=256), recorded(module)
    counts.arm(True)
    for batch in batches:  # gradient accumulation
        task.loss(module, batch)
    scalars, tensors = counts.take(structure=True)
    tokens = counts.take_tokens()
    for i, (name, pairs) in enumerate(seen.items()):
        mask = torch.cat([routing.mask() for routing, _ in pairs]).numpy()
        probs = torch.cat([routing.probs.detach() for routing, _ in pairs]).double().numpy()
        domain = torch.cat([context.domain for _, context in pairs]).numpy()
        ids = torch.cat([context.token_ids for _, context in pairs]).numpy()
        assert tensors[f"load/{name}"].dtype == np.uint32
        np.testing.assert_array_equal(tensors[f"load/{name}"], mask.sum(0))
        np.testing.assert_allclose(tensors[f"importance/{name}"], probs.mean(0), rtol=1e-6)
        by_domain = np.stack([mask[domain == d].sum(0) for d in range(3)])
        np.testing.assert_array_equal(tensors[f"load_by_domain/{name}"], by_domain)
        np.testing.assert_array_equal(tensors[f"coactivation/{name}"], mask.T.astype(int) @ mask)
        if i < 2:
            after = torch.cat([routing.mask() for routing, _ in seen[f"blocks.{i + 1}.ffn"]]).numpy()
            np.testing.assert_array_equal(tensors[f"transition/{name}"], mask.T.astype(int) @ after)
        assert scalars[f"router/{name}/confidence"] == pytest.approx(probs.max(1).mean())
        entropy = -(probs * np.log(probs)).sum(1).mean() / np.log(E)
        assert scalars[f"router/{name}/entropy"] == pytest.approx(entropy)
        weights = torch.cat([routing.weights.detach() for routing, _ in pairs]).double()
        support = (weights.sum(1) ** 2 / (weights**2).sum(1)).mean().item()
        assert scalars[f"router/{name}/support"] == pytest.approx(support)
        assert scalars[f"router/{name}/probability_support"] == pytest.approx((1 / (probs**2).sum(1)).mean())
        table = tokens[f"tokens/{name}"]
        assert table.shape == (E, 256) and table.sum() == mask.sum()
        for expert, token in ((0, 98), (3, 102)):
            assert table[expert, token] == mask[ids == token, expert].sum()
    assert "transition/blocks.2.ffn" not in tensors and not any(name.startswith("dropped/") for name in tensors)
    assert counts.take_tokens() == {}


def test_nothing_is_counted_unless_armed_nor_after_the_end(model, task):
    module, batch = model(), task.batch("train", 2, torch.Generator().manual_seed(0))
    counts = probe(module)
    task.loss(module, batch)
    assert counts.take(structure=True) == ({}, {})
    counts.arm(True)
    counts.close()
    task.loss(module, batch)
    assert counts.take(structure=True) == ({}, {})
    assert not any(moe._observers for moe in moe_layers(module).values()) and not module._forward_pre_hooks


def test_evaluation_is_counted_apart(model, task):
    module, batch = model(), task.batch("validation", 4, torch.Generator().manual_seed(0))
    counts = probe(module, domains=3)
    counts.arm(True)
    task.loss(module.eval(), batch)
    task.loss(module.train(), batch)
    assert counts.take(structure=False)[1]["load/blocks.0.ffn"].sum() == 4 * 8 * K
    valid = counts.take_evaluation()
    assert sorted({name.split("/")[1] for name in valid}) == ["importance", "load", "load_by_domain"]
    assert valid["valid/load/blocks.1.ffn"].sum() == valid["valid/load_by_domain/blocks.1.ffn"].sum() == 4 * 8 * K
    assert counts.take_evaluation() == {}


def test_a_forward_repeated_for_the_backward_pass_is_counted_once(layer):
    torch.manual_seed(0)
    moe = layer()
    counts = probe(moe)
    counts.arm(True)
    x = torch.randn(10, D, requires_grad=True)
    recompute(moe, x, use_reentrant=False).sum().backward()
    assert counts.take(structure=False)[1]["load/model"].sum() == 10 * K


def test_drops_are_shares_of_assignments_and_of_tokens(layer):
    torch.manual_seed(0)
    moe = layer(top_k=1, capacity=0.5)
    counts, seen = probe(moe), []
    moe.observe(lambda _, routing, context: seen.append(routing))
    counts.arm(True)
    moe(torch.randn(64, D))
    _, tensors = counts.take(structure=True)
    expected = 1 - float(seen[0].kept.double().mean())
    assert expected > 0
    np.testing.assert_allclose(tensors["dropped/model"], [expected, expected], rtol=1e-6)
    assert tensors["load/model"].sum() == 64  # before capacity
    assert "coactivation/model" not in tensors  # one expert a token


def test_variable_numbers_of_experts_and_routers_without_probabilities():
    torch.manual_seed(0)
    choice = MoELayer(ExpertChoiceRouter(D, E, capacity=1.5), GLUExperts(E, D, 8))
    counts, seen = probe(choice), []
    choice.observe(lambda _, routing, context: seen.append(routing))
    counts.arm(True)
    choice(torch.randn(20, D))
    tensors = counts.take(structure=True)[1]
    mask = seen[0].mask().numpy()
    np.testing.assert_array_equal(tensors["coactivation/model"], mask.T.astype(int) @ mask)

    hashed = MoELayer(HashRouter(256, E, K), GLUExperts(E, D, 8))
    counts = probe(hashed)
    counts.arm(True)
    hashed(torch.randn(20, D), Context(token_ids=torch.arange(20)))
    scalars, tensors = counts.take(structure=True)
    assert scalars == {"router/model/support": K} and sorted(tensors) == ["coactivation/model", "load/model"]


class Mapped(nn.Module):
    """A block whose router returns a boolean map of the experts."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = MapRouter(), nn.Linear(D, D)

    def forward(self, x):
        self.router(x)
        return x


class MapRouter(nn.Module):
    num_experts, top_k = E, K

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D))

    def forward(self, x):
        logits = x.reshape(-1, D) @ self.weight.T
        return torch.zeros_like(logits).bool().scatter(1, logits.topk(K, -1).indices, True), logits


@pytest.mark.parametrize("mapped", [False, True])
def test_padding_is_not_counted(foreign, mapped: bool):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.block = nn.Embedding(9, D), Mapped() if mapped else foreign()

        def forward(self, input_ids, attention_mask=None):
            return self.block(self.embed(input_ids))

    torch.manual_seed(0)
    module = Masked()
    counts = probe(module, vocabulary=9)
    counts.arm(True)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    module(input_ids=torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]]), attention_mask=mask)
    assert counts.take(structure=False)[1]["load/block"].sum() == 5 * K
    assert counts.take_tokens()["tokens/block"].sum(0).tolist() == [0, K, K, K, K, K, 0, 0, 0]


def test_each_side_of_an_encoder_decoder_model_has_its_own_padding(foreign):
    class TwoSided(nn.Module):
        config = SimpleNamespace(is_encoder_decoder=True)

        def __init__(self):
            super().__init__()
            self.embed, self.encoder, self.decoder = nn.Embedding(9, D), foreign(), foreign()

        def forward(self, input_ids, decoder_input_ids, attention_mask=None, decoder_attention_mask=None):
            return self.encoder(self.embed(input_ids)), self.decoder(self.embed(decoder_input_ids))

    torch.manual_seed(0)
    module, ids, real = TwoSided(), torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [1, 0, 0]])
    counts = probe(module)
    for decoder_mask, rest in ((None, 6), (1 - real, 2)):
        counts.arm(True)
        module(ids, decoder_input_ids=ids, attention_mask=real, decoder_attention_mask=decoder_mask)
        found = counts.take(structure=False)[1]
        assert (found["load/encoder"].sum(), found["load/decoder"].sum()) == (4 * K, rest * K)
