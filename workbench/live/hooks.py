"""What happens around the steps of a run: commands before them, the record and the checkpoints after them."""

import math
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from workbench.lib.core import checkpoint
from workbench.lib.core.moe import moe_layers
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

    def __init__(self, controller: Controller, replay: Sequence[Answer] = ()):
        self.controller, self.replay = controller, replay
        self._applied: dict[str, float | None] = dict.fromkeys(SETTINGS)

    def before_step(self, state: State) -> None:
        for answer in self.replay:
            if answer.step == state.step:
                setattr(self.controller.controls, answer.name, answer.value)
                self.controller.channel.event(state.step, "control", f"{answer.name} = {answer.value:g}")
        controls = self.controller.before_step(state.step)
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
        layers = moe_layers(state.model)
        deaf = [layer for layer, module in layers.items() if not _set(module.router, name, value)]
        if deaf:
            text = f"{name} = {value:g} changes nothing in {', '.join(deaf)}: the router has no such setting"
            self.controller.channel.event(state.step, "note", text)


def _set(router: nn.Module, name: str, value: float) -> bool:
    """Set "balance" or "top_k" of a router; whether it has that setting."""
    if name == "top_k" and hasattr(router, "set_top_k"):
        router.set_top_k(value)
        return True
    if name == "balance" and "lbl" in router.coefficients:
        router.coefficients["lbl"] = value
        return True
    return False


class Recorder(Hook):
    """Hands every step and every evaluation to the probes."""

    def __init__(self, probes: Watch):
        self.probes = probes

    def after_evaluation(self, state: State) -> None:
        self.probes.evaluation(state.metrics, step=state.step)

    def after_step(self, state: State) -> None:
        values = {"aux": state.aux, "lr": state.lr, "grad_norm": state.grad_norm}
        self.probes.step(state.loss, seconds=state.seconds, **values)


class Keeper(Hook):
    """Writes checkpoints. It comes after the recorder, so that a checkpoint never knows more than the record.

    Args:
        folder: where they lie.
        every: steps between two; 0 for none while training.
        kept: steps made at the checkpoint that is there already, -1 for none.
    """

    def __init__(self, folder: Path, every: int, controller: Controller, probes: Watch, kept: int):
        self.folder, self.every, self.controller, self.probes, self._kept = folder, every, controller, probes, kept

    def after_step(self, state: State) -> None:
        made = state.step + 1
        if self.every and made % self.every == 0 and math.isfinite(state.loss) and math.isfinite(state.grad_norm):
            self.keep(state, made)

    def keep(self, state: State, made: int) -> None:
        """A checkpoint after `made` steps, unless there is one; RunStopped where it cannot be written."""
        if made == self._kept:
            return
        settings: Controls = self.controller.controls
        try:
            checkpoint.save(
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
