"""`workbench live`: a training in its own process, and the live pages of it on this machine, until Ctrl-C.

`workbench view` serves the same pages of runs that are kept, and trains nothing.

- The server runs in this process and only reads the run, so it cannot hold up the training.
- It answers on 127.0.0.1 alone, and only pages of its own address may open a connection to it.
- The training ends with this process, however that ends: it stops when its standard input closes.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

from workbench.errors import InputError
from workbench.live.recipe import Recipe
from workbench.live.records import LOSS
from workbench.live.store import Run, find, new_folder, run_name
from workbench.paths import shipped

HOST = "127.0.0.1"
FIRST_PORT, PORTS = 5006, 100
ROOT = Path(__file__).resolve().parents[2]

LOG = "trainer.log"
START_SECONDS = 300.0  # for the first step: imports and, the first time, reading the data
STOP_SECONDS = 30.0  # for the step being made and its checkpoint
REPORT_SECONDS = 10.0
POLL_SECONDS = 0.1


def _say(text: str) -> None:
    print(text, flush=True)  # a pipe is to see it now, too


def live(
    overrides: Mapping[str, Any],
    port: int | None = None,
    open_browser: bool | None = None,
    console: Callable[[str], None] = _say,
) -> None:
    """Train a recipe and serve its live pages until Ctrl-C (or SIGTERM, or SIGHUP).

    Args:
        overrides: values of the `Recipe` that are not the defaults.
        port: of the server; the first free one from 5006 if left out.
        open_browser: whether to open the page in a browser; if left out, where there is a screen.
        console: takes the lines that are said.

    Raises:
        InputError: a value of the recipe or the port cannot be used, or the trainer refuses to start.
    """
    recipe = Recipe.from_dict(overrides)
    pages = app_files()
    port = free_port(port)
    folder = new_folder("live")
    handlers = _interrupt_on(signal.SIGTERM, signal.SIGHUP)
    trainer = server = None
    try:
        console(f"starting run {folder.name}")
        trainer = start_trainer(folder, recipe)
        server = start_server(pages, port)
        _wait_for_first_step(trainer, folder)
        _show(port, folder.name, open_browser, console)
        _follow(trainer, folder, recipe.steps, console)
        console("the pages stay until Ctrl-C")
        threading.Event().wait()
    except KeyboardInterrupt:
        console("ending")
    finally:
        if trainer is not None:
            stop_trainer(trainer)
        if server is not None:
            server.stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _last_words(folder, console)


def view(
    run: str | Path = "latest",
    port: int | None = None,
    open_browser: bool | None = None,
    console: Callable[[str], None] = _say,
) -> None:
    """Serve the live pages, opened on a run that is kept, until Ctrl-C (or SIGTERM, or SIGHUP).

    Args:
        run: its name, a prefix that only it has, its folder, or "latest".
        port, open_browser, console: as of `live`.

    Raises:
        InputError: there is no such run, it cannot be read, or the port cannot be used.
    """
    with find(run) as found:
        name = run_name(found.folder)
        state, steps = found.status.state, found.last_step + 1
    pages = app_files()
    port = free_port(port)
    handlers = _interrupt_on(signal.SIGTERM, signal.SIGHUP)
    server = None
    try:
        server = start_server(pages, port)
        console(f"run {found.name} {state} after {steps} steps, kept at {found.folder}")
        _show(port, name, open_browser, console)
        threading.Event().wait()
    except KeyboardInterrupt:
        console("ending")
    finally:
        if server is not None:
            server.stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def app_files() -> dict[str, Path]:
    """The pages by their name in the address."""
    found = {path.stem: path for path in sorted(shipped("apps").glob("*.py"))}
    if "live" not in found:
        raise InputError(f"the live pages are not there: no live.py in {shipped('apps')}")
    return found


def free_port(port: int | None) -> int:
    """`port` if it is free, or the first free one; InputError where there is none."""
    wanted = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]
    for number in wanted:
        if not 1 <= number <= 65535:
            raise InputError(f"port is {number} but must be between 1 and 65535")
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
            probe.bind((HOST, number))
            return number
    taken = (
        f"port is {port}" if port is not None else f"every port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is taken"
    )
    raise InputError(f"{taken} but must be a free port that this user may open")


def start_trainer(folder: Path, recipe: Recipe) -> subprocess.Popen:
    """The training in a process that Ctrl-C in this terminal does not reach; what it says goes to its log."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "workbench.live.trainer", str(folder), "--recipe", recipe.to_json(), "--attached"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with (folder / LOG).open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )


def stop_trainer(trainer: subprocess.Popen) -> None:
    """Let the training end after its step, with a checkpoint; a second Ctrl-C, or a step without end, kills it."""
    trainer.terminate()
    try:
        trainer.wait(STOP_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        trainer.kill()
        trainer.wait()
    trainer.stdin.close()


def start_server(pages: Mapping[str, Path], port: int) -> Any:
    """The pages, served from a thread of this process, the page "live" at "/" as well; the server has `stop()`."""
    import panel as pn
    import torch

    torch.set_num_threads(1)  # the views compute little, and the training needs its cores
    logging.getLogger("asyncio").addFilter(_not_a_closed_page)
    files = {name: str(path) for name, path in pages.items()}
    return pn.serve(
        {"/": files["live"], **files},
        port=port,
        address=HOST,
        websocket_origin=[f"localhost:{port}", f"{HOST}:{port}"],
        show=False,
        threaded=True,
        verbose=False,
    )


def _not_a_closed_page(record: logging.LogRecord) -> bool:
    """False for what Tornado logs, with a traceback, when a page is closed while a message is on its way to it."""
    return not (record.exc_info and record.exc_info[0] and record.exc_info[0].__name__ == "WebSocketClosedError")


def _wait_for_first_step(trainer: subprocess.Popen, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with suppress(InputError), Run(folder) as run:  # it is not a run before the trainer has made it one
            if run.last_step >= 0:
                return
        if trainer.poll() is not None:
            said = (folder / LOG).read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            reason = said[-1].removeprefix("workbench: error: ")
            if trainer.returncode == 2:
                raise InputError(reason)
            raise SystemExit(f"workbench: the training ended before its first step: {reason} (see {folder / LOG})")
        time.sleep(POLL_SECONDS)
    raise SystemExit(f"workbench: the training made no step in {START_SECONDS:.0f} seconds (see {folder / LOG})")


def _show(port: int, run: str, open_browser: bool | None, console: Callable[[str], None]) -> None:
    """Wait until the page of a run answers, say where it is, and open it where there is a screen."""
    address = f"http://localhost:{port}/live?run={quote(run)}"
    _load(address.replace("localhost", HOST))
    console(f"watch it at {address} (Ctrl-C ends it)")
    if _has_screen() if open_browser is None else open_browser:
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()


def _load(address: str) -> None:
    """Ask for a page until the server answers: the first session loads what all later ones use."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urlopen(address, timeout=START_SECONDS) as page:
                page.read()
            return
        except URLError as error:  # its thread does not listen yet
            if time.monotonic() > deadline:
                raise SystemExit(f"workbench: the pages do not answer at {address}: {error.reason}") from None
            time.sleep(POLL_SECONDS)


def _follow(trainer: subprocess.Popen, folder: Path, total: int, console: Callable[[str], None]) -> None:
    """Say how the training goes, until it ends."""
    with Run(folder) as run:
        said_at, said_step = time.monotonic(), run.last_step
        while trainer.poll() is None:
            time.sleep(POLL_SECONDS)
            now, step = time.monotonic(), run.last_step
            if now - said_at < REPORT_SECONDS or step == said_step:
                continue
            rate = (step - said_step) / (now - said_at)
            loss = run.scalars(LOSS.name(), start=step)[1][0]
            left = (total - step - 1) / rate / 60
            console(f"step {step + 1} of {total}, loss {loss:.3f}, {rate:.1f} steps/s, {left:.0f} min left")
            said_at, said_step = now, step
        state, message = run.status
        console(f"run {run.name} {state}{': ' if message else ''}{message}")


def _last_words(folder: Path, console: Callable[[str], None]) -> None:
    """Where the run is kept, and how to go on."""
    try:
        with Run(folder) as run:
            state, steps = run.status.state, run.last_step + 1
    except InputError:
        return  # it never became a run; the error says why
    console(f"run {folder.name} {state} after {steps} steps, kept at {folder}")
    if state != "finished":
        console(f"go on with: workbench resume {folder.name}")


def _interrupt_on(*signals: int) -> dict[int, Any]:
    """Make these signals end the program like Ctrl-C; returns the handlers they had."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, interrupt) for number in signals}


def _has_screen() -> bool:
    """Whether a browser opened here would be seen: not over a remote login, not without a display."""
    if os.environ.get("SSH_CONNECTION"):
        return False
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
