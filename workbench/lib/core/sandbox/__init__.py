"""Programs that nobody has read, run in a process of their own that can compute, answer, and nothing else.

    with Sandbox("workbench.lib.search.fsap_trial", Limits(seconds=20)) as sandbox:
        outcome = sandbox.run(code, job, tensors)          # Outcome(kind="network", detail="system call socket", ...)

A server process without the caller's environment and open files loads torch once and runs nothing of a program. Each
program is a fork of it with limits of time and memory, in namespaces of its own where the kernel permits them, behind
a filter of system calls that knows what is allowed: no file is opened, no socket made, no process or thread started.
What is refused ends the program and is reported by kind (`KINDS`). The filter is tried before the first program; where
it is missing or does not hold (anything but Linux on x86-64, some containers), `Sandbox` refuses, unless it is told
`allow_weaker=True`. Then limits, namespaces, and what Python itself announces are all there is: enough against
accidents, not against intent. `Sandbox.isolation` says which walls stand; namespaces are a second one behind the
filter, which many containers do not permit.

What it does not protect from:

- The kernel. A fault of Linux that the allowed calls (memory, clocks, futexes, reading and writing of open pipes) can
  reach is open to a program, and so is what one processor leaks to whoever shares it (Spectre and its like). It is no
  virtual machine; do not give it programs of somebody who means harm, and secrets on the same machine, together.
- Lies. A program shares its process with the trial that judges it: whatever a trial returns can be forged, the kind of
  a refusal too (that it was stopped cannot). What must be true is computed by the caller from what the trial returns,
  and what the program must not know is not sent: judge it on targets that stay outside.
- Use of the machine within the limits: a processor for so many seconds, and so many bytes, for each program. A fork
  shares the memory of the server, which holds libraries and the tensors of the job, no more.
- What reading a program promises. `source.refusal` names early what would be stopped later; it is no wall.
- Files that were open before: there are none, but a change of the server has to keep it so.

A trial is a module with `warm()`, called once in the server to load whatever a program may need, and
`trial(load, job, tensors)`, called in the program's own process: `load()` runs the program and returns its names; what
it returns has to be JSON.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor

from workbench.catalogue import PACKAGE
from workbench.errors import InputError
from workbench.lib.core.sandbox import confine
from workbench.lib.core.sandbox.source import refusal

KINDS = {
    "ok": "it ran, and this is what its trial returned",
    "syntax": "it does not parse, or is too long or too deep",
    "import": "it imports what is not allowed",
    "name": "it names what is not allowed, such as eval or __class__",
    "write": "it writes, or makes, renames or removes files",
    "read": "it opens or lists files",
    "network": "it asks for a socket or a host",
    "process": "it starts processes or threads, or sends signals",
    "native code": "it loads a library of machine code",
    "system call": "it asks the kernel for something else",
    "memory": "it asks for more memory than it may have",
    "time": "it does not end in its time",
    "answer": "what it returned is no answer",
    "crash": "its process died",
    "exit": "it ends the process",
    "error": "it raises an error",
}
"""Kind -> what it says; a trial adds kinds of its own by raising `inside.Refused`."""

START, SLACK = 300, 60  # seconds for a server to load on a busy machine, and to answer beyond a program's time
TORCH = ("math", "torch", "torch.nn", "torch.nn.functional", "torch.optim")


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: of wall time, and of processor time.
        memory: bytes beyond those of the server.
        modules: what it may import.
    """

    seconds: float = 30.0
    memory: int = 1 << 30
    modules: tuple[str, ...] = TORCH

    def __post_init__(self):
        if not 0 < self.seconds <= 24 * 3600:
            raise InputError(f"seconds is {self.seconds} but must be above 0, at most a day")
        if not 1 << 26 <= self.memory <= 1 << 40:
            raise InputError(f"memory is {self.memory} but must be from {1 << 26} to {1 << 40} bytes")


@dataclass(frozen=True)
class Outcome:
    """What came of a program.

    Attributes:
        kind: one of `KINDS`, or of the trial's own.
        detail: what was refused, or went wrong; of the program's own making, cut and printable.
        value: what the trial returned, where kind is "ok". It may be forged, see above.
        seconds: of wall time.
        memory: most bytes it had, those it shares with the server among them.
    """

    kind: str
    detail: str = ""
    value: Any = None
    seconds: float = 0.0
    memory: int = 0

    @property
    def ok(self) -> bool:
        return self.kind == "ok"


class Sandbox:
    """Runs programs, one at a time; a context manager.

    Args:
        trial: name of the module that tries them, see above.
        limits: of each.
        allow_weaker: run them also where the filter of system calls is missing. See above what is left then. The limit
            of the number of processes is nothing to a superuser, and files are then open to whoever runs this.

    Attributes:
        limits: of the next program; they may be replaced between two.
        isolation: what there is of "filter" and "namespaces", once it is entered.

    Raises:
        InputError: the filter is missing or does not hold, and `allow_weaker` is not set.
    """

    def __init__(self, trial: str, limits: Limits | None = None, allow_weaker: bool = False):
        self.trial, self.limits, self.allow_weaker = trial, limits or Limits(), allow_weaker
        self.isolation: dict[str, bool] = {}
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Sandbox":
        problem = confine.missing()
        if sys.platform != "linux":
            raise InputError(f"programs cannot be confined here: {problem}, and nothing weaker is there for it")
        if problem and not self.allow_weaker:
            raise InputError(_weaker(problem))
        self._errors = tempfile.TemporaryFile()
        self._server = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _start()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, cwd="/", env=_environment(),
            start_new_session=True,
        )  # fmt: skip
        try:
            self.isolation = self._ask({"trial": self.trial}, b"", START)
            if not self.isolation["filter"] and not self.allow_weaker:
                raise InputError(_weaker("this kernel, or the container, does not take its filter of system calls"))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def entered(self) -> bool:
        return self._server is not None

    def run(
        self, code: str, job: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> Outcome:
        """Read a program, and run it if nothing was refused by reading.

        Args:
            job: what the trial is told, as JSON has it.
            tensors: and given.
        """
        if not self.entered:
            raise InputError("the sandbox is closed: use it in a with statement")
        if found := refusal(code, self.limits.modules):
            return Outcome(*found)
        from safetensors.torch import save

        apart = {name: tensor.detach().contiguous().clone() for name, tensor in (tensors or {}).items()}
        data = save(apart) if apart else b""
        limits = {"seconds": self.limits.seconds, "memory": self.limits.memory, "modules": list(self.limits.modules)}
        asked = {"code": code, "job": dict(job or {}), "limits": limits, "bytes": len(data)}
        said = self._ask(asked, data, self.limits.seconds + SLACK)
        kind, detail = said.get("kind"), said.get("detail", "")
        if not isinstance(kind, str) or not isinstance(detail, str):
            kind, detail = "answer", "is no answer"
        value = said.get("value") if kind == "ok" else None
        return Outcome(_plain(kind, 40), _plain(detail, 300), value, said["seconds"], said["memory"])

    def close(self) -> None:
        """End the server, and with it a program that still runs."""
        server, self._server = self._server, None
        if server is not None:
            server.kill()
            server.communicate()
            self._errors.close()

    def _ask(self, what: dict[str, Any], data: bytes, seconds: float) -> dict[str, Any]:
        assert self._server is not None
        try:
            self._server.stdin.write(json.dumps(what).encode() + b"\n" + data)
            self._server.stdin.flush()
            ready, _, _ = select.select([self._server.stdout], [], [], seconds)
            line = self._server.stdout.readline() if ready else b""
        except BrokenPipeError:
            line = b""
        if not line:
            self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 2000))
            last = self._errors.read().decode(errors="replace").strip()
            self.close()
            raise RuntimeError(f"the process that programs are forked from is lost. {last}")
        return json.loads(line)


def _start() -> str:
    """What the server runs: libraries are looked for where the caller has them, and never where it happens to stand."""
    paths = [str(PACKAGE.parent), *(path for path in sys.path if os.path.isabs(path))]
    return f"import sys; sys.path[:] = {paths!r}; from workbench.lib.core.sandbox.server import main; main()"


def _environment() -> dict[str, str]:
    """Nothing of the caller's but where its libraries are."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return kept | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LANG": "C.UTF-8", "HOME": "/nonexistent"}


def _weaker(problem: str) -> str:
    return (
        f"programs cannot be confined here: {problem}. allow_weaker=True runs them with limits of time and memory and "
        "with what Python announces of its own acts, which is no wall"
    )


def _plain(text: str, most: int) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text[:most])
