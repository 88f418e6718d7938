"""A slow link on one machine: a network namespace of its own, whose loopback passes so many Mbit/s.

On the plain loopback of few cores a transfer competes with the computing that is to hide it, and nothing is gained by
overlap. A shaped one is waited for, not computed. All processes inside share that one medium, in both directions. The
namespace has no other interface and ends with what runs in it; nothing outside is touched.

It takes Linux, `unshare` of util-linux, `ip` and `tc` of iproute2, and the right to make a namespace: `available`.
"""

import os
import pickle
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from workbench.attached import attach
from workbench.errors import InputError

TOOLS = ("unshare", "ip", "tc")
MTU = 1500  # as Ethernet has it: the 65,536 of a loopback would make bursts of the link's milliseconds
PATIENCE = 60.0
"""Seconds that `call_shaped` gives a function where it is not told another number."""


@cache
def available() -> tuple[bool, str]:
    """Whether a shaped namespace can be made here, and why not where it cannot; tried once, for real."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return False, f"a shaped link needs {' and '.join(missing)}, not found on this machine"
    tried = subprocess.run(_inside(["true"], 100.0), capture_output=True, text=True, timeout=PATIENCE)
    if tried.returncode:
        return False, f"a shaped link is not permitted here: {tried.stderr.strip() or f'status {tried.returncode}'}"
    return True, ""


def shaped_command(command: Sequence[str], mbit: float) -> list[str]:
    """The command line that runs `command` in a namespace of its own whose loopback passes `mbit` Mbit/s.

    gloo inside uses the loopback, as GLOO_SOCKET_IFNAME says.

    Raises:
        InputError: the rate is not above 0, or no such namespace can be made here, with the reason.
    """
    if not 0 < mbit < float("inf"):
        raise InputError(f"mbit is {mbit} but must be a rate above 0, in Mbit/s")
    permitted, reason = available()
    if not permitted:
        raise InputError(f"mbit is {mbit} but {reason}")
    return _inside(command, mbit)


def _inside(command: Sequence[str], mbit: float) -> list[str]:
    """`unshare` runs the shell in the new namespace or not at all, so that `lo` is never the machine's own.

    The bucket holds 4 ms, more than a tick of the kernel, and the queue a second: nothing is dropped in between.
    """
    rate = int(mbit * 1e6)
    burst, limit = max(64_000, rate // 2_000), max(1_000_000, rate // 8)
    setup = [
        f"ip link set dev lo mtu {MTU} up",
        f"tc qdisc add dev lo root tbf rate {rate}bit burst {burst} limit {limit}",
        "export GLOO_SOCKET_IFNAME=lo",
        f"exec {shlex.join(command)}",
    ]
    return ["unshare", "--net", "--", "sh", "-ec", "\n".join(setup)]


def call_shaped(function: Callable[..., Any], *args: Any, mbit: float, timeout: float = PATIENCE) -> Any:
    """function(*args) as a fresh interpreter computes it in a namespace whose loopback passes `mbit` Mbit/s.

    The processes that it starts are in the namespace too: ``call_shaped(run_processes, work, 2, mbit=100)``.

    Args:
        function, args: the function is importable by its name; it, its arguments and its value can be pickled.
        timeout: seconds until all that runs in there is ended.

    Raises:
        InputError: as `shaped_command`.
        TimeoutError: it took longer.
        RuntimeError: the interpreter died without an answer; its last words are in the message.
        Exception: whatever the function raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        call, answer = Path(folder) / "call", Path(folder) / "answer"
        call.write_bytes(pickle.dumps((function, args)))
        program = f"from {__name__} import _answer; _answer({os.getpid()}, {str(call)!r}, {str(answer)!r})"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        made = subprocess.Popen(
            shaped_command([sys.executable, "-c", program], mbit),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a group of its own, ended as one
        )
        try:
            _, words = made.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{function.__name__} had no answer on a link of {mbit} Mbit/s in {timeout} s") from None
        finally:
            if made.poll() is None:
                os.killpg(made.pid, signal.SIGKILL)
                made.communicate()
        if not answer.exists():
            raise RuntimeError(f"{function.__name__} ended with status {made.returncode}: {words.strip()[-2000:]}")
        good, value = pickle.loads(answer.read_bytes())
    if not good:
        raise value
    return value


def loopback_seconds(n_bytes: int) -> float:
    """From the first of so many bytes through one socket of the loopback until the last has come."""

    def read() -> None:
        with server.accept()[0] as there:
            left = n_bytes
            while left:
                left -= len(there.recv(1 << 16))
            there.sendall(b".")

    with socket.create_server(("127.0.0.1", 0)) as server:
        reader = threading.Thread(target=read)
        reader.start()
        with socket.create_connection(server.getsockname()) as here:
            began = time.perf_counter()
            here.sendall(bytes(n_bytes))
            here.recv(1)
            spent = time.perf_counter() - began
        reader.join()
    return spent


def _answer(parent: int, call: str, answer: str) -> None:
    """In the namespace: makes the call that one file holds, and leaves its value or its error in the other.

    It ends with its parent, and with it all that it has started.
    """
    attach(parent)
    function, args = pickle.loads(Path(call).read_bytes())
    try:
        found = (True, function(*args))
    except Exception as error:
        found = (False, error)
    Path(answer).write_bytes(pickle.dumps(found))
