"""PCB-Merging: the formulas as loops, and what follows from them exactly."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import workbench
from workbench.cli import main
from workbench.errors import InputError
from workbench.kernels import dispatch
from workbench.lib.core.merge import TaskVectors, make_merger
from workbench.lib.core.merge.sinks import write_merged
from workbench.lib.merging.pcb_merging import INTER, norm, pcb_merge, pcb_scores, pcb_terms


def vectors(n: int, p: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loops(tau: torch.Tensor, ratio: float, lam: list[float], inter: str, q: float) -> list[float]:
    """The head of the file, number by number, the intra term with its e^n."""
    rows = tau.tolist()
    n, p = len(rows), len(rows[0])

    def stretched(row):
        low, high = min(row), max(row)
        return [(v - low) / (high - low) for v in row]

    sizes, clipped, signed = [], [], []
    for row in rows:
        order = sorted(abs(v) for v in row)
        low, high = order[int(p * q)], order[int(p * (1 - q)) - 1]
        a = [min(max(abs(v), low), high) for v in row]
        sizes.append(stretched(a))
        clipped.append([math.copysign(x, v) for x, v in zip(a, row, strict=True)])
        signed.append([math.copysign(x, v) for x, v in zip(sizes[-1], row, strict=True)])
    scales = []
    for i in range(n):
        if inter == "pairwise_tanh":
            agree = [sum(math.tanh(signed[i][k] * signed[j][k]) for j in range(n)) for k in range(p)]
        elif inter == "sum_tanh":
            agree = [math.tanh(rows[i][k] * sum(rows[j][k] for j in range(n))) for k in range(p)]
        else:
            agree = [0.0] * p
            for j in range(n):
                e = [math.exp(v) for v in stretched([rows[i][k] * rows[j][k] for k in range(p)])]
                agree = [had + v / sum(e) for had, v in zip(agree, e, strict=True)]
        score = [math.exp(n * z * z) * b for z, b in zip(sizes[i], agree, strict=True)]
        cut = sorted(score)[int(p * (1 - ratio))]
        scales.append(stretched([max(v, cut) for v in score]))
    merged = []
    for k in range(p):
        total = sum(scales[i][k] for i in range(n))
        merged.append(sum(lam[i] * scales[i][k] * clipped[i][k] for i in range(n)) / total if total else 0.0)
    return merged


@pytest.mark.parametrize("inter", INTER)
@pytest.mark.parametrize("clip", [0.0, 0.04])
def test_it_is_the_formula_as_loops(inter, clip):
    tau, lam = vectors(3, 50), [0.8, 1.0, 1.3]
    made = pcb_merge(tau, 0.3, torch.tensor(lam, dtype=tau.dtype), inter=inter, clip=clip)
    expected = torch.tensor(loops(tau, 0.3, lam, inter, clip), dtype=torch.float64)
    assert 10 < (expected != 0).sum() < 50
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inter", INTER)
@pytest.mark.parametrize("n", [1, 4])
def test_of_one_task_or_of_its_copies_the_kept_weights_are_the_clipped_ones(inter, n):
    tau = vectors(1, 400).repeat(n, 1)
    clipped, scale = pcb_scores(tau, 0.2, inter)
    merged, kept = pcb_merge(tau, 0.2, inter=inter), scale[0] > 0
    assert 70 < kept.sum() < 90
    torch.testing.assert_close(merged[kept], clipped[0][kept], rtol=1e-14, atol=0)
    assert (merged[~kept] == 0).all()


def test_the_share_that_stays_is_the_ratio():
    _, scale = pcb_scores(vectors(3, 20_000), 0.2)
    assert ((scale > 0).sum(1) == 3999).all()
    assert (scale.amin(1) == 0).all() and (scale.amax(1) == 1).all()
    _, scale = pcb_scores(vectors(3, 500), 1.0)
    assert ((scale == 0).sum(1) == 1).all()


@pytest.mark.parametrize("inter", INTER)
def test_every_merged_weight_is_between_those_that_survive(inter):
    clipped, scale = pcb_scores(vectors(5, 1000), 0.3, inter)
    merged, alive = pcb_merge(vectors(5, 1000), 0.3, inter=inter), scale > 0
    low = clipped.masked_fill(~alive, math.inf).amin(0)
    high = clipped.masked_fill(~alive, -math.inf).amax(0)
    some = alive.any(0)
    assert (~some).any() and (alive.sum(0) > 1).any()
    assert (merged[some] >= low[some] - 1e-12).all() and (merged[some] <= high[some] + 1e-12).all()
    assert (merged[~some] == 0).all()


@pytest.mark.parametrize("inter", INTER)
def test_signs_and_scales_go_through_but_for_the_form_that_takes_raw_products(inter):
    tau = vectors(4, 300)
    merged = pcb_merge(tau, inter=inter)
    torch.testing.assert_close(pcb_merge(-tau, inter=inter), -merged)
    scaled = pcb_merge(100 * tau, inter=inter) / 100
    if inter == "sum_tanh":
        assert (scaled - merged).abs().max() > 0.01 * merged.abs().max()
    else:
        torch.testing.assert_close(scaled, merged, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inter", INTER)
def test_the_order_of_tasks_says_nothing_and_weights_move_with_their_places(inter):
    tau = vectors(4, 300)
    merged = pcb_merge(tau, inter=inter)
    torch.testing.assert_close(pcb_merge(tau[[2, 0, 3, 1]], inter=inter), merged, rtol=1e-10, atol=1e-12)
    places = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(pcb_merge(tau[:, places], inter=inter), merged[places], rtol=1e-10, atol=1e-12)


def test_two_opposite_weights_of_one_size_have_the_score_of_none():
    """tanh(g^2) + tanh(-g^2) = 0; everything that agrees is above it."""
    tau = vectors(1, 200).repeat(2, 1)
    opposite = int(tau[0].abs().argmax())
    tau[1, opposite] *= -1
    _, scale = pcb_scores(tau, 1.0)
    assert (scale[:, opposite] == 0).all() and (scale.sum(1) > 0).all()


def test_lambda_scales_what_is_added_and_is_no_part_of_the_scores():
    tau = vectors(3, 300)
    merged = pcb_merge(tau)
    torch.testing.assert_close(pcb_merge(tau, lam=1.7), 1.7 * merged)
    each = sum(pcb_merge(tau, lam=torch.eye(3, dtype=torch.float64)[i]) for i in range(3))
    torch.testing.assert_close(each, merged)
    assert (pcb_merge(tau, lam=0.0) == 0).all()


def test_many_tasks_do_not_overflow():
    tau = vectors(120, 60).float()
    assert pcb_merge(tau).isfinite().all() and (pcb_merge(tau) != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inter", INTER)
def test_a_task_vector_of_one_size_has_no_say_and_nothing_is_not_a_number(inter, dtype):
    tau = vectors(3, 100).to(dtype)
    for same in (torch.zeros(100), torch.full((100,), 0.5), 0.5 * vectors(1, 100, seed=5)[0].sign()):
        tau[1] = same
        _, scale = pcb_scores(tau, 0.3, inter)
        assert (scale[1] == 0).all() and (scale[0] > 0).any()
        merged = pcb_merge(tau, 0.3, inter=inter)
        assert merged.isfinite().all() and merged.any()
        torch.testing.assert_close(merged, pcb_merge(tau, 0.3, torch.tensor([1.0, 9.0, 1.0]), inter))
        assert (pcb_merge(tau[1:2].repeat(3, 1), inter=inter) == 0).all()
    assert (norm(torch.full((2, 5), 3.0)) == 0).all()


@pytest.mark.parametrize("inter", INTER)
def test_a_task_that_changed_less_than_what_is_clipped_is_refused_and_merged_unclipped(inter):
    tau = vectors(2, 1000)
    tau[1] = 0
    tau[1, 100:105] = torch.arange(1.0, 6.0)
    with pytest.raises(InputError, match=r"experts\[1\] - base has magnitudes of 0 to 5 but 0 at both ranks of clip"):
        pcb_merge(tau, inter=inter)
    merged = pcb_merge(tau[1:], 0.2, inter=inter, clip=0.0)
    assert merged[100:105].tolist()[1:] == [2, 3, 4, 5]


@pytest.mark.parametrize("inter", INTER)
def test_the_scales_are_those_of_the_product_of_the_terms(inter):
    tau = vectors(3, 200)
    clipped, intra, agreement = pcb_terms(tau, inter)
    again, scale = pcb_scores(tau, 0.25, inter)
    assert torch.equal(clipped, again) and intra.amax() == 1
    score = intra * agreement
    kept = score.sort(1, descending=True).indices[:, :49]
    assert all(set(kept[i].tolist()) == set(scale[i].nonzero().flatten().tolist()) for i in range(3))


def test_numbers_of_32_bits_go_through_the_kernel_and_come_out_alike():
    tau = vectors(4, 5000)
    exact, scale = pcb_merge(tau), pcb_scores(tau)[1]
    assert dispatch.last_backend("pcb_merge") == "reference"
    found = pcb_merge(tau.float())
    assert dispatch.last_backend("pcb_merge") in ("native", "cpu") and found.dtype == torch.float32
    near = (scale.sum(0) > 1e-3) | (scale.sum(0) == 0)  # where rounding does not decide
    assert near.float().mean() > 0.9
    torch.testing.assert_close(found[near].double(), exact[near], rtol=1e-3, atol=1e-3)
    assert pcb_merge(tau.bfloat16()).dtype == torch.bfloat16


def models(dtype: torch.dtype = torch.float32, n: int = 3) -> tuple[dict, list[dict]]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"a": (30, 20), "b": (17,), "c": (40, 9), "none": (0, 3)}
    base, *experts = (
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        for _ in range(n + 1)
    )
    return base | {"steps": torch.tensor(3)}, [expert | {"steps": torch.tensor(4)} for expert in experts]


def flat(state: dict) -> torch.Tensor:
    return torch.cat([value.flatten() for value in state.values() if value.is_floating_point()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inter", INTER)
def test_models_are_merged_as_one_vector_in_memory_and_from_files(inter, dtype, tmp_path):
    base, experts = models(dtype)
    tau = torch.stack([flat(expert) - flat(base) for expert in experts])
    options = {"ratio": 0.3, "scale": 1.5, "weights": [1.0, 0.8, 1.2], "inter": inter, "clip": 0.02}
    lam = torch.tensor([1.5, 1.5 * 0.8, 1.5 * 1.2], dtype=torch.float64)
    expected = flat(base) + pcb_merge(tau, 0.3, lam, inter, 0.02)
    merged = workbench.merge(base, experts, "pcb", **options)
    torch.testing.assert_close(flat(merged), expected)
    if inter == "pairwise_tanh" and dispatch.last_backend("pcb_merge") == "native":
        assert torch.equal(flat(merged), expected)
    assert merged["steps"] == 3 and merged["none"].shape == (0, 3)
    for i, state in enumerate((base, *experts)):
        save_file(state, tmp_path / f"{i}.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    out = write_merged(TaskVectors(paths[0], paths[1:]), make_merger("pcb", options), tmp_path / "out.safetensors")
    assert torch.equal(flat({name: load_file(out)[name] for name in base}), flat(merged))


def test_models_of_several_types_are_merged_in_the_widest():
    base, experts = models()
    for state in (base, *experts):
        state["b"] = state["b"].double()
    merged = workbench.merge(base, experts, "pcb")
    tau = torch.stack([flat(expert) - flat(base) for expert in experts])
    torch.testing.assert_close(flat(merged), flat(base) + pcb_merge(tau), rtol=1e-4, atol=1e-5)
    assert merged["b"].dtype == torch.float64 and merged["a"].dtype == torch.float32


def test_quantiles_are_of_all_tensors_together():
    base, experts = models()
    for expert in experts:
        expert["a"] = base["a"] + 100 * (expert["a"] - base["a"])
    merged = workbench.merge(base, experts, "pcb", ratio=0.2)
    assert all(torch.equal(merged[name], base[name]) for name in ("b", "c"))
    assert not torch.equal(merged["a"], base["a"])


def test_more_models_than_the_kernel_takes_are_merged():
    base, experts = models(n=65)
    merged = workbench.merge(base, experts, "pcb", scale=0.5)
    tau = torch.stack([flat(expert) - flat(base) for expert in experts])
    torch.testing.assert_close(flat(merged), flat(base) + pcb_merge(tau, lam=0.5))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("inter", INTER)
def test_a_weight_that_is_not_finite_is_named(inter, value):
    base, experts = models()
    experts[1]["c"][3, 2] = value
    with pytest.raises(InputError, match=r"c of experts\[1\] has 1 weights that are not finite, the first at 29"):
        workbench.merge(base, experts, "pcb", inter=inter)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": 0.0}, "ratio is 0.0"),
        ({"ratio": 1.01}, "ratio is 1.01"),
        ({"inter": "tanh"}, "inter"),
        ({"clip": -0.1}, "clip is -0.1"),
        ({"weights": [1.0]}, "weights has 1 numbers but must have one for each of 3"),
        ({"lam": 1.0}, "lam"),
    ],
)
def test_wrong_options_of_a_merge_are_refused_by_name(options, said):
    base, experts = models()
    with pytest.raises(InputError, match=said):
        workbench.merge(base, experts, "pcb", **options)


def test_it_is_merged_from_the_shell(tmp_path, capsys):
    base, experts = models()
    for i, state in enumerate((base, *experts)):
        (tmp_path / f"{i}").mkdir()
        save_file(state, tmp_path / f"{i}" / "model.safetensors")
        (tmp_path / f"{i}" / "config.json").write_text("{}")
    folders = [str(tmp_path / f"{i}") for i in range(4)]
    words = ["--method", "pcb", "-p", "ratio", "0.4", "-p", "scale", "1.2", "--out", str(tmp_path / "out")]
    assert main(["merge", *folders, *words]) == 0
    assert "pcb of 3 experts" in capsys.readouterr().out
    made = load_file(tmp_path / "out" / "model.safetensors")
    expected = workbench.merge(base, experts, "pcb", ratio=0.4, scale=1.2)
    assert all(torch.equal(made[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": 0.01}, "ratio is 0.01 but must be above clip, 0.01"),
        ({"ratio": 1.1}, "ratio is 1.1"),
        ({"clip": 0.5}, "clip is 0.5"),
        ({"inter": "tanh"}, "inter"),
        ({"lam": torch.ones(2)}, "one for each of 3 tasks"),
        ({"lam": float("nan"), "inter": "sum_tanh"}, "lam is nan but must be finite"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        pcb_merge(vectors(3, 50), **options)


@pytest.mark.parametrize(
    "tau",
    [torch.ones(2, 3).to(torch.float8_e5m2), torch.ones(3), torch.ones(2, 3, dtype=torch.int64), torch.ones(0, 3)],
)
def test_what_is_no_matrix_of_floats_is_refused(tau):
    with pytest.raises(InputError, match="must be floats"):
        pcb_merge(tau)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(value):
    tau = vectors(3, 50)
    tau[1, 7] = value
    with pytest.raises(InputError, match="finite"):
        pcb_merge(tau)
