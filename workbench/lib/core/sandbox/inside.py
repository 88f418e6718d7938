"""The life of one program: fork, confinement, what Python tells of its own acts, and the one answer that it gives.

Runs in the server (`server.py`), which has torch loaded and runs nothing of a program itself.
"""

import builtins
import json
import linecache
import math
import os
import select
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from workbench.lib.core.sandbox import confine
from workbench.lib.core.sandbox.confine import NETWORK, PROCESS, READS, WRITES
from workbench.lib.core.sandbox.source import FORBIDDEN

LONGEST_ANSWER = 1 << 20  # bytes
STOPPED = 3  # the status of a process whose act was refused by its own Python

#: What Python announces before it does it -> the kind; the longest beginning that fits counts.
ACTS = {
    "os.system": PROCESS, "os.fork": PROCESS, "os.exec": PROCESS, "os.spawn": PROCESS, "os.posix_spawn": PROCESS,
    "os.kill": PROCESS, "os.killpg": PROCESS, "os.startfile": PROCESS, "subprocess.": PROCESS, "pty.spawn": PROCESS,
    "signal.pthread_kill": PROCESS, "_posixsubprocess.": PROCESS, "_thread.start_new_thread": PROCESS,
    "_thread.start_joinable_thread": PROCESS,
    "socket.": NETWORK, "urllib.": NETWORK, "http.": NETWORK, "ftplib.": NETWORK, "smtplib.": NETWORK,
    "os.remove": WRITES, "os.rename": WRITES, "os.mkdir": WRITES, "os.rmdir": WRITES, "os.link": WRITES,
    "os.symlink": WRITES, "os.truncate": WRITES, "os.chmod": WRITES, "os.chown": WRITES, "os.utime": WRITES,
    "os.setxattr": WRITES, "os.removexattr": WRITES, "shutil.": WRITES, "tempfile.": WRITES, "sqlite3.": WRITES,
    "os.listdir": READS, "os.scandir": READS, "os.chdir": READS, "os.walk": READS, "glob.": READS,
    "ctypes.": "native code", "mmap.": "native code",
}  # fmt: skip


class Refused(BaseException):
    """A program did what it may not. No `Exception`, so that no "except Exception" of a program takes it."""

    def __init__(self, kind: str, detail: str):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


def run(
    code: str,
    trial: Callable[[Callable[[], dict], Mapping[str, Any], Mapping[str, Any]], Any],
    job: Mapping[str, Any],
    tensors: Mapping[str, Any],
    limits: Mapping[str, Any],
    walled: bool,
) -> dict[str, Any]:
    """Run a program in a process of its own and say what came of it, see `workbench.lib.core.sandbox.Outcome`."""
    answers, answer = os.pipe()
    ours, theirs = socket.socketpair()
    began, here = time.monotonic(), os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the server starts none, and a fork has one
        pid = os.fork()
    if pid == 0:
        try:
            os.closerange(0, min(answer, theirs.fileno()))
            _become(here, answer, theirs, limits, walled)
            _answer(answer, code, trial, job, tensors, limits["modules"])
        except BaseException:  # whatever it is, this process never returns into the server
            os._exit(1)
        os._exit(0)
    os.close(answer)
    theirs.close()
    try:
        return _watch(pid, answers, ours, began + limits["seconds"], walled) | {"seconds": time.monotonic() - began}
    finally:
        os.close(answers)
        ours.close()


def _become(parent: int, answer: int, theirs: socket.socket, limits: Mapping[str, Any], walled: bool) -> None:
    """Of a fork of the server, a process that can compute and answer and nothing else."""
    confine.die_with_parent(parent)
    os.setsid()  # a group of its own, which is killed as one
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2 and descriptor not in (answer, theirs.fileno()):
            with suppress(OSError):  # the one that listed them is closed already
                os.close(descriptor)
    confine.limit(limits["seconds"], limits["memory"])
    if walled:
        listener = confine.install()
        socket.send_fds(theirs, [b"."], [listener])
        os.close(listener)
    theirs.close()


def _answer(answer, code, trial, job, tensors, modules) -> None:
    def say(**what: Any) -> None:
        text = json.dumps(what, allow_nan=False).encode()
        while text:
            text = text[os.write(answer, text) :]

    def stop(kind: str, detail: str) -> None:
        say(kind=kind, detail=detail)
        os._exit(STOPPED)

    warnings.simplefilter("ignore")
    linecache.checkcache, linecache.updatecache = _nothing, _no_lines  # libraries ask for lines of their own source
    sys.addaudithook(_hook(stop))
    try:
        said = {"kind": "ok", "value": trial(lambda: _load(code, modules), job, tensors)}
    except Refused as error:
        said = {"kind": error.kind, "detail": error.detail}
    except BaseException as error:
        said = {"kind": _kind_of(error), "detail": f"{type(error).__name__}: {error}"[:300]}
    say(**said)


def _nothing(filename: str | None = None) -> None:
    pass


def _no_lines(filename: str, module_globals: Any = None) -> list[str]:
    return []


def _load(code: str, modules: list[str]) -> dict[str, Any]:
    """The names that a program defines."""
    allowed = {name: getattr(builtins, name) for name in dir(builtins) if name not in FORBIDDEN}

    def load(name: str, into=None, here=None, names=(), level: int = 0):
        if level or name not in modules:
            raise Refused("import", name)
        return __import__(name, None, None, names or (), 0)

    space: dict[str, Any] = {"__builtins__": allowed | {"__import__": load}, "__name__": "program"}
    exec(compile(code, "<program>", "exec"), space)
    return space


def _hook(stop: Callable[[str, str], None]) -> Callable[[str, tuple], None]:
    def hook(event: str, values: tuple) -> None:
        if event == "open":
            mode, flags = values[1], values[2]
            writes = any(letter in "wax+" for letter in mode) if isinstance(mode, str) else flags & confine.WRITING
            stop(WRITES if writes else READS, f"open {values[0]!r}"[:200])
        if event == "import":
            stop("import", str(values[0])[:200])
        kind = next((kind for act, kind in ACTS.items() if event.startswith(act)), None)
        if kind is not None:
            stop(kind, event)

    return hook


def _kind_of(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "bad_alloc" in text:
        return "memory"
    if text.startswith("Parent directory "):  # torch looks for the folder before it writes a model, and sees none
        return WRITES
    return "exit" if isinstance(error, SystemExit | KeyboardInterrupt) else "error"


def _watch(pid: int, answers: int, ours: socket.socket, end: float, walled: bool) -> dict[str, Any]:
    """Wait for the answer, a refused call, the end of the process or of its time, and leave no process behind."""
    process, listener, text = os.pidfd_open(pid), None, b""
    waiting = select.poll()
    for descriptor in (process, answers, *((ours.fileno(),) if walled else ())):
        waiting.register(descriptor, select.POLLIN)
    found: dict[str, Any] | None = None
    try:
        while found is None:
            left = end - time.monotonic()
            ready = dict(waiting.poll(max(0, math.ceil(left * 1000)))) if left > 0 else {}
            if left <= 0:
                found = {"kind": "time", "detail": "did not end in its time"}
            elif listener in ready:
                if ready[listener] & select.POLLIN:
                    kind, name = confine.refused(listener)
                    found = {"kind": kind, "detail": f"system call {name}"}
                else:
                    waiting.unregister(listener)
            elif answers in ready:
                part = os.read(answers, 1 << 16)
                text += part
                if not part:
                    waiting.unregister(answers)
                if len(text) > LONGEST_ANSWER:
                    found = {"kind": "answer", "detail": f"is longer than {LONGEST_ANSWER} bytes"}
            elif ours.fileno() in ready:
                _, received, _, _ = socket.recv_fds(ours, 1, 1)
                waiting.unregister(ours.fileno())
                if received:
                    listener = received[0]
                    waiting.register(listener, select.POLLIN)
            elif process in ready:
                break
    except OSError as error:  # the process ended while it was told of
        found = {"kind": "crash", "detail": type(error).__name__}
    finally:
        if found is not None:
            os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):  # nobody is left of its group, or it came to be none
            os.killpg(pid, signal.SIGKILL)
        _, status, used = os.wait4(pid, 0)
        os.close(process)
        if listener is not None:
            os.close(listener)
    found = found or _ended(status, text)
    return found | {"memory": used.ru_maxrss * 1024}


def _ended(status: int, text: bytes) -> dict[str, Any]:
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return {"kind": {"SIGXCPU": "time"}.get(name, "crash"), "detail": f"ended by {name}"}
    if not text:
        return {"kind": "crash", "detail": f"ended with status {os.WEXITSTATUS(status)} and no answer"}
    try:
        said = json.loads(text, parse_constant=_no_number)
        json.dumps(said)  # what cannot be passed on is found here
    except (ValueError, RecursionError):
        return {"kind": "answer", "detail": "is no JSON"}
    return said if isinstance(said, dict) else {"kind": "answer", "detail": "is no answer"}


def _no_number(name: str) -> float:
    raise ValueError(name)
