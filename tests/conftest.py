"""What all tests share: shapes checked at run time, one thread, homes, the order of the workers, and a browser."""

import os
import shutil
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
from beartype import BeartypeConf, beartype
from hypothesis import HealthCheck, settings
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


# Begun in the background by a script, the tests, and what they start, would have interrupts ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No example is judged by its time, which is that of a busy machine, and every run tries the same ones.
settings.register_profile("workbench", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("workbench")

PATIENCE = 300.0
"""Seconds that a test waits for what must come. A busy machine is slow, and no test is about speed."""

SHARED = ("data", "models")
"""Folders of the home that hold what can be made again from its recipe; made once for all tests."""

LONGEST = (
    "tests/notebooks/test_notebooks.py",
    "tests/studies/",
    "tests/kernels/test_interpreter.py",
    "tests/apps/",
    "tests/lib/core/adapt/test_pretrained_text.py",
    "tests/kernels/test_static.py",
)
"""Where the tests are that take longest. They begin first, so that the workers end together."""

SPLIT = ("tests/notebooks/test_notebooks.py", "tests/studies/test_studies.py", "tests/kernels/test_static.py")
"""Files that several workers may share: what their tests have in common is theirs by parameter."""


def group(nodeid: str) -> str:
    """Tests of one group run in one worker, which has their fixtures: those of a file, those of a study."""
    file, _, test = nodeid.partition("::")
    parameter = test[test.index("[") :] if "[" in test else ""
    name = parameter.strip("[]") if file in SPLIT else Path(file).stem.removeprefix("test_").replace("_", "-")
    if file.startswith("tests/studies/"):
        return f"study {name}"  # the file of one study, and what test_studies.py asks of it
    return f"{file} {name}" if file in SPLIT else file


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch):
    """The row of a system that does not stand yet, in the catalogue of this test: all real ones may stand."""
    from workbench import catalogue

    plain = {"slug": "not-yet", "title": "A system", "family": "merging", "year": 2024, "paper": "ICLR 2024"}
    row = catalogue.Method(**plain, claim="It will be better.", status="planned", kind=None, example=None)
    rows = (*catalogue._rows(), row)
    monkeypatch.setattr(catalogue, "_rows", lambda: rows)
    return row


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """`--dist loadgroup` by the groups above, in the order of the collection.

    xdist's own writes the name of a group into the name of a test by an attribute that pytest 9.2 no longer reads, and
    then deals out the tests one by one.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((i for i, start in enumerate(LONGEST) if item.nodeid.startswith(start)), len(LONGEST))

    items.sort(key=place)


def pytest_configure(config: pytest.Config) -> None:
    """One home for the whole session; parallel workers inherit it from the process that starts them."""
    if not hasattr(config, "workerinput"):
        os.environ["WORKBENCH_HOME"] = tempfile.mkdtemp(prefix="workbench-tests-")
        for name in SHARED:
            (Path(os.environ["WORKBENCH_HOME"]) / name).mkdir()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["WORKBENCH_HOME"], ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Shapes and types are looked at by nobody but the library itself, as they are where it is used."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ``WORKBENCH_HOME`` of the test's own, which does not exist yet."""
    folder = tmp_path / "home"
    monkeypatch.setenv("WORKBENCH_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def furnish() -> Callable[[Path], Path]:
    """Makes a folder a home without runs, in which the data and models of the session are there."""
    session = Path(os.environ["WORKBENCH_HOME"])

    def furnished(folder: Path) -> Path:
        folder.mkdir()
        for name in SHARED:
            (folder / name).symlink_to(session / name, target_is_directory=True)
        return folder

    return furnished


@pytest.fixture
def home(empty_home: Path, furnish: Callable[[Path], Path]) -> Path:
    """A ``WORKBENCH_HOME`` of the test's own, without runs; data and trained models are shared with all tests."""
    return furnish(empty_home)


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], object]], None]:
    """Waits for what comes by itself: until(condition). A run that is not one yet, an InputError, is no answer yet."""
    from workbench.errors import InputError

    def wait(condition: Callable[[], object]) -> None:
        deadline, said = time.monotonic() + PATIENCE, None
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
            except InputError as error:
                said = error
            time.sleep(0.02)
        raise AssertionError(f"it did not come within {PATIENCE:.0f} seconds; last error: {said}")

    return wait


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
