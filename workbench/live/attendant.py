"""What goes on around the trainings of a run: its record, its commands, its checkpoints."""

import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import workbench
from workbench.errors import InputError
from workbench.lib.core import checkpoint
from workbench.lib.core.budget import measure_budget
from workbench.lib.core.sidecar import Checkpoint
from workbench.lib.core.train import Hook, State
from workbench.live.arm import Arm
from workbench.live.control import Controller, Controls
from workbench.live.hooks import SETTINGS, Control, Evaluation, Keeper, Recorder
from workbench.live.probes.conflict import undisturbed
from workbench.live.provenance import revision, versions
from workbench.live.recipe import Recipe
from workbench.live.store import CHECKPOINTS, Answer, RunStopped, RunWriter
from workbench.live.watch import Cadence, Watch, describe

if TYPE_CHECKING:
    from workbench.live.team import Team

Progress = Callable[[int, int, str], None]
"""progress(steps made, steps in all, a few words)"""


class Over(BaseException):
    """The run has ended, whatever its recipe would do next."""


class Past(NamedTuple):
    """What there was of a run when it was resumed."""

    meta: Mapping[str, Any]
    answers: Sequence[Answer]


class Attendant:
    """Attends the trainings that a recipe makes, as one run: those of one model, whose steps count on.

    To be given to `lib.core.train.attended`. The run is made when the first training begins, and with the last one
    `Over` ends whatever called for it. Used in `with`, which records how the run ended.

    A run that is resumed makes only the training again that its checkpoint is from, and what comes after it: of the
    trainings before, what is left is in the weights.

    Where a team of processes trains, each has one, and that of the process that leads makes the run.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe | Arm,
        progress: Progress | None = None,
        past: Past | None = None,
        team: "Team | None" = None,
    ):
        self.folder, self.recipe, self.progress, self.team = folder, recipe, progress, team
        self.checkpoints = folder / CHECKPOINTS
        self.cadence = Cadence(**recipe.cadence)
        self.past = past  # until the run is where it was
        self.trained = self.steps = 0  # trainings that are over, and their steps
        self.state: State | None = None  # of the training now, or of the last
        self.writer: RunWriter | None = None
        self.controller: Controller | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Attendant":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @contextmanager
    def __call__(self, state: State) -> Iterator[Sequence[Hook]]:
        first, resumed = self.steps, self.past is not None
        self._begin(state)
        if self.team:
            self.team.spread(state, self.recipe.layout)
        probes, shares = self._probes(state), None
        try:
            found = self._newest(state) if resumed else None
            if found and found.step >= self.total and not self._is_last:
                state.step = state.config.steps
                hooks = []
            else:
                start = found.step if found else first
                replay = self._catch_up(found, start) if resumed else ()
                if found and self._leads:
                    probes.restore(found.extra)
                if self.team:
                    self.team.refresh()
                if start == first and self.trained:
                    self.writer.event(start, "phase", self._which)
                probes.attach(self.writer, own=False, next_step=start)
                state.step = start - first
                keeper = Keeper(
                    self.checkpoints,
                    self.recipe.checkpoint_every,
                    self.controller,
                    probes,
                    kept=start if found else -1,
                    first=first,
                    save=self._saver(),
                )
                hooks = [Control(self.controller, replay, first), Recorder(probes, first), keeper]
                if self.team:
                    shares = self._shares(probes, first)
                    hooks.insert(1, shares)
                if self.recipe.evaluations and not state.config.eval_every:
                    every = max(1, state.config.steps // self.recipe.evaluations)
                    hooks.insert(1, Evaluation(probes, every, first))
                if self.progress and self._leads:
                    hooks.append(_Report(self.progress, first, self.total))
            yield hooks
            if hooks:
                keeper.keep(state, first + state.step)
        except RunStopped:
            _make_room(self.checkpoints)
            raise
        finally:
            if shares:
                shares.close()
            probes.close()
        self.trained, self.steps = self.trained + 1, first + state.step
        if self._is_over:
            raise Over

    def finish(self) -> State:
        """Say in the run how it ended, and return the last state."""
        if self.writer is None or not self._is_over:
            raise RuntimeError(f"{self.trained} of {self.recipe.trainings} trainings were made: {self.recipe}")
        if self.team:
            self.team.refresh()
        whole = self.team.whole if self.team else self.state.model
        if whole is not None:
            self.writer.set_meta("weights_sha256", checkpoint.weights_digest(whole))
        if self.trained == self.recipe.trainings and (self.steps == self.total or not self.controller.controls.stop):
            self.writer.status("finished")
        else:
            reason = self._reason[-1]
            if self.team and self.team.stopped_by is not None and len(self._reason) == 1:
                reason = f"stopped by a signal to rank {self.team.stopped_by}"
            self.writer.status("stopped", f"{reason} after {self.steps} of {self.total} steps")
        return self.state

    @property
    def _leads(self) -> bool:
        return self.team is None or self.team.leads

    @property
    def _is_last(self) -> bool:
        return self.trained + 1 == self.recipe.trainings

    @property
    def _is_over(self) -> bool:
        stopped = self.controller and (self.controller.controls.stop or self.controller.stopping)
        return self.trained == self.recipe.trainings or bool(stopped)

    @property
    def _which(self) -> str:
        return f"training {self.trained + 1} of {self.recipe.trainings}"

    def _begin(self, state: State) -> None:
        """Make or open the run, or tell it of a further training."""
        if self.state is not None and state.model is not self.state.model:
            raise RuntimeError(f"{self._which} is of another model than the one before: {self.recipe}")
        self.state, self.total = state, self.steps + state.config.steps
        if self.writer is None and self.team:
            self.team.led(lambda: self._open(state))
            self.writer = self.writer or self.team.silent(self.folder)
        elif self.writer is None:
            self._open(state)
        else:
            for key, value in (("model", self._model(state)), ("total_steps", self.total)):
                self.writer.set_meta(key, value)
            self.writer.status("running", self._which)  # another word, so that readers look at the meta again
        if self.past is None and self.controller is None:
            self._control(None)

    def _open(self, state: State) -> None:
        """Make or open the run."""
        if self.past is None:
            self.writer = self._stack.enter_context(RunWriter.create(self.folder, self._meta(state)))
            return
        _check_data(self.folder.name, state.task.manifest, self.past.meta["data"])
        self.writer = self._stack.enter_context(RunWriter.open(self.folder))
        if self._processes() != self.past.meta.get("processes"):
            self.writer.set_meta("processes", self._processes())

    def _processes(self) -> dict[str, Any] | None:
        """How several processes share the training; None where there is one."""
        return self.team and {"world": self.team.world, "layout": self.recipe.layout, "device": self.team.device.type}

    def _probes(self, state: State) -> Watch:
        if self.team is None:
            return Watch(state.model, state.task, self.cadence, self.recipe.seed)
        whole = self.team.whole if self.team.leads else state.model
        own = {"trained": state.model, "leads": self.team.leads}
        return Watch(whole, state.task, self.cadence, self.recipe.seed, **own)

    def _shares(self, probes: Watch, first: int) -> Hook:
        from workbench.live.team import Shares

        return Shares(self.team, probes, first)

    def _saver(self) -> Callable[..., Any]:
        if self.team is None:
            return checkpoint.save
        from workbench.lib.core.distributed import checkpoints

        return partial(checkpoints.save, replicas=self.team.replicas)

    def _control(self, found: Checkpoint | None) -> None:
        controls, agree = Controls(**found.controls) if found else None, {"agree": self.team.agree} if self.team else {}
        self.controller = Controller(self.writer, controls, **agree)
        # whoever starts several ends the others as soon as one has ended: each must come to say why
        self._reason = self._stack.enter_context(_stop_signals(self.controller, for_good=self.team is not None))

    def _newest(self, state: State) -> Checkpoint | None:
        """The newest checkpoint, its weights in the model, and in the optimizer what is of this training."""
        if self.team:
            from workbench.lib.core.distributed import checkpoints

            return checkpoints.load(self.checkpoints, state.model, state.optimizer, replicas=self.team.replicas)
        found = checkpoint.load(self.checkpoints, state.model)
        inside = found and self.steps < found.step and (found.step < self.total or self._is_last)
        return checkpoint.load(self.checkpoints, state.model, state.optimizer) if inside else found

    def _catch_up(self, found: Checkpoint | None, start: int) -> list[Answer]:
        """Take back what was recorded after the checkpoint; the commands that were carried out since."""
        past, self.past = self.past, None
        self.writer.truncate(start - 1)
        _tell(self.writer, found, start)
        self._control(found)
        done = [a for a in past.answers if a.name in SETTINGS and not a.error and a.step is not None]
        return [answer for answer in done if answer.step >= start]

    def _meta(self, state: State) -> dict[str, Any]:
        every = state.config.eval_every
        if not every and self.recipe.evaluations:
            every = max(1, state.config.steps // self.recipe.evaluations)
        return {
            "kind": "train",
            "seed": self.recipe.seed,
            "recipe": self.recipe.to_dict(),
            "versions": versions(),
            "git": revision(Path(workbench.__file__).parent.parent),
            "data": state.task.manifest,
            "total_steps": self.total,
            "cadence": asdict(self.cadence) | {"evaluation": every or 0},
            "processes": self._processes(),
            "model": self._model(state),
        }

    def _model(self, state: State) -> dict[str, Any]:
        batch = state.task.batch("train", state.config.batch_size, torch.Generator().manual_seed(0))
        with undisturbed(state.model):
            budget = measure_budget(state.model, state.task, batch)
        described = describe(state.model, state.task)
        return described | {"active_parameters": budget.active_params, "flops": budget.flops}


def _check_data(name: str, now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    for key, entry in now.items():
        if _digest(entry) != _digest(then.get(key)):
            raise InputError(f"run {name} cannot be resumed: its data {key!r} have changed on this machine")


def _digest(entry: Any) -> Any:
    """Of a set in a manifest its digest; of a plain value that value as JSON gives it back."""
    if isinstance(entry, Mapping):
        return entry["sha256"]
    return list(entry) if isinstance(entry, tuple) else entry


def _tell(writer: RunWriter, found: Checkpoint | None, start: int) -> None:
    """Note in the run how it goes on, and what may keep it from being bit-equal."""
    last = start - 1  # the step it goes on after; a later resume from there forgets only what came after that
    writer.event(last, "resume", f"from the checkpoint after {start} steps" if found else "from the beginning")
    for damage in found.skipped if found else ():
        writer.event(last, "note", f"a newer checkpoint is damaged, {damage}")
    if found and found.torch_version != torch.__version__:
        text = f"torch is {torch.__version__} but was {found.torch_version}: the numbers may round differently"
        writer.event(last, "note", text)


class _Report(Hook):
    def __init__(self, progress: Progress, first: int, total: int):
        self.progress, self.first, self.total = progress, first, total

    def after_step(self, state: State) -> None:
        self.progress(self.first + state.step + 1, self.total, f"loss {state.loss:.3f}")


@contextmanager
def _stop_signals(controller: Controller, for_good: bool = False) -> Iterator[list[str]]:
    """SIGTERM and Ctrl-C ask the run to stop; yields why it was asked. Outside the main thread they are left alone.

    Afterwards they do what they did before, unless it is for good.
    """
    reason = ["stopped by command"]

    def stop(number: int, frame: object) -> None:
        if number == signal.SIGINT and (controller.stopping or controller.controls.stop):
            raise KeyboardInterrupt
        reason.append(f"stopped by {signal.Signals(number).name}")
        controller.stopping = True

    if threading.current_thread() is not threading.main_thread():
        yield reason
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield reason
    finally:
        for number, handler in () if for_good else before.items():
            signal.signal(number, handler)


def _make_room(folder: Path) -> None:
    """On a full disk, give up the older of two checkpoints, so that the run can say why it ended."""
    for path in sorted(folder.glob("step-*"))[:-1]:
        shutil.rmtree(path, ignore_errors=True)
