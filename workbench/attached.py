"""Processes that do not outlive the one that started them, whatever ended that one: a kill asks nobody.

    attach(parent)                               in a process started by `parent`: it ends when that one does
    run([*command of python], cwd=folder)        a module of Python as such a process, with all that it starts

As a script this file is what `run` starts. It imports nothing of the workbench, which need not be where that runs.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SECONDS = 0.2  # between two looks at who the parent is


def attach(parent: int) -> None:
    """End this process, and the others of its group if it leads one, soon after the process `parent`, its own, ends.

    The kernel hands a child to another parent when its own is gone, so that nothing need be kept open between the two.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS)
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="workbench-attached", daemon=True).start()


def run(
    module: str, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments`, as a process group that ends with this process or with an exception in it."""
    # -P: the folder of this file is no place to look for modules
    command = [sys.executable, "-P", __file__, str(os.getpid()), module, *arguments]
    pipes = {name: subprocess.PIPE for name in ("stdout", "stderr")}
    with subprocess.Popen(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, text=True, start_new_session=True, **pipes
    ) as process:
        try:
            stdout, stderr = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess([module, *arguments], process.returncode, stdout, stderr)


if __name__ == "__main__":
    import runpy

    attach(int(sys.argv[1]))
    sys.argv[:] = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
