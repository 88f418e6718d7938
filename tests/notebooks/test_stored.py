"""What is stored in the notebooks is the same when they are run again elsewhere: no seconds and no dates."""

import json
import re
from collections.abc import Iterator

import pytest

from workbench import notebook

TIME = re.compile(
    r"\d\s?(?:ns|us|µs|ms|s|sec|min|h)\b(?!=)|\bs/\w+|\bseconds\b|\bminutes?\b|\bhours?\b|\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d",
    re.IGNORECASE,
)
PLOTLY = "application/vnd.plotly.v1+json"
DATA = {"bdata", "source", "x", "y", "z"}  # of a figure: arrays in base64, pictures, numbers


def outputs(name: str) -> Iterator[dict]:
    for cell in json.loads((notebook.FOLDER / f"{name}.ipynb").read_text())["cells"]:
        yield from cell.get("outputs", ())


def texts(value: object) -> Iterator[str]:
    """Every text that a reader sees in an output, from its data by kind down to the labels of a figure."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            if key not in DATA and not key.startswith("image/"):
                yield from texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts(part)


OF_TIMES = {"11_distributed", "12_serving", "14_search"}
"""Notebooks whose subject is time: what they show is simulated, or read from records that travel with the package."""


@pytest.mark.parametrize("text", ["12.3 s", "4ms", "s/run", "Seconds a run: 3", "2026-11-26-1322-tour", "at 13:22:01"])
def test_a_time_is_recognised(text: str):
    assert TIME.search(text)


@pytest.mark.parametrize("name", sorted({*notebook.names()} - OF_TIMES))
def test_no_output_holds_a_time(name: str):
    found = [found.group() for output in outputs(name) for text in texts(output) for found in TIME.finditer(text)]
    assert not found


@pytest.mark.parametrize("name", notebook.names())
def test_figures_of_timings_show_ratios(name: str):
    layouts = [o["data"][PLOTLY]["layout"] for o in outputs(name) if PLOTLY in o.get("data", {})]
    timed = [layout for layout in layouts if re.match(r"<b>(Time|Speed)", layout["title"]["text"])]
    assert all("÷" in layout["yaxis"]["title"]["text"] for layout in timed)
    assert len(timed) >= (4 if name == "17_kernels" else 0)


@pytest.mark.parametrize("name", notebook.names())
def test_sliders_draw_when_asked(name: str):
    """An `interact` that draws at once, inside its output widget, can leave a run without a page waiting for ever."""
    cells = json.loads((notebook.FOLDER / f"{name}.ipynb").read_text())["cells"]
    sliders = ["".join(cell["source"]) for cell in cells if "interact" in "".join(cell["source"])]
    assert all("interact.options(manual=True" in source for source in sliders if "widgets.interact" in source)
