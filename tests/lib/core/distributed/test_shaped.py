"""A shaped link: as slow as it is told, alone in its namespace, and ended with what runs in it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import running
from workbench.errors import InputError
from workbench.lib.core.distributed import shaped
from workbench.lib.core.distributed.shaped import available, call_shaped, loopback_seconds, shaped_command

permitted, reason = available()
ROOT = Path(__file__).parents[4]
needs_a_namespace = pytest.mark.skipif(not permitted, reason=reason)


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def stay(file: str) -> None:
    """Says who is here, with a process of its own, and does not go."""
    child = subprocess.Popen(["sleep", "1000"])
    Path(file).write_text(f"{os.getpid()} {child.pid}\n")
    time.sleep(1000)


def refuse(word: str) -> None:
    raise InputError(f"word is {word} but must be another")


@needs_a_namespace
def test_bytes_take_the_time_of_the_rate():
    """Never less: a busy machine makes it only longer. 64,000 bytes pass at once."""
    n_bytes = 500_000
    assert call_shaped(loopback_seconds, n_bytes, mbit=20) > 8 * (n_bytes - 64_000) / 20e6


@needs_a_namespace
def test_inside_is_one_interface_and_outside_stays_as_it_is():
    before = said("ip", "-o", "link"), said("tc", "qdisc")
    inside = said(*shaped_command(["ip", "-o", "link"], 30)).splitlines()
    assert len(inside) == 1 and " lo: " in inside[0] and "mtu 1500" in inside[0] and "UP" in inside[0]
    assert "tbf" in said(*shaped_command(["tc", "qdisc", "show", "dev", "lo"], 30))
    assert "30Mbit" in said(*shaped_command(["tc", "qdisc", "show", "dev", "lo"], 30))
    assert said(*shaped_command(["sh", "-c", "echo $GLOO_SOCKET_IFNAME 'a  b'"], 30)) == "lo a  b\n"
    assert (said("ip", "-o", "link"), said("tc", "qdisc")) == before


@needs_a_namespace
def test_what_goes_wrong_inside_is_told():
    with pytest.raises(InputError, match="word is this but must be another"):
        call_shaped(refuse, "this", mbit=10)
    with pytest.raises(TimeoutError, match=r"sleep had no answer on a link of 10 Mbit/s in 0.5 s"):
        call_shaped(time.sleep, 100, mbit=10, timeout=0.5)
    with pytest.raises(RuntimeError, match="_exit ended with status 3"):
        call_shaped(os._exit, 3, mbit=10)
    with pytest.raises(subprocess.CalledProcessError):
        said(*shaped_command(["false"], 10))


@needs_a_namespace
def test_what_runs_inside_ends_with_whoever_called_it(tmp_path, until):
    file = tmp_path / "pids"
    code = f"from tests.lib.core.distributed.test_shaped import *; call_shaped(stay, {str(file)!r}, mbit=10)"
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until(lambda: file.exists() and file.read_text().endswith("\n"))
    pids = list(map(int, file.read_text().split()))
    assert all(map(running, pids))
    caller.kill()
    caller.wait()
    until(lambda: not any(map(running, pids)))


def test_a_machine_that_does_not_permit_it_says_why(monkeypatch):
    monkeypatch.setattr(shaped, "available", lambda: (False, "a shaped link needs tc, not found on this machine"))
    with pytest.raises(InputError, match="mbit is 10 but a shaped link needs tc, not found"):
        shaped_command(["true"], 10)
    monkeypatch.setattr(shaped, "TOOLS", ("sh", "no-such-tool"))
    assert available.__wrapped__() == (False, "a shaped link needs no-such-tool, not found on this machine")
    monkeypatch.setattr(shaped, "TOOLS", ())
    monkeypatch.setattr(shaped, "_inside", lambda command, mbit: ["sh", "-c", "echo not you >&2; exit 1"])
    assert available.__wrapped__() == (False, "a shaped link is not permitted here: not you")


@pytest.mark.parametrize("mbit", [0, -1, float("inf"), float("nan")])
def test_a_rate_that_is_none_is_refused(mbit):
    with pytest.raises(InputError, match=r"mbit is .* but must be a rate above 0"):
        shaped_command(["true"], mbit)
