"""Versions and revision, with and without git."""

from pathlib import Path

import pytest
import torch

import workbench
from workbench.live.provenance import revision, versions


def git(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A program of that name, the only one there is."""
    (folder / "git").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_versions_are_those_in_use():
    found = versions()
    assert (found["workbench"], found["torch"]) == (workbench.__version__, torch.__version__)


@pytest.mark.parametrize(("changed", "mark"), [(0, ""), (1, "+")])
def test_the_commit_and_whether_files_differ(tmp_path, monkeypatch, changed: int, mark: str):
    git(tmp_path, monkeypatch, f'case "$*" in *rev-parse*) echo abc123;; *) exit {changed};; esac')
    assert revision(tmp_path) == f"abc123{mark}"


def test_no_repository_and_no_git(tmp_path, monkeypatch):
    git(tmp_path, monkeypatch, "exit 128")
    assert revision(tmp_path) is None
    (tmp_path / "git").unlink()
    assert revision(tmp_path) is None
