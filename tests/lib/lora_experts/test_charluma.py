"""CharLuMA: a pool of columns whose order of selection matters, a router per language, and a projection that stays."""

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.adapt import adapt, load_adapter
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM, VisionClassifier
from workbench.lib.core.routing import Context
from workbench.lib.lora_experts.charluma import ColumnPool, LanguageRouter, LanguageSubspaceProjector, PoolLayer

IMAGES, LENGTH, D_IN, D_OUT, RANK, POOL = 6, 5, 10, 12, 4, 9
H = torch.randn(IMAGES, LENGTH, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LANGUAGE = torch.tensor([0, 1, 2, 0, 2, 1])


def projector(shake: bool = True, **options) -> LanguageSubspaceProjector:
    torch.manual_seed(0)
    options = {"rank": RANK, "pool": POOL, "alpha": 3.0} | options
    layer = LanguageSubspaceProjector(D_IN, D_OUT, **options).double()
    if shake:
        nn.init.normal_(layer.experts.columns)
    return layer


def small(**options):
    """An adapted projector inside a model that takes pictures; and the handle."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Linear(D_IN, 8), nn.GELU(), nn.Linear(8, D_OUT))).double()
    adapted = adapt(net, "charluma", **{"rank": RANK, "pool": POOL} | options)
    net.double()
    nn.init.normal_(adapted.layers["0"].experts.columns)
    return adapted


def test_charluma_is_the_frozen_mlp_while_the_pool_is_zero():
    layer = projector(shake=False)
    assert torch.equal(layer(H, LANGUAGE), layer.base(H))


@pytest.mark.parametrize("pairing", ["rank", "index"])
def test_charluma_equals_its_formula_written_out(pairing):
    layer = projector(pairing=pairing, temperature=0.7)
    expected = layer.base(H).clone()
    for i in range(IMAGES):
        logits = layer.router.weight[LANGUAGE[i]] @ H[i].mean(0) / 0.7
        order = sorted(range(POOL), key=lambda n, scores=logits: -scores[n])[:RANK]
        weight = torch.softmax(logits[order], 0)  # over the chosen ones alone
        for t in range(LENGTH):
            z = layer.a @ H[i, t]
            for j, n in enumerate(order):
                row = j if pairing == "rank" else n % RANK
                expected[i, t] += 3.0 / RANK * weight[j] * z[row] * layer.experts.columns[n]
        assert layer(H, LANGUAGE) is not None and layer.selection[0][i].tolist() == order
        torch.testing.assert_close(layer.selection[1][i], weight.detach())
    torch.testing.assert_close(layer(H, LANGUAGE), expected, atol=1e-12, rtol=1e-12)


def test_charluma_trains_pool_and_routers_and_never_a_or_the_mlp():
    layer = projector()
    trained = {name: p.numel() for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"router.weight": 3 * POOL * D_IN, "experts.columns": POOL * D_OUT}
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(H, LANGUAGE).square().sum().backward()
        optimizer.step()
    moved = {name for name, p in layer.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trained)
    assert projector(train_a=True).a.requires_grad
    assert all(p.requires_grad for p in projector(freeze_mlp=False).base.parameters())


def test_charluma_first_step_moves_the_pool_and_not_the_routers():
    layer = projector(shake=False)
    layer(H, LANGUAGE).square().sum().backward()
    assert not layer.router.weight.grad.any() and layer.experts.columns.grad.abs().max() > 0


def test_charluma_all_columns_with_equal_scores_are_a_plain_lora():
    layer = projector(pool=RANK, pairing="index")
    nn.init.zeros_(layer.router.weight)
    update = layer.experts.columns.T @ layer.a * 3.0 / RANK**2
    torch.testing.assert_close(layer(H, LANGUAGE) - layer.base(H), H @ update.T, atol=1e-12, rtol=1e-12)


def test_charluma_mixed_languages_equal_one_language_each():
    layer = projector()
    for language in range(3):
        alone = layer(H, torch.full((IMAGES,), language))
        rows = language == LANGUAGE
        torch.testing.assert_close(layer(H, LANGUAGE)[rows], alone[rows], atol=1e-12, rtol=1e-12)
    assert not torch.allclose(layer(H, torch.zeros_like(LANGUAGE)), layer(H, torch.ones_like(LANGUAGE)))


def test_charluma_absent_languages_and_unselected_columns_get_no_gradient():
    layer = projector()
    layer(H[:2], torch.tensor([2, 0])).square().sum().backward()
    per_language = layer.router.weight.grad.abs().amax((1, 2))
    assert per_language[1] == 0 and per_language[0] > 0 and per_language[2] > 0
    chosen = torch.zeros(POOL, dtype=torch.bool)
    chosen[layer.selection[0].flatten()] = True
    assert not chosen.all()
    assert torch.equal(layer.experts.columns.grad.abs().amax(1) > 0, chosen)


@pytest.mark.parametrize(("pairing", "depends"), [("rank", True), ("index", False)])
def test_charluma_order_of_the_selection_matters_by_rank_only(pairing, depends):
    """The same set of columns with the same weights each, but for the order: equal weights make order the one thing."""
    pool = ColumnPool(POOL, D_OUT, 1.0, pairing).double()
    nn.init.normal_(pool.columns)
    z = torch.randn(1, LENGTH, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    router = LanguageRouter(D_IN, POOL, RANK, 1)
    logits = torch.zeros(POOL, dtype=torch.float64)
    logits[[1, 2, 5, 7]] = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64) * 1e-9 + 1
    swapped = logits.clone()
    swapped[[1, 2]] = logits[[2, 1]]
    outputs, x = [], torch.ones(1, 1, dtype=torch.float64)
    for scores in (logits, swapped):
        router.weight = nn.Parameter(scores[None, :, None])
        routing = router(x, Context(domain=torch.zeros(1, dtype=torch.long)))
        assert set(routing.indices[0].tolist()) == {1, 2, 5, 7}
        outputs.append(pool(z, routing))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2 if depends else torch.allclose(*outputs, atol=1e-7)


def test_charluma_selection_is_per_image_and_ignores_the_order_of_its_tokens():
    layer = projector()
    layer(H, LANGUAGE)
    index, weight = layer.selection
    assert index.shape == weight.shape == (IMAGES, RANK)
    order = torch.tensor([3, 0, 4, 1, 2])
    y = layer(H[:, order], LANGUAGE)
    assert torch.equal(layer.selection[0], index)
    torch.testing.assert_close(layer.selection[1], weight)
    torch.testing.assert_close(y, layer(H, LANGUAGE)[:, order], atol=1e-12, rtol=1e-12)


def test_charluma_without_a_language_uses_the_mean_of_the_routers():
    adapted = small()
    layer = adapted.layers["0"]
    y = adapted.model(H)
    assert not any(torch.allclose(y, told) for told in _told(adapted))
    with torch.no_grad():
        layer.router.weight.copy_(layer.router.weight.mean(0).expand_as(layer.router.weight).clone())
    torch.testing.assert_close(adapted.model(H), y, atol=1e-12, rtol=1e-12)
    for told in _told(adapted):
        torch.testing.assert_close(told, y, atol=1e-12, rtol=1e-12)


def _told(adapted):
    for language in range(3):
        with adapted.given(language=language):
            yield adapted.model(H)


def test_charluma_takes_a_language_for_all_for_each_image_or_for_each_token():
    adapted = small()
    with adapted.given(language=LANGUAGE):
        y = adapted.model(H)
    with adapted.given(language=LANGUAGE.repeat_interleave(LENGTH)):
        torch.testing.assert_close(adapted.model(H), y)
    with adapted.given(language=1):
        torch.testing.assert_close(adapted.model(H)[LANGUAGE == 1], y[LANGUAGE == 1])
    mixed = torch.arange(IMAGES * LENGTH) % 3
    with adapted.given(language=mixed), pytest.raises(InputError, match="differs within an image"):
        adapted.model(H)
    with adapted.given(language=3), pytest.raises(InputError, match="language holds 3 but must be between 0 and"):
        adapted.model(H)
    with pytest.raises(InputError, match=r"fact of charluma 'lang' is unknown"), adapted.given(lang=1):
        pass


def test_charluma_goes_beside_whole_blocks_and_lone_layers():
    lm = DecoderLM(11, 16, 2, 4, lambda layer: GLU(16, 24), 12)
    adapted = adapt(lm, "charluma", "*")
    assert all(isinstance(layer, PoolLayer) for layer in adapted.layers.values())
    assert isinstance(adapted.layers["blocks.0.ffn"].base, GLU)
    assert isinstance(adapted.layers["blocks.0.attention.qkv"].base, nn.Linear)
    tokens = torch.randint(11, (3, 12))
    with adapted.given(language=torch.tensor([0, 1, 2])):
        assert lm(tokens).shape == (3, 12, 11)
    vision = VisionClassifier((1, 8, 8), 4, 16, 1, 4, lambda layer: GLU(16, 24), 5)
    adapt(vision, "charluma")
    assert vision(torch.randn(2, 1, 8, 8)).shape == (2, 5)
    tiny = nn.Sequential(nn.Linear(4, 3))
    adapt(tiny, "charluma")
    assert tiny(torch.randn(2, 4)).shape == (2, 3)


def test_charluma_announces_every_token_and_is_watched_with_tasks_for_tokens():
    lm = DecoderLM(11, 16, 1, 4, lambda layer: GLU(16, 24), 12)
    adapted = adapt(lm, "charluma", "*.ffn.*", rank=4, pool=9)
    layer, seen = adapted.layers["blocks.0.ffn"], []
    layer.observe(lambda module, routing, context: seen.append((module, routing, context)))
    lm(torch.randint(11, (3, 12)), Context(domain=torch.arange(3).repeat_interleave(12)))
    ((module, routing, context),) = seen
    assert module is layer and routing.n_tokens == 36 and routing.n_experts == 9 and routing.top_k == 4
    assert torch.equal(context.domain, torch.arange(3).repeat_interleave(12))
    torch.testing.assert_close(routing.probs.sum(1), torch.ones(36))
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(36))
    assert torch.equal(routing.indices.view(3, 12, 4)[:, 0], routing.indices.view(3, 12, 4)[:, 7])


def test_charluma_is_saved_and_restored_with_its_frozen_projection(tmp_path):
    adapted = small()
    adapted.save(tmp_path / "adapter")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Linear(D_IN, 8), nn.GELU(), nn.Linear(8, D_OUT))).double()
    torch.manual_seed(99)
    adapted_again = load_adapter(net, tmp_path / "adapter")
    net.double()
    with adapted.given(language=LANGUAGE), adapted_again.given(language=LANGUAGE):
        torch.testing.assert_close(net(H), adapted.model(H), atol=1e-6, rtol=1e-6)
    with pytest.raises(InputError, match="charluma cannot be merged back"):
        adapted.merge_back()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairing": "set"}, "pairing 'set' is unknown"),
        ({"rank": 11}, "rank is 11 but must be between 1 and the layer's smaller width, 10"),
        ({"rank": 0}, "rank is 0"),
        ({"pool": 3}, "pool is 3 but must be at least the rank, 4"),
        ({"languages": 0}, "languages is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_charluma_names_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        projector(**options)
    with pytest.raises(InputError, match=message):
        small(**options)


def test_charluma_has_as_many_columns_as_the_rank():
    router = LanguageRouter(D_IN, POOL, RANK, 3)
    router.set_top_k(RANK)
    with pytest.raises(InputError, match="top_k is 2"):
        router.set_top_k(2)
    with pytest.raises(InputError, match="NaN or infinite"):
        router(torch.full((2, D_IN), torch.nan), Context())
