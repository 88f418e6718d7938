"""Training as a run: from a recipe to a folder that can be watched, steered, stopped, killed and resumed.

    python -m workbench.live.trainer FOLDER --recipe '{"steps": 200}'     a new run
    python -m workbench.live.trainer FOLDER                               go on with a run that was stopped or died

A resumed run goes back to its newest checkpoint, forgets what was recorded after it and makes those steps again, with
the commands that were carried out in them: it ends with the weights of a run that was never disturbed.
"""

import argparse
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import workbench
from workbench.errors import InputError
from workbench.lib.core import checkpoint
from workbench.lib.core.budget import measure_budget
from workbench.lib.core.task import Task
from workbench.lib.core.train import Hook, State, TrainConfig, make_optimizer, train
from workbench.live.control import Controller, Controls
from workbench.live.hooks import SETTINGS, Control, Keeper, Recorder
from workbench.live.probes.conflict import undisturbed
from workbench.live.provenance import revision, versions
from workbench.live.recipe import Recipe
from workbench.live.store import CHECKPOINTS, Answer, RunStopped, RunWriter, find
from workbench.live.watch import Cadence, Watch, describe

Progress = Callable[[int, int, str], None]
"""progress(steps made, steps in all, a few words)"""


def train_run(recipe: Recipe, folder: str | Path, progress: Progress | None = None) -> State:
    """Train `recipe` as a new run in `folder` and return the final state.

    SIGTERM and Ctrl-C end it after the current step, with a checkpoint; a second Ctrl-C ends it at once.

    Raises:
        InputError: the folder holds a run already, or the recipe's data are not on this machine.
        RunStopped: the run cannot be written any more, for example because the disk is full.
        FloatingPointError: the loss is not a number any more.
    """
    with threads(recipe.threads):
        model, task, config = recipe.build()
        with RunWriter.create(folder, _meta(recipe, model, task, config)) as writer:
            return _train(writer, recipe, model, task, config, progress)


def resume(run: str | Path, progress: Progress | None = None) -> State:
    """Go on with a run (its name or folder) from its newest checkpoint; otherwise like `train_run`.

    Raises:
        InputError: the run has finished, is being written, is a watched model's, or its data have changed.
    """
    with find(run) as past:
        folder, meta, state = past.folder, past.meta, past.status.state
        answers = past.answers()
    if meta.get("kind") != "train":
        raise InputError(
            f"run {folder.name} is a watched model: its own program goes on with it, with watch(..., resume=True)"
        )
    if state == "finished":
        raise InputError(f"run {folder.name} has finished its {meta['total_steps']} steps: nothing is left to resume")
    recipe = Recipe.from_dict(meta["recipe"])
    with threads(recipe.threads):
        model, task, config = recipe.build()
        for domain, entry in task.manifest.items():
            if entry["sha256"] != meta["data"][domain]["sha256"]:
                raise InputError(
                    f"run {folder.name} cannot be resumed: its data {domain!r} have changed on this machine"
                )
        with RunWriter.open(folder) as writer:
            return _train(writer, recipe, model, task, config, progress, answers)


def _meta(recipe: Recipe, model: nn.Module, task: Task, config: TrainConfig) -> dict[str, Any]:
    batch = task.batch("train", config.batch_size, torch.Generator().manual_seed(0))
    with undisturbed(model):
        budget = measure_budget(model, task, batch)
    return {
        "kind": "train",
        "seed": recipe.seed,
        "recipe": recipe.to_dict(),
        "versions": versions(),
        "git": revision(Path(workbench.__file__).parent.parent),
        "data": task.manifest,
        "total_steps": recipe.steps,
        "cadence": asdict(Cadence()) | {"evaluation": recipe.eval_every},
        "model": describe(model, task) | {"active_parameters": budget.active_params, "flops": budget.flops},
    }


def _train(
    writer: RunWriter,
    recipe: Recipe,
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    progress: Progress | None,
    answers: Sequence[Answer] | None = None,
) -> State:
    """The run itself: from the beginning, or (with the `answers` so far) from its newest checkpoint."""
    folder = writer.folder / CHECKPOINTS
    optimizer = make_optimizer(model, config)
    probes = Watch(model, task, Cadence(), recipe.seed)
    try:
        found = None if answers is None else checkpoint.load(folder, model, optimizer)
        start = found.step if found else 0
        if answers is not None:
            writer.truncate(start - 1)
            _tell(writer, found, start)
        if found:
            probes.restore(found.extra)
        probes.attach(writer, own=False, next_step=start)
        controller = Controller(writer, Controls(**found.controls) if found else None)
        replay = [
            a for a in answers or () if a.name in SETTINGS and not a.error and a.step is not None and a.step >= start
        ]
        keeper = Keeper(folder, recipe.checkpoint_every, controller, probes, kept=start if found else -1)
        hooks = [Control(controller, replay), Recorder(probes), keeper]
        if progress:
            hooks.append(_Report(progress))
        with _stop_signals(controller) as reason:
            state = train(model, task, config, hooks, optimizer=optimizer, start=start)
        keeper.keep(state, state.step)
    except RunStopped:
        _make_room(folder)
        raise
    finally:
        probes.close()
    writer.set_meta("weights_sha256", checkpoint.weights_digest(model))
    if state.step == config.steps:
        writer.status("finished")
    else:
        writer.status("stopped", f"{reason[-1]} after {state.step} of {config.steps} steps")
    return state


def _tell(writer: RunWriter, found: checkpoint.Checkpoint | None, start: int) -> None:
    """Note in the run how it goes on, and what may keep it from being bit-equal."""
    last = start - 1  # the step it goes on after; a later resume from there forgets only what came after that
    writer.event(last, "resume", f"from the checkpoint after {start} steps" if found else "from the beginning")
    for damage in found.skipped if found else ():
        writer.event(last, "note", f"a newer checkpoint is damaged, {damage}")
    if found and found.torch_version != torch.__version__:
        text = f"torch is {torch.__version__} but was {found.torch_version}: the numbers may round differently"
        writer.event(last, "note", text)


class _Report(Hook):
    def __init__(self, progress: Progress):
        self.progress = progress

    def after_step(self, state: State) -> None:
        self.progress(state.step + 1, state.config.steps, f"loss {state.loss:.3f}")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch works with `count` threads: their number is part of what makes a run the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _stop_signals(controller: Controller) -> Iterator[list[str]]:
    """SIGTERM and Ctrl-C ask the run to stop; yields why it was asked. Outside the main thread they are left alone."""
    reason = ["stopped by command"]

    def stop(number: int, frame: object) -> None:
        if number == signal.SIGINT and controller.controls.stop:
            raise KeyboardInterrupt
        reason.append(f"stopped by {signal.Signals(number).name}")
        controller.controls.stop = True

    if threading.current_thread() is not threading.main_thread():
        yield reason
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield reason
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _make_room(folder: Path) -> None:
    """On a full disk, give up the older of two checkpoints, so that the run can say why it ended."""
    for path in sorted(folder.glob("step-*"))[:-1]:
        shutil.rmtree(path, ignore_errors=True)


def _stop_with_parent() -> None:
    """End like on SIGTERM when standard input closes: the program that started this one is gone."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)  # not sys.stdin.read, whose lock the interpreter wants when it ends
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _give_way() -> None:
    """Take the processor where nobody else wants it: what is watched must not hold up the one who watches."""
    os.nice(10)
    if os.getsid(0) == os.getpid():  # Linux weighs sessions against each other first; no one else's is touched
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text("10")


def main(argv: Sequence[str] | None = None) -> int:
    """The trainer as a process; its exit status: 0 ended in order, 1 failed, 2 wrong input."""
    parser = argparse.ArgumentParser(prog="python -m workbench.live.trainer", description="Train a run, or resume one.")
    parser.add_argument("folder", type=Path, help="of the run")
    parser.add_argument("--recipe", help="JSON of a new run's recipe; without it the run in FOLDER is resumed")
    parser.add_argument("--attached", action="store_true", help="stop when standard input closes")
    args = parser.parse_args(argv)
    if args.attached:
        _give_way()
        _stop_with_parent()
    try:
        if args.recipe is None:
            resume(args.folder)
        else:
            train_run(Recipe.from_json(args.recipe), args.folder)
    except (InputError, RunStopped, FloatingPointError) as error:
        print(f"workbench: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
