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
import traceback
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

LONGEST = 86_400.0
"""Seconds that one process may wait for the others: a day."""


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
        except Exception as error:
            lost = team and team.lost(error)
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
    parser = argparse.ArgumentParser(
        prog="python -m workbench.live.trainer", description="Train a run, or resume one.", allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="of the run")
    parser.add_argument("--recipe", help="JSON of a new run's recipe; without it the run in FOLDER is resumed")
    parser.add_argument("--attached", action="store_true", help="stop when standard input closes")
    parser.add_argument("--processes", type=int, default=1, help="train in so many processes (default: 1)")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds one waits for the others (default: 300)")
    args = parser.parse_args(argv)
    team = None
    try:
        started = os.environ.get("WORLD_SIZE", "1")
        _check_numbers(args.processes, args.patience, started)
        if args.processes > 1:
            from workbench.live.team import launch

            return launch(args.processes, "workbench.live.trainer", _of_one(args))
        if args.attached:
            _give_way()
            _stop_with_parent()
        if started != "1":
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
        status = 2 if isinstance(error, InputError) else 1
        if team:
            team.leave(status)
        return status
    except Exception:
        if team is None:
            raise
        traceback.print_exc()
        team.leave(1)
    return 0


def _check_numbers(processes: int, patience: float, started: str) -> None:
    """Raise `InputError` where these are none; `started`: how many processes torchrun has started with this one."""
    if processes < 1:
        raise InputError(f"--processes is {processes} but must be at least 1")
    if processes > 1 and started != "1":
        raise InputError(f"--processes is {processes} but torchrun has started {started} already: leave one out")
    if not 0 < patience <= LONGEST:
        raise InputError(f"--patience is {patience:g} but must be above 0 and at most {LONGEST:g} seconds")


def _of_one(args: argparse.Namespace) -> list[str]:
    """The arguments of each of several processes, in place of those of the one that starts them."""
    recipe = [] if args.recipe is None else ["--recipe", args.recipe]
    return [*recipe, *["--attached"] * args.attached, "--patience", str(args.patience), "--", str(args.folder)]


if __name__ == "__main__":
    sys.exit(main())
