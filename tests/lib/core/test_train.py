"""The training loop: schedule, optimizer groups, hooks, determinism, resuming in memory."""

import math
from contextlib import contextmanager
from itertools import islice

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.checkpoint import weights_digest
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import (
    Hook,
    State,
    TrainConfig,
    attended,
    is_attended,
    make_optimizer,
    nobody,
    step_seed,
    steps,
    train,
)
from workbench.lib.data.types import TextDomains


@pytest.fixture(scope="module")
def task() -> LanguageModelling:
    generator = torch.Generator().manual_seed(0)

    def text() -> torch.Tensor:
        return torch.randint(97, 105, (2000,), generator=generator).to(torch.uint8)

    splits = {split: {name: text() for name in ("a", "b")} for split in ("train", "validation", "test")}
    return LanguageModelling(TextDomains("letters", ("a", "b"), splits, {}), seq_len=16)


def model(seed: int = 0, bias_rate: float = 0.0) -> DecoderLM:
    torch.manual_seed(seed)

    def ffn(layer: int) -> MoELayer:
        router = LinearRouter(16, 4, 2, coefficients={"lbl": 0.01}, bias_rate=bias_rate)
        return MoELayer(router, GLUExperts(4, 16, 8))

    return DecoderLM(256, 16, 2, 2, ffn, seq_len=16)


def test_learning_rate_rises_linearly_then_falls_along_a_cosine():
    config = TrainConfig(steps=110, lr=0.2, warmup=10, final_lr=0.1)
    assert config.lr_at(0) == pytest.approx(0.02)
    assert config.lr_at(9) == config.lr_at(10) == pytest.approx(0.2)
    assert config.lr_at(109) == pytest.approx(0.02)
    half = 10 + 99 / 2
    assert (config.lr_at(math.floor(half)) + config.lr_at(math.ceil(half))) / 2 == pytest.approx(0.11, rel=1e-3)
    assert all(config.lr_at(step) > config.lr_at(step + 1) for step in range(10, 109))


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 0), ("batch_size", 0), ("seed", -1), ("lr", 0.0), ("lr", 1.5), ("lr", math.nan)]
)
def test_an_impossible_value_is_named(name: str, value: float):
    with pytest.raises(InputError, match=f"{name} is {value} but must be"):
        TrainConfig(**{"steps": 1, name: value})


def test_seeds_of_steps_are_fixed_and_distinct():
    seeds = {(seed, step): step_seed(seed, step) for seed in range(20) for step in range(50)}
    assert len(set(seeds.values())) == len(seeds)
    assert seeds[3, 7] == step_seed(3, 7)
    assert all(0 <= seed < 2**63 for seed in seeds.values())


def test_only_matrices_are_decayed():
    module = nn.ModuleDict({"e": nn.Embedding(5, 4), "l": nn.Linear(4, 4), "n": nn.RMSNorm(4)})
    module["frozen"] = nn.Linear(4, 4).requires_grad_(False)
    decayed, others = make_optimizer(module, TrainConfig(steps=1, weight_decay=0.3)).param_groups
    assert [id(p) for p in decayed["params"]] == [id(module["l"].weight)]
    assert {id(p) for p in others["params"]} == {id(module["e"].weight), id(module["l"].bias), id(module["n"].weight)}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)


def test_the_same_seed_gives_the_same_numbers_bit_for_bit(task):
    config = TrainConfig(steps=20, batch_size=4, seed=3, eval_every=10, eval_batches=1)
    first, second = (train(model(bias_rate=0.01), task, config) for _ in range(2))
    assert weights_digest(first.model) == weights_digest(second.model)
    assert first.history == second.history and first.loss == second.loss
    other = train(model(bias_rate=0.01), task, TrainConfig(steps=20, batch_size=4, seed=4))
    assert weights_digest(other.model) != weights_digest(first.model)


def test_training_learns(task):
    losses = []

    class Note(Hook):
        def after_step(self, state: State) -> None:
            losses.append(state.loss)

    train(model(), task, TrainConfig(steps=60, batch_size=8, lr=1e-2, warmup=5), [Note()])
    assert losses[0] == pytest.approx(math.log(256), rel=0.1)
    assert min(losses[-10:]) < math.log(12)  # eight letters; ln 8 is the best there is


def test_evaluation_comes_on_time_and_changes_nothing(task):
    config = {"steps": 12, "batch_size": 4, "eval_batches": 1}
    often = train(model(bias_rate=0.01), task, TrainConfig(**config, eval_every=5))
    assert [step for step, _ in often.history] == [5, 10, 12]
    assert often.history[-1][1] == often.metrics
    assert set(often.metrics) == {"bits_per_byte", "bits_per_byte/a", "bits_per_byte/b"}
    never = train(model(bias_rate=0.01), task, TrainConfig(**config))
    assert [step for step, _ in never.history] == [12]
    assert weights_digest(often.model) == weights_digest(never.model)


def test_training_without_any_evaluation_is_the_same_training(task):
    seen, silent = (train(model(), task, TrainConfig(steps=4, batch_size=4, eval_every=n)) for n in (0, None))
    assert len(seen.history) == 1 and silent.history == [] and silent.metrics == {}
    assert weights_digest(seen.model) == weights_digest(silent.model) and seen.loss == silent.loss


def test_going_on_from_a_step_is_as_if_it_never_stopped(task):
    config = TrainConfig(steps=12, batch_size=4)
    whole = train(model(), task, config)

    class StopAfter(Hook):
        def after_step(self, state: State) -> None:
            state.stop = state.step == 6

    part = train(model(), task, config, [StopAfter()])
    assert part.step == 7
    torch.manual_seed(99)  # whatever happened in between
    rest = train(part.model, task, config, optimizer=part.optimizer, start=part.step)
    assert rest.step == 12
    assert weights_digest(rest.model) == weights_digest(whole.model)


def test_hooks_see_each_step_in_order_with_clipped_gradients(task):
    calls = []

    class Note(Hook):
        def before_step(self, state: State) -> None:
            calls.append(("before_step", state.step))
            self.weights = weights_digest(state.model)

        def before_update(self, state: State) -> None:
            calls.append(("before_update", state.step))
            assert weights_digest(state.model) == self.weights
            squares = sum(p.grad.square().sum() for p in state.model.parameters() if p.grad is not None)
            assert float(squares.sqrt()) <= 0.1 * (1 + 1e-5) < state.grad_norm

        def after_evaluation(self, state: State) -> None:
            calls.append(("after_evaluation", state.step))

        def after_step(self, state: State) -> None:
            calls.append(("after_step", state.step))
            assert weights_digest(state.model) != self.weights
            assert math.isfinite(state.loss) and state.aux > 0 and state.seconds > 0

    train(model(), task, TrainConfig(steps=2, batch_size=4, clip=0.1, eval_batches=1), [Note()])
    step = ("before_step", "before_update", "after_step")
    assert calls == [(c, 0) for c in step] + [(c, 1) for c in (*step[:2], "after_evaluation", "after_step")]


def test_a_hook_may_scale_the_learning_rate_and_stop_before_a_step(task):
    rates = []

    class Steer(Hook):
        def before_step(self, state: State) -> None:
            state.lr_scale = 0.5 if state.step else 1.0
            state.stop = state.step == 3

        def after_step(self, state: State) -> None:
            rates.append(state.lr)

    config = TrainConfig(steps=10, batch_size=2, warmup=0)
    state = train(model(), task, config, [Steer()])
    assert state.step == 3
    assert rates == [config.lr_at(0), 0.5 * config.lr_at(1), 0.5 * config.lr_at(2)]
    assert {group["lr"] for group in state.optimizer.param_groups} == {rates[-1]}


def test_the_bias_of_loss_free_balancing_moves_once_a_step(task):
    trained = model(bias_rate=0.125)
    train(trained, task, TrainConfig(steps=3, batch_size=4, eval_every=1, eval_batches=1))
    bias = trained.blocks[0].ffn.router.bias
    assert set((bias.bias / 0.125).abs().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    assert bias.bias.any() and not bias.load.any()


def test_a_loss_that_is_no_number_ends_the_training_with_a_reason(task):
    class Broken(LanguageModelling):
        def loss(self, module, batch):
            loss, context = super().loss(module, batch)
            return loss * float("nan"), context

    with pytest.raises(FloatingPointError, match="loss is nan at step 0"):
        train(model(), Broken(task.data, 16), TrainConfig(steps=3, batch_size=2))


def test_a_model_without_experts_trains_too(task):
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor, context: Context | None = None) -> torch.Tensor:
            return self.linear(x)

    torch.manual_seed(0)
    state = train(DecoderLM(256, 16, 1, 2, lambda layer: Dense(), 16), task, TrainConfig(steps=2, batch_size=2))
    assert state.aux == 0.0 and math.isfinite(state.loss)


def noisy(seed: int) -> DecoderLM:
    """A model with dropout: each of its steps draws random numbers beside those of its batch."""
    noisy = model(seed, bias_rate=0.01)
    noisy.norm.register_forward_hook(lambda module, inputs, output: F.dropout(output, 0.3, module.training))
    return noisy


CONFIGS = [TrainConfig(steps=n, batch_size=4, seed=n, eval_every=2, eval_batches=1) for n in (6, 4)]


def test_workers_in_lock_step_train_as_each_does_alone(task):
    losses: list[list[float]] = [[], []]

    class Note(Hook):
        def __init__(self, i: int):
            self.losses = losses[i]

        def after_step(self, state: State) -> None:
            self.losses.append(state.loss)

    alone = [train(noisy(i), task, config, [Note(i)]) for i, config in enumerate(CONFIGS)]
    together = [steps(noisy(i), task, config) for i, config in enumerate(CONFIGS)]
    states: list[list[State]] = [[], []]
    seen: list[list[float]] = [[], []]
    for turn in range(6):
        for i in (0, 1) if turn % 2 else (1, 0):
            for state in islice(together[i], 1):
                states[i].append(state)
                seen[i].append(state.loss)
                assert state.step == turn + 1 and state.model.training
    assert seen == losses and [len(each) for each in seen] == [6, 4]
    for each, single, ended in zip(states, alone, together, strict=True):
        assert len({id(state) for state in each}) == 1 and list(ended) == []
        assert each[-1].history == single.history
        assert weights_digest(each[-1].model) == weights_digest(single.model)


def test_a_training_closed_between_two_steps_can_go_on(task):
    whole = train(noisy(0), task, CONFIGS[0])
    part = steps(noisy(0), task, CONFIGS[0])
    state = list(islice(part, 3))[-1]
    part.close()
    assert state.step == 3 and all(module.training for module in state.model.modules())
    assert list(part) == []
    rest = train(state.model, task, CONFIGS[0], optimizer=state.optimizer, start=state.step)
    assert weights_digest(rest.model) == weights_digest(whole.model)


def test_whoever_makes_the_steps_may_stop_them(task):
    made = steps(model(), task, TrainConfig(steps=5, batch_size=2))
    next(made).stop = True
    with pytest.raises(StopIteration) as end:
        next(made)
    assert end.value.value.step == 1 and end.value.value.history == []


def test_a_training_that_is_stopped_at_once_changes_nothing(task):
    class Refuse(Hook):
        def before_step(self, state: State) -> None:
            state.stop = True

    untouched = weights_digest(model())
    state = train(model(), task, TrainConfig(steps=5, batch_size=2), [Refuse()])
    assert state.step == 0 and weights_digest(state.model) == untouched


def test_an_attended_training_has_further_hooks_after_its_own_from_its_first_step_to_its_last(task):
    order, seen = [], []

    class Note(Hook):
        def __init__(self, name: str):
            self.name = name

        def after_step(self, state: State) -> None:
            order.append(self.name)

    @contextmanager
    def attend(state: State):
        seen.append(("enters", state.step))
        try:
            yield [Note("attendant's")]
        finally:
            seen.append(("leaves", state.step))

    plain = train(model(), task, TrainConfig(steps=2, batch_size=2))
    with attended(attend):
        assert is_attended()
        state = train(model(), task, TrainConfig(steps=2, batch_size=2), [Note("own")])
        with attended(nobody):
            assert not is_attended()
            train(model(), task, TrainConfig(steps=2, batch_size=2))
    train(model(), task, TrainConfig(steps=2, batch_size=2))
    assert not is_attended() and seen == [("enters", 0), ("leaves", 2)]
    assert order == ["own", "attendant's"] * 2
    assert weights_digest(state.model) == weights_digest(plain.model)


def test_an_attendant_may_put_a_training_where_an_earlier_one_stood_and_end_what_called_for_it(task):
    config = TrainConfig(steps=6, batch_size=2)
    whole = train(model(), task, config)
    made = steps(model(), task, config)
    begun = list(islice(made, 3))[-1]

    class Over(BaseException):
        pass

    @contextmanager
    def attend(state: State):
        state.model.load_state_dict(begun.model.state_dict())
        state.optimizer.load_state_dict(begun.optimizer.state_dict())
        state.step = begun.step
        yield ()
        assert state.step == 6
        raise Over

    again = model()
    with pytest.raises(Over), attended(attend):
        train(again, task, config)
    assert not is_attended() and weights_digest(again) == weights_digest(whole.model)
