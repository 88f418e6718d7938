"""Harmless programs that each try one forbidden thing: all are stopped, and named for what they tried.

What they would do if nothing stopped them: make an empty file in a folder of the test, ask for a socket, count. They
are allowed to import what they try it with (`WALLED`), so that the wall stops them, and not their reader.
"""

import errno
import json
import os
import struct
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.processes import below
from workbench.errors import InputError
from workbench.lib.core.sandbox import KINDS, TORCH, Limits, Sandbox, confine, inside
from workbench.lib.core.sandbox.source import refusal

PATIENT = 240.0  # seconds that a program has where it is to end by itself, on however busy a machine
WALLED = Limits(PATIENT, modules=(*TORCH, "os", "io", "time", "socket", "_socket", "threading", "ctypes", "importlib"))
TRIAL = "workbench.lib.search.fsap_trial"
PROGRAM = """
import torch
import torch.nn as nn
{head}

def supported_hyperparameters():
    return {{"lr"}}


class Net(nn.Module):
    def __init__(self, in_shape, out_shape, prm, device):
        super().__init__()
        self.first = nn.Conv2d(in_shape[1], {width}, 3)
        self.last = nn.Linear({width}, out_shape[0])

    def forward(self, x):
        {forward}
        return self.last(self.first(x).relu().mean((2, 3)))

    def train_setup(self, prm):
        self.optimizer = torch.optim.SGD(self.parameters(), lr=prm["lr"])

    def learn(self, train_data):
        for images, labels in train_data:
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self(images), labels).backward()
            self.optimizer.step()
"""
JOB = {
    "channels": 1, "height": 8, "width": 8, "classes": 3, "prm": {"lr": 0.1}, "most_params": 5000, "most_macs": 500_000,
    "seed": 0, "batch": 4, "epochs": 1,
}  # fmt: skip
HERE = "the folder of the test"

#: What is tried in the middle of a forward pass -> the kind that it is stopped as.
TRIED = {
    "loops": ("while True: pass", "time"),
    "waits": ("time.sleep(100)", "time"),
    "writes by Python": (f"io.FileIO('{HERE}/made', 'w')", "write"),
    "writes by the system": (f"os.open('{HERE}/made', 65)", "write"),
    "writes a model": (f"torch.save(x, '{HERE}/made')", "write"),
    "writes by C++, unannounced": (f"torch.from_file('{HERE}/made', shared=True, size=4)", "write"),
    "shares memory, unannounced": ("x.share_memory_()", "write"),
    "removes": (f"os.remove('{HERE}/there')", "write"),
    "renames": (f"os.rename('{HERE}/there', '{HERE}/made')", "write"),
    "makes a folder": (f"os.mkdir('{HERE}/made')", "write"),
    "a pipe with a name, unannounced": (f"os.mkfifo('{HERE}/made')", "write"),
    "reads": (f"io.open('{HERE}/there')", "read"),
    "loads a model": (f"torch.load('{HERE}/there')", "read"),
    "lists": (f"os.listdir('{HERE}')", "read"),
    "forks": ("os.fork()", "process"),
    "starts a shell": ("os.system('true')", "process"),
    "starts a program": ("os.posix_spawn('/bin/true', ['true'], {})", "process"),
    "starts a thread": ("threading.Thread(target=print).start()", "process"),
    "starts threads by C++, unannounced": ("torch.set_num_threads(3); torch.mm(*torch.randn(2, 999, 999))", "process"),
    "signals its parent": ("os.kill(os.getppid(), 0)", "process"),
    "leaves its session, unannounced": ("os.setsid()", "process"),
    "asks for a socket": ("socket.socket()", "network"),
    "asks for a host": ("socket.getaddrinfo('localhost', 80)", "network"),
    "two sockets, unannounced": ("_socket.socketpair()", "network"),
    "loads machine code": ("ctypes.CDLL(None)", "native code"),
    "becomes somebody else, unannounced": ("os.setuid(1)", "system call"),
    "duplicates, unannounced": ("os.dup(1)", "system call"),
    "imports by the importer itself": ("importlib.import_module('wave')", "read"),
    "makes torch import": ("torch.compile(self.first)(x)", "import"),
    "allocates tensors": ("torch.empty(1 << 30).fill_(1)", "memory"),
    "allocates bytes": ("bytearray(1 << 32)", "memory"),
    "ends": ("raise SystemExit", "exit"),
    "ends without a word": ("os._exit(0)", "crash"),
    "aborts": ("os.abort()", "crash"),
    "raises": ("1 / 0", "error"),
    "wrong shape": ("return x", "shape"),
    "no tensor": ("return None", "shape"),
    "no finite numbers": ("x = x / 0", "not finite"),
}  # fmt: skip
#: What is seen by reading -> the kind.
READ = {
    "unclosed": ("(", "syntax"),
    "imports os": ("import os", "import"),
    "imports from": ("from subprocess import run", "import"),
    "imports a module of torch": ("from torch import utils", "import"),
    "imports all": ("from torch import *", "import"),
    "relative": ("from . import x", "import"),
    "imports by a name": ("__import__('os')", "name"),
    "evaluates": ("eval('1')", "name"),
    "executes": ("exec('1')", "name"),
    "opens": ("open('x')", "name"),
    "climbs": ("().__class__.__bases__", "name"),
    "takes the builtins": ("__builtins__", "name"),
    "deep": ("x = " + "(" * 80 + "1" + ",)" * 80, "syntax"),
    "long": ("x = '" + "a" * 70_000 + "'", "syntax"),
}


def program(forward: str = "pass", head: str = "", width: int = 4) -> str:
    return PROGRAM.format(forward=forward, head=head, width=width)


@pytest.fixture(scope="module")
def sandbox():
    os.environ["WORKBENCH_TEST_SECRET"] = "not to be seen"
    try:
        with Sandbox(TRIAL, Limits(PATIENT)) as sandbox:
            yield sandbox
    except InputError as error:
        pytest.skip(str(error))  # that it is refused there is tested below, whatever this machine permits
    finally:
        del os.environ["WORKBENCH_TEST_SECRET"]


@pytest.fixture
def walled(sandbox):
    """The same one, and the programs may import what is to be stopped."""
    before, sandbox.limits = sandbox.limits, WALLED
    yield sandbox
    sandbox.limits = before


@pytest.fixture
def images():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, 8, 8, generator=draw)
    return {"x": x, "y": torch.arange(8) % 3, "asked": x[:5]}


def test_a_program_that_does_nothing_forbidden_is_tried_and_alike_each_time(sandbox, images):
    assert sandbox.isolation["filter"]
    first, again = (sandbox.run(program(), JOB, images) for _ in range(2))
    assert first.ok and first.value == again.value and len(first.value["predicted"]) == 5
    assert first.value["params"] == 4 * 10 + 4 * 3 + 3 and first.value["macs"] == 36 * 36 + 12
    assert first.seconds > 0 and first.memory > 0 and set(sandbox.isolation) == {"filter", "namespaces"}


@pytest.mark.parametrize("what", TRIED)
def test_each_forbidden_thing_is_stopped_and_named(what: str, walled, images, tmp_path: Path):
    (tmp_path / "there").write_text("here")
    forward, kind = TRIED[what]
    walled.limits = replace(WALLED, seconds=1.0 if kind == "time" else PATIENT)
    head = f"import {', '.join(WALLED.modules[len(TORCH) :])}"
    outcome = walled.run(program(forward.replace(HERE, str(tmp_path)), head), JOB, images)
    assert outcome.kind == kind and outcome.detail.isprintable(), outcome
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and outcome.value is None
    assert below(walled._server.pid) == set(), "nothing is left of it"
    if "unannounced" in what:
        assert outcome.detail.startswith("system call "), "Python says nothing of it, the kernel stops it"


@pytest.mark.parametrize("what", READ)
def test_what_reading_shows_is_named_before_it_runs(what: str, sandbox, images):
    outcome = sandbox.run(program(head=READ[what][0]), JOB, images)
    assert outcome.kind == READ[what][1] and outcome.seconds == 0


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"Net(nn.Module)": "Not(nn.Module)"}, "contract"),
        ({"def learn": "def teach"}, "contract"),
        ({"nn.Module": "object", "super().__init__()": "pass"}, "contract"),
        ({'{"lr"}': '{"decay"}'}, "contract"),
        ({"self.first(x)": "self.first(x[:, :, :1])"}, "error"),
        ({"self.optimizer.step()": "self.last.weight.data.fill_(float('nan'))"}, "not finite"),
    ],
)
def test_what_the_trial_refuses_has_kinds_of_its_own(change, kind, sandbox, images):
    code = program()
    for old, new in change.items():
        code = code.replace(old, new)
    assert sandbox.run(code, JOB, images).kind == kind


def test_limits_of_parameters_and_of_multiplications(sandbox, images):
    assert sandbox.run(program(width=2000), JOB, images).kind == "parameters"
    assert sandbox.run(program(), JOB | {"most_macs": 1000}, images).kind == "macs"


def test_a_refusal_cannot_be_caught_away(walled, images):
    for tried in ("socket.socket()", "_socket.socketpair()"):
        caught = f"try: {tried}\n        except BaseException: pass"
        assert walled.run(program(caught, "import socket, _socket"), JOB, images).kind == "network"


def test_nothing_of_the_caller_is_there(walled, images):
    seen = "raise ValueError(repr(sorted(os.environ)))"
    outcome = walled.run(program(seen, "import os"), JOB, images)
    assert outcome.kind == "error" and "LANG" in outcome.detail and "WORKBENCH" not in outcome.detail


def test_of_open_files_a_program_has_the_one_of_its_answer(tmp_path: Path):
    def trial(load, job, tensors):
        there = []
        for descriptor in range(1024):
            with suppress(OSError):
                os.fstat(descriptor)
                there.append(descriptor)
        return len(there)

    limits = {"seconds": PATIENT, "memory": 1 << 28, "modules": []}
    with (tmp_path / "open").open("w"):
        found = inside.run("", trial, {}, {}, limits, walled=False)
    assert found["kind"] == "ok" and found["value"] == 4, "three that lead nowhere, and one"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b"", "crash"), (b"[]", "answer"), (b"{", "answer"), (b'{"kind": "ok", "value": NaN}', "answer"),
        (b"[" * 50_000, "answer"), (b"\xff", "answer"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_said_to_be_none(text: bytes, kind: str):
    assert inside._ended(0, text)["kind"] == kind


def test_what_a_program_says_of_itself_is_cut_and_plain(sandbox, images):
    assert len(sandbox.run(program("raise ValueError('x' * 9999)"), JOB, images).detail) == 300
    assert "\033" not in sandbox.run(program("raise ValueError('\\033[31m')"), JOB, images).detail
    assert sandbox.run(program(), JOB, images).ok, "and the next one is tried as ever"


def test_the_filter_is_what_it_says():
    """The instructions, run by hand: allowed calls, such as ask, writing and reading, another machine, unknown ones."""
    code = [struct.unpack("=HBBI", confine.program(77)[at : at + 8]) for at in range(0, len(confine.program(77)), 8)]

    def answer(number: int, *arguments: int, machine: int = confine.X86_64) -> int:
        words = {0: number, 4: machine}
        for place in range(6):
            value = arguments[place] if place < len(arguments) else 0
            words |= {16 + 8 * place: value & 0xFFFFFFFF, 20 + 8 * place: value >> 32}
        at = held = 0
        while True:
            kind, yes, no, value = code[at]
            at += 1
            if kind == 0x20:
                held = words[value]
            elif kind == 0x06:
                return value
            else:
                at += yes if (held == value if kind == 0x15 else held & value) else no

    assert all(answer(number) == confine.ALLOW for number in confine.ALLOWED.values())
    assert all(answer(number) == confine.ERRNO | confine.EACCES for number in confine.ASKS.values())
    refused = set(confine.NAMES) - {confine.OPEN, confine.OPENAT, confine.IOCTL, confine.PRLIMIT, confine.TGKILL}
    assert all(answer(number) == confine.NOTIFY for number in refused)
    assert {answer(number) for number in (500, 9999, 0x40000001)} == {confine.NOTIFY}, "new calls, and those of x32"
    assert answer(0, machine=0x40000003) == confine.KILL
    for flags, action in ((0, confine.ERRNO | confine.EACCES), (os.O_WRONLY | os.O_CREAT, confine.NOTIFY)):
        assert answer(confine.OPENAT, 0, 0, flags) == answer(confine.OPEN, 0, flags) == action
    assert answer(confine.OPENAT, 0, 0, os.O_TMPFILE | os.O_RDWR) == confine.NOTIFY
    assert answer(confine.TGKILL, 77) == confine.ALLOW and answer(confine.TGKILL, 78) == confine.NOTIFY
    assert answer(confine.PRLIMIT, 0, 1, 0) == confine.ALLOW
    assert {answer(confine.PRLIMIT, 0, 1, new) for new in (1, 1 << 32)} == {confine.NOTIFY}
    assert answer(confine.IOCTL) == confine.ERRNO | confine.ENOTTY
    assert not set(confine.ALLOWED.values()) & refused and len(confine.NAMES) == sum(map(len, confine.REFUSED.values()))


def test_where_the_filter_is_missing_it_is_refused_unless_that_is_said(monkeypatch):
    monkeypatch.setattr(confine.platform, "machine", lambda: "riscv64")
    with pytest.raises(InputError, match="written for x86-64 and this is riscv64"):
        Sandbox(TRIAL).__enter__()
    monkeypatch.setattr(confine.sys, "platform", "darwin")
    with pytest.raises(InputError, match="it needs Linux and this is darwin"):
        Sandbox(TRIAL, allow_weaker=True).__enter__()


def test_where_a_container_does_not_take_the_filter_it_is_refused_unless_that_is_said(monkeypatch):
    monkeypatch.setattr(Sandbox, "_ask", lambda *asked: {"filter": False, "namespaces": False})
    with pytest.raises(InputError, match=r"or the container, does not take its filter.*no wall"):
        Sandbox(TRIAL).__enter__()
    with Sandbox(TRIAL, allow_weaker=True) as weaker:
        assert weaker.isolation == {"filter": False, "namespaces": False}


def test_a_filter_that_cannot_be_set_starts_no_program(monkeypatch, tmp_path: Path):
    def fails():
        raise OSError(errno.EINVAL, "not here")

    monkeypatch.setattr(inside.confine, "install", fails)
    limits = {"seconds": PATIENT, "memory": 1 << 28, "modules": []}
    found = inside.run("", lambda load, job, tensors: (tmp_path / "ran").touch(), {}, {}, limits, walled=True)
    assert found["kind"] == "crash" and not list(tmp_path.iterdir())


def test_without_the_filter_limits_and_what_python_announces_are_left(tmp_path: Path):
    def trial(load, job, tensors):
        load()
        return 1

    def tried(body: str, seconds: float = PATIENT) -> str:
        limits = {"seconds": seconds, "memory": 1 << 28, "modules": ["os", "socket"]}
        return inside.run(f"import os, socket\n{body}", trial, {}, {}, limits, walled=False)["kind"]

    kinds = {
        "pass": "ok", "os.system('true')": "process", "os.fork()": "process", "bytearray(1 << 32)": "memory",
        "socket.socket()": "network", f"os.mkdir('{tmp_path}/made')": "write",
    }  # fmt: skip
    assert {body: tried(body) for body in kinds} == kinds and not list(tmp_path.iterdir())
    assert tried("while True: pass", 1.0) == "time"


def test_what_cannot_be_is_refused(sandbox, images):
    with pytest.raises(InputError, match="seconds is 0"):
        Limits(seconds=0)
    with pytest.raises(InputError, match="memory is 5"):
        Limits(memory=5)
    with pytest.raises(InputError, match="the sandbox is closed"):
        Sandbox(TRIAL).run(program())
    with pytest.raises(RuntimeError, match=r"(?s)is lost.*No module named 'workbench.nothing'"):
        Sandbox("workbench.nothing").__enter__()


def test_kinds_are_said():
    assert {kind for _, kind in (TRIED | READ).values()} - {"shape", "not finite"} <= KINDS.keys()
    assert refusal("import torch", ["torch"]) is None
    json.dumps(KINDS)
