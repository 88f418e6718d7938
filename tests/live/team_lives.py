"""A process that test_team starts: trains runs in several processes, disturbs them, and prints what became of them.

One JSON object. Every rank is a fork of this process, which has imported torch.

    python team_lives.py FOLDER SCENARIO ...
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

from workbench.errors import InputError
from workbench.live.recipe import Recipe
from workbench.live.store import Run
from workbench.live.trainer import main, resume, train_run

SMALL = {
    "domains": ["docs", "names"],
    "cap": 8192,
    "seq_len": 16,
    "batch_size": 4,
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 2,
    "n_experts": 4,
    "d_hidden": 8,
    "bias_rate": 0.01,
    "steps": 24,
    "eval_every": 10,
    "checkpoint_every": 5,
}


def recipe(layout: str, **values) -> Recipe:
    return Recipe.from_dict(SMALL | {"layout": layout} | values)


def lives(world: int, *arguments: str, ranks: tuple[int, ...] | None = None, patience: float = 30.0) -> list[int]:
    """The trainer as a process, as each of these ranks of a world."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world) if ranks is None else ranks:
        child = os.fork()
        if child:
            started.append(child)
            continue
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in own.items()})
        try:
            os._exit(main([*arguments, "--patience", str(patience)]))
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(9)
    return started


def ends(children: list[int], seconds: float = 60.0) -> list[int]:
    """The exit status of each, by when all must have ended; a signal is below 0."""
    deadline, found = time.monotonic() + seconds, {}
    while len(found) < len(children) and time.monotonic() < deadline:
        for child in children:
            if child not in found:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    found[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in set(children) - found.keys():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [found.get(child, 99) for child in children]


def at_step(folder: Path, step: int, children: list[int], act: Callable[[], None]) -> None:
    """Act when the run has made so many steps, unless a process ends before."""
    while not any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children):
        try:
            with Run(folder) as run:
                if run.last_step >= step:
                    return act()
        except InputError:  # not a run yet
            pass
        time.sleep(0.005)


def state(folder: Path) -> dict:
    with Run(folder) as run:
        said = {"status": list(run.status), "digest": run.meta.get("weights_sha256"), "last": run.last_step}
        return said | {"events": [[event.step, event.kind, event.text] for event in run.events()]}


def new(folder: Path, layout: str, **values) -> tuple[str, ...]:
    return str(folder), "--recipe", recipe(layout, **values).to_json()


def whole(folder: Path) -> dict:
    """Every layout in two processes, undisturbed, and one process."""
    train_run(recipe("data"), folder / "one")
    return {layout: ends(lives(2, *new(folder / layout, layout))) for layout in ("data", "sharded", "experts")}


def killed(folder: Path) -> dict:
    """A rank is killed while a run goes; then it goes on, in two processes."""
    found = {}
    for layout, who in (("experts", 1), ("data", 0)):
        path = folder / f"killed-{layout}"
        children = lives(2, *new(path, layout))
        at_step(path, 12, children, partial(os.kill, children[who], signal.SIGKILL))
        began = time.monotonic()
        found[layout] = {"ends": ends(children), "seconds": time.monotonic() - began, "then": state(path)}
        found[layout] |= {"resumed": ends(lives(2, str(path))), "now": state(path)}
    return found


def stops(folder: Path) -> dict:
    """SIGTERM to one rank, and to rank 0; a rank that hangs; one that never comes."""
    found = {}
    for who in (0, 1):
        path = folder / f"stopped-{who}"
        children = lives(2, *new(path, "sharded", steps=10**6, checkpoint_every=0))
        at_step(path, 12, children, partial(os.kill, children[who], signal.SIGTERM))
        found[f"stopped {who}"] = {"ends": ends(children), "then": state(path)}
    path = folder / "hangs"
    children = lives(2, *new(path, "data", steps=10**6), patience=4.0)
    at_step(path, 12, children, partial(os.kill, children[1], signal.SIGSTOP))
    began = time.monotonic()
    found["hangs"] = {"ends": ends(children[:1]), "seconds": time.monotonic() - began, "then": state(path)}
    os.kill(children[1], signal.SIGKILL)
    os.waitpid(children[1], 0)
    began = time.monotonic()
    found["missing"] = {
        "ends": ends(lives(3, *new(folder / "missing", "data", batch_size=6), ranks=(0, 2), patience=2.0))
    }
    found["missing"] |= {"seconds": time.monotonic() - began, "run": (folder / "missing" / "run.sqlite").exists()}
    return found


def numbers(folder: Path) -> dict:
    """Two processes stop after a while; four go on, then one."""
    path = folder / "numbers"
    children = lives(2, *new(path, "experts", eval_every=0))
    at_step(path, 7, children, partial(os.kill, children[0], signal.SIGTERM))
    found = {"two": ends(children), "after two": state(path)}
    children = lives(4, str(path))
    at_step(path, 15, children, partial(os.kill, children[3], signal.SIGTERM))
    found |= {"four": ends(children), "after four": state(path)}
    resume(path)
    return found | {"after one": state(path)}


def commands(folder: Path) -> dict:
    """Settings and a pause, asked of rank 0 while it trains."""
    path = folder / "commands"
    children = lives(2, *new(path, "data", steps=60, checkpoint_every=0), patience=3.0)
    asked = []

    def ask() -> None:
        with Run(path) as run:
            for command in (("learning_rate", 0.02), ("balance", 0.0), ("top_k", 1), ("pause",)):
                asked.append(run.send(*command))
            while run.status.state != "paused":
                time.sleep(0.01)
            time.sleep(4.0)  # longer than the processes wait for each other
            last = run.last_step
            run.send("step")
            while run.last_step == last:
                time.sleep(0.01)
            run.send("continue")

    at_step(path, 3, children, ask)
    found = {"ends": ends(children), "then": state(path)}
    with Run(path) as run:
        steps = {answer.name: answer.step for answer in run.answers()}
        found |= {
            "steps": steps,
            "aux": run.scalars("train/aux")[1].tolist(),
            "lr": run.scalars("train/lr")[1].tolist(),
        }
        found["loads"] = {int(s): int(load.sum()) for s, load in zip(*run.tensors("load/blocks.0.ffn"), strict=True)}
    return found


if __name__ == "__main__":
    import_module("torch._dynamo")  # imported here once, not in every life
    import_module("workbench.live.team")
    recipe("data").build()
    found = {name: globals()[name](Path(sys.argv[1])) for name in sys.argv[2:]}
    print(json.dumps(found))
