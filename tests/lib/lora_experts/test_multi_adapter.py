"""Several adapters over one frozen base: each as if it were alone, whatever the others do."""

import copy

import pytest
import torch
from torch import nn

from workbench.beds.symbol_maps import SymbolMaps
from workbench.errors import InputError
from workbench.lib.core.adapt import adapt, load_adapter
from workbench.lib.core.attention import Attention
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import Block, DecoderLM, VisionClassifier
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Classification
from workbench.lib.core.train import Hook, TrainConfig, train
from workbench.lib.data.types import Arrays
from workbench.lib.lora_experts.multi_adapter import Job, MultiAdapterTrainer, Together

FFN = "*.ffn.*"


def decoder(dtype: torch.dtype = torch.float64) -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(11 + 8, 16, 2, 2, lambda layer: GLU(16, 24), 13).to(dtype)


def config(seed: int, steps: int = 6, **options) -> TrainConfig:
    return TrainConfig(steps, 5, weight_decay=0.0, seed=seed, **options)


def job(slug: str, seed: int, *, tasks=(0, 1), length: int = 6, targets=FFN, steps: int = 6, lr=3e-3, **options) -> Job:
    return Job(slug, SymbolMaps(tasks, 8, length), config(seed, steps, lr=lr), targets, options)


def trainer(jobs: dict[str, Job], base: nn.Module | None = None) -> MultiAdapterTrainer:
    """A trainer whose adapters are in float64, as the base is."""
    made = MultiAdapterTrainer(decoder() if base is None else base, jobs)
    for adapted in made.adapted.values():
        for layer in adapted.layers.values():
            layer.double()
    return made


class Losses(Hook):
    def __init__(self):
        self.curve: list[float] = []

    def after_step(self, state):
        self.curve.append(state.loss)


def alone(one: Job, base: nn.Module):
    """The same job by `train`: its adapted model and its losses."""
    torch.manual_seed(one.config.seed if one.seed is None else one.seed)
    adapted, losses = adapt(copy.deepcopy(base), one.slug, one.targets, **one.options), Losses()
    for layer in adapted.layers.values():
        layer.to(next(base.parameters()).dtype)
    train(adapted.model, one.task, one.config, [losses], optimizer=adapted.optimizer(one.config.lr))
    return adapted, losses.curve


def check(made: MultiAdapterTrainer, base: nn.Module, curves: dict[str, list[float]], names=None):
    for name in names or made.jobs:
        adapted, losses = alone(made.jobs[name], base)
        assert curves[name] == pytest.approx(losses, abs=1e-10)
        for key, p in adapted.named_parameters().items():
            torch.testing.assert_close(made.adapted[name].named_parameters()[key], p, atol=1e-10, rtol=1e-10)


def four() -> dict[str, Job]:
    return {
        "a": job("mixlora", 0, experts=4, rank=2),
        "b": job("mixlora", 1, tasks=(2, 3, 4), experts=3, rank=3, top_k=1, lr=1e-2),
        "c": job("mixlora", 2, tasks=(5,), experts=4, rank=2, dora=True, steps=3),
        "d": job("llava-mole", 3, tasks=(6, 7), rank=2, targets=("*.ffn.*", "*.attention.*")),
    }


def test_mixlora_four_mixtures_trained_together_are_four_trained_apart():
    base = decoder()
    kept = {name: value.clone() for name, value in base.state_dict().items()}
    made = trainer(four(), base)
    curves = made.run()
    assert [len(curve) for curve in curves.values()] == [6, 6, 3, 6] and made.step_number == 6 and not made.stopped
    check(made, decoder(), curves)
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())
    assert all(torch.equal(value, kept[name]) for name, value in base.state_dict().items())
    with pytest.raises(InputError, match="no job is running at step 6"):
        made.step()


def test_mixlora_four_mixtures_in_float32_have_the_losses_of_four_apart():
    base = decoder(torch.float32)
    jobs = {str(i): job("mixlora", i, tasks=(2 * i, 2 * i + 1), experts=4, rank=2) for i in range(4)}
    made = MultiAdapterTrainer(base, jobs)
    curves = made.run()
    for name, one in jobs.items():
        assert curves[name] == pytest.approx(alone(one, decoder(torch.float32))[1], abs=1e-5)


def test_mixlora_jobs_of_other_lengths_systems_and_places_do_not_notice_each_other():
    base = decoder()
    made = trainer(
        {
            "long": job("mixlora", 0, experts=4, rank=2),
            "short": job("mixlora", 1, length=3, experts=3, rank=2),
            "lora": job("lora", 2, length=4, targets="*", rank=3),
            "attention": job("lora", 3, targets="*.attention.*", rank=2),
            "first": job("lora", 4, length=2, targets="blocks.0.ffn.gate_up", rank=2),
        },
        base,
    )
    check(made, decoder(), made.run())


def test_mixlora_a_gradient_does_not_know_of_the_data_of_other_jobs():
    gradients = []
    for tasks in ((2, 3), (6, 7)):
        jobs = {"a": job("mixlora", 0, experts=4, rank=2), "b": job("mixlora", 1, tasks=tasks, lr=1e-2, rank=2)}
        made = trainer(jobs)
        made.step()
        gradients.append([p.grad.clone() for p in made.adapted["a"].parameters()])
    # not bit for bit: the products of one row may be summed in another order beside other rows
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, atol=1e-14, rtol=1e-12)


def test_mixlora_gradients_are_clipped_job_by_job():
    steep = job("mixlora", 1, rank=2)
    made = trainer({"a": job("mixlora", 0, rank=2), "b": Job("mixlora", steep.task, config(1, clip=1e-6), FFN)})
    check(made, decoder(), made.run())


def test_mixlora_jobs_share_one_copy_of_the_base():
    base = decoder()
    made = trainer(four(), base)
    kept = {p.data_ptr() for p in base.parameters()}
    for name, adapted in made.adapted.items():
        own = {p.data_ptr() for p in adapted.parameters()}
        rest = {p.data_ptr() for p in adapted.model.parameters()} - own
        assert rest == kept and not own & kept, name
    assert {p.data_ptr() for p in made.together.model.parameters()} == kept


def test_mixlora_frozen_input_layers_run_once_for_all_jobs():
    base = decoder()
    made = trainer({str(i): job("mixlora", i, experts=4, rank=2) for i in range(4)}, base)
    weights = {id(block.ffn.gate_up.weight): 0 for block in base.blocks}
    rows = []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is nn.functional.linear and id(args[1]) in weights:
                weights[id(args[1])] += 1
                rows.append(args[0].shape[:-1].numel())
            return function(*args, **(kwargs or {}))

    with Count():
        made.step()
    assert list(weights.values()) == [1, 1] and rows == [4 * 5 * 12 + 4 * 5] * 2


@pytest.mark.parametrize("when", [0, 2])
def test_mixlora_a_job_that_diverges_is_stopped_and_the_others_do_not_notice(when):
    base, jobs = decoder(), four()
    made = trainer(jobs, base)
    curves = made.run(when)
    bad = made.adapted["b"]
    with torch.no_grad():
        bad.parameters()[0].fill_(float("nan"))
    kept = [p.clone() for p in bad.parameters()]
    for name, losses in made.run().items():
        curves[name] += losses
    assert made.stopped.keys() == {"b"} and f"at step {when}" in made.stopped["b"] and len(curves["b"]) == when
    assert all(torch.equal(p.nan_to_num(7.0), k.nan_to_num(7.0)) for p, k in zip(bad.parameters(), kept, strict=True))
    check(made, decoder(), curves, ["a", "c", "d"])


def test_mixlora_a_router_that_refuses_its_rows_stops_its_job_alone():
    made = trainer(four())
    router = made.adapted["a"].layers["blocks.1.ffn"].router
    with torch.no_grad():
        router.projection.weight.fill_(float("inf"))
    curves = made.run()
    assert "NaN or infinite" in made.stopped["a"] and curves["a"] == []
    check(made, decoder(), curves, ["b", "c", "d"])


class Steep(SymbolMaps):
    """A finite loss with a gradient that is not."""

    def loss(self, model, batch):
        loss, context = super().loss(model, batch)
        return loss + (loss - loss.detach()).abs().sqrt(), context


def test_mixlora_a_gradient_that_is_not_finite_changes_no_weight():
    made = trainer({"a": job("mixlora", 0, rank=2), "b": Job("mixlora", Steep((1,), 8), config(1), FFN, {"rank": 2})})
    kept = [p.clone() for p in made.adapted["b"].parameters()]
    curves = made.run()
    assert made.stopped == {"b": "the gradient is not finite at step 0"} and curves["b"] == []
    assert all(torch.equal(p, k) for p, k in zip(made.adapted["b"].parameters(), kept, strict=True))
    check(made, decoder(), curves, ["a"])


def test_mixlora_a_job_stopped_by_hand_leaves_the_others_alone():
    made = trainer(four())
    curves = made.run(2)
    made.stop("d")
    for name, losses in made.run().items():
        curves[name] += losses
    assert made.stopped == {"d": "by hand before step 2"} and len(curves["d"]) == 2
    check(made, decoder(), curves, ["a", "b", "c"])
    with pytest.raises(InputError, match="job 'e' is unknown"):
        made.stop("e")


def test_mixlora_all_jobs_stopped_ends_the_run():
    made = trainer({"a": job("mixlora", 0, rank=2)})
    with torch.no_grad():
        made.adapted["a"].parameters()[0].fill_(float("nan"))
    assert made.run() == {"a": []} and made.step_number == 1


def test_mixlora_each_job_is_an_adapted_model_of_its_own_afterwards(tmp_path):

    made = trainer(four())
    made.run(3)
    tokens = torch.randint(19, (3, 13))
    adapted = made.adapted["a"]
    adapted.save(tmp_path / "a")
    clean = decoder()
    again = load_adapter(clean, tmp_path / "a")
    for layer in again.layers.values():
        layer.double()
    # what is kept is float64 here, which the fresh float32 layers of `load_adapter` round
    torch.testing.assert_close(clean.double()(tokens), adapted.model(tokens), atol=1e-5, rtol=1e-5)
    assert adapted.remove()(tokens).shape == (3, 13, 19)


def test_mixlora_jobs_on_pictures():
    pixels = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 10
    splits = dict.fromkeys(("train", "validation", "test"), (pixels, labels))
    task = Classification(Arrays("dots", splits, tuple("0123456789"), {}))

    def base():
        torch.manual_seed(0)
        return VisionClassifier((1, 8, 8), 4, 16, 2, 2, lambda layer: GLU(16, 24), 10)

    jobs = {str(i): Job("mixlora", task, config(i), "blocks.*", {"experts": 3, "rank": 2}) for i in range(2)}
    made = MultiAdapterTrainer(base(), jobs)
    curves = made.run()
    for name, one in jobs.items():
        assert curves[name] == pytest.approx(alone(one, base())[1], abs=1e-5)


def test_mixlora_observers_see_the_rows_of_their_own_job():
    made = trainer({"a": job("mixlora", 0, rank=2), "b": job("mixlora", 1, tasks=(5,), length=3, rank=2)})
    seen = []
    layer = made.adapted["b"].layers["blocks.0.ffn"]
    layer.observe(lambda layer, routing, context: seen.append((routing.n_tokens, context)))
    made.step()
    assert [n for n, _ in seen] == [5 * 7] and seen[0][1].token_ids.shape == (35,)
    assert seen[0][1].domain.tolist() == [0] * 35  # the only task of its job


class Odd(nn.Module):
    """A model with batch normalisation."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(8, nn.Linear(8, 8), Attention(8, 2, True))])
        self.norm = nn.BatchNorm1d(8)


def test_mixlora_trainer_names_what_is_wrong():
    with pytest.raises(InputError, match="jobs is empty"):
        MultiAdapterTrainer(decoder(), {})
    with pytest.raises(InputError, match="batch normalisation"):
        MultiAdapterTrainer(Odd(), four())
    with pytest.raises(InputError, match="job 'x': targets 'nothing'"):
        MultiAdapterTrainer(decoder(), {"x": job("lora", 0, targets="nothing")})
    with pytest.raises(InputError, match="job 'x': rank is 99"):
        MultiAdapterTrainer(decoder(), {"x": job("mixlora", 0, rank=99)})
    base = decoder(torch.float32)
    adapted = {name: adapt(copy.deepcopy(base), "lora") for name in "ab"}
    from workbench.lib.core.task import Batch

    ids, pictures = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, 4)
    batches = {name: Batch(x, x, torch.zeros(2).long()) for name, x in zip("ab", (ids, pictures), strict=True)}
    with pytest.raises(InputError, match=r"inputs have shapes a \(2, 3\), b \(2, 3, 4\)"):
        Together(base, adapted)(batches)
    assert Context().aux == 0.0
