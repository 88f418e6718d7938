"""Dynamic-DINO: the start is the dense block exactly, the gate's sum is k, and what the task can and cannot move."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.adapt import adapt, load_adapter
from workbench.lib.core.adapt.feed_forward import find_feed_forward
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.routing import Context, Routing
from workbench.lib.lora_experts.dynamic_dino import (
    SlicedFeedForward,
    SliceExperts,
    SliceRouter,
    TunedLinear,
    same_copy_share,
)
from workbench.lib.measures.coactivation import coactivation_counts, effective_partners, joint_share, selection_mask
from workbench.lib.measures.curveball import coactivation_scores

D, H = 6, 12
X = torch.randn(64, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TOKENS = torch.randint(32, (3, 9), generator=torch.Generator().manual_seed(3))


class Gated(nn.Module):
    """Three matrices with biases, as in a Llama."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


BLOCKS = {
    "gated": Gated,
    "fused": lambda: GLU(D, H),
    "plain": lambda: nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)),
    "no bias": lambda: nn.Sequential(nn.Linear(D, H, bias=False), nn.ReLU(), nn.Linear(H, D, bias=False)),
}


def block(kind: str = "plain") -> nn.Module:
    torch.manual_seed(0)
    return BLOCKS[kind]().double()


def put(kind: str = "plain", **options):
    """A model of one block in float64 with the mixture in its place, and the layer."""
    adapted = adapt(nn.Sequential(block(kind)), "dynamic-dino", **{"experts": 6, "top_k": 2} | options)
    adapted.model.double()
    return adapted, adapted.layers["0"]


def routed(layer: SlicedFeedForward, x: Tensor) -> Routing:
    return layer.router(x, Context())


def shake(layer: SlicedFeedForward) -> None:
    """Away from the start: no ties, no equal copies."""
    torch.manual_seed(5)
    for p in (*layer.experts.parameters(), *layer.router.parameters()):
        p.data.add_(torch.randn_like(p) * 0.5)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(("copies", "slices"), [(1, 1), (5, 1), (3, 2), (2, 3), (4, 4), (1, 6), (2, 12)])
def test_dynamic_dino_starts_as_the_dense_block(kind, copies, slices):
    dense = block(kind)(X)
    adapted, layer = put(kind, experts=copies * slices, top_k=slices)
    assert torch.allclose(adapted.model(X), dense, rtol=0, atol=1e-14)
    indices = routed(layer, X).indices
    assert ((indices // slices) == indices[:, :1] // slices).all()  # all of one copy
    assert (indices.sort(1).values % slices == torch.arange(slices)).all()  # and each of its slices once


def test_dynamic_dino_starts_as_the_dense_block_in_float32_and_for_vectors_of_zeros():
    model = nn.Sequential(block().float())
    x = torch.cat([X.float(), torch.zeros(3, D)])  # all copies tie for a zero vector
    dense = model(x)
    assert (adapt(model, "dynamic-dino", experts=12, top_k=3).model(x) - dense).abs().max() < 1e-6


def test_dynamic_dino_converts_a_whole_model_without_a_change():
    torch.manual_seed(0)
    model = DecoderLM(32, 16, 2, 2, lambda layer: GLU(16, 24), 9).double()
    dense = model(TOKENS)
    adapted = adapt(model, "dynamic-dino")
    adapted.model.double()
    assert {type(layer) for layer in adapted.layers.values()} == {SlicedFeedForward, TunedLinear}
    assert torch.allclose(model(TOKENS), dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"gate": "renorm"}, {"gate": "softmax"}, {"tie": False}, {"allocate": False}], ids=str
)
def test_dynamic_dino_loses_the_start_without_any_of_its_parts(options):
    dense = block()(X)
    torch.manual_seed(2)
    adapted, _ = put(**options)
    assert (adapted.model(X) - dense).abs().max() > 0.05


def test_dynamic_dino_wrong_gates_give_the_fractions_they_should():
    adapted, _ = put(experts=8, gate="renorm")
    assert torch.allclose(adapted.model(X), block()(X) / 2, rtol=0, atol=1e-14)
    adapted, _ = put(experts=8, gate="softmax", router_std=1e-9)
    assert torch.allclose(adapted.model(X), block()(X) / 8, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", BLOCKS)
def test_dynamic_dino_is_the_weighted_sum_of_narrow_blocks(kind):
    adapted, layer = put(kind)
    shake(layer)
    routing, e = routed(layer, X), layer.experts
    expected = torch.zeros_like(X)
    for n, (indices, weights) in enumerate(zip(routing.indices.tolist(), routing.weights, strict=True)):
        for i, w in zip(indices, weights, strict=True):
            up = X[n] @ e.up[i].T + (0 if e.up_bias is None else e.up_bias[i])
            if kind in ("gated", "fused"):
                gate = X[n] @ e.gate[i].T + (0 if e.gate_bias is None else e.gate_bias[i])
                hidden = F.silu(gate) * up
            else:
                hidden = F.gelu(up) if kind == "plain" else up.relu()
            expected[n] += w * (hidden @ e.down[i].T + (0 if e.down_bias is None else e.down_bias[i]))
    assert torch.allclose(adapted.model(X), expected, rtol=0, atol=1e-12)
    assert torch.equal(routing.indices[:, 0], routing.logits.argmax(1))


def test_dynamic_dino_weights_sum_to_k_in_float32_whatever_the_input():
    for slices, copies in ((1, 5), (2, 4), (4, 2), (3, 1)):
        torch.manual_seed(0)
        router = SliceRouter(D, copies, slices, tie=False, std=2.0)
        for dtype in (torch.float32, torch.bfloat16):
            routing = router(X.to(dtype))
            assert routing.weight.dtype == torch.float32 and routing.probs.dtype == torch.float32
            assert torch.allclose(routing.weights.sum(1), torch.tensor(float(slices)), rtol=0, atol=1e-6)
            chosen = routing.probs.gather(1, routing.indices)
            assert torch.allclose(routing.weights, slices * chosen / chosen.sum(1, keepdim=True), rtol=1e-5)


def test_dynamic_dino_counts_its_parameters():
    for kind, formula in (
        ("plain", lambda n, k: n * (2 * D * H + H + k * D)),
        ("no bias", lambda n, k: n * 2 * D * H),
        ("gated", lambda n, k: n * (3 * D * H + 2 * H + k * D)),
        ("fused", lambda n, k: n * 3 * D * H),
    ):
        for n, k in ((3, 2), (2, 4)):
            adapted, _ = put(kind, experts=n * k, top_k=k)
            report = adapted.report()
            assert report["trained"] == report["added"] == formula(n, k) + n * k * D


def test_dynamic_dino_tasks_cannot_move_probability_between_copies():
    adapted, layer = put(experts=12, top_k=3)
    # the task's loss alone: losses() holds the balance loss
    (adapted.model(X) - X.roll(1, 0)).square().sum().backward()
    gradient = layer.router.projection.weight.grad.unflatten(0, (4, 3))
    assert gradient.abs().max() > 1e-2  # the slices of a copy do get different gradients
    assert gradient.sum(1).abs().max() < 1e-12
    layer.router.projection.weight.grad = None
    adapted.model(X)
    adapted.losses()["lbl"].backward()
    assert layer.router.projection.weight.grad.unflatten(0, (4, 3)).sum(1).abs().max() > 1e-6


def test_dynamic_dino_with_one_slice_is_sparse_upcycling():
    adapted, layer = put(experts=4, top_k=1)
    shake(layer)
    routing = routed(layer, X)
    assert (routing.weight == 1).all() and layer.experts.up.shape == (4, H, D)
    adapted.model(X).sum().backward()
    gradient = layer.router.projection.weight.grad
    assert gradient is None or not gradient.any()


def test_dynamic_dino_with_one_copy_uses_all_slices_and_can_leave_the_dense_block():
    adapted, layer = put(experts=3, top_k=3)
    assert (routed(layer, X).counts == len(X)).all()
    with torch.no_grad():
        layer.router.projection.weight.add_(torch.randn(3, D, generator=torch.Generator().manual_seed(2)))
    assert routed(layer, X).weight.std() > 0.1
    assert (adapted.model(X) - block()(X)).abs().max() > 0.01


def test_dynamic_dino_with_one_copy_in_one_slice_is_dense_tuning():
    adapted, layer = put(experts=1, top_k=1)
    dense = block()
    for model in (adapted.model, dense):
        (model(X) - X.roll(1, 0)).square().sum().backward()
    assert torch.allclose(layer.experts.up.grad[0], dense[0].weight.grad, rtol=0, atol=1e-10)
    assert torch.allclose(layer.experts.down_bias.grad[0], dense[2].bias.grad, rtol=0, atol=1e-10)


def test_dynamic_dino_experts_that_are_not_chosen_get_no_gradient():
    adapted, layer = put(experts=16)
    shake(layer)
    x = X[:2]
    adapted.model(x).sum().backward()
    idle = routed(layer, x).counts == 0
    assert idle.any()
    for p in layer.experts.parameters():
        assert not p.grad[idle].any() and p.grad[~idle].flatten(1).any(1).all()
    assert all(p.grad is None for p in layer.base.parameters())


def test_dynamic_dino_trains_what_is_wanted_and_nothing_else():
    torch.manual_seed(0)
    model = DecoderLM(32, 16, 2, 2, lambda layer: GLU(16, 24), 9)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    adapted = adapt(model, "dynamic-dino", ("*.ffn.*", "*.0.attention.*"), experts=8)
    assert set(adapted.layers) == {
        "blocks.0.ffn",
        "blocks.1.ffn",
        "blocks.0.attention.qkv",
        "blocks.0.attention.out",
    }
    optimizer = adapted.optimizer(1e-2)
    for _ in range(3):
        context = Context()
        F.cross_entropy(model(TOKENS, context).flatten(0, 1), TOKENS.flatten()).add(context.aux).backward()
        optimizer.step()
    assert context.aux.item() > 0
    assert all(torch.equal(p, before[name]) for name, p in adapted.remove().state_dict().items())


def test_dynamic_dino_tunes_a_lone_layer_in_full_and_folds_it_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 5))
    x = X[:, :4].float()
    dense = model(x)
    adapted = adapt(model, "dynamic-dino")
    assert torch.equal(model(x), dense)
    assert adapted.report()["trained"] == 4 * 7 + 7 * 5
    for p in adapted.parameters():
        p.data.add_(0.1)
    tuned = model(x)
    assert not torch.allclose(tuned, dense)
    assert torch.allclose(adapted.merge_back()(x), tuned, atol=1e-6)


def test_dynamic_dino_mixtures_cannot_be_folded_back():
    adapted, _ = put()
    with pytest.raises(InputError, match="cannot be merged back"):
        adapted.merge_back()


def test_dynamic_dino_is_saved_and_restored(tmp_path):
    torch.manual_seed(0)
    model = DecoderLM(32, 16, 2, 2, lambda layer: GLU(16, 24), 9)
    adapted = adapt(model, "dynamic-dino", experts=8)
    for layer in adapted.layers.values():
        for name, p in layer.named_parameters():
            if not name.startswith("base."):
                p.data.add_(torch.randn_like(p) * 0.1)
    expected = model(TOKENS)
    adapted.save(tmp_path / "a")
    adapted.remove()
    load_adapter(model, tmp_path / "a")
    assert torch.equal(model(TOKENS), expected)


def test_dynamic_dino_announces_what_it_routes():
    adapted, layer = put(balance=0.01)
    seen = []
    layer.observe(lambda module, routing, context: seen.append(routing))
    adapted.model(X)
    (routing,) = seen
    assert (layer.n_experts, layer.top_k) == (6, 2) and routing.losses.keys() == {"lbl"}
    share = routing.counts / routing.counts.sum()
    expected = 0.01 * 6 * (share * routing.probs.mean(0)).sum()
    assert torch.allclose(adapted.losses()["lbl"], expected)
    assert layer.router.coefficients == {"lbl": 0.01}


def test_dynamic_dino_keeps_the_size_of_its_output_when_k_is_changed():
    _, layer = put(experts=8)
    layer.router.set_top_k(4)
    routing = routed(layer, X)
    assert routing.indices.shape == (64, 4) and torch.allclose(routing.weights.sum(1), torch.tensor(2.0).double())


def test_dynamic_dino_fixed_partners_at_the_start_are_ties_and_the_null_knows():
    torch.manual_seed(0)
    router = SliceRouter(D, 4, 3, std=1.0)
    x = torch.randn(2000, D)
    mask = router(x).mask()
    counts = coactivation_counts(mask)
    assert same_copy_share(counts, 3) == 1.0
    assert effective_partners(counts).tolist() == pytest.approx([2.0] * 12)  # k - 1 without any training
    share = joint_share(counts)
    assert torch.equal(share, share.T) and torch.allclose(share.sum(1), 3 * share.diagonal())
    scores = coactivation_scores(mask, 20, torch.Generator().manual_seed(0))
    assert torch.equal(scores.mean.diagonal(), counts.diagonal().double())  # the null keeps the loads
    assert effective_partners(scores.mean).min() > 5

    torch.manual_seed(0)
    untied = coactivation_counts(SliceRouter(D, 4, 3, std=1.0, tie=False)(x).mask())
    assert same_copy_share(untied, 3) == pytest.approx(2 / 11, abs=0.15)
    random = coactivation_counts(selection_mask(torch.rand(20_000, 12).argsort(1)[:, :3], 12))
    assert same_copy_share(random, 3) == pytest.approx(2 / 11, abs=0.01)
    assert same_copy_share(torch.eye(4), 1) != same_copy_share(torch.eye(4), 1)  # NaN for k = 1


def test_dynamic_dino_defaults_fit_any_width():
    for d_hidden in (1, 5, 8):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Sequential(nn.Linear(4, d_hidden), nn.Tanh(), nn.Linear(d_hidden, 4)))
        x = torch.randn(5, 4)
        dense = model(x)
        adapted = adapt(model, "dynamic-dino")
        assert (adapted.layers["0"].n_experts, adapted.layers["0"].top_k) == (32, 1 if d_hidden % 2 else 2)
        assert torch.allclose(model(x), dense, atol=1e-6)
    assert put(experts=3, top_k=None)[1].top_k == 1


def test_dynamic_dino_runs_a_bfloat16_block():
    adapted = adapt(nn.Sequential(block().bfloat16()), "dynamic-dino", experts=4)
    assert adapted.layers["0"].experts.up.dtype == torch.float32  # what is trained stays so
    assert adapted.model(X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "n_experts is 0"),
        ({"experts": 4, "top_k": 5}, "top_k is 5 but must be between 1 and n_experts = 4"),
        ({"experts": 4, "top_k": 0}, "top_k is 0"),
        ({"experts": 6, "top_k": 4}, "top_k is 4 but must divide experts = 6"),
        ({"experts": 10, "top_k": 5}, "top_k is 5 but must divide the hidden width of 0, 12"),
        ({"gate": "k-renorm"}, "gate"),
        ({"balance": -1}, "must be at least 0"),
    ],
    ids=str,
)
def test_dynamic_dino_refuses_bad_input(options, message):
    model = nn.Sequential(block())
    with pytest.raises(InputError, match=message):
        adapt(model, "dynamic-dino", **options)
    assert isinstance(model[0], nn.Sequential)


def test_dynamic_dino_refuses_parts_that_do_not_fit():
    found = find_feed_forward(block())
    with pytest.raises(InputError, match="slices is 5"):
        SliceExperts(found, 2, 5)
    with pytest.raises(InputError, match="copies is 0"):
        SliceExperts(found, 0, 2)
    with pytest.raises(InputError, match="router has 4 experts"):
        SlicedFeedForward(found, SliceRouter(D, 2, 2), SliceExperts(found, 3, 2))
