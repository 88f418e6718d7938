"""Meters: the sum over batches is the measure of all tokens; and conflict inside a real mixture of experts."""

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.measures import coactivation as co
from workbench.lib.measures.meters import ConflictMeter, RoutingMeter
from workbench.lib.measures.routing import load_stats, router_confidence, token_entropy
from workbench.lib.measures.transition import transition_counts, transition_probability

LAYERS = ("a", "b")


def batch(n_tokens: int, seed: int, n_experts: int = 6, top_k: int = 2):
    """Probabilities and the top-k choice of both layers."""
    probs = torch.randn(2, n_tokens, n_experts, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    return probs, probs.topk(top_k, dim=-1).indices


def filled(*batches, kept=None) -> RoutingMeter:
    meter = RoutingMeter(LAYERS, 6, 2)
    for probs, indices in batches:
        for i, layer in enumerate(LAYERS):
            meter.update(layer, indices[i], probs[i], None if kept is None else kept[: len(indices[i])])
    return meter


def test_a_meter_is_the_measure_of_all_tokens():
    batches = [batch(20, 0), batch(35, 1)]
    meter = filled(*batches)
    probs = torch.cat([b[0] for b in batches], dim=1)
    masks = [co.selection_mask(torch.cat([b[1][i] for b in batches]), 6) for i in range(2)]
    for i, layer in enumerate(LAYERS):
        expected = load_stats(masks[i].sum(0), 2, 55)
        for name, value in vars(meter.summary()[layer]).items():
            torch.testing.assert_close(value, getattr(expected, name), msg=name)
        torch.testing.assert_close(meter.importance(layer), probs[i].double().mean(0))
        torch.testing.assert_close(meter.confidence(layer), router_confidence(probs[i]))
        torch.testing.assert_close(meter.token_entropy(layer), token_entropy(probs[i]))
        for kind in co.KINDS:
            whole = co.coactivation(co.coactivation_counts(masks[i]), kind)
            torch.testing.assert_close(meter.coactivation(layer, kind).values, whole.values, equal_nan=True)
    expected = transition_probability(transition_counts(*masks), 2)
    torch.testing.assert_close(meter.transition("a"), expected)


def test_meters_add_up_exactly():
    one, two = batch(20, 0), batch(35, 1)
    total, apart = filled(one, two), filled(one) + filled(two)
    for layer in LAYERS:
        for name, value in vars(total.counts(layer)).items():
            other = getattr(apart.counts(layer), name)
            if value is None:
                assert other is None
            elif value.dtype == torch.int64:
                assert torch.equal(value, other), name
            else:
                torch.testing.assert_close(value, other)
    with pytest.raises(InputError, match="same layers"):
        filled(one) + RoutingMeter(("a", "c"), 6, 2)


def test_padding_is_left_out_of_everything():
    probs, indices = batch(30, 0)
    mask = torch.arange(30) < 20
    kept = torch.rand(30, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    padded, cut = RoutingMeter(LAYERS, 6, 2), RoutingMeter(LAYERS, 6, 2)
    for i, layer in enumerate(LAYERS):
        padded.update(layer, indices[i], probs[i], kept, mask)
        cut.update(layer, indices[i, :20], probs[i, :20], kept[:20])
    for layer in LAYERS:
        for name, value in vars(padded.counts(layer)).items():
            other = getattr(cut.counts(layer), name)
            assert value is other is None or torch.equal(value, other), name


def test_drop_rates():
    kept = torch.tensor([[True, False], [False, False], [True, True]])
    meter = filled(batch(3, 0), kept=kept)
    pairs, tokens = meter.drop_rates("a")
    assert (pairs.item(), tokens.item()) == (0.5, pytest.approx(1 / 3))
    assert all(rate.isnan() for rate in filled(batch(3, 0)).drop_rates("a"))


def test_variable_number_of_experts_by_mask():
    meter = RoutingMeter(("a", "b"), (3, 2), None)
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    kept = torch.tensor([[True, False, False], [False, False, False], [False, False, False]])
    meter.update("a", mask, kept=kept)
    meter.update("b", torch.tensor([[True, False], [True, True], [False, False]]))
    assert meter.counts("a").pairs.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert meter.counts("a").transition.tolist() == [[2, 1], [1, 0], [0, 0]]
    assert meter.summary()["a"].dead == 1
    pairs, tokens = meter.drop_rates("a")
    assert (pairs.item(), tokens.item()) == (pytest.approx(2 / 3), 0.5)


def test_empty_meter_and_reset():
    meter = filled(batch(10, 0))
    meter.reset()
    assert meter.summary()["a"].cv.isnan() and meter.importance("b").isnan().all()
    assert "no tokens" in meter.coactivation("a").undefined_reason
    meter.update("a", torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 6))
    assert meter.summary()["a"].dead.isnan()


def test_transition_needs_the_next_layer_right_after_with_the_same_tokens():
    meter = RoutingMeter(LAYERS, 6, 2)
    _, indices = batch(8, 0)
    meter.update("b", indices[1])
    meter.update("a", indices[0])
    meter.update("b", indices[1, :5])
    assert meter.counts("a").transition.sum() == 0
    with pytest.raises(InputError, match="the last one"):
        meter.transition("b")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((("a", "a"), 4, 1), "distinct"),
        (((), 4, 1), "distinct"),
        ((("a",), 4, 5), "top_k is 5"),
        ((("a",), (4, 4), 1), "one size"),
    ],
)
def test_bad_arguments(arguments, part):
    with pytest.raises(InputError, match=part):
        RoutingMeter(*arguments)
    with pytest.raises(InputError, match=r"layer 'blocks\.0' is unknown"):
        RoutingMeter(("blocks.1",), 4, 1).update("blocks.0", torch.zeros(1, 1, dtype=torch.int64))


class TinyMixture(nn.Module):
    """A shared layer, three packed experts and one always-on expert; tokens are sent where told."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(4, 5)
        self.experts = nn.Parameter(torch.randn(3, 2, 5))
        self.shared = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        h = torch.tanh(self.trunk(x))
        return h @ self.experts[expert].T + self.shared(h)


def losses_of(model: TinyMixture, experts: tuple[int, ...]):
    """A loss for each task, its tokens all sent to one expert."""
    x = torch.randn(len(experts), 2, 16, 4, generator=torch.Generator().manual_seed(1))
    y = torch.randn(len(experts), 2, 16, 2, generator=torch.Generator().manual_seed(2))
    return {
        f"task{i}": lambda half, i=i, e=e: (model(x[i, half], e) - y[i, half]).square().mean()
        for i, e in enumerate(experts)
    }


def groups_of(model: TinyMixture):
    experts = {f"expert{e}": [(model.experts, e)] for e in range(3)}
    return {"all": list(model.parameters()), "trunk": [*model.trunk.parameters()], **experts,
            "shared": [*model.shared.parameters()]}  # fmt: skip


def test_gramians_are_those_of_autograd_and_sum_to_the_summed_loss():
    model = TinyMixture()
    losses, meter = losses_of(model, (0, 0, 1)), ConflictMeter(groups_of(model))
    assert meter.n_parameters == {"all": 67, "trunk": 25, "expert0": 10, "expert1": 10, "expert2": 10, "shared": 12}
    gram3 = meter.gramians(losses)
    flat = [
        torch.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(loss(half), list(model.parameters()))])
            for loss in losses.values()
        ]).double()
        for half in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(gram3["all"][0], flat[0] @ flat[0].T, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(gram3["all"][2], flat[0] @ flat[1].T, rtol=1e-6, atol=1e-12)
    parts = sum(gram3[name] for name in gram3 if name != "all")
    torch.testing.assert_close(parts, gram3["all"], rtol=1e-6, atol=1e-9)
    summed = torch.autograd.grad(sum(loss(0) for loss in losses.values()), list(model.parameters()))
    squared = sum(g.double().square().sum() for g in summed)
    torch.testing.assert_close(gram3["all"][0].sum(), squared, rtol=1e-6, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_disjoint_routing_is_undefined_in_the_experts_and_defined_in_the_shared_one():
    model = TinyMixture()
    stats = ConflictMeter(groups_of(model)).measure(losses_of(model, (0, 1)))
    for expert in ("expert0", "expert1", "expert2"):
        assert stats[expert].cosine[0, 1].isnan() and stats[expert].rate.isnan()
    for group in ("trunk", "shared", "all"):
        assert not stats[group].cosine.isnan().any()
    assert stats["shared"].band == 12**-0.5


def test_a_task_its_copy_and_its_negation():
    model = TinyMixture()
    loss = losses_of(model, (0,))["task0"]
    tasks = {"task": loss, "copy": lambda half: 3 * loss(half), "negation": lambda half: -loss(half)}
    cosine = ConflictMeter(groups_of(model)).measure(tasks)["all"].cosine
    assert cosine[0].tolist() == pytest.approx([1, 1, -1])


def test_empty_groups_are_refused():
    with pytest.raises(InputError, match="at least one parameter"):
        ConflictMeter({"gate": []})
