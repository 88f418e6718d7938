"""The training loop: one plain generator that can be read in a minute.

Every step draws all its randomness (the batch, dropout, router noise) from (seed, step) alone. The same seed therefore
gives the same numbers, and a run resumed at step s continues as if it had never stopped, with no generator to save.
"""

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.optim.matrix import undecayed
from workbench.lib.core.replicas import ALONE, Replicas
from workbench.lib.core.task import Task


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: optimizer steps in all.
        batch_size: rows per step.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up; then a cosine down to `final_lr` * lr at the last step.
        final_lr: last learning rate as a fraction of the peak.
        weight_decay: of the matrices; vectors (norms, biases, scalars) and embeddings are not decayed.
        clip: largest gradient norm.
        seed: of everything random in training (not of the model's initialisation, which has happened before).
        eval_every: steps between evaluations on the validation split; 0 for one at the end, None for none at all.
        eval_batches: batches per domain in each evaluation; None for the whole split.
    """

    steps: int
    batch_size: int = 16
    lr: float = 3e-3
    warmup: int = 20
    final_lr: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    eval_every: int | None = 0
    eval_batches: int | None = None

    def __post_init__(self):
        for name, low in (("steps", 1), ("batch_size", 1), ("warmup", 0), ("eval_every", 0), ("seed", 0)):
            if (getattr(self, name) or 0) < low:
                raise InputError(f"{name} is {getattr(self, name)} but must be at least {low}")
        if not 0 < self.lr <= 1:
            raise InputError(f"lr is {self.lr} but must be above 0 and at most 1")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step (0-based)."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


@dataclass
class State:
    """What the loop knows; hooks read it and may change `lr_scale` and `stop`.

    Attributes:
        replicas: the other processes that train this model.
        step: the step being made, 0-based; between two steps and after the last, the number of steps made.
        loss, aux, grad_norm, lr, seconds: of the step just made (task loss in nats; seconds without the hooks).
        metrics: of the last evaluation.
        history: every evaluation as (steps made, metrics).
        lr_scale: factor on the scheduled learning rate.
        stop: set it to end after this step.
    """

    model: nn.Module
    task: Task
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    replicas: Replicas = ALONE
    step: int = 0
    loss: float = math.nan
    aux: float = 0.0
    grad_norm: float = math.nan
    lr: float = 0.0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    lr_scale: float = 1.0
    stop: bool = False


class Hook:
    """What may happen around a step; override what you need."""

    def before_step(self, state: State) -> None:
        """Before the batch is drawn."""

    def before_update(self, state: State) -> None:
        """Gradients are there and clipped, parameters not yet changed."""

    def after_step(self, state: State) -> None:
        """Parameters have changed; `state.step` is still the step just made."""

    def after_evaluation(self, state: State) -> None:
        """`state.metrics` are new."""


Attend = Callable[[State], AbstractContextManager[Iterable[Hook]]]
"""What goes on around a training: entered before its first step, with hooks for it, and left after its last.

It may put `state.model`, `state.optimizer` and `state.step` where an earlier training stood, and `state.replicas`."""


def nobody(state: State) -> AbstractContextManager[Iterable[Hook]]:
    """Attends no training: the `Attend` where there is no other."""
    return nullcontext(())


_attend: ContextVar[Attend] = ContextVar("attend", default=nobody)


@contextmanager
def attended(attend: Attend) -> Iterator[None]:
    """Every training that begins inside is attended, whoever calls for it: a whole study, recorded and controlled.

    The hooks come after those of the training itself. An `attended` inside another takes its place.
    """
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)


def is_attended() -> bool:
    """Whether somebody attends the trainings that begin here."""
    return _attend.get() is not nobody


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only.

    Not decayed are parameters of one or no dimension, embeddings, and those that a module names as `undecayed`.
    """
    spared = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()} | undecayed(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in spared]
    others = [p for p in trained if p.ndim < 2 or id(p) in spared]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))


def step_seed(seed: int, step: int) -> int:
    """The seed of everything random in one step."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 1)


def steps(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    hooks: Iterable[Hook] = (),
    *,
    optimizer: torch.optim.Optimizer | None = None,
    start: int = 0,
    replicas: Replicas = ALONE,
) -> Generator[State, None, State]:
    """Train `model` on `task`, one optimizer step at each `next`: several trainings can go on side by side.

    Yields the same `State` after every step, when its hooks have run and `state.step` is the number of steps made, and
    returns it in the end. Closed between two steps, it leaves the model in training mode and a `state` to go on from.

    Args:
        hooks: see `Hook`; recording, control and checkpoints are hooks.
        optimizer, start: to continue: an optimizer in the state it had after `start` steps. A group of its parameters
            may have an "lr_scale", a factor on the learning rate.
        replicas: the other processes that train this model, each in this loop; `config.batch_size` is that of all.

    Seeds torch's global generator at each step (see the module's docstring), so trainings do not disturb each other.
    """
    state = State(model, task, optimizer or make_optimizer(model, config), config, replicas, step=start)
    with _attend.get()(state) as further:
        yield from _steps(state, (*hooks, *further))
    return state


def _steps(state: State, hooks: tuple[Hook, ...]) -> Iterator[State]:
    model, task, optimizer, config, replicas = state.model, state.task, state.optimizer, state.config, state.replicas
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    # all devices are seeded where there is another than the CPU: it takes a hundred times as long
    on_cpu = all(p.device.type == "cpu" for p in trained)
    draw_from = torch.default_generator.manual_seed if on_cpu else torch.manual_seed
    model.train()
    for step in range(state.step, config.steps):
        for hook in hooks:
            hook.before_step(state)
        if state.stop:
            return
        began = time.perf_counter()
        seed = step_seed(config.seed, step)
        draw_from(seed)
        batch = task.batch("train", config.batch_size, torch.Generator().manual_seed(seed))
        loss, context = task.loss(model, replicas.share(batch))
        state.loss, state.aux = replicas.means(loss, context.aux)
        if not math.isfinite(state.loss + state.aux):  # before it reaches the weights
            hint = f": a learning rate below {state.lr:.2g}?" if state.lr else ", before anything was learned"
            raise FloatingPointError(f"the loss is {state.loss} at step {step}{hint}")
        optimizer.zero_grad(set_to_none=True)
        (loss + context.aux).backward()
        state.grad_norm = replicas.clip(trained, config.clip)
        for hook in hooks:
            hook.before_update(state)
        state.lr = config.lr_at(step) * state.lr_scale
        update(model, optimizer, state.lr)
        state.seconds = time.perf_counter() - began
        last = step + 1 == config.steps
        if config.eval_every is not None and (last or (config.eval_every and (step + 1) % config.eval_every == 0)):
            state.metrics = task.evaluate(model, max_batches=config.eval_batches)
            state.history.append((step + 1, state.metrics))
            for hook in hooks:
                hook.after_evaluation(state)
        for hook in hooks:
            hook.after_step(state)
        state.step = step + 1
        yield state
        if state.stop:
            return


def update(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Change the weights by the gradients that are there, and tell the modules that count steps."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    optimizer.step()
    tell_step(model)


def tell_step(model: nn.Module) -> None:
    """Tell the modules that count steps that there was one."""
    for module in model.modules():
        if hasattr(module, "after_step"):  # e.g. the bias of loss-free balancing
            module.after_step()


def train(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    hooks: Iterable[Hook] = (),
    *,
    optimizer: torch.optim.Optimizer | None = None,
    start: int = 0,
    replicas: Replicas = ALONE,
) -> State:
    """Train `model` on `task` to the end, or until a hook stops it, and return the final `State`.

    Arguments as in `steps`, which makes one step at a time.
    """
    made = steps(model, task, config, hooks, optimizer=optimizer, start=start, replicas=replicas)
    while True:
        try:
            next(made)
        except StopIteration as end:
            return end.value
