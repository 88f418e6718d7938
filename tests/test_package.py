"""The top level is light, and every name it promises is there."""

import subprocess
import sys

import pytest

import workbench

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
