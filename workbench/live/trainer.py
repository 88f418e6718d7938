"""Training as a run: from a recipe to a folder that can be watched, steered, stopped, killed and resumed.

    python -m workbench.live.trainer FOLDER --recipe '{"steps": 200}'     a new run
    python -m workbench.live.trainer FOLDER                               go on with a run that was stopped or died
    torchrun --nproc-per-node 2 -m workbench.live.trainer FOLDER ...      either, in two processes

A resumed run goes back to its newest checkpoint, forgets what was recorded after it and makes those steps again, with
the commands that were carried out in them: it ends with the weights of a run that was never disturbed.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import InputError
from workbench.lib.core.threads import torch_threads
from workbench.lib.core.train import State, attended
from workbench.live.arm import Arm, read_recipe
from workbench.live.attendant import Attendant, Over, Past, Progress
from workbench.live.recipe import Recipe
from workbench.live.store import RunStopped, find

if TYPE_CHECKING:
    from workbench.live.team import Team


def train_run(
    recipe: Recipe | Arm, folder: str | Path, progress: Progress | None = None, team: "Team | None" = None
) -> State:
    """Train `recipe` as a new run in `folder` and return the final state.

    SIGTERM and Ctrl-C end it after the current step, with a checkpoint; a second Ctrl-C ends it at once.

    Args:
        team: the processes that train it together, each in a call of this; see `team.join`.

    Raises:
        InputError: the folder holds a run already, the recipe's data are not on this machine, or it cannot be shared
            out to the team.
        RunStopped: the run cannot be written any more, for example because the disk is full, or a process of the team
            is gone.
        FloatingPointError: the loss is not a number any more.
    """
    return _train(recipe, Path(folder), progress, team=team)


def resume(run: str | Path, progress: Progress | None = None, team: "Team | None" = None) -> State:
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
    if missing := [key for key in ("recipe", "data", "total_steps") if meta.get(key) is None]:
        raise InputError(f"run {folder.name} cannot be resumed: it does not say its {missing[0]}")
    if state == "finished":
        raise InputError(f"run {folder.name} has finished its {meta['total_steps']} steps: nothing is left to resume")
    return _train(read_recipe(meta["recipe"]), folder, progress, Past(meta, answers), team)


def _train(
    recipe: Recipe | Arm,
    folder: Path,
    progress: Progress | None,
    past: Past | None = None,
    team: "Team | None" = None,
) -> State:
    if team:
        recipe.check_processes(team.world)
        team.led(lambda: None)  # all have read the run before one writes it
    with torch_threads(recipe.threads), Attendant(folder, recipe, progress, past, team) as attendant:
        try:
            with suppress(Over), attended(attendant):
                recipe.train()
            return attendant.finish()
        except RuntimeError as error:
            lost = None if team is None or isinstance(error, RunStopped) else team.lost(error)
            if lost is None:
                raise
            raise lost from error


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
    parser.add_argument("--processes", type=int, default=1, help="train in so many processes (default: 1)")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds one waits for the others (default: 300)")
    args = parser.parse_args(argv)
    if args.processes > 1:
        from workbench.live.team import launch

        arguments = _without(sys.argv[1:] if argv is None else argv, "--processes")
        return launch(args.processes, "workbench.live.trainer", arguments)
    if args.attached:
        _give_way()
        _stop_with_parent()
    team = None
    try:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            from workbench.live.team import join

            team = join(args.patience)
        if args.recipe is None:
            resume(args.folder, team=team)
        else:
            train_run(read_recipe(args.recipe), args.folder, team=team)
        if team:
            team.close()
    except (InputError, RunStopped, FloatingPointError) as error:
        if team is None or team.leads:
            print(f"workbench: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def _without(arguments: Sequence[str], option: str) -> list[str]:
    """The arguments but an option and its value."""
    kept = [argument for argument in arguments if not argument.startswith(f"{option}=")]
    if option in kept:
        at = kept.index(option)
        del kept[at : at + 2]
    return kept


if __name__ == "__main__":
    sys.exit(main())
