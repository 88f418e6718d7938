"""The doctor finds what is wrong and says what to do about it."""

import socket
from pathlib import Path

import pytest

from workbench import doctor
from workbench.doctor import FAIL, OK, WARN


def test_a_machine_that_runs_these_tests_is_well(empty_home: Path):
    checks = doctor.examine()
    names = ["python", "packages", "torch", "compiler", "kernel", "browser", "folder", "disk", "sqlite", "data", "port"]
    assert [check.name for check in checks] == names
    assert [check for check in checks if check.state == FAIL] == []
    assert empty_home.is_dir() and list(empty_home.iterdir()) == [], "the checks leave nothing behind"


def test_a_home_that_cannot_be_written_is_found(empty_home: Path):
    empty_home.write_text("a file where a folder should be")
    assert doctor.folder().state == FAIL and "WORKBENCH_HOME" in doctor.folder().mend
    by_name = {check.name: check for check in doctor.examine()}
    assert by_name["sqlite"].state == FAIL, "a check that breaks is a finding"
    assert by_name["port"].state in (OK, WARN), "and the others are still made"


def test_a_taken_port_is_found(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(doctor, "LIVE_PORT", server.getsockname()[1])
        assert doctor.port().state == WARN
    assert doctor.port().state == OK


def test_a_missing_package_is_found(monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        if name == "panel":
            raise doctor.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(doctor, "version", version)
    assert (doctor.packages().state, doctor.packages().detail) == (FAIL, "missing: panel")


@pytest.mark.parametrize(("free", "state"), [(10, OK), (1, WARN), (0.1, FAIL)])
def test_a_full_disk_is_found(monkeypatch: pytest.MonkeyPatch, home: Path, free: float, state: str):
    usage = type("Usage", (), {"free": free * 2**30})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert doctor.disk().state == state


def test_the_browser_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("WORKBENCH_CHROMIUM", str(tmp_path / "chrome"))
    assert doctor.find_browser() is None and doctor.browser().state == WARN
    (tmp_path / "chrome").write_text("")
    assert doctor.find_browser() == tmp_path / "chrome"
