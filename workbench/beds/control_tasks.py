"""Small control tasks with one observation and one action for all: sequences that a scripted expert has left behind.

For world models of several tasks. Three systems, and of each a twin in which the action does the opposite: what is seen
at first is the same, and what happens next, and what the expert does, is not, so that the gradients of twins pull
against each other. Observations have four numbers and actions two in -1 .. 1; where a system has fewer, they are 0.

    pendulum      cos and sin of the angle, angular velocity; to be swung up and held up by a torque that is too weak
    integrator    place and speed on a line; to be brought to rest at 0
    walk          place and goal in the plane, in steps of a grid, one axis at a time

The expert acts with noise, so that more is seen than its way alone. A row is 16 steps: inputs (16, 6), observations and
actions; targets (16, 7), the next observation, the reward, and the action of the expert without its noise. The loss is
for the model to say, see `ControlTasks`. Made here.

Tensor letters: B batch, T time.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.beds.baseline import MLP, Measured, seeded
from workbench.errors import InputError
from workbench.lib.core.attention import Attention
from workbench.lib.core.models import Block, MakeFFN
from workbench.lib.core.routing import Context
from workbench.lib.core.task import ArrayTask, Batch, device_of, mean_by_domain
from workbench.lib.core.train import TrainConfig, train

NEEDS = ()
T, OBSERVED, ACTION = 16, 4, 2
SYSTEMS = ("pendulum", "integrator", "walk")
TASKS = (*SYSTEMS, *(f"{name} reversed" for name in SYSTEMS))
NOISE = 0.3  # of the expert's actions
ROWS = {"train": 384, "validation": 64, "test": 128}

SMOKE = {"steps": 20, "batch": 24}
SMALL = {"steps": 400, "batch": 96}
FULL = {"steps": 4000, "batch": 192}

State = Float[Tensor, "rows _"]


@dataclass(frozen=True)
class System:
    """What makes a system: states (n, .) at first, what is seen of one, what the expert does, and what comes of it."""

    start: Callable[[int, torch.Generator], State]
    observe: Callable[[State], State]
    expert: Callable[[State], State]
    step: Callable[[State, State], tuple[State, Tensor]]


def _padded(*columns: Tensor, width: int) -> State:
    rows = torch.stack(columns, 1)
    return torch.cat([rows, rows.new_zeros(len(rows), width - rows.shape[1])], 1)


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _pendulum() -> System:
    step, gravity, torque = 0.15, 3.0, 2.0

    def expert(state: State) -> State:
        angle, speed = state.unbind(1)
        off = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi  # from upright
        energy = 0.5 * speed.square() + gravity * (angle.cos() - 1)  # 0 upright and at rest
        pump = -torch.sign(speed) * torch.sign(energy)
        hold = -2.0 * off - 1.0 * speed
        return _padded(torch.where(off.abs() < 0.6, hold, pump).clamp(-1, 1), width=ACTION)

    def move(state: State, action: State) -> tuple[State, Tensor]:
        angle, speed = state.unbind(1)
        speed = (speed + step * (gravity * angle.sin() + torque * action[:, 0])).clamp(-6, 6)
        angle = angle + step * speed
        return torch.stack([angle, speed], 1), angle.cos() - 0.02 * speed.square()

    return System(
        lambda n, g: torch.stack([_uniform(-math.pi, math.pi, (n,), g), _uniform(-2, 2, (n,), g)], 1),
        lambda s: _padded(s[:, 0].cos(), s[:, 0].sin(), s[:, 1] / 3, width=OBSERVED),
        expert,
        move,
    )


def _integrator() -> System:
    def move(state: State, action: State) -> tuple[State, Tensor]:
        place, speed = state.unbind(1)
        speed = 0.98 * speed + 0.3 * action[:, 0]
        place = place + 0.3 * speed
        return torch.stack([place, speed], 1), 1 - place.square() - 0.2 * speed.square()

    return System(
        lambda n, g: _uniform(-1.5, 1.5, (n, 2), g),
        lambda s: _padded(*s.unbind(1), width=OBSERVED),
        lambda s: _padded((-1.5 * s[:, 0] - 1.8 * s[:, 1]).clamp(-1, 1), width=ACTION),
        move,
    )


def _walk() -> System:
    size = 8

    def expert(state: State) -> State:
        far = state[:, 2:] - state[:, :2]
        axis = far.abs().argmax(1, keepdim=True)
        return torch.zeros_like(far).scatter(1, axis, far.gather(1, axis).sign())

    def move(state: State, action: State) -> tuple[State, Tensor]:
        place = (state[:, :2] + action.round()).clamp(0, size - 1)
        away = (state[:, 2:] - place).abs().sum(1)
        return torch.cat([place, state[:, 2:]], 1), 1 - away / 4

    return System(
        lambda n, g: torch.randint(size, (n, 4), generator=g).float(), lambda s: s / (size / 2) - 1, expert, move
    )


MADE = {"pendulum": _pendulum, "integrator": _integrator, "walk": _walk}


def sequences(name: str, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs (rows, 16, 6) and targets (rows, 16, 7) of one task."""
    system, sign = MADE[name.removesuffix(" reversed")](), -1.0 if name.endswith(" reversed") else 1.0
    state, inputs, targets = system.start(rows, generator), [], []
    for _ in range(T):
        seen, best = system.observe(state), sign * system.expert(state)
        used = (best.abs().sum(0) > 0).float()  # a system of one action is given no other
        action = (best + NOISE * torch.randn(best.shape, generator=generator) * used).clamp(-1, 1)
        state, reward = system.step(state, sign * action)
        inputs.append(torch.cat([seen, action], 1))
        targets.append(torch.cat([system.observe(state), reward[:, None], best], 1))
    return torch.stack(inputs, 1), torch.stack(targets, 1)


class ControlTasks(ArrayTask):
    """The six tasks; metric: "loss", the mean over the tasks of what the model says of its errors, lower is better.

    A model is called as `model(inputs, targets, context)` and returns the loss of each row (B,), since a world model
    compares with a latent of its own.

    Attributes:
        active: tasks that a batch of training is drawn from; a batch has as many rows of each as of all it would have,
            so that one of fewer tasks is a smaller one.
    """

    metric, unit, higher_is_better = "loss", "squared error", False

    def __init__(self, fold: int = 0, rows: Mapping[str, int] = ROWS):
        if fold < 0:
            raise InputError(f"fold is {fold} but must be at least 0")
        generator = torch.Generator().manual_seed(fold)
        splits = {split: {name: sequences(name, n, generator) for name in TASKS} for split, n in rows.items()}
        digest = sha256(b"".join(part.numpy().tobytes() for task in splits["train"].values() for part in task))
        manifest = {"control-tasks": {"fold": fold, "rows": dict(rows), "sha256": digest.hexdigest()}}
        super().__init__("control-tasks", splits, manifest)
        self.active = tuple(range(len(TASKS)))

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        if domain is not None or split != "train":
            return super().batch(split, size, generator, domain)
        each = size // len(TASKS)
        if each < 1:
            raise InputError(f"size is {size} but must be at least {len(TASKS)}, a row of each task")
        parts = [super(ControlTasks, self).batch(split, each, generator, task) for task in self.active]
        return Batch(*(torch.cat(part) for part in zip(*((b.inputs, b.targets, b.domain) for b in parts), strict=True)))

    def context(self, batch: Batch) -> Context:
        return Context(domain=batch.domain)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        batch = batch.to(device_of(model))
        context = self.context(batch)
        return model(batch.inputs, batch.targets, context).mean(), context

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        mean = mean_by_domain(self, model, split, max_batches, lambda batch: self.loss(model, batch)[0])
        return {self.metric: sum(mean.values()) / len(mean)} | {f"{self.metric}/{d}": v for d, v in mean.items()}


class StepModel(nn.Module):
    """What comes next from one step alone, by a perceptron for all tasks. The action mostly tells whose twin it is."""

    def __init__(self, hidden: int = 64):
        super().__init__()
        self.mlp = MLP((OBSERVED + ACTION, hidden, hidden, OBSERVED + 1 + ACTION))

    def forward(self, inputs: Tensor, targets: Tensor, context: Context | None = None) -> Float[Tensor, " batch"]:
        said = self.mlp(inputs.flatten(0, 1)).view_as(targets)
        return (said - targets).square().flatten(1).mean(1)


class Transformer(nn.Module):
    """What all tasks share of a world model, between the encoder and the heads: latents and actions, one after another.

    Latents (B, T, D) and actions (B, T, 2) give (B, T, 2, D), the hidden states at each latent and at each action.
    """

    def __init__(self, d_model: int, n_layers: int, n_heads: int, ffn: MakeFFN):
        super().__init__()
        self.action = nn.Linear(ACTION, d_model)
        self.position = nn.Parameter(0.02 * torch.randn(2 * T, d_model))
        self.blocks = nn.ModuleList(
            Block(d_model, ffn(layer), Attention(d_model, n_heads, causal=True)) for layer in range(n_layers)
        )
        self.norm = nn.RMSNorm(d_model)

    def forward(self, latents: Tensor, actions: Tensor, context: Context) -> Float[Tensor, "batch time 2 dim"]:
        x = torch.stack([latents, self.action(actions)], 2).flatten(1, 2) + self.position
        for block in self.blocks:
            x = block(x, context)
        return self.norm(x).unflatten(1, (T, 2))


class WorldModel(nn.Module):
    """Says from each latent and what was before the expert's action, and from each action the next latent and reward.

    Latents are normalised; those that are to be predicted have no gradient. Rewards and the expert's actions are read
    by heads that each task has alone, `heads`, the next latent by one for all. The loss of a row is the sum of three
    mean squared errors.

    Args:
        ffn: gives the feed-forward part of each layer; a mixture is told the task of its tokens in `context.domain`.
    """

    def __init__(self, d_model: int, n_layers: int, n_heads: int, ffn: MakeFFN):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(OBSERVED, d_model), nn.GELU(), nn.Linear(d_model, d_model), nn.LayerNorm(d_model)
        )
        self.transformer = Transformer(d_model, n_layers, n_heads, ffn)
        self.next_latent = nn.Linear(d_model, d_model)
        self.heads = nn.Embedding(len(TASKS), (1 + ACTION) * d_model)
        nn.init.normal_(self.heads.weight, std=d_model**-0.5)

    def forward(
        self,
        inputs: Float[Tensor, "batch time 6"],
        targets: Float[Tensor, "batch time 7"],
        context: Context,
    ) -> Float[Tensor, " batch"]:
        seen, action = inputs.split((OBSERVED, ACTION), -1)
        after, reward, best = targets.split((OBSERVED, 1, ACTION), -1)
        inner = replace(context, domain=context.domain.repeat_interleave(2 * T))
        hidden = self.transformer(self.encoder(seen), action, inner)
        context.aux = inner.aux
        at_latent, at_action = hidden.unbind(2)
        heads = self.heads(context.domain).unflatten(1, (1 + ACTION, -1)).transpose(1, 2)  # (B, D, 3)
        errors = (
            self.next_latent(at_action) - self.encoder(after).detach(),
            at_action @ heads[..., :1] - reward,
            at_latent @ heads[..., 1:] - best,
        )
        return sum(error.square().flatten(1).mean(1) for error in errors)


def prepare(settings: Mapping[str, Any] = SMALL) -> list[ControlTasks]:
    return [ControlTasks()]


def measure(settings: Mapping[str, Any] = SMALL) -> list[Measured]:
    """A perceptron on one step, without the past."""
    (task,) = prepare(settings)
    x, y = (torch.cat([task.splits[s][name][i] for name in TASKS]) for i, s in ((1, "train"), (1, "test")))
    trivial = float((y - x.flatten(0, 1).mean(0)).square().mean())
    model = seeded(0, StepModel)
    train(model, task, TrainConfig(settings["steps"], settings["batch"], eval_every=None))
    size = " / ".join(f"{n * len(TASKS):,}" for n in ROWS.values())
    reached = task.evaluate(model, "test")["loss"]
    return [Measured("six tasks", size, "perceptron 64-64 on a step", "squared error", trivial, reached, 0.0)]
