"""What a run was made with: the versions of the software and the revision of the code."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "numpy", "safetensors", "transformers", "peft")


def versions() -> dict[str, str]:
    """Version of the workbench, of Python and of the packages that decide the numbers, as far as they are installed."""
    from workbench import __version__

    found = {"workbench": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def revision(folder: str | Path) -> str | None:
    """The commit checked out in `folder`, with "+" if files differ from it; None where there is none, or no git."""
    git = ["git", "-C", str(folder)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        if commit.returncode:
            return None
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, timeout=5).returncode
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+" if changed else "")
