"""`workbench live` from its start to Ctrl-C, without a browser."""

import http.client
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from urllib.parse import unquote

import pytest

from tests.live.synthetic import write_synthetic_run
from workbench.errors import InputError
from workbench.live import serve
from workbench.live.recipe import Recipe
from workbench.live.store import CHECKPOINTS, Run

SCRIPT = """
import sys
from workbench.errors import InputError
from workbench.live.arm import read_recipe
from workbench.live.serve import live
try:
    live([read_recipe(sys.argv[1])], open_browser=False)
except InputError as error:
    sys.exit(f"refused: {error}")
"""
SMALL = (
    '{"domains": ["docs", "names"], "cap": 8192, "seq_len": 16, "batch_size": 4, "d_model": 16, "n_layers": 2,'
    ' "n_heads": 2, "n_experts": 4, "d_hidden": 8, "steps": 1000000}'
)


class Program:
    """The command in a process, and the lines it says."""

    def __init__(self, *command: str):
        command = [sys.executable, *command]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.said: list[str] = []
        self._lines: Queue[str] = Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line.rstrip())
        self._lines.put("(the end)")

    def wait_for(self, pattern: str, seconds: float = 300) -> re.Match:
        while not self.said or self.said[-1] != "(the end)":
            try:
                self.said.append(self._lines.get(timeout=seconds))
            except Empty:
                break
            if found := re.search(pattern, self.said[-1]):
                return found
        raise AssertionError(f"never said {pattern!r} but\n" + "\n".join(self.said))

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        self.wait_for(r"\(the end\)")
        return self.process.wait()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("WORKBENCH_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def program(home: Path) -> Iterator[tuple[Program, int, str]]:
    started = Program("-c", SCRIPT, SMALL)
    try:
        found = started.wait_for(r"http://localhost:(\d+)/live\?run=(\S+)")
        yield started, int(found[1]), found[2]
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.wait()


def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    return answer.status, text


def test_the_pages_answer_and_load_nothing_from_elsewhere(program):
    _, port, name = program
    pages = [f"/{page}?run={name}" for page in serve.app_files()] + ["/"]
    assert f"/live?run={name}" in pages
    for path in pages:
        status, text = get(port, path)
        assert status == 200
        # what a page fetches, as against the names of XML namespaces and links that a person may follow
        fetched = re.findall(r"""(?:src|href)=["'](https?:)?//([^/"':]+)""", text)
        assert {host for _, host in fetched} <= {"localhost", "127.0.0.1"}


def test_only_pages_of_this_address_may_connect(program):
    _, port, name = program
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Version": "13"}
    upgrade["Sec_WebSocket_Key"] = "x3JJHMbDL1EzLkh9GBhXDw=="
    status, _ = get(port, f"/live/ws?run={name}", Origin="http://elsewhere.example", **upgrade)
    assert status == 403
    outside = {address[4][0] for address in socket.getaddrinfo(socket.gethostname(), None)} - {"127.0.0.1", "::1"}
    for address in outside:  # nobody but this machine
        with pytest.raises(OSError), socket.create_connection((address, port), timeout=5):
            pass


def test_the_port_is_taken_meanwhile(program):
    _, port, _ = program
    with pytest.raises(InputError, match=f"port is {port} but must be a free port"):
        serve.free_port(port)
    assert serve.free_port(None) != port


def test_ctrl_c_ends_the_training_and_says_where_the_run_is(program, home: Path):
    started, port, name = program
    assert started.end() == 0
    with Run(home / "runs" / name) as run:
        assert run.status.state == "stopped" and "SIGTERM" in run.status.message
        steps = run.last_step + 1
    assert started.said[-3:-1] == [
        f"run {name} stopped after {steps} steps, kept at {home / 'runs' / name}",
        f"go on with: workbench resume {name}",
    ]
    assert (home / "runs" / name / CHECKPOINTS / f"step-{steps:08d}").is_dir()
    with pytest.raises(OSError):
        get(port, "/")


def test_view_shows_a_run_that_is_kept_and_trains_nothing(home: Path, tmp_path: Path):
    """A run outside the person's own, by its folder: the page says which, and its address leads there again."""
    write_synthetic_run(tmp_path / "else where" / "mine", 3, n_layers=2, n_experts=4, n_tokens=64)
    before = list((home / "runs").glob("*"))
    started = Program("-m", "workbench", "view", str(tmp_path / "else where" / "mine"), "--no-browser")
    found = started.wait_for(r"http://localhost:(\d+)(/live\?run=(\S+))")
    assert started.said[0] == f"run mine finished after 3 steps, kept at {tmp_path / 'else where' / 'mine'}"
    assert unquote(found[3]) == str(tmp_path / "else where" / "mine")
    status, text = get(int(found[1]), found[2])
    assert status == 200 and "unknown" not in text
    assert started.end() == 0 and list((home / "runs").glob("*")) == before


def test_a_trainer_that_refuses_says_why(home: Path):
    started = Program("-c", SCRIPT, SMALL.replace('"docs"', '"abc"'))
    found = started.wait_for("refused: (.*)")
    assert "'abc' is not on this machine" in found[1] and "workbench data get abc" in found[1]
    assert started.process.wait() == 1


def test_a_wrong_port_is_refused_before_anything_starts(home: Path):
    before = list((home / "runs").glob("*"))
    for port in (0, 70_000, -1):
        with pytest.raises(InputError, match=f"port is {port} but must be between 1 and 65535"):
            serve.live([Recipe()], port=port)
    assert list((home / "runs").glob("*")) == before


def test_a_page_that_closes_leaves_no_traceback():
    from tornado.websocket import WebSocketClosedError

    def record(error: Exception) -> logging.LogRecord:
        return logging.LogRecord("asyncio", logging.ERROR, "", 0, "text", (), (type(error), error, None))

    assert not serve._not_a_closed_page(record(WebSocketClosedError()))
    assert serve._not_a_closed_page(record(ValueError()))
    assert serve._not_a_closed_page(logging.LogRecord("asyncio", logging.ERROR, "", 0, "text", (), None))


def test_a_browser_is_opened_only_where_it_is_seen(monkeypatch: pytest.MonkeyPatch):
    for name in ("SSH_CONNECTION", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(serve.sys, "platform", "linux")
    assert not serve._has_screen()
    monkeypatch.setenv("DISPLAY", ":0")
    assert serve._has_screen()
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 1 10.0.0.2 22")
    assert not serve._has_screen()
    assert os.environ["DISPLAY"] == ":0"
