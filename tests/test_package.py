"""The top level is light, and every name it promises is there."""

import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.request import urlopen

import pytest

import workbench
from tests.live.synthetic import write_synthetic_run

ROOT = Path(__file__).parents[1]

HEAVY = {
    "torch",
    "panel",
    "bokeh",
    "plotly",
    "transformers",
    "sklearn",
    "scipy",
    "numpy",
    "pandas",
    "papermill",
    "rich",
}


def imported_by(code: str) -> set[str]:
    """The names of the heavy packages that a fresh interpreter has imported after ``code``."""
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('\\n' + ' '.join(sys.modules))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return HEAVY & set(output.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import workbench; dir(workbench); workbench.methods(); str(workbench.method('remix'))",
        "from workbench.cli import main; main(['--help'])",
        "from workbench.cli import main; main(['study', '--help'])",
        "from workbench.cli import main; main(['live', '--help'])",
        "from workbench.cli import main; main(['methods', '--json'])",
        "from workbench.cli import main; main(['study', 'no-such-slug'])",
        "from workbench.cli import main; main(['results', '--json'])",
    ],
)
def test_it_is_light(code: str):
    assert imported_by(code) == set()


def test_the_check_of_lightness_sees_a_heavy_import():
    assert imported_by("import numpy") == {"numpy"}


@pytest.mark.parametrize("name", workbench.__all__)
def test_every_public_name_is_there_and_documented(name: str):
    value = getattr(workbench, name)
    assert name in dir(workbench)
    assert name == "__version__" or value.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        workbench.nonsense  # noqa: B018


def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "workbench", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"workbench {workbench.__version__}\n")


# -- a wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel of this checkout holds, and nothing else of the workbench."""
    built, folder = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("site-packages")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    zipfile.ZipFile(next(built.glob("*.whl"))).extractall(folder)
    return folder


def installed(wheel: Path, *command: str) -> str:
    """What a fresh interpreter prints that has the wheel's workbench before any other."""
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    done = subprocess.run([sys.executable, *command], cwd=wheel.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_holds_every_file_of_the_package_its_apps_and_its_notebooks(wheel: Path):
    places = {"workbench": "workbench", "apps": "workbench/apps", "notebooks": "workbench/notebooks"}
    for folder, inside in places.items():
        files = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()}
        kept = {file for file in files if not {"__pycache__", ".ipynb_checkpoints"} & set(file.parts)}
        assert not {file.as_posix() for file in kept if not (wheel / inside / file).is_file()}


def test_an_installed_wheel_finds_its_own_apps_and_notebooks_and_no_others(wheel: Path):
    for folder in ("apps", "notebooks"):  # another package's, beside it
        (wheel / folder).mkdir()
    assert json.loads(installed(wheel, "-m", "workbench", "where", "--json")) | {"home": ""} == {
        "notebooks": str(wheel / "workbench" / "notebooks"),
        "apps": str(wheel / "workbench" / "apps"),
        "home": "",
    }
    assert "preset" in installed(wheel, "-m", "workbench", "run", "00_tour", "--parameters")
    pages = "from workbench.live.serve import app_files; print(*app_files(), app_files()['live'])"
    names = sorted(path.stem for path in (ROOT / "apps").glob("*.py"))
    assert installed(wheel, "-c", pages).split() == [*names, str(wheel / "workbench" / "apps" / "live.py")]


def test_an_installed_wheel_shows_a_run(wheel: Path, home: Path):
    write_synthetic_run(home / "runs" / "mine", 3, n_layers=2, n_experts=4, n_tokens=64)
    command = [sys.executable, "-m", "workbench", "view", "--no-browser"]
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    with subprocess.Popen(command, cwd=wheel.parent, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = next((found[0] for line in process.stdout if (found := re.search(r"http://\S+", line))), "")
            assert re.search(r"/live\?run=mine&token=[\w-]+$", address), address
            with urlopen(address) as page:
                assert page.status == 200
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_a_checkout_has_them_beside_the_package():
    places = json.loads(installed(ROOT, "-m", "workbench", "where", "--json"))
    assert (places["apps"], places["notebooks"]) == (str(ROOT / "apps"), str(ROOT / "notebooks"))
