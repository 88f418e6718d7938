"""The control channel: what may be asked of a running trainer, and how the trainer carries it out.

- A person asks through ``Run.send``; ``validate`` refuses nonsense before anything is written.
- The trainer calls ``Controller.before_step`` between steps. It waits there while the run is paused.
- Every command is answered in the run, and every one carried out is an event of kind "control".
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from workbench.errors import InputError, unknown

POLL_SECONDS = 0.05  # while paused; a person does not feel it, and it costs no core


@dataclass(frozen=True)
class Command:
    """One command as the trainer receives it; value is None for the commands without an argument."""

    id: int
    name: str
    value: float | int | None = None


@dataclass(frozen=True)
class Rule:
    """What a command means and takes: argument None, or a number of ``kind`` in the interval from low to high."""

    help: str
    argument: str | None = None
    kind: type = float
    low: float = 0.0
    high: float = math.inf  # top_k: the fewest experts of any layer
    open_low: bool = False  # low itself is not allowed

    @property
    def allowed(self) -> str:
        """The interval in words."""
        if self.open_low:
            return f"above {self.low:g} and at most {self.high:g}"
        return f"between {self.low:g} and {self.high:g}"


COMMANDS: dict[str, Rule] = {
    "pause": Rule("stop before the next step and wait"),
    "continue": Rule("go on after a pause"),
    "step": Rule("do one step, then wait"),
    "stop": Rule("end the run after the current step, with a checkpoint"),
    "learning_rate": Rule("peak learning rate of the schedule", "rate per step", high=1.0, open_low=True),
    "balance": Rule("coefficient of the balance losses", "coefficient", high=10.0),
    "top_k": Rule("experts per token", "experts", kind=int, low=1),
}


def validate(name: str, value: object, meta: dict[str, Any]) -> float | int | None:
    """The value to send for command ``name`` of the run with this meta; InputError where it is not allowed."""
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    rule = COMMANDS[name]
    if rule.argument is None:
        if value is not None:
            raise InputError(f"command {name} takes no value but got {value!r}")
        return None
    if name == "top_k":
        rule = _limit_top_k(rule, meta)
    number = _number(value)
    inside = rule.low < number <= rule.high if rule.open_low else rule.low <= number <= rule.high
    if not inside or (rule.kind is int and number != int(number)):  # NaN is never inside
        noun = "a whole number" if rule.kind is int else "a number"
        raise InputError(f"{name} is {value!r} but must be {noun} {rule.allowed}")
    return rule.kind(number)


def _number(value: object) -> float:
    """value as a float, NaN where it is none; True and "3" are none, whatever Python makes of them."""
    try:
        return math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _limit_top_k(rule: Rule, meta: dict[str, Any]) -> Rule:
    layers = (meta.get("model") or {}).get("layers") or []
    fixed = [layer["n_experts"] for layer in layers if layer.get("top_k")]
    if not fixed:
        raise InputError("top_k cannot be set: no layer of this run has a fixed number of experts per token")
    return Rule(rule.help, rule.argument, rule.kind, rule.low, min(fixed))


@dataclass
class Controls:
    """What the commands so far ask of the trainer; None leaves a setting as the recipe has it."""

    paused: bool = False
    stop: bool = False
    learning_rate: float | None = None
    balance: float | None = None
    top_k: int | None = None


class Channel(Protocol):
    """The part of ``RunWriter`` that a controller needs."""

    def commands(self) -> list[Command]: ...
    def answer(self, command: Command, step: int, error: str | None = None) -> None: ...
    def event(self, step: int, kind: str, text: str) -> None: ...
    def status(self, state: str, message: str = "") -> None: ...


Agree = Callable[[Controls, bool], bool]
"""agree(controls, wait): makes the controls of all processes those of the first, and says whether all wait."""


class Controller:
    """Carries out the commands of a run between the trainer's steps.

    ``controls`` may come from a checkpoint: a resumed run keeps the settings it had, but not that it was paused.
    Where several processes train, each has one, and ``agree``: only the first has a channel on which commands come.

    Attributes:
        stopping: set it, from a signal handler too, to stop before the next step: all processes before the same one.
    """

    def __init__(self, channel: Channel, controls: Controls | None = None, agree: Agree = lambda _, wait: wait):
        self.channel, self._agree = channel, agree
        self.controls = replace(controls or Controls(), paused=False, stop=False)
        self.stopping = False
        self._steps_allowed = 0  # steps that a paused run still owes

    def before_step(self, step: int) -> Controls:
        """The controls that hold for ``step``; returns at once, or, while paused, when a command lets it."""
        while True:
            self.poll(step)
            held = self.controls.paused and not self.controls.stop
            if not self._agree(self.controls, held and not self._steps_allowed):
                break
            time.sleep(POLL_SECONDS)
        if held and self._steps_allowed:
            self._steps_allowed -= 1
        return self.controls

    def poll(self, step: int) -> None:
        """Carry out what has come in since the last call, oldest first, without waiting."""
        self.controls.stop = self.controls.stop or self.stopping
        for command in self.channel.commands():
            if self.controls.stop:
                self.channel.answer(command, step, error="the run is stopping")
                continue
            was_paused = self.controls.paused
            self._apply(command)
            value = "" if command.value is None else f" = {command.value:g}"
            self.channel.event(step, "control", command.name + value)
            if self.controls.paused != was_paused:
                self.channel.status("paused" if self.controls.paused else "running")
            self.channel.answer(command, step)  # last: whoever reads the answer finds the rest done

    def _apply(self, command: Command) -> None:
        controls = self.controls
        match command.name:
            case "pause":
                controls.paused, self._steps_allowed = True, 0
            case "continue":
                controls.paused, self._steps_allowed = False, 0
            case "step":
                controls.paused, self._steps_allowed = True, self._steps_allowed + 1
            case "stop":
                controls.stop = True
            case "learning_rate" | "balance" | "top_k":
                setattr(controls, command.name, command.value)
