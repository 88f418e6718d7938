"""Whether this machine has what the workbench needs: one check a line, each with what to do where it fails."""

import os
import shutil
import socket
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from workbench.paths import home

OK, WARN, FAIL = "ok", "warn", "fail"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LIVE_PORT = 5006  # Panel's own default


@dataclass(frozen=True)
class Check:
    """One check. ``mend`` says what to do unless the state is ok; warn leaves most of the workbench usable."""

    name: str
    state: str
    detail: str
    mend: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def examine() -> list[Check]:
    """All checks, in the order in which things build on each other."""
    checks: list[Callable[[], Check]] = [
        python, packages, torch, compiler, kernel, browser, folder, disk, sqlite, data, port,
    ]  # fmt: skip
    found = []
    for check in checks:
        try:
            found.append(check())
        except Exception as error:  # a check that breaks is itself a finding, and the others still matter
            found.append(Check(check.__name__, FAIL, f"{type(error).__name__}: {error}"))
    return found


def python() -> Check:
    detail = f"{sys.version.split()[0]} at {sys.executable}"
    return Check("python", OK if sys.version_info >= (3, 11) else FAIL, detail, "install Python 3.11 or newer")


def packages() -> Check:
    names = ("panel", "bokeh", "plotly", "jupyterlab", "papermill", "scikit-learn")
    found, missing = [], []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check("packages", FAIL, f"missing: {', '.join(missing)}", "python -m pip install -e .")
    return Check("packages", OK, ", ".join(found))


def torch() -> Check:
    import torch  # seconds; the other commands do without

    devices = f"{torch.cuda.device_count()} GPU" if torch.cuda.is_available() else "no GPU, which is fine"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    detail = f"{torch.__version__}, {torch.get_num_threads()} threads on {cores} cores, {devices}"
    if torch.get_num_threads() > cores:
        return Check("torch", WARN, detail, f"export OMP_NUM_THREADS={cores}")
    return Check("torch", OK, detail)


def compiler() -> Check:
    from workbench.kernels import native

    found = native.compiler()
    mend = "without one the kernels take up to twice the time: apt-get install gcc, or set CC"
    return Check("compiler", OK if found else WARN, found or "no C compiler found", mend)


def kernel() -> Check:
    from jupyter_client.kernelspec import KernelSpecManager

    found = KernelSpecManager().find_kernel_specs()
    mend = "python -m ipykernel install --sys-prefix"
    return Check("kernel", OK if "python3" in found else FAIL, f"Jupyter kernels: {', '.join(found) or 'none'}", mend)


def browser() -> Check:
    path = find_browser()
    mend = "only the tests of the pages need one: apt-get install chromium, or set WORKBENCH_CHROMIUM"
    return Check("browser", OK if path else WARN, str(path or "no Chromium found"), mend)


def find_browser() -> Path | None:
    """The Chromium that the tests drive: ``$WORKBENCH_CHROMIUM`` or the first known name on the path."""
    named = os.environ.get("WORKBENCH_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    return Path(found) if found and Path(found).is_file() else None


def folder() -> Check:
    mend = "set WORKBENCH_HOME to a folder of yours"
    try:
        home().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home()):
            pass
    except OSError as error:
        return Check("folder", FAIL, f"{home()} cannot be written: {error.strerror}", mend)
    return Check("folder", OK, f"{home()} can be written")


def disk() -> Check:
    place = next(path for path in (home(), *home().parents) if path.exists())
    free = shutil.disk_usage(place).free / 2**30
    state = OK if free >= 2 else WARN if free >= 0.25 else FAIL
    return Check("disk", state, f"{free:.1f} GiB free at {place}", "a long run takes up to 0.2 GiB: free some space")


def sqlite() -> Check:
    """Runs are SQLite files with a write-ahead log, which network file systems do not carry."""
    mend = "set WORKBENCH_HOME to a folder on a local disk"
    with tempfile.TemporaryDirectory(dir=home()) as place:
        connection = sqlite3.connect(Path(place) / "check.sqlite")
        try:
            mode = connection.execute("PRAGMA journal_mode=wal").fetchone()[0]
        finally:
            connection.close()
    state = OK if mode == "wal" else FAIL
    return Check(
        "sqlite", state, f"{sqlite3.sqlite_version}, write-ahead log {'works' if mode == 'wal' else 'refused'}", mend
    )


def data() -> Check:
    from workbench.lib.data import available

    entries = available()
    absent = [entry.name for entry in entries if not entry.present]
    detail = f"{len(entries) - len(absent)} of {len(entries)} sets here"
    return Check("data", OK, detail + f"; workbench data get brings {', '.join(absent)}" * bool(absent))


def port() -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(("127.0.0.1", LIVE_PORT))
        except OSError as error:
            return Check("port", WARN, f"{LIVE_PORT} is taken: {error.strerror}", "workbench live --port takes another")
    return Check("port", OK, f"{LIVE_PORT} is free")
