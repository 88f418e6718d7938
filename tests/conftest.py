"""What all tests share: shapes checked at run time, one thread, a home of their own, and a browser."""

import os
import shutil
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

pytest.register_assert_rewrite("tests.kinds")  # its checks say what they found, like a test

# Shapes and dtypes written in the signatures of the library are checked here, and only here. The hook takes its checker
# by a name to import, so the one in which an int will do for a float gets one.
checker = types.ModuleType("workbench_checker")
checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))
sys.modules[checker.__name__] = checker
install_import_hook(["workbench.lib", "workbench.beds"], "workbench_checker.check")

# One thread each: the numbers are the same on every machine, and parallel workers do not fight. It is set before torch
# is imported, and in the environment, so that processes started by tests have it too.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["WORKBENCH_QUIET"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")))
)


def pytest_configure(config: pytest.Config) -> None:
    """One home for the whole session; parallel workers inherit it from the process that starts them."""
    if not hasattr(config, "workerinput"):
        os.environ["WORKBENCH_HOME"] = tempfile.mkdtemp(prefix="workbench-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["WORKBENCH_HOME"], ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ``WORKBENCH_HOME`` of the test's own, empty."""
    folder = tmp_path / "home"
    monkeypatch.setenv("WORKBENCH_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """Headless Chromium, driven by playwright. Skips where there is none, fails where one is required."""
    from playwright.sync_api import sync_playwright

    from workbench.doctor import find_browser

    path = find_browser()
    if path is None:
        refuse = pytest.fail if os.environ.get("WORKBENCH_REQUIRE_BROWSER") else pytest.skip
        refuse("no Chromium found; see .ci/install-browser")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()
