"""`workbench live` from its start to Ctrl-C, without a browser."""

import asyncio
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
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path
from queue import Empty, Queue
from urllib.parse import unquote

import pytest

from tests.live.synthetic import write_synthetic_run
from workbench.cli import main
from workbench.errors import InputError
from workbench.live import guard, serve
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
ADDRESS = r"http://localhost:(\d+)/live\?run=([^&]+)&token=([\w-]{32}) "


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

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

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
        found = started.wait_for(ADDRESS)
        yield started, int(found[1]), found[2]
    finally:
        started.kill()


@pytest.fixture(scope="module")
def viewer(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Program, int, str]]:
    """`workbench view` of a run outside the person's own, by its folder."""
    folder = tmp_path_factory.mktemp("else where") / "mine"
    write_synthetic_run(folder, 3, n_layers=2, n_experts=4, n_tokens=64)
    started = Program("-m", "workbench", "view", str(folder), "--no-browser")
    try:
        found = started.wait_for(ADDRESS)
        yield started, int(found[1]), found[2]
    finally:
        started.kill()


@pytest.fixture(scope="module")
def plain(home: Path) -> Iterator[tuple[Program, int, str]]:
    """Plain `panel serve`, on which the first page has been opened."""
    write_synthetic_run(home / "runs" / "plain", 3, n_layers=2, n_experts=4, n_tokens=64)
    pages = [str(serve.app_files()[name]) for name in ("live", "verdicts")]
    started = Program("-m", "panel", "serve", *pages, "--port", "0", "--address", "127.0.0.1")
    try:
        port = int(started.wait_for(r"http://127\.0\.0\.1:(\d+)/")[1])
        get(port, "/live?run=plain")
        started.wait_for(r"the pages are read-only; with token=[\w-]{32} in the address they control runs")
        yield started, port, "plain"
    finally:
        started.kill()


def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    return answer.status, text


def page_of(port: int, query: str) -> str:
    """All the text of a page, which its websocket brings, as the models of a session of its own."""
    from tornado.httpclient import HTTPRequest
    from tornado.websocket import websocket_connect

    status, text = get(port, f"/live?{query}")
    assert status == 200
    token = re.search(r'"token":"([^"]+)"', text)[1]

    async def pull() -> str:
        address = HTTPRequest(f"ws://localhost:{port}/live/ws", headers={"Origin": f"http://localhost:{port}"})
        socket = await websocket_connect(address, subprotocols=["bokeh", token])
        for sent in ((), ('{"msgid": "1", "msgtype": "PULL-DOC-REQ"}', "{}", "{}")):  # it greets first
            for part in sent:
                await socket.write_message(part)
            _, _, content = [await socket.read_message() for _ in ("header", "metadata", "content")]
        socket.close()
        return content

    with ThreadPoolExecutor(1) as thread:  # a browser that another test drives has its event loop in this one
        content = thread.submit(asyncio.run, asyncio.wait_for(pull(), 300)).result()
    return unescape(content)  # Panel escapes the HTML of a page once more


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


UPGRADE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec_WebSocket_Version": "13",
    "Sec_WebSocket_Key": "x3JJHMbDL1EzLkh9GBhXDw==",
}
ASKED = {"page": ("/live", 200), "static": ("/static/js/bokeh.min.js", 200), "websocket": ("/live/ws", 101)}
OWN, FOREIGN = ("localhost:{}", "127.0.0.1:{}"), ("elsewhere.example:{}", "elsewhere.example", "localhost.example:{}")


@pytest.mark.parametrize("origin", [None, *OWN, *FOREIGN, "null"])
@pytest.mark.parametrize("host", [*OWN, *FOREIGN])
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("server", ["program", "viewer", "plain"])
def test_only_its_own_pages_are_answered_and_only_by_its_own_names(request, server, asked, host, origin):
    """A page of another name that leads here has the same Host and Origin, and neither is ours."""
    _, port, _ = request.getfixturevalue(server)
    path, good = ASKED[asked]
    headers = {"Host": host.format(port)} | (UPGRADE if asked == "websocket" else {})
    if origin is not None:
        headers["Origin"] = origin if origin == "null" else f"http://{origin.format(port)}"
    status, text = get(port, path, **headers)
    # plain panel serve knows itself by one of its two names; a page of the other is none of its own, unless asked so
    accepted = host in OWN and (origin is None or origin in ((host, OWN[0]) if server == "plain" else OWN))
    assert status == (good if accepted else 403)
    assert accepted or text.startswith("workbench: refused: ")


def test_nobody_but_this_machine_is_answered(program):
    _, port, _ = program
    outside = {address[4][0] for address in socket.getaddrinfo(socket.gethostname(), None)} - {"127.0.0.1", "::1"}
    for address in outside:
        with pytest.raises(OSError), socket.create_connection((address, port), timeout=5):
            pass


@pytest.mark.parametrize("server", ["viewer", "plain"])
@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("run=%2Ftmp", "&#x27;/tmp&#x27; is unknown"),
        ("run=..%2F..%2Felsewhere", "is unknown"),
        ("run=" + "x" * 5000, "is unknown"),
        ("run=%00", "is unknown"),
        ("run=~nobody", "is unknown"),
        ("run=plain&token=wrong", "not that of this server"),
    ],
)
def test_an_address_that_leads_elsewhere_is_told_so(request, plain, server, query, said):
    _, port, _ = request.getfixturevalue(server)
    assert said in page_of(port, query)


@pytest.mark.parametrize("query", ["run=%FF%FE", "compare=%FF", "theme=%FF", "token=%FF"])
def test_an_address_that_is_no_text_is_refused(plain, query):
    _, port, _ = plain
    assert get(port, f"/live?{query}") == (400, "workbench: refused: the address is not UTF-8\n")


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


def test_view_shows_a_run_that_is_kept_and_trains_nothing(home: Path, viewer):
    """The page says which, and its address leads there again."""
    started, port, name = viewer
    folder = Path(unquote(name))
    assert folder.name == "mine" and started.said[0] == f"run mine finished after 3 steps, kept at {folder}"
    page = page_of(port, f"run={name}")
    assert "finished" in page and "unknown" not in page
    before = list((home / "runs").glob("*"))
    assert started.end() == 0 and list((home / "runs").glob("*")) == before


def test_a_home_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "file" / "home"))
    assert main(["live", "--no-browser"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"workbench: error: run folder {tmp_path}/file/home/runs/") and said.count("\n") == 1
    assert "cannot be made: Not a directory (see $WORKBENCH_HOME)" in said


def test_another_address_takes_a_warning_and_answers_to_its_own_names(home: Path, monkeypatch):
    monkeypatch.setattr(serve, "_load", lambda address: None)
    said = []
    guard.new_token()
    serve._show("0.0.0.0", 5006, ["mine"], False, said.append)
    host = socket.gethostname()
    assert said[0].startswith(f"warning: whoever reaches port 5006 of {host} can read the runs")
    assert said[1] == f"watch it at http://{host}:5006/live?run=mine&token={guard.token()} (Ctrl-C ends it)"
    said.clear()
    serve._show("127.0.0.1", 5006, ["mine"], False, said.append)
    assert len(said) == 1 and said[0].startswith("watch it at http://localhost:5006/live?run=mine&token=")
    for wrong in ("", "::1", "elsewhere.invalid", "192.0.2.1", "x" * 300):
        with pytest.raises(InputError, match="must be a name or an IPv4 address of this machine"):
            serve.free_port(None, wrong)


def test_the_token_is_in_no_command_line(home: Path, monkeypatch):
    """The browser is told a file, which nobody else may read, and which leads to the page."""
    opened = Queue()
    monkeypatch.setattr(serve, "_load", lambda address: None)
    monkeypatch.setattr(serve.webbrowser, "open", opened.put)
    guard.new_token()
    serve._show("127.0.0.1", 5006, ["mine"], True, lambda line: None)
    address = opened.get(timeout=300)
    file = Path(unquote(address.removeprefix("file://")))
    assert guard.token() not in address and file.stat().st_mode & 0o777 == 0o600
    assert f"http://localhost:5006/live?run=mine&amp;token={guard.token()}" in file.read_text()
    file.unlink()


def test_a_token_is_the_one_of_this_server_or_none():
    guard.new_token()
    first = guard.token()
    assert guard.may_control(first) and len(first) == 32
    for wrong in (None, "", first[:-1], f"{first}x", "é"):
        assert not guard.may_control(wrong)
    guard.new_token()
    assert not guard.may_control(first)


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
