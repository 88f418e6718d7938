"""Run notebooks at their default parameters and store them as they are kept in the repository.

    python notebooks/store.py                # all of them
    python notebooks/store.py 01_routing     # one

Stored outputs are what a reader sees without running anything: text, tables, and every Plotly figure with a still
picture beside it (drawn by the bundled plotly.js in a headless browser; nothing is fetched). Noise of the machine
(timings, execution dates, widget states, progress on stderr) and pages that need a running kernel are left out, so that
a diff shows what changed.
"""

import base64
import io
import json
import sys
import tempfile
from pathlib import Path

import nbformat

from workbench import notebook
from workbench.doctor import find_browser

HERE = Path(__file__).parent
PLOTLY = "application/vnd.plotly.v1+json"
DRAW = """async figure => {
    const layout = Object.assign({}, figure.layout, {width: figure.layout.width || 900});
    const url = await Plotly.toImage({data: figure.data, layout}, {
        format: "png", width: layout.width, height: layout.height || 420, scale: 1});
    return url.split(",")[1];
}"""


def main(names: list[str]) -> int:
    paths = [notebook.find(HERE / f"{Path(name).stem}.ipynb") for name in names] or sorted(HERE.glob("*.ipynb"))
    for path in paths:
        print(f"{path.name}: running ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            executed = notebook.run(path, {}, Path(folder) / path.name)
            content = nbformat.read(executed, as_version=4)
        figures = clean(content)
        draw(figures)
        nbformat.write(content, path)
        print(f"{path.name}: stored, {len(figures)} figures, {path.stat().st_size / 1e6:.2f} MB")
    return 0


def clean(content: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Take the noise out of an executed notebook, in place; returns its outputs that hold a Plotly figure."""
    figures = []
    content.metadata = {key: content.metadata[key] for key in ("kernelspec",) if key in content.metadata}
    content.metadata["language_info"] = {"name": "python"}
    for cell in content.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags" and value}
        for name, picture in cell.get("attachments", {}).items():  # of docs/, which JupyterLab does not serve
            picture["image/png"] = base64.b64encode((HERE.parent / "docs" / name).read_bytes()).decode()
    code = [cell for cell in content.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, start=1):
        cell.execution_count = count
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr" and not is_live(output)]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
            if PLOTLY in output.get("data", {}):
                figures.append(output)
    return figures


def is_live(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a widget, a Panel page or the scripts of one: nothing of it shows without the kernel."""
    if output.output_type not in ("display_data", "execute_result"):
        return False
    live = ("application/vnd.holoviews", "application/vnd.jupyter.widget-view")
    page = any(kind.startswith(live) for kind in output.data)
    return page or not output.data or "data-root-id" in output.data.get("text/html", "")


def draw(figures: list[nbformat.NotebookNode]) -> None:
    """Add a PNG to every Plotly output, for readers without JavaScript."""
    if not figures:
        return
    from playwright.sync_api import sync_playwright
    from plotly.offline import get_plotlyjs

    browser = find_browser()
    if browser is None:
        raise SystemExit("no Chromium found: the still pictures need one (see .ci/install-browser)")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        page.add_script_tag(content=get_plotlyjs())
        for output in figures:
            figure = json.loads(json.dumps(output.data[PLOTLY]))
            output.data["image/png"] = smaller(page.evaluate(DRAW, figure))
        chromium.close()


def smaller(png: str) -> str:
    """The picture with 256 colours of its own, which a plot does not miss: a third of the size."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(png, validate=True))).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
