"""`workbench live`: one or two trainings, each in its own process, and the live pages of them, until Ctrl-C.

`workbench view` serves the same pages of runs that are kept, and trains nothing.

- The server runs in this process and only reads the runs, so it cannot hold up the trainings.
- It answers on 127.0.0.1 alone unless told otherwise, only by its own names, and commands only with the token in the
  address that it says (`guard`).
- The trainings end with this process, however that ends: they stop when their standard input closes.
"""

import atexit
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from html import escape
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

from workbench.errors import InputError
from workbench.live import guard
from workbench.live.arm import Arm
from workbench.live.recipe import Recipe
from workbench.live.records import LOSS
from workbench.live.store import Run, find, new_folder, run_name
from workbench.paths import shipped

HOST = "127.0.0.1"
FIRST_PORT, PORTS = 5006, 100
ROOT = Path(__file__).resolve().parents[2]

LOG = "trainer.log"
START_SECONDS = 60.0  # after which it is said that the first step is still to come
ANSWER_SECONDS = 300.0  # for the first page
STOP_SECONDS = 30.0  # for the step being made and its checkpoint
REPORT_SECONDS = 10.0
POLL_SECONDS = 0.1


def _say(text: str) -> None:
    print(text, flush=True)  # a pipe is to see it now, too


def live(
    recipes: Sequence[Recipe | Arm],
    port: int | None = None,
    open_browser: bool | None = None,
    console: Callable[[str], None] = _say,
    address: str = HOST,
    processes: int = 1,
) -> None:
    """Train one recipe, or two side by side, and serve the live pages until Ctrl-C (or SIGTERM, or SIGHUP).

    Args:
        recipes: what to train, each in a process of its own.
        port: of the server; the first free one from 5006 if left out.
        open_browser: whether to open the page in a browser; if left out, where there is a screen.
        console: takes the lines that are said.
        address: where the server listens; whoever reaches it may read the runs.
        processes: how many train each recipe together.

    Raises:
        InputError: the address, the port or the folder of runs cannot be used, or a trainer refuses to start.
    """
    for recipe in recipes:
        recipe.check_processes(processes)
    pages = app_files()
    port = free_port(port, address)
    folders = [new_folder(_kind(recipe)) for recipe in recipes]
    handlers = _interrupt_on(signal.SIGTERM, signal.SIGHUP)
    trainers: list[subprocess.Popen] = []
    server = None
    try:
        for folder, recipe in zip(folders, recipes, strict=True):
            console(f"starting run {folder.name}")
            trainers.append(start_trainer(folder, recipe, processes))
        server = start_server(pages, port, address)
        running = list(zip(trainers, folders, strict=True))
        for trainer, folder in running:
            _wait_for_first_step(trainer, folder, console)
        _show(address, port, [folder.name for folder in folders], open_browser, console)
        _follow(running, console)
        console("the pages stay until Ctrl-C")
        threading.Event().wait()
    except KeyboardInterrupt:
        console("ending")
    finally:
        stop_trainers(trainers)
        if server is not None:
            server.stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for folder in folders:
            _last_words(folder, console)


def _kind(recipe: Recipe | Arm) -> str:
    """What the name of the run says it is."""
    if isinstance(recipe, Recipe):
        return "live"
    name = recipe.arm if recipe.arm.startswith(recipe.study) else f"{recipe.study}-{recipe.arm}"
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")


def view(
    run: str | Path = "latest",
    port: int | None = None,
    open_browser: bool | None = None,
    console: Callable[[str], None] = _say,
    address: str = HOST,
) -> None:
    """Serve the live pages, opened on a run that is kept, until Ctrl-C (or SIGTERM, or SIGHUP).

    Args:
        run: its name, a prefix that only it has, its folder, or "latest".
        port, open_browser, console, address: as of `live`.

    Raises:
        InputError: there is no such run, it cannot be read, or the address or the port cannot be used.
    """
    with find(run) as found:
        name = run_name(found.folder)
        guard.shown[name] = found.folder
        state, steps = found.status.state, found.last_step + 1
    pages = app_files()
    port = free_port(port, address)
    handlers = _interrupt_on(signal.SIGTERM, signal.SIGHUP)
    server = None
    try:
        server = start_server(pages, port, address)
        console(f"run {found.name} {state} after {steps} steps, kept at {found.folder}")
        _show(address, port, [name], open_browser, console)
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


def free_port(port: int | None, address: str = HOST) -> int:
    """`port` if it is free at `address`, or the first free one; InputError where there is none."""
    try:
        number = socket.getaddrinfo(address, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
        with socket.socket() as probe:
            probe.bind((number, 0))
    except (OSError, ValueError):
        raise InputError(f"address is {address!r} but must be a name or an IPv4 address of this machine") from None
    wanted = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]
    for candidate in wanted:
        if not 1 <= candidate <= 65535:
            raise InputError(f"port is {candidate} but must be between 1 and 65535")
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
            probe.bind((number, candidate))
            return candidate
    taken = (
        f"port is {port}" if port is not None else f"every port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is taken"
    )
    raise InputError(f"{taken} but must be a free port that this user may open")


def start_trainer(folder: Path, recipe: Recipe | Arm, processes: int = 1) -> subprocess.Popen:
    """The training in a process that Ctrl-C in this terminal does not reach; what it says goes to its log."""
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        log = (folder / LOG).open("wb")
    except OSError as error:
        raise InputError(f"run folder {folder} cannot be made: {error.strerror} (see $WORKBENCH_HOME)") from error
    command = [sys.executable, "-m", "workbench.live.trainer", str(folder), "--recipe", recipe.to_json(), "--attached"]
    command += ["--processes", str(processes)] if processes > 1 else []
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with log:
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
    stop_trainers([trainer])


def stop_trainers(trainers: Sequence[subprocess.Popen]) -> None:
    """The same for several, at once."""
    for trainer in trainers:
        trainer.terminate()
    for trainer in trainers:
        try:
            trainer.wait(STOP_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            trainer.kill()
            trainer.wait()
        trainer.stdin.close()


def start_server(pages: Mapping[str, Path], port: int, address: str = HOST) -> Any:
    """The pages, served from a thread of this process, the page "live" at "/" as well; the server has `stop()`."""
    import panel as pn
    import torch

    torch.set_num_threads(1)  # the views compute little, and the training needs its cores
    logging.getLogger("asyncio").addFilter(_not_a_closed_page)
    guard.guard_servers()
    guard.new_token()
    files = {name: str(path) for name, path in pages.items()}
    return pn.serve(
        {"/": files["live"], **files},
        port=port,
        address=address,
        websocket_origin=[f"{name}:{port}" for name in ("localhost", HOST, *_names(address))],
        show=False,
        threaded=True,
        verbose=False,
    )


def _names(address: str) -> list[str]:
    """What this machine may be called by who asks at an address, beside its names for itself."""
    if address in ("localhost", HOST):
        return []
    if address != "0.0.0.0":
        return [address]
    host = socket.gethostname()
    with suppress(OSError):
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None, socket.AF_INET)}
        return list(dict.fromkeys((host, socket.getfqdn(), *sorted(found))))
    return [host]


def _not_a_closed_page(record: logging.LogRecord) -> bool:
    """False for what Tornado logs, with a traceback, when a page is closed while a message is on its way to it."""
    return not (record.exc_info and record.exc_info[0] and record.exc_info[0].__name__ == "WebSocketClosedError")


def _wait_for_first_step(trainer: subprocess.Popen, folder: Path, console: Callable[[str], None]) -> None:
    """Wait as long as the trainer lives: the bed of a study may have to be trained first."""
    patience = time.monotonic() + START_SECONDS
    while True:
        with suppress(InputError), Run(folder) as run:  # it is not a run before the trainer has made it one
            if run.last_step >= 0:
                return
        if trainer.poll() is not None:
            said = (folder / LOG).read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            reason = said[-1].removeprefix("workbench: error: ")
            if trainer.returncode == 2:
                raise InputError(reason)
            raise SystemExit(f"workbench: the training ended before its first step: {reason} (see {folder / LOG})")
        if time.monotonic() > patience:
            console(f"still before its first step: {folder.name} prepares what it starts from")
            patience = time.monotonic() + REPORT_SECONDS
        time.sleep(POLL_SECONDS)


def _show(
    address: str, port: int, names: Sequence[str], open_browser: bool | None, console: Callable[[str], None]
) -> None:
    """Wait until the page of one or two runs answers, say where it is, and open it where there is a screen."""
    others = _names(address)
    query = f"live?run={'&compare='.join(quote(name) for name in names)}"
    _load(f"http://{others[0] if others and address == others[0] else HOST}:{port}/{query}")
    if others:
        console(
            f"warning: whoever reaches port {port} of {others[0]} can read the runs, and nothing is encrypted: "
            "who sees the address below on its way can control them"
        )
    page = f"http://{others[0] if others else 'localhost'}:{port}/{query}&{guard.TOKEN}={guard.token()}"
    console(f"watch it at {page} (Ctrl-C ends it)")
    if _has_screen() if open_browser is None else open_browser:
        threading.Thread(target=webbrowser.open, args=(_leading_to(page),), daemon=True).start()


def _leading_to(page: str) -> str:
    """The address of a file that leads to a page: the command line of a browser is no secret, its token is one."""
    with tempfile.NamedTemporaryFile("w", prefix="workbench-", suffix=".html", delete=False) as file:  # mode 0600
        file.write(f'<meta http-equiv="refresh" content="0; url={escape(page)}">')
    atexit.register(Path(file.name).unlink, missing_ok=True)
    return Path(file.name).as_uri()


def _load(address: str) -> None:
    """Ask for a page until the server answers: the first session loads what all later ones use."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            with urlopen(address, timeout=ANSWER_SECONDS) as page:
                page.read()
            return
        except URLError as error:  # its thread does not listen yet
            if time.monotonic() > deadline:
                raise SystemExit(f"workbench: the pages do not answer at {address}: {error.reason}") from None
            time.sleep(POLL_SECONDS)


def _follow(running: Sequence[tuple[subprocess.Popen, Path]], console: Callable[[str], None]) -> None:
    """Say how the trainings go, until all have ended."""
    with ExitStack() as stack:
        left = [(trainer, _Said(stack.enter_context(Run(folder)))) for trainer, folder in running]
        several = len(left) > 1
        while left:
            for trainer, said in list(left):
                if trainer.poll() is None:
                    said.report(console, several)
                else:
                    state, message = said.run.status
                    console(f"run {said.run.name} {state}{': ' if message else ''}{message}")
                    left.remove((trainer, said))
            time.sleep(POLL_SECONDS)


class _Said:
    """What was last said of a run."""

    def __init__(self, run: Run):
        self.run, self.at, self.step = run, time.monotonic(), run.last_step

    def report(self, console: Callable[[str], None], named: bool) -> None:
        """Say its step, loss and speed, unless that was said a moment ago."""
        now, step = time.monotonic(), self.run.last_step
        if now - self.at < REPORT_SECONDS or step == self.step:
            return
        total, rate = self.run.meta["total_steps"], (step - self.step) / (now - self.at)
        loss = self.run.scalars(LOSS.name(), start=step)[1][0]
        left = (total - step - 1) / rate / 60
        name = f"{self.run.name}: " if named else ""
        console(f"{name}step {step + 1} of {total}, loss {loss:.3f}, {rate:.1f} steps/s, {left:.0f} min left")
        self.at, self.step = now, step


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
