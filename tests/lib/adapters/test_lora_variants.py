"""LoRA's variants: what each is on paper, what peft makes of the same weights, what holds for every one."""

import copy
import json

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import workbench
from workbench.errors import InputError
from workbench.lib.adapters.lora_variants import FITTED, OWN, STARTS, nearest, of_weight, plain_loras, rank_budget
from workbench.lib.core.adapt import adapt
from workbench.lib.core.adapt.peft import read_peft, write_peft

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
SHORT = {"adalora": {"begin": 2, "end": 6, "every": 2}, "relora": {"every": 3, "warm": 2}}
PLAIN = ["lora", "rslora", "lora+", "lora-fa", "pissa", "milora", "olora", "lora-ga", "eva", "riemannian", "lora-pro"]


def small() -> nn.Module:
    """Wide, narrow and square layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 6)
    ).double()


def loss(model) -> torch.Tensor:
    return F.mse_loss(model(X), Y)


def put(variant: str, rank: int = 3, fit: bool = True, **options):
    torch.manual_seed(1)
    options = {"own": SHORT.get(variant)} | options
    adapted = adapt(small(), "lora-variants", variant=variant, rank=rank, **options)
    if variant in FITTED and fit:
        adapted.adapter.fit(adapted, [0, 1], lambda _: loss(adapted.model))
    return adapted


def trained(variant: str, steps: int = 4, **options):
    adapted = put(variant, **options)
    optimizer = adapted.optimizer(lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(adapted.model).backward()
        optimizer.step()
    return adapted


def deltas(adapted) -> dict[str, torch.Tensor]:
    return {name: layer.fixed_update().detach() for name, layer in adapted.layers.items()}


@pytest.mark.parametrize("variant", OWN)
def test_a_variant_starts_as_its_base_learns_merges_and_is_taken_off(variant):
    before = small()
    adapted = put(variant)
    torch.testing.assert_close(adapted.model(X), before(X), atol=1e-10, rtol=1e-10)
    start = loss(adapted.model).item()
    adapted.remove()
    adapted = trained(variant, 8)
    assert loss(adapted.model).item() < start - 1e-3
    y = adapted.model(X)
    single = copy.deepcopy(adapted.model)
    merged = adapted.merge_back()
    torch.testing.assert_close(merged(X), y, atol=1e-10, rtol=1e-10)
    assert [type(m) for m in merged.modules()] == [type(m) for m in before.modules()]
    torch.testing.assert_close(single(X), y, atol=1e-12, rtol=1e-12)
    adapted = trained(variant, 8)
    state = adapted.remove().state_dict()
    assert all(torch.equal(state[name], t) for name, t in before.state_dict().items())


@pytest.mark.parametrize("variant", OWN)
def test_a_variant_is_saved_and_goes_on_from_what_was_saved(variant, tmp_path):
    adapted = trained(variant)
    adapted.save(tmp_path / "a")
    torch.manual_seed(7)
    again = workbench.load_adapter(small(), tmp_path / "a")
    assert torch.equal(again.model(X), adapted.model(X))
    assert again.report() == adapted.report()
    results = []
    for one in (adapted, again):  # both with an optimizer that remembers nothing
        torch.manual_seed(3)
        optimizer = one.optimizer(0.02)
        for _ in range(3):
            optimizer.zero_grad()
            loss(one.model).backward()
            optimizer.step()
        results.append(one.model(X))
    assert torch.equal(*results)


@pytest.mark.parametrize("variant", OWN)
def test_a_variant_computes_in_the_type_of_autocast_and_trains_in_float32_on_a_narrow_model(variant):
    adapted = put(variant)
    model, x = adapted.model.float(), X.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), atol=5e-2, rtol=5e-2)
    adapted = adapt(small().bfloat16(), "lora-variants", variant=variant, rank=3)
    assert adapted.model(X.bfloat16()).dtype == torch.bfloat16
    assert {p.dtype for p in adapted.parameters()} == {torch.float32}


@pytest.mark.parametrize("variant", STARTS)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_start_has_its_rank_and_is_the_part_of_the_weight_that_it_says(variant, rank):
    adapted = put(variant, rank, alpha=2.0)
    for layer in adapted.layers.values():
        product = layer.experts.delta(0).detach()
        assert torch.linalg.matrix_rank(product) == rank
        u, s, vt = torch.linalg.svd(layer.base.weight, full_matrices=False)
        part = {"pissa": slice(None, rank), "milora": slice(len(s) - rank, None)}.get(variant)
        if part is not None:
            torch.testing.assert_close(product, (u[:, part] * s[part]) @ vt[part])


def test_pissa_of_full_rank_leaves_nothing_and_two_parts_are_the_weight():
    weight = torch.randn(6, 9, dtype=torch.float64)
    for scale in (1.0, 0.5):
        a, b = of_weight("pissa", weight, 6, scale)
        torch.testing.assert_close(scale * b @ a, weight)
        (a, b), (c, d) = of_weight("pissa", weight, 4, scale), of_weight("milora", weight, 2, scale)
        torch.testing.assert_close(scale * (b @ a + d @ c), weight)
    a, b = of_weight("olora", weight, 6, 1.0)
    torch.testing.assert_close(b @ a, weight)
    torch.testing.assert_close(b.T @ b, torch.eye(6, dtype=torch.float64))


def gradient(model: nn.Module, name: str) -> torch.Tensor:
    """dL/dW of a plain linear layer."""
    return torch.autograd.grad(loss(model), model.get_submodule(name).weight)[0]


def test_only_b_learns_at_first_and_a_step_of_descent_moves_the_weight_as_the_frame_says():
    adapted = put("lora", alpha=6.0)
    loss(adapted.model).backward()
    g = gradient(small(), "0")
    bank = adapted.layers["0"].experts
    assert not bank.a.grad.any()
    torch.testing.assert_close(bank.b.grad[0], 2.0 * g @ bank.a[0].T)
    with torch.no_grad():
        bank.b.normal_()
    layer = adapted.layers["0"]
    bank.a.grad = bank.b.grad = None
    loss(adapted.model).backward()
    moved = copy.deepcopy(small())
    with torch.no_grad():
        moved[0].weight += layer.fixed_update()
    g, a, b = gradient(moved, "0"), bank.a[0].detach(), bank.b[0].detach()
    eta = 1e-6
    after = 2.0 * (b - eta * bank.b.grad[0]) @ (a - eta * bank.a.grad[0])
    torch.testing.assert_close((after - 2.0 * b @ a) / -eta, 4.0 * (b @ b.T @ g + g @ a.T @ a), atol=1e-4, rtol=1e-4)


def test_the_magnitudes_of_dora_are_the_norms_whatever_is_learned():
    adapted = put("dora")
    assert all(float(d.abs().max()) < 1e-12 for d in deltas(adapted).values())
    adapted = trained("dora", 10)
    for layer in adapted.layers.values():
        weight = layer.base.weight + layer.fixed_update()
        torch.testing.assert_close(weight.norm(dim=1), layer.magnitude.detach())
        assert not torch.allclose(layer.magnitude, layer.base.weight.norm(dim=1), atol=1e-3)


def test_no_gradient_of_dora_goes_through_the_norm():
    adapted = put("dora")
    layer = adapted.layers["0"]
    with torch.no_grad():
        layer.experts.b.normal_()
    layer.ratio().sum().backward()
    assert layer.experts.b.grad is None and layer.magnitude.grad is not None


def test_rslora_is_lora_of_more_alpha_and_lora_plus_of_ratio_one_is_lora():
    one, other = trained("rslora", rank=4, alpha=3.0), trained("lora", rank=4, alpha=6.0)
    assert all(torch.allclose(a, b) for a, b in zip(deltas(one).values(), deltas(other).values(), strict=True))
    torch.manual_seed(1)
    plus = adapt(small(), "lora-variants", variant="lora+", rank=3, own={"ratio": 1.0})
    optimizer = plus.optimizer(lr=0.02)
    for _ in range(4):
        optimizer.zero_grad()
        loss(plus.model).backward()
        optimizer.step()
    assert torch.equal(plus.model(X), trained("lora").model(X))
    assert not torch.allclose(trained("lora+").model(X), trained("lora").model(X), atol=1e-3)


def test_lora_plus_has_a_group_at_its_ratio_and_lora_fa_trains_no_a():
    groups = put("lora+").optimizer(lr=0.01).param_groups
    assert {g["lr_scale"]: g["lr"] for g in groups} == {1.0: 0.01, 16.0: 0.16}
    assert {p.shape[2] for g in groups if g["lr_scale"] == 16.0 for p in g["params"]} == {3}  # the B's
    start = [layer.experts.a.clone() for layer in put("lora-fa").layers.values()]
    end = [layer.experts.a for layer in trained("lora-fa").layers.values()]
    assert all(torch.equal(a, b) for a, b in zip(start, end, strict=True))


def test_the_gradients_of_lora_pro_are_as_near_as_two_factors_come_and_nearest_to_loras():
    torch.manual_seed(0)
    a, b, g, s = torch.randn(3, 9).double(), torch.randn(7, 3).double(), torch.randn(7, 9).double(), 0.5
    da, db = s * b.T @ g, s * g @ a.T
    ga, gb = nearest(a, b, da, db, s, 0.0)
    left = torch.eye(7).double() - b @ torch.linalg.pinv(b)
    right = torch.eye(9).double() - torch.linalg.pinv(a) @ a
    torch.testing.assert_close(g - s * (b @ ga + gb @ a), left @ g @ right, atol=1e-8, rtol=1e-8)  # what none reaches
    for _ in range(5):  # the same product, and further away
        x = 0.1 * torch.randn(3, 3).double()
        far = (ga + x @ a - da).square().sum() + (gb - b @ x - db).square().sum()
        assert far > (ga - da).square().sum() + (gb - db).square().sum()
    zero = torch.zeros_like(b)
    ga, gb = nearest(a, zero, torch.zeros_like(a), db, s, 1e-8)
    assert ga.abs().max() < 1e-12 and gb.isfinite().all() and gb.any()


def test_riemannian_gradients_are_those_of_the_formula():
    adapted = put("riemannian")
    bank = adapted.layers["0"].experts
    with torch.no_grad():
        bank.b.normal_()
    optimizer = adapted.optimizer(0.1)
    loss(adapted.model).backward()
    a, b, da, db = (t.detach()[0].clone() for t in (bank.a, bank.b, bank.a.grad, bank.b.grad))
    optimizer.step()
    one = 1e-6 * torch.eye(3).double()
    torch.testing.assert_close(bank.a.grad[0], torch.linalg.inv(b.T @ b + one) @ da)
    torch.testing.assert_close(bank.b.grad[0], db @ torch.linalg.inv(a @ a.T + one))


def test_relora_reaches_more_than_its_rank_and_forgets_most_moments():
    adapted = put("relora", rank=1)
    optimizer = adapted.optimizer(lr=0.05)
    for step in range(1, 8):
        optimizer.zero_grad()
        loss(adapted.model).backward()
        optimizer.step()
        bank = adapted.layers["0"].experts
        if step in (3, 6):
            assert not bank.b.any()
            moments = [optimizer.state[bank.a][key] != 0 for key in ("exp_avg", "exp_avg_sq")]
            assert int(moments[0].sum()) == 1 and torch.equal(*moments)  # one in a hundred, at least one
        assert optimizer.param_groups[0]["lr_scale"] == {3: 0.5, 6: 0.5}.get(step, 1.0)
    assert torch.linalg.matrix_rank(adapted.layers["0"].fixed_update(), rtol=1e-6) == 3


def test_adalora_keeps_as_many_ranks_as_its_budget_over_all_layers():
    assert [rank_budget(t, 12, 8, 2, 6) for t in (0, 2, 3, 4, 6, 9)] == [12, 12, 9, 8, 8, 8]
    adapted = put("adalora")
    optimizer, layers = adapted.optimizer(lr=0.05), list(adapted.layers.values())
    seen = []
    for step in range(1, 9):
        optimizer.zero_grad()
        loss(adapted.model).backward()
        optimizer.step()
        seen.append(torch.cat([layer.l.detach() != 0 for layer in layers]))
        if step in (4, 6, 7, 8):
            assert int(seen[-1].sum()) == rank_budget(step, 12, 8, 2, 6)
        if step == 5:
            assert seen[-1].all()  # between two masks what was out may come back
    assert len({int(layer.alive.sum()) for layer in layers}) > 1  # one threshold for all layers
    for layer in layers:
        alive = layer.alive
        expected = 3 / int(alive.sum()) * (layer.p[:, alive] * layer.l[alive]) @ layer.q[alive] if alive.any() else 0
        torch.testing.assert_close(layer.fixed_update(), expected + torch.zeros_like(layer.base.weight))


def test_adalora_feels_by_moving_means_and_fines_directions_that_are_not_orthogonal():
    layer = put("adalora").layers["0"]
    grads = {name: torch.randn_like(p) for name, p in layer.factors().items()}
    for p, g in zip(layer.factors().values(), grads.values(), strict=True):
        p.grad = g.clone()
    fine = sum((w - torch.eye(3).double()).square().sum() for w in (layer.p.T @ layer.p, layer.q @ layer.q.T))
    expected = torch.autograd.grad(0.1 * fine, [layer.p, layer.q])
    layer.feel(0.1, 0.85)
    torch.testing.assert_close(layer.p.grad - grads["p"], expected[0])
    torch.testing.assert_close(layer.q.grad - grads["q"], expected[1])
    now = (layer.p * layer.p.grad).abs()
    torch.testing.assert_close(layer.p_mean, 0.15 * now)
    torch.testing.assert_close(layer.p_spread, 0.15 * 0.85 * now)


def test_vera_shares_its_matrices_and_trains_two_vectors_a_layer():
    adapted = put("vera")
    layers = list(adapted.layers.values())
    assert len({layer.shared_a.data_ptr() for layer in layers}) == 1
    assert adapted.report()["trained"] == sum(layer.base.out_features + 3 for layer in layers)


def test_lora_ga_and_eva_start_from_the_data_of_all_batches():
    with pytest.raises(InputError, match=r"0 has not seen data, from which lora-ga starts: adapter\.fit"):
        optimizer = put("lora-ga", fit=False).optimizer()
        optimizer.step()
    adapted = put("lora-ga")
    g, layer = gradient(small(), "0"), adapted.layers["0"]
    u, _, vt = torch.linalg.svd(g)
    k = 12**0.25 / 4
    assert float(layer.experts.scale[0]) == pytest.approx(3**0.5)
    for ours, theirs in ((layer.experts.a[0], vt[:3]), (layer.experts.b[0].T, u[:, 3:6].T)):
        torch.testing.assert_close(
            (ours / k) @ theirs.T, torch.diag(((ours / k) @ theirs.T).diag().sign()), atol=1e-8, rtol=0
        )
    eva = put("eva").layers["0"].experts.a[0]
    main = torch.linalg.svd(X, full_matrices=False).Vh[:3]
    torch.testing.assert_close((eva @ main.T).abs(), torch.eye(3).double(), atol=1e-8, rtol=0)
    with pytest.raises(InputError, match="start from data, and once"):
        adapted.adapter.fit(adapted, [0], lambda _: loss(adapted.model))


@pytest.mark.parametrize("variant", PLAIN)
def test_what_is_a_lora_is_one_for_peft_and_read_again(variant, tmp_path):
    adapted = trained(variant)
    y = adapted.model(X)
    write_peft(plain_loras(adapted), tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(small(), str(tmp_path / "lora")).double()
    torch.testing.assert_close(theirs(X), y, atol=1e-6, rtol=1e-6)
    if variant not in (*STARTS, "lora-ga"):  # 2 r is more than a narrow layer of this model has
        torch.testing.assert_close(read_peft(small(), tmp_path / "lora").model(X), y, atol=1e-10, rtol=1e-10)


def test_dora_is_one_for_peft(tmp_path):
    adapted = trained("dora")
    banks = {name: layer.experts for name, layer in adapted.layers.items()}
    magnitudes = {name: layer.magnitude for name, layer in adapted.layers.items()}
    write_peft(banks, tmp_path / "dora", magnitudes=magnitudes)
    assert json.loads((tmp_path / "dora" / "adapter_config.json").read_text())["use_dora"] is True
    theirs = peft.PeftModel.from_pretrained(small(), str(tmp_path / "dora")).double().eval()
    torch.testing.assert_close(theirs(X), adapted.model(X), atol=1e-6, rtol=1e-6)
    with pytest.raises(InputError, match="magnitudes are of 0 but must be of all banks"):
        write_peft(banks, tmp_path / "other", magnitudes={"0": magnitudes["0"]})
    with pytest.raises(InputError, match="is no plain LoRA"):
        plain_loras(adapted)


@pytest.mark.parametrize("variant", ["pissa", "olora"])
def test_starts_are_those_of_peft_on_the_same_weights(variant):
    names = ["0", "2", "3", "4"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=names, init_lora_weights=variant)
    theirs = peft.get_peft_model(small().float(), config)
    ours = put(variant, alpha=6.0)
    for name, layer in ours.layers.items():
        one = theirs.base_model.model.get_submodule(name)
        theirs_delta = 2.0 * one.lora_B["default"].weight @ one.lora_A["default"].weight
        torch.testing.assert_close(layer.experts.delta(0).float(), theirs_delta, atol=1e-5, rtol=1e-5)
        start = layer.base.weight - layer.experts.delta(0)
        torch.testing.assert_close(start.float(), one.base_layer.weight, atol=1e-5, rtol=1e-5)


NAMES = ["0", "2", "3", "4"]
KINDS = {
    "vera": lambda: peft.VeraConfig(r=3, target_modules=NAMES),
    "randlora": lambda: peft.RandLoraConfig(r=3, randlora_alpha=6, target_modules=NAMES),
    "adalora": lambda: peft.AdaLoraConfig(init_r=3, lora_alpha=3, total_step=10, target_modules=NAMES),
    "hira": lambda: peft.HiraConfig(r=3, target_modules=NAMES),
}


@pytest.mark.parametrize("variant", KINDS)
@torch.no_grad()
def test_forms_are_those_of_peft_on_the_same_weights(variant):
    torch.manual_seed(5)
    theirs = peft.get_peft_model(small(), KINDS[variant]()).double().eval()
    ours = put(variant, **({"alpha": 6.0} if variant == "randlora" else {}))
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3)
    for name, layer in ours.layers.items():
        one = theirs.base_model.model.get_submodule(name)
        if variant == "vera":
            one.vera_lambda_b["default"].copy_(layer.b), one.vera_lambda_d["default"].copy_(layer.d)
            layer.shared_a.copy_(one.vera_A["default"]), layer.shared_b.copy_(one.vera_B["default"])
        elif variant == "randlora":
            one.randlora_lambda["default"].copy_(layer.l), one.randlora_gamma["default"].copy_(layer.g)
            width = layer.shared_a.shape[2]  # peft's is larger than is used
            layer.shared_a.copy_(one.randlora_A["default"][:, :, :width])
            # peft meets the columns of B, counted base by base, with rows of A that are counted rank by rank
            theirs_b = one.randlora_B["default"][: layer.large, : layer.bases].flatten(1)
            layer.shared_b[: layer.large, : layer.bases] = theirs_b.unflatten(1, (3, layer.bases)).transpose(1, 2)
        elif variant == "hira":
            one.hira_A["default"].copy_(layer.experts.a[0]), one.hira_B["default"].copy_(layer.experts.b[0])
        else:
            one.lora_A["default"].copy_(layer.q), one.lora_B["default"].copy_(layer.p)
            one.lora_E["default"].copy_(layer.l[:, None])
        expected = one.get_delta_weight("default") * (layer.base.weight if variant == "hira" else 1.0)
        tolerance = 1e-4 if variant == "adalora" else 1e-6  # peft divides by the ranks and 1e-5
        torch.testing.assert_close(layer.fixed_update(), expected.double(), atol=tolerance, rtol=tolerance)
    if variant != "randlora":  # whose B is arranged anew for each layer
        torch.testing.assert_close(theirs(X), ours.model(X), atol=1e-3, rtol=1e-3)


def test_wrong_settings_are_named():
    for options, message in (
        ({"variant": "doras"}, "variant 'doras' is unknown; did you mean 'dora'"),
        ({"variant": "lora+", "own": {"ratios": 2.0}}, r"setting of lora\+ 'ratios' is unknown"),
        ({"variant": "lora-ga", "rank": 4}, "rank is 4 but must be between 1 and half the layer's smaller width, 3"),
        ({"alpha": 0.0}, r"alpha is 0\.0 but must be above 0"),
    ):
        with pytest.raises(InputError, match=message):
            adapt(small(), "lora-variants", **options)
