"""LEGO: pieces stacked are a sum, alike pieces are fused, lengths and variance are what the corrections say."""

import json
from functools import partial

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import workbench
from tests.draws import draw
from tests.kinds import models
from workbench.errors import InputError
from workbench.lib.core.merge.adapters import LowRankDeltas, concatenate, read_deltas
from workbench.lib.core.merge.low_rank import units
from workbench.lib.merging.lora_lego import canonical_units, clusters, lego_merge, lego_prune, merge_adapters

drawn = partial(draw, dtype=torch.float64)

D_IN, D_OUT, RANK, N = 12, 9, 4, 5


def lora(seed=0, rank=RANK, scale=1.0, d_in=D_IN, d_out=D_OUT):
    return drawn(rank, d_in, seed=seed), drawn(d_out, rank, seed=seed + 100), scale


def dense(a, b, scale):
    return scale * b @ a


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def planted(n=N, noise=1e-3, seed=7):
    """n adapters of the same RANK pieces in orders of their own, each moved a little, and the pieces' own adapter."""
    a, b, _ = lora(seed)
    a, b = 3 * a, 3 * b
    order = [torch.randperm(RANK, generator=torch.Generator().manual_seed(i)) for i in range(n)]
    moved = [
        (a[o] + noise * drawn(RANK, D_IN, seed=i), b[:, o] + noise * drawn(D_OUT, RANK, seed=i + 50), 1.0)
        for i, o in enumerate(order)
    ]
    return moved, (a, b, 1.0)


def test_every_piece_alone_is_the_sum_of_the_adapters():
    loras = [lora(0, scale=2.0), lora(1, rank=2, scale=0.5), lora(2, scale=-1.0)]
    merged = lego_merge(loras, 10, reweight_params=False, reweight_output=False)
    close(dense(*merged.factors), sum(dense(*each) for each in loras))
    assert merged.inertia < 1e-20 and merged.scale == 1 and merged.mixed == 0
    with_params = lego_merge(loras, 10, reweight_output=False)  # singletons have the length of their member
    close(dense(*with_params.factors), sum(dense(*each) for each in loras))


def test_the_order_of_ranks_and_of_adapters_does_not_matter():
    loras, _ = planted()
    whole = lego_merge(loras).factors
    shuffled = [(a.flip(0), b.flip(1), s) for a, b, s in reversed(loras)]
    close(dense(*lego_merge(shuffled).factors), dense(*whole))
    close(dense(*lego_merge(loras, seed=5).factors), dense(*whole))


@pytest.mark.parametrize("params", [True, False])
def test_copies_of_an_adapter_are_that_adapter(params):
    given = lora(3, scale=2.0)
    merged = lego_merge([given] * N, reweight_params=params)
    assert merged.scale == 1 and len(merged.a) == RANK and merged.mixed == RANK and merged.inertia < 1e-20
    close(dense(*merged.factors), dense(*given))


def test_a_mean_gets_the_mean_length_of_its_members_and_one_that_cancels_is_left_and_counted():
    loras = [lora(i) for i in range(N)]
    pool, _ = units(loras)
    merged = lego_merge(loras, 6)
    plain = lego_merge(loras, 6, reweight_params=False)
    assert torch.equal(merged.label, plain.label)
    lengths = torch.cat([merged.a, merged.b.T], 1).norm(dim=1)
    for c in range(6):
        own = pool[merged.label == c]
        close(lengths[c], own.norm(dim=1).mean(), 1e-6)
        close(torch.cat([plain.a[c], plain.b[:, c]]), own.mean(0))
        if len(own) == 1:
            close(torch.cat([merged.a[c], merged.b[:, c]]), own[0])
    close(
        torch.tensor(plain.inertia),
        (pool - torch.cat([plain.a, plain.b.T], 1)[plain.label]).square().sum().float(),
        1e-5,
    )
    # x and -x, in one cluster
    a, b, _ = lora(0, rank=1)
    cancelling = lego_merge([(a, b, 1.0), (-a, -b, 1.0)], 1)
    assert cancelling.cancelled == 1 and not cancelling.a.any() and not cancelling.b.any()
    assert merged.cancelled == 0


def test_gamma_is_the_root_of_rank_by_k():
    loras = [lora(i) for i in range(N)]
    assert lego_merge(loras).scale == 1
    assert lego_merge(loras, 4 * RANK).scale == 0.5
    assert lego_merge(loras, 4 * RANK, reweight_output=False).scale == 1
    assert lego_merge([lora(0, rank=2), lora(1, rank=6)], 8).scale == pytest.approx((4 / 8) ** 0.5)
    assert len(lego_merge([lora(0, rank=2), lora(1, rank=6)]).a) == 6


def test_gamma_keeps_the_variance_of_independent_pieces():
    """k = N = n r singletons against one adapter of rank r, over many draws."""
    ratio = []
    for seed in range(300):
        loras = [lora(1000 * seed + i, d_in=6, d_out=5) for i in range(N)]
        ratio.append((dense(*lego_merge(loras, N * RANK).factors).var(), dense(*loras[0]).var()))
    merged, one = (torch.stack(values).mean() for values in zip(*ratio, strict=True))
    assert merged / one == pytest.approx(1, abs=0.05)


def test_planted_pieces_are_found():
    loras, prototype = planted()
    merged = lego_merge(loras)
    assert merged.label.bincount().tolist() == [N] * RANK and merged.mixed == RANK
    assert (dense(*merged.factors) - dense(*prototype)).norm() < 1e-2 * dense(*prototype).norm()


def test_the_paper_s_pool_hangs_on_scales_and_signs_that_no_model_sees_and_the_canonical_one_does_not():
    """A warning: (c a, b / c) and (-a, -b) are the same piece to a model."""
    loras = [lora(i) for i in range(N)]
    factor = torch.tensor([0.2, -1.0, 5.0, -0.5], dtype=torch.float64)
    same = [(a * factor[:, None], b / factor, s) if i % 2 else (a, b, s) for i, (a, b, s) in enumerate(loras)]
    for one, other in zip(loras, same, strict=True):
        close(dense(*one), dense(*other))
    close(dense(*lego_merge(same, canonical=True).factors), dense(*lego_merge(loras, canonical=True).factors))
    given, changed = (dense(*lego_merge(each).factors) for each in (loras, same))
    assert (given - changed).norm() > 0.1 * given.norm()
    pool = canonical_units(units(same)[0], D_IN)
    a, b = pool[:, :D_IN], pool[:, D_IN:]
    close(a.norm(dim=1), b.norm(dim=1))
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()
    close(b.T @ a, sum(dense(*each) for each in loras))
    # pieces that do nothing are all the same point
    a, b, s = lora(0)
    assert not canonical_units(units([(a, 0 * b, s)])[0], D_IN).any()


def test_k_means_is_no_worse_than_any_assignment_of_a_small_pool():
    """Against every partition of eight pieces into three clusters."""
    import itertools

    pool = drawn(8, 3, seed=2)
    best = min(
        sum((pool[[i for i in range(8) if given[i] == c]] - pool[[i for i in range(8) if given[i] == c]].mean(0))
            .square().sum().item() for c in range(3))
        for given in itertools.product(range(3), repeat=8)
        if len(set(given)) == 3
    )  # fmt: skip
    label = clusters(pool, 3)
    found = sum((pool[label == c] - pool[label == c].mean(0)).square().sum().item() for c in range(3))
    assert found == pytest.approx(best)


def test_numbers_of_a_merged_adapter_and_pruning():
    loras = [lora(i) for i in range(N)]
    for k in (1, 3, 20):
        a, b, _ = lego_merge(loras, k).factors
        assert a.numel() + b.numel() == k * (D_IN + D_OUT)
    given = lora(0)
    close(dense(*lego_prune(given, RANK).factors), dense(*given))
    pruned = lego_prune(given, 2)
    assert pruned.a.shape == (2, D_IN) and pruned.scale == pytest.approx(2**0.5)


def test_a_model_s_adapters_are_merged_layer_by_layer_into_what_peft_loads(tmp_path):
    adapters = [{"0": lora(i, scale=2.0), "1": lora(i, rank=2, d_in=D_OUT, d_out=6)} for i in range(3)]
    del adapters[2]["1"]
    merged = merge_adapters(adapters, rank=3)
    close(dense(*merged["1"]), dense(*lego_merge([each["1"] for each in adapters[:2]], 3).factors))
    # r = k; gamma k of each layer as its alpha
    state, ranks, alphas = {}, {}, {}
    for name, (a, b, gamma) in merged.items():
        state |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        ranks[name], alphas[name] = len(a), gamma * len(a)
    config = peft.LoraConfig(r=3, target_modules=["0", "1"], rank_pattern=ranks, alpha_pattern=alphas)
    config.save_pretrained(tmp_path)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "adapter_model.safetensors")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["alpha_pattern"]["1"] == pytest.approx(
        3 * (2 / 3) ** 0.5
    )
    base = nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Linear(D_OUT, 6)).double()
    before = [layer.weight.detach().clone() for layer in base]
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path)).merge_and_unload()
    for name, layer, weight in zip(merged, loaded, before, strict=True):
        close(layer.weight - weight, dense(*merged[name]), 1e-6)


def test_adapters_from_folders_are_merged_into_a_folder(tmp_path):
    """The mappings that `read_deltas` gives, and `LowRankDeltas` that writes one, are what it takes and makes."""
    for i in range(3):
        made = {name: (a.float(), b.float(), s) for name, (a, b, s) in (("x", lora(i, scale=2.0)), ("y", lora(i + 9)))}
        LowRankDeltas(made).save(tmp_path / f"{i}")
    read = read_deltas([tmp_path / f"{i}" for i in range(3)])
    merged = merge_adapters(read, rank=6)
    LowRankDeltas(merged).save(tmp_path / "merged")
    (back,) = read_deltas([tmp_path / "merged"])
    assert set(back) == {"x", "y"}
    for name in back:
        assert len(back[name][0]) == 6
        torch.testing.assert_close(back.dense(name), dense(*merged[name]), rtol=1e-5, atol=1e-5)
    # all pieces stacked are the sum that `concatenate` is
    every = merge_adapters(read, rank=3 * RANK, reweight_output=False)
    summed = concatenate(read, [1.0] * 3)
    torch.testing.assert_close(dense(*every["x"]), summed.dense("x"), rtol=1e-4, atol=1e-4)


def test_full_experts_are_merged_by_their_updates():
    base, experts = models(3)
    merged = workbench.merge(base, experts, "lego", rank=3)
    update = merged["0.weight"] - base["0.weight"]
    assert torch.linalg.matrix_rank(update.double(), rtol=1e-5) == 3
    torch.testing.assert_close(merged["0.bias"], sum(e["0.bias"] for e in experts) / 3)
    same = workbench.merge(base, [experts[0]] * 3, "lego", rank=8)
    torch.testing.assert_close(same["0.weight"], experts[0]["0.weight"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lego_merge([]), "loras have shapes none"),
        (lambda: lego_merge([lora(0), lora(1, d_in=5)]), "with the same I and O"),
        (lambda: lego_merge([lora(0)], 1, seed=-1), "seed is -1 but must be at least 0"),
        (lambda: lego_merge([lora(0)], 0), "rank is 0 but must be from 1 to the number of different pieces, 4"),
        (
            lambda: lego_merge([lora(0), lora(0)], 5),
            "rank is 5 but must be from 1 to the number of different pieces, 4",
        ),
        (lambda: merge_adapters([]), "adapters is empty"),
        (lambda: merge_adapters([{"x": lora(0)}, {"x": lora(1)}], 9), "x: rank is 9"),
        (lambda: workbench.merge(*models(3), "lego", rank=0), "rank is 0"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_no_more_pieces_are_kept_than_there_are_different_ones():
    """Adapters that were never trained, say."""
    nothing = torch.zeros(2, 5), torch.zeros(4, 2), 1.0
    merged = lego_merge([nothing, nothing])
    assert merged.a.shape == (1, 5) and not merged.a.any() and not merged.b.any()
