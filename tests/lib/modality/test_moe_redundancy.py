"""Adapters that only image tokens pass, new rows beside frozen ones, and where these start."""

import builtins
import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import ot
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from workbench.errors import InputError
from workbench.lib.core.experts import GLU, GLUExperts
from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import moe_layers
from workbench.lib.core.routing import Context
from workbench.lib.core.split import split_glu
from workbench.lib.core.train import TrainConfig, make_optimizer
from workbench.lib.modality.moe_redundancy import (
    KINDS,
    STARTS,
    ExtendedLM,
    ImageTokens,
    PartialLoRAExperts,
    PartialLoRALinear,
    TextView,
    apply_partial_lora,
    expert_redundancy,
    gromov_wasserstein_embeddings,
    start_rows,
)

V, NEW, D, T = 20, 6, 16, 10
RANKS = {"*.attention.*": 3, "*.router.*": 2, "*.experts": 2}


def text_model(experts: bool = True, seed: int = 0) -> DecoderLM:
    torch.manual_seed(seed)
    model = DecoderLM(V, D, 2, 2, lambda layer: GLU(D, 32), T)
    for block in model.blocks if experts else ():
        block.ffn = split_glu(block.ffn, 4, 2)
    return model.eval()


def extended(shaken: bool = True, everywhere: bool = False, ranks=RANKS, **options) -> tuple[DecoderLM, ExtendedLM]:
    """The frozen text model, and a copy of it that has learned something about images."""
    base = text_model(**options)
    model = copy.deepcopy(base)
    images = apply_partial_lora(model, ranks, everywhere=everywhere)
    rows = torch.randn(NEW, D, generator=torch.Generator().manual_seed(1)) * D**-0.5
    model = ExtendedLM(model, rows, images).eval()
    return base, shake(model) if shaken else model


def shake(model: nn.Module, seed: int = 2) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return model


def text(rows: int = 3, seed: int = 3) -> torch.Tensor:
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(seed))


def mixed(first: int = 4, last: int = 8) -> torch.Tensor:
    """Text, from `first` to `last` image tokens, text again."""
    tokens = text()
    tokens[:, first:last] = V + torch.arange(3 * (last - first)).view(3, -1) % NEW
    return tokens


def nats(model: ExtendedLM, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


# -- what text sees


@pytest.mark.parametrize("experts", [True, False])
def test_text_is_the_same_to_the_bit_whatever_adapters_and_rows_hold(experts: bool):
    ranks = RANKS if experts else {"*.attention.*": 3, "*.ffn.*": 2}
    base, model = extended(experts=experts, ranks=ranks)
    hidden = []
    for part in (base.norm, model.base.norm):
        part.register_forward_hook(lambda module, given, output: hidden.append(output))
    assert torch.equal(base(text()), model(text(), text_only=True))
    assert torch.equal(*hidden)
    assert torch.equal(base(text()), model(text())[..., :V])
    assert torch.equal(base(text()), TextView(model)(text(), Context()))


def test_text_is_the_same_to_the_bit_after_training_and_no_text_row_has_moved():
    base, model = extended(shaken=False)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = make_optimizer(model, TrainConfig(1, lr=0.05, weight_decay=0.5))
    start = nats(model, mixed()).item()
    for _ in range(8):
        optimizer.zero_grad()
        nats(model, mixed()).backward()
        optimizer.step()
    assert nats(model, mixed()).item() < start - 0.1
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert all(torch.equal(named[name], p) for name, p in frozen.items())
    assert not any(id(named[name]) in given for name in frozen)
    assert "base.embedding.weight" in frozen and "base.position" in frozen
    assert torch.equal(base(text()), model(text(), text_only=True))


def test_nothing_before_the_first_image_token_changes_with_any_adapter():
    _, model = extended()
    tokens = mixed()
    before = model(tokens)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and name != "new.weight":
                p.copy_(torch.randn(p.shape) * 2)
    after = model(tokens)
    assert torch.equal(before[:, :4], after[:, :4])
    changed = (before != after).any(-1)
    assert changed[:, 4:8].all() and changed[:, 8:].all()  # text behind an image sees its keys and values


def test_text_logits_do_not_know_the_image_rows_and_a_shared_softmax_does():
    _, model = extended()
    alone, together = model(text(), text_only=True), model(text())
    assert alone.shape[-1] == V and together.shape[-1] == V + NEW
    assert not torch.allclose(alone.softmax(-1), together.softmax(-1)[..., :V])


def test_ordinary_lora_changes_text():
    base, model = extended(everywhere=True)
    assert not torch.allclose(base(text()), model(text(), text_only=True))


# -- the adapters


def test_at_the_start_the_adapters_change_nothing():
    base, model = extended(shaken=False)
    plain = ExtendedLM(base, model.new.weight)
    torch.testing.assert_close(model(mixed()), plain(mixed()), atol=1e-6, rtol=1e-5)


def test_with_every_token_of_an_image_it_is_lora():
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    layer = shake(PartialLoRALinear(base, rank=2, alpha=4.0))
    x = torch.randn(3, 7, 6)
    full = torch.ones(3, 7, dtype=torch.bool)
    weight = base.weight + 4 / 2 * layer.update.b[0] @ layer.update.a[0]
    torch.testing.assert_close(layer(x, full), F.linear(x, weight, base.bias))
    some = torch.rand(3, 7) < 0.5
    y = layer(x, some)
    assert torch.equal(y[~some], base(x)[~some])
    torch.testing.assert_close(y[some], F.linear(x, weight, base.bias)[some])
    assert torch.equal(layer(x), base(x)) and torch.equal(layer(x, ~full), base(x))


def test_image_tokens_meet_experts_whose_matrices_are_sums():
    layer = split_glu(GLU(D, 32), 4, 2)
    images = apply_partial_lora(layer, {"experts": 2})
    shake(layer)
    bank, x = layer.experts, torch.randn(12, D)
    mask = torch.arange(12) % 3 == 0
    summed = GLUExperts(4, D, 8)
    with torch.no_grad():
        for weight, frozen, update in (
            (summed.gate_up, bank.base.gate_up, bank.gate_up),
            (summed.down, bank.base.down, bank.down),
        ):
            weight.copy_(frozen + torch.stack([update.delta(e) for e in range(4)]))
    routing = layer.router(x)
    with images.told(mask):
        y = layer(x)
    torch.testing.assert_close(y[mask], summed(x, routing)[mask])
    assert torch.equal(y[~mask], bank.base(x[~mask], routing.only(~mask)))
    with images.told(torch.ones(12, dtype=torch.bool)):
        torch.testing.assert_close(layer(x), summed(x, routing))
    assert torch.equal(layer(x), bank.base(x, routing))


def test_gradients_come_from_image_positions_only():
    _, model = extended()
    nats(model, text()).backward()
    adapters = [p for m in model.modules() if isinstance(m, LowRankExperts) for p in m.parameters()]
    assert adapters and all(p.grad is None for p in adapters)
    tokens = mixed()
    x = torch.randn(3, T, D)
    layer = model.base.blocks[0].attention.qkv
    layer(x, tokens >= V).square().sum().backward()
    alone = [p.grad.clone() for p in layer.update.parameters()]
    layer.zero_grad()
    layer(x[tokens >= V], torch.ones(12, dtype=torch.bool)).square().sum().backward()
    for p, expected in zip(layer.update.parameters(), alone, strict=True):
        torch.testing.assert_close(p.grad, expected)


@pytest.mark.parametrize("experts", [True, False])
def test_what_is_trained_is_the_factors_and_the_new_rows(experts: bool):
    ranks = RANKS if experts else {"*.attention.*": 3, "*.ffn.*": 2}
    _, model = extended(experts=experts, ranks=ranks)
    layer = 3 * (D + 3 * D) + 3 * (D + D)
    layer += 2 * (D + 4) + 4 * 2 * (D + 16 + 8 + D) if experts else 2 * (D + 64 + 32 + D)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * layer + NEW * D
    assert all(isinstance(layer.experts, PartialLoRAExperts) for layer in moe_layers(model).values())


def test_a_text_batch_evaluates_no_adapter(monkeypatch: pytest.MonkeyPatch):
    _, model = extended()
    monkeypatch.setattr(PartialLoRAExperts, "adapted", lambda self: pytest.fail("an adapter was evaluated"))
    model(text())
    with pytest.raises(pytest.fail.Exception):
        model(mixed())


def test_what_cannot_be_adapted_says_why_and_changes_nothing():
    model = text_model()
    before = [*model.named_modules()]
    with pytest.raises(InputError, match=r"ranks '\*.attn.\*' is unknown"):
        apply_partial_lora(model, {"*.attn.*": 2})
    with pytest.raises(InputError, match="rank is 40"):
        apply_partial_lora(model, {"*.attention.*": 2, "*.experts": 40})
    assert [*model.named_modules()] == before and all(p.requires_grad for p in model.parameters())
    with pytest.raises(InputError, match="mask has 5 tokens but a layer sees 6"):
        layer = PartialLoRALinear(nn.Linear(4, 4), 2)
        with layer.images.told(torch.ones(5, dtype=torch.bool)):
            layer(torch.ones(6, 4))
    with pytest.raises(InputError, match=r"mask has shape \(6,\) but must be that of the tokens, \(2, 3\)"):
        PartialLoRALinear(nn.Linear(4, 4), 2)(torch.ones(2, 3, 4), torch.ones(6, dtype=torch.bool))


def test_image_tokens_are_told_by_true_and_false_alone(unchecked):
    """Numbers would be taken for the places of tokens."""
    numbers = torch.tensor([0, 1, 0])
    with pytest.raises(InputError, match=r"mask is torch.int64 but must be torch.bool"), ImageTokens().told(numbers):
        pass
    with pytest.raises(InputError, match=r"mask is torch.int64 but must be torch.bool"):
        PartialLoRALinear(nn.Linear(3, 3), 2)(torch.ones(3, 3), numbers)


def test_threads_that_share_a_model_tell_their_own_tokens():
    _, model = extended()
    rows = [text(), mixed(), mixed(2, 9), torch.full_like(text(), V)]
    with torch.no_grad():
        alone = [model(tokens) for tokens in rows]
    meet = threading.Barrier(len(rows))

    def wait(*_) -> None:
        meet.wait(60)  # all have told, and nobody has read

    def said(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens)

    model.base.blocks[0].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(len(rows)) as pool:
        for found, wanted in zip(pool.map(said, rows), alone, strict=True):
            assert torch.equal(found, wanted)


def test_a_model_is_adapted_once():
    for layer in (nn.Sequential(nn.Linear(4, 4)), split_glu(GLU(D, 32), 4, 2)):
        apply_partial_lora(layer, 2)
        before = {name: (p.data_ptr(), p.requires_grad) for name, p in layer.named_parameters()}
        with pytest.raises(InputError, match="model has PLoRA already, as"):
            apply_partial_lora(layer, 2)
        assert {name: (p.data_ptr(), p.requires_grad) for name, p in layer.named_parameters()} == before


def test_a_checkpoint_that_would_forget_the_image_tokens_is_refused():
    layer = PartialLoRALinear(nn.Linear(4, 4), 2)
    x = torch.ones(6, 4, requires_grad=True)
    with layer.images.told(torch.ones(6, dtype=torch.bool)):
        y = checkpoint(layer, x, use_reentrant=False)
    with pytest.raises(InputError, match="a checkpoint repeats a layer"):
        y.sum().backward()


def test_the_extended_model_refuses_what_it_has_no_row_for(unchecked):
    base, model = extended()
    with pytest.raises(InputError, match=r"tokens is torch.int64 of 26 to 26 but must hold ids 0 to 25"):
        model(torch.full((1, 3), V + NEW))
    with pytest.raises(InputError, match="of -1 to 2 but must hold ids 0 to 25"):
        model(torch.tensor([[-1, 2]]))
    for wrong in (text(1).repeat(1, 2), text(1)[0], text(0)):
        with pytest.raises(InputError, match=r"tokens has shape .* but must be \(batch, 1 to"):
            model(wrong)
    with pytest.raises(InputError, match=r"rows has shape \(4, 3\) but must be"):
        ExtendedLM(base, torch.ones(4, 3))
    assert model(torch.full((1, 3), V + NEW - 1)).shape == (1, 3, V + NEW)
    images = ImageTokens()
    with images.told(torch.zeros(2, 3, dtype=torch.bool)):
        assert images.of(torch.ones(2, 3, 4)) is None


def test_a_copy_tells_its_own_layers_and_a_state_dict_holds_all():
    _, model = extended()
    expected = model(mixed())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(mixed()), expected)
    assert twin.images is not model.images and twin.images is twin.base.blocks[0].ffn.experts.images
    _, other = extended(shaken=False, seed=9)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(mixed()), expected)


# -- where the rows start


def cloud(n: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(points: torch.Tensor, seed: int = 5) -> torch.Tensor:
    """Rotated and moved."""
    return points @ torch.linalg.qr(cloud(points.shape[1], points.shape[1], seed)).Q + 3


def test_a_coupling_has_its_marginals_and_is_the_best_of_its_starts():
    _, info = gromov_wasserstein_embeddings(cloud(12, 3, 0), cloud(30, 8, 1), starts=5)
    torch.testing.assert_close(info.coupling.sum(1), torch.full((12,), 1 / 12, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(info.coupling.sum(0), torch.full((30,), 1 / 30, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (info.coupling >= 0).all()
    assert len(info.values) == 5 and info.value == min(info.values) and len(set(info.values)) > 1


def test_a_permuted_and_rotated_copy_of_the_codes_is_recovered():
    codes = cloud(16, 6, 0)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    rows, info = gromov_wasserstein_embeddings(codes, turned(codes)[order])
    expected = torch.zeros(16, 16, dtype=torch.float64)
    expected[order, torch.arange(16)] = 1 / 16
    torch.testing.assert_close(info.coupling, expected, atol=1e-8, rtol=0)
    assert info.value == pytest.approx(0, abs=1e-10)
    matched = turned(codes)
    torch.testing.assert_close(F.normalize(rows, dim=1), F.normalize(matched, dim=1))


def test_only_distances_matter():
    codes, words = cloud(10, 3, 0), cloud(20, 5, 1)
    _, info = gromov_wasserstein_embeddings(codes, words)
    for other in ((turned(codes), words), (codes, turned(words)), (4 * codes, words / 7)):
        _, same = gromov_wasserstein_embeddings(*other)
        assert same.value == pytest.approx(info.value, rel=1e-6)


def test_the_value_is_that_of_pot_from_the_same_start_and_the_formula():
    codes, words = cloud(9, 3, 0), cloud(14, 5, 1)
    rows, info = gromov_wasserstein_embeddings(codes, words, starts=1)
    a, b = (ot.dist(x.numpy(), metric="euclidean") for x in (codes, words))
    a, b = a / a.mean(), b / b.mean()
    plan, log = ot.gromov.gromov_wasserstein(a, b, np.full(9, 1 / 9), np.full(14, 1 / 14), log=True)
    assert info.value == pytest.approx(log["gw_dist"], rel=1e-6)
    torch.testing.assert_close(info.coupling, torch.from_numpy(plan), atol=1e-6, rtol=0)
    gaps = (a[:, :, None, None] - b[None, None]) ** 2  # k l i j
    assert info.value == pytest.approx(np.einsum("klij,ki,lj->", gaps, plan, plan), rel=1e-6)
    means = 9 * info.coupling @ words
    torch.testing.assert_close(F.normalize(rows, dim=1), F.normalize(means, dim=1))
    torch.testing.assert_close(rows.norm(dim=1), words.norm(dim=1).mean().expand(9))


def test_starts_differ_in_what_they_say():
    codes, words = cloud(10, 4, 0).float(), cloud(25, 8, 1).float() * 0.2
    rows = {how: start_rows(how, codes, words, seed=3) for how in STARTS}
    assert all(found.shape == (10, 8) and found.dtype == torch.float32 for found in rows.values())
    assert not torch.equal(rows["gw"], rows["permuted"])
    key = [sorted(map(tuple, rows[how].tolist())) for how in ("gw", "permuted")]
    assert key[0] == key[1]  # the same rows
    assert rows["random"].std().item() == pytest.approx(words.std().item(), rel=0.3)
    assert (rows["mean"] - words.mean(0)).std() < 0.2 * words.std()
    linear = start_rows("linear", codes + 7, words, seed=3)
    torch.testing.assert_close(linear, rows["linear"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(linear.norm(dim=1), words.norm(dim=1).mean().expand(10))
    assert all(torch.equal(found, start_rows(how, codes, words, seed=3)) for how, found in rows.items())


def test_what_has_no_geometry_is_refused(monkeypatch: pytest.MonkeyPatch, unchecked):
    with pytest.raises(InputError, match="the 4 points are all the same"):
        gromov_wasserstein_embeddings(torch.ones(4, 2), cloud(5, 3, 0))
    for codes in (torch.ones(4), torch.tensor([[1.0, torch.nan], [2.0, 3.0]]), torch.tensor([[torch.inf], [0.0]])):
        for how in STARTS:
            with pytest.raises(InputError, match=r"codes has shape .* but must be \(n, dim\) of finite numbers"):
                start_rows(how, codes, cloud(5, 3, 0))
    with pytest.raises(InputError, match="starts is 0"):
        gromov_wasserstein_embeddings(cloud(4, 2, 0), cloud(5, 3, 0), starts=0)
    with pytest.raises(InputError, match="how 'gww' is unknown; did you mean 'gw'"):
        start_rows("gww", cloud(4, 2, 0), cloud(5, 3, 0))
    real = builtins.__import__

    def without(name, *rest, **keywords):
        if name == "ot":
            raise ImportError("No module named 'ot'")
        return real(name, *rest, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"needs POT: pip install 'workbench\[modality\]'"):
        gromov_wasserstein_embeddings(cloud(4, 2, 0), cloud(5, 3, 0))
    assert start_rows("random", cloud(4, 2, 0), cloud(5, 3, 0)).shape == (4, 3)


# -- how redundant the experts are


def test_redundancy_is_that_of_the_outputs_of_all_experts_on_tokens_of_one_kind():
    _, model = extended()
    tokens = mixed()
    inputs = {}
    for name, layer in moe_layers(model).items():
        layer.register_forward_pre_hook(lambda layer, given, name=name: inputs.setdefault(name, given[0]))
    found = {kind: expert_redundancy(model, tokens, kind) for kind in KINDS}
    for kind, new in (("text", False), ("image", True)):
        for i, (name, layer) in enumerate(moe_layers(model).items()):
            x = inputs[name][(tokens >= V) == new]
            weights = layer.experts.adapted() if new else layer.experts.base
            gate, up = (x @ weights.gate_up[1].T).chunk(2, -1)
            one = (F.silu(gate) * up) @ weights.down[1].T
            gate, up = (x @ weights.gate_up[3].T).chunk(2, -1)
            other = (F.silu(gate) * up) @ weights.down[3].T
            expected = F.cosine_similarity(one, other, dim=-1).mean().item()
            assert found[kind][i, 1, 3].item() == pytest.approx(expected, abs=1e-5)
    assert found["text"].shape == (2, 4, 4)
    # text tokens before the image are those of the frozen model, so what they meet there is, too
    assert math.isfinite(float(found["image"].sum()))


def test_redundancy_of_what_has_none_says_why():
    _, model = extended()
    with pytest.raises(InputError, match="tokens has none of kind 'image'"):
        expert_redundancy(model, text())
    with pytest.raises(InputError, match="kind 'images' is unknown"):
        expert_redundancy(model, mixed(), "images")
    dense = ExtendedLM(text_model(experts=False), torch.ones(NEW, D))
    with pytest.raises(InputError, match="model has no layer with experts"):
        expert_redundancy(dense, mixed())
