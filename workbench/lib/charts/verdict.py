"""Does a script draw the chart it should? By running it where a renderer is here, by a strict parser otherwise.

Python is always run, in a process of its own with the Agg backend, and judged by the figure that it drew and by its
pixels, which must be those of the chart's own script. R and LaTeX pictures hold no metadata, so these scripts are
always parsed; where Rscript or pdflatex is installed they must render as well. The result says which of this was done.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workbench.errors import InputError, unknown
from workbench.lib.charts.grammar import ScriptError, parse
from workbench.lib.charts.spec import LANGUAGES, ChartSpec
from workbench.lib.charts.templates import render

TIMEOUT = 60.0
"""Seconds one script may take."""
IMAGE = 64
"""Pixels of the pictures that two Python scripts are compared by."""
COMMANDS = {"r": ("Rscript", "chart.R", "chart.png"), "latex": ("pdflatex", "chart.tex", "chart.pdf")}
MISSING = "matplotlib is missing, and charts are drawn with it: pip install matplotlib"


@dataclass(frozen=True)
class Verdict:
    """What became of one script.

    Attributes:
        ok: it draws the chart.
        how: "executed" (run, and its figure read), "rendered and parsed", or "parsed" (no renderer here).
        reason: what is wrong, "" if nothing.
        found: the chart it draws, None where that could not be told.
    """

    ok: bool
    how: str
    reason: str = ""
    found: ChartSpec | None = None


@dataclass(frozen=True, eq=False)
class Drawing:
    """What running a Python script gave.

    Attributes:
        spec: the chart in its figure; None where it failed, or shows something no `ChartSpec` says.
        image: (size, size, 3) uint8; None where no image was wanted or it failed.
        error: what went wrong, "" if nothing.
    """

    spec: ChartSpec | None
    image: np.ndarray | None
    error: str = ""


def renderers() -> dict[str, str]:
    """How each language is verified on this machine, see `Verdict`."""
    here = {language: shutil.which(command[0]) is not None for language, command in COMMANDS.items()}
    return {"python": "executed"} | {name: "rendered and parsed" if there else "parsed" for name, there in here.items()}


def verify(spec: ChartSpec, script: str, language: str, timeout: float = TIMEOUT) -> Verdict:
    """Whether `script` draws exactly the chart `spec`."""
    if language not in LANGUAGES:
        raise unknown("language", language, LANGUAGES)
    how = renderers()[language]
    if language == "python":
        drawing, expected = run_python([script, render(spec, language)], IMAGE, timeout)
        verdict = _compare(spec, drawing.spec, how, drawing.error)
        # The metadata says nothing of what a template never varies: bars may be there and invisible.
        if verdict.ok and not np.array_equal(drawing.image, expected.image):
            return Verdict(False, how, "draws the same data in another style", drawing.spec)
        return verdict
    try:
        found = parse(script, language)
    except ScriptError as error:
        return Verdict(False, how, str(error))
    reason = _rendered(script, language, timeout) if how != "parsed" else ""
    return Verdict(False, how, reason, found) if reason else _compare(spec, found, how, "")


def _compare(spec: ChartSpec, found: ChartSpec | None, how: str, error: str) -> Verdict:
    if error or found is None:
        return Verdict(False, how, error, found)
    wrong = [name for name in spec.__dataclass_fields__ if getattr(spec, name) != getattr(found, name)]
    return Verdict(not wrong, how, f"draws another {', '.join(wrong)}" if wrong else "", found)


def run_python(scripts: Sequence[str], size: int = 0, timeout: float = TIMEOUT) -> list[Drawing]:
    """Run matplotlib scripts one after the other in another process, and read their figures.

    Args:
        size: of the images in pixels, a multiple of 32; 0 for none.
        timeout: seconds one script may take. One that takes longer fails, and those after it run in a new process.

    Raises:
        InputError: matplotlib is not installed, or `size` is none.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise InputError(MISSING)
    if size < 0 or size % 32:
        raise InputError(f"size is {size} but must be a multiple of 32, or 0 for no images")
    found: list[Drawing] = []
    while len(found) < len(scripts):
        rest = list(scripts[len(found) :])
        results, reason = _process(rest, size, timeout)
        found += [_drawing(result, size) for result in results]
        if len(results) < len(rest):
            found.append(Drawing(None, None, reason))
    return found


def _process(scripts: list[str], size: int, timeout: float) -> tuple[list[dict], str]:
    """The results of the scripts that ended, and why the next one did not."""
    root = str(Path(__file__).parents[3])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        out.touch()
        environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": root}
        command = [sys.executable, "-m", "workbench.lib.charts.worker"]
        request = json.dumps({"scripts": scripts, "size": size, "out": str(out)})
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder,
            env=environment,
        )  # fmt: skip
        reason = ""
        try:
            # The first script pays for the start of the process too; a batch is given as much for each of its scripts.
            _, stderr = worker.communicate(request, timeout=timeout * len(scripts))
            reason = f"the process ended with {worker.returncode}: {stderr.strip()[-300:]}"
        except subprocess.TimeoutExpired:
            reason = f"takes longer than {timeout} s"
        finally:
            worker.kill()
            worker.wait()
        return [json.loads(line) for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")], reason


def _drawing(result: dict, size: int) -> Drawing:
    image = None
    if "image" in result:
        pixels = np.frombuffer(base64.b64decode(result["image"]), dtype=np.uint8)
        image = pixels.reshape(size, size, 4)[:, :, :3].copy()
    spec = ChartSpec.from_json(result["spec"]) if "spec" in result else None
    return Drawing(spec, image, result.get("error", ""))


def _rendered(script: str, language: str, timeout: float) -> str:
    """Why the installed renderer does not draw the script; "" if it does."""
    command, name, picture = COMMANDS[language]
    options = (
        ["-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape"] if language == "latex" else ["--vanilla"]
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_text(script)
        try:
            done = subprocess.run([command, *options, name], cwd=folder, capture_output=True, timeout=timeout)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{command}: {error}"
        if done.returncode or not (Path(folder) / picture).is_file():
            return f"{command} ended with {done.returncode}: {done.stdout.decode(errors='replace')[-300:]}"
    return ""
