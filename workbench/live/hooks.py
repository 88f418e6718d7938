"""What happens around the steps of a run: commands before them, the record and the checkpoints after them.

A run may be several trainings one after the other; `first` is the number of its steps before the training of a hook.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from workbench.errors import InputError
from workbench.lib.core import checkpoint
from workbench.lib.core.observe import routed_layers
from workbench.lib.core.train import Hook, State
from workbench.live.control import Controller, Controls
from workbench.live.store import Answer, RunStopped
from workbench.live.watch import Watch

SETTINGS = ("learning_rate", "balance", "top_k")
"""The commands that change the numbers of a run."""


class Control(Hook):
    """Carries out commands between steps.

    Args:
        controller: of the run.
        replay: commands that were carried out in steps that are made again; each is, at its step.
    """

    def __init__(self, controller: Controller, replay: Sequence[Answer] = (), first: int = 0):
        self.controller, self.replay, self.first = controller, replay, first
        self._applied: dict[str, float | None] = dict.fromkeys(SETTINGS)

    def before_step(self, state: State) -> None:
        step = self.first + state.step
        for answer in self.replay:
            if answer.step == step:
                setattr(self.controller.controls, answer.name, answer.value)
                self.controller.channel.event(step, "control", f"{answer.name} = {answer.value:g}")
        controls = self.controller.before_step(step)
        state.stop = state.stop or controls.stop
        for name in SETTINGS:
            value = getattr(controls, name)
            if value != self._applied[name]:
                self._apply(name, value, state)
                self._applied[name] = value

    def _apply(self, name: str, value: float, state: State) -> None:
        if name == "learning_rate":
            state.lr_scale = value / state.config.lr
            return
        layers = routed_layers(state.model)
        deaf = {layer: why for layer, module in layers.items() if (why := _set(module.router, name, value))}
        if deaf or not layers:
            where = f"in {', '.join(deaf)}: {next(iter(deaf.values()))}" if deaf else "here: this model has no router"
            text = f"{name} = {value:g} changes nothing {where}"
            self.controller.channel.event(self.first + state.step, "note", text)


BALANCE = ("lbl", "band", "top1", "balance", "pool")
"""What a router calls the loss that keeps its load even."""


def _set(router: nn.Module, name: str, value: float) -> str | None:
    """Set "balance" or "top_k" of a router; why it cannot be set, if so."""
    if name == "balance":
        own = [loss for loss in BALANCE if loss in router.coefficients]
        router.coefficients.update(dict.fromkeys(own, value))
        return None if own else "the router has no such setting"
    if not hasattr(router, "set_top_k"):
        return "the router has no such setting"
    try:
        router.set_top_k(value)
    except InputError as error:  # a rule with a K of its own
        return str(error)
    return None


class Recorder(Hook):
    """Hands every step and every evaluation to the probes."""

    def __init__(self, probes: Watch, first: int = 0):
        self.probes, self.first = probes, first

    def after_evaluation(self, state: State) -> None:
        self.probes.evaluation(state.metrics, step=self.first + state.step)

    def after_step(self, state: State) -> None:
        values = {"aux": state.aux, "lr": state.lr, "grad_norm": state.grad_norm}
        self.probes.step(state.loss, seconds=state.seconds, **values)


class Evaluation(Hook):
    """Evaluates every so many steps a training that does not while it goes; it comes before the recorder."""

    def __init__(self, probes: Watch, every: int, first: int = 0):
        self.probes, self.every, self.first = probes, every, first

    def after_step(self, state: State) -> None:
        made, its_own = state.step + 1, state.config.eval_every is not None
        if made % self.every == 0 and not (its_own and made == state.config.steps):
            self.probes.evaluate(self.first + state.step)


class Keeper(Hook):
    """Writes checkpoints. It comes after the recorder, so that a checkpoint never knows more than the record.

    Args:
        folder: where they lie.
        every: steps between two; 0 for none while training.
        kept: steps made at the checkpoint that is there already, -1 for none.
        save: writes one, as `checkpoint.save` does.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        controller: Controller,
        probes: Watch,
        kept: int,
        first: int = 0,
        save: Callable[..., Any] = checkpoint.save,
    ):
        self.folder, self.every, self.controller, self.probes = folder, every, controller, probes
        self._kept, self.first, self._save = kept, first, save

    def after_step(self, state: State) -> None:
        made = self.first + state.step + 1
        if self.every and made % self.every == 0 and math.isfinite(state.loss) and math.isfinite(state.grad_norm):
            self.keep(state, made)

    def keep(self, state: State, made: int) -> None:
        """A checkpoint after `made` steps, unless there is one; RunStopped where it cannot be written."""
        if made == self._kept:
            return
        settings: Controls = self.controller.controls
        try:
            self._save(
                self.folder,
                made,
                state.model,
                state.optimizer,
                lr_scale=state.lr_scale,
                controls={name: getattr(settings, name) for name in SETTINGS},
                extra=self.probes.state(),
            )
        except OSError as error:
            raise RunStopped(f"run stopped: its checkpoint after {made} steps cannot be written: {error}") from error
        self._kept = made
