"""The apps in a real browser, served by plain ``panel serve`` from another directory, while runs are being written."""

import base64
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from torch import nn

from tests.live.synthetic import write_synthetic_run
from workbench.lib import data
from workbench.lib.core.adapt import adapt
from workbench.live.store import Run, RunWriter
from workbench.live.watch import watch

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]
APPS = {"imbalance": 8, "coactivation": 2, "spectra": 6, "conflict": 5, "live": 6}  # plots in each, beside tables
PATIENCE = 300_000  # ms; a busy machine is slow, and none of these tests is about speed
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+/")  # as panel says where it serves; it takes a free port itself
PLOTS = "plots => plots.map(plot => ({title: plot.layout.title.text, data: plot.data, layout: plot.layout}))"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, furnish) -> Path:
    folder = furnish(tmp_path_factory.mktemp("person") / "home")
    for name, seed in (("first", 1), ("second", 2)):
        write_synthetic_run(folder / "runs" / name, 211, n_layers=2, seed=seed)
    return folder


@contextmanager
def process(*command: str, **more) -> Iterator[subprocess.Popen]:
    """A process that is ended with the block."""
    running = subprocess.Popen([sys.executable, *command], **more)
    try:
        yield running
    finally:
        running.terminate()
        running.wait()


@pytest.fixture(scope="module")
def site(home: Path, until, log: Path) -> Iterator[str]:
    files = [str(path) for path in sorted((ROOT / "apps").glob("*.py"))]
    command = ["-m", "panel", "serve", *files, "--port", "0", "--address", "127.0.0.1"]
    command += ["--index", str(ROOT / "apps" / "index.html")]
    with (
        log.open("w") as out,
        process(*command, cwd=log.parent, env=os.environ | {"WORKBENCH_HOME": str(home)}, stdout=out, stderr=out),
    ):
        until(lambda: ADDRESS.search(log.read_text()))
        yield ADDRESS.search(log.read_text())[0]
    said = log.read_text()
    assert not ours(said), said


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server says."""
    return tmp_path_factory.mktemp("elsewhere") / "log"


@pytest.fixture(scope="module")
def token(site: str, log: Path) -> str:
    """What the server says once its first page is opened."""
    urlopen(site + "verdicts").close()
    return re.search(r"with token=([\w-]{32}) in the address", log.read_text())[1]


def ours(said: str) -> list[str]:
    """The lines of a server's log that tell of a fault of ours: errors it logged, and tracebacks through our files.

    A traceback through Tornado alone is a page that was closed while a message was on its way to it. Tornado itself
    may lie below the checkout, in a virtual environment.
    """
    folders = tuple(f'File "{ROOT / folder}{os.sep}' for folder in ("workbench", "apps", "notebooks"))
    return [line for line in said.splitlines() if "ERROR" in line or line.strip().startswith(folders)]


def test_only_lines_of_our_own_files_are_our_fault():
    inside = f'  File "{ROOT}/.venv/lib/python3.11/site-packages/tornado/websocket.py", line 1, in wrapper'
    own = [f'  File "{ROOT}/apps/live.py", line 1', f'  File "{ROOT}/workbench/live/serve.py", line 1, in f']
    said = ["Task exception was never retrieved", inside, "tornado.websocket.WebSocketClosedError", *own, "ERROR: no"]
    assert ours("\n".join(said)) == [*own, "ERROR: no"]


@pytest.fixture(scope="module")
def context(browser) -> Iterator:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(PATIENCE)
    yield context
    context.close()


@pytest.fixture
def visit(context, site: str) -> Iterator[Callable]:
    """Opens a page of the site. Nothing may be asked of another host, and nothing may go wrong in the console."""
    asked, wrong, drawn, page = [], [], [], context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))

    def open_page(path: str, plots: int = 1):
        page.goto(site + path)
        page.wait_for_function(f"() => ({DRAWN}) >= {plots}")
        drawn.extend([path] * bool(plots))
        return page

    yield open_page
    page.close()
    scripts = {url.partition("?")[0].rpartition("/")[2] for url in asked if "plotly" in url}
    assert scripts == ({"plotly-cartesian.min.js"} if drawn else set())  # the small part of plotly.js
    assert [url for url in asked if not url.startswith((site, site.replace("http", "ws"), "blob:", "data:"))] == []
    assert wrong == []


DRAWN = """(function count(root) {
  return [...root.querySelectorAll("*")].reduce((n, node) => n
    + (node.matches(".js-plotly-plot") && node.querySelector(".main-svg") ? 1 : 0)
    + (node.shadowRoot ? count(node.shadowRoot) : 0), 0)
})(document)"""


def plots(page) -> dict[str, dict]:
    """The plots on the screen by their title."""
    found = page.locator(".js-plotly-plot:visible").evaluate_all(PLOTS)
    return {plot["title"].split("</b>")[0].removeprefix("<b>"): plot for plot in found}


def papers(page) -> set[str]:
    """The backgrounds of the plots."""
    return {plot["layout"]["template"]["layout"]["paper_bgcolor"] for plot in plots(page).values()}


def shown_step(page) -> int:
    return int(page.locator(".step b").first.inner_text().replace(",", ""))


@pytest.fixture
def live(home: Path, until) -> Iterator[Run]:
    """A run that is being written, twenty steps a second, and obeys commands."""
    folder = home / "runs" / f"live-{time.monotonic_ns()}"
    with process(str(ROOT / "tests" / "apps" / "live_writer.py"), str(folder), "0.05"):
        until(lambda: Run(folder).last_step > 20)
        yield Run(folder)


@pytest.mark.parametrize(("app", "theme"), [*((app, "light") for app in APPS), ("live", "dark")])
def test_every_app_draws_its_plots_on_one_screen_without_overlap(visit, until, app, theme):
    page = visit(f"{app}?run=first&theme={theme}")
    cards = page.locator("details:visible")
    until(lambda: cards.count() >= APPS[app])
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 1280
    boxes = [box for box in cards.evaluate_all("nodes => nodes.map(node => node.getBoundingClientRect().toJSON())")]
    for i, box in enumerate(boxes):
        for other in boxes[:i]:
            apart = (
                box["right"] <= other["left"]
                or other["right"] <= box["left"]
                or box["bottom"] <= other["top"]
                or other["bottom"] <= box["top"]
            )
            assert apart, (box, other)
    until(lambda: papers(page) == {{"light": "#ffffff", "dark": "#161b21"}[theme]})
    assert page.locator(".chip.finished").inner_text() == "finished"


def test_values_change_while_a_run_trains_and_commands_reach_it(visit, live, until, token):
    page = visit(f"live?run={live.name}&token={token}", plots=6)
    before, drawn = shown_step(page), plots(page)["Loss"]["data"][0]
    until(lambda: shown_step(page) >= before + 20)
    until(lambda: plots(page)["Loss"]["data"][0] != drawn)

    page.get_by_role("button", name="Pause").click()
    page.locator(".chip.paused").wait_for()
    page.get_by_text("pause applied at step").wait_for()
    stopped = live.last_step
    until(lambda: shown_step(page) == stopped)
    page.wait_for_timeout(500)
    assert live.last_step == stopped == shown_step(page)

    page.get_by_role("button", name="Step").click()
    page.get_by_text("step applied at step").wait_for()
    until(lambda: live.last_step == stopped + 1 == shown_step(page))

    page.get_by_label("Learning rate").fill("7")
    page.keyboard.press("Enter")
    page.get_by_text("learning_rate is 7.0 but must be a number above 0").wait_for()
    page.get_by_label("Learning rate").fill("0.0005")
    page.keyboard.press("Enter")
    page.get_by_text("learning rate = 0.0005 applied").wait_for()
    assert [(answer.name, answer.value, answer.error) for answer in live.answers()] == [
        ("pause", None, None),
        ("step", None, None),
        ("learning_rate", 0.0005, None),
    ]

    page.get_by_role("button", name="Dark").click()
    address = "location.href"
    until(lambda: "theme=dark" in page.evaluate(address))
    assert f"token={token}" in page.evaluate(address)  # to load the page again is to have its controls again
    page.get_by_role("button", name="Continue").click()
    page.locator(".chip.running").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator(".chip.stopped").wait_for()
    assert page.get_by_role("button", name="Pause").is_disabled()
    assert live.status.state == "stopped"


def test_the_report_of_an_adaptation_is_read_on_the_page(visit, home):
    """As wide as the page, and scrolled inside its card where it is long."""
    layers = nn.ModuleDict({f"layer_{letter}": nn.Linear(8, 8) for letter in "abcdefghijklmnopqrstuvwxyz"})
    layers["words"] = nn.Embedding(9, 8)
    with watch(adapt(layers, "lora", rank=2).model, home / "runs" / "adapted") as watched:
        watched.step(1.0)
    page = visit("live?run=adapted", plots=1)
    page.get_by_role("button", name="Adapters", exact=True).or_(
        page.get_by_role("radio", name="Adapters", exact=True)
    ).click()
    page.get_by_text("832 of 2,776 parameters are trained, 30 %").wait_for()
    page.get_by_role("row", name="layer_a 1 2 1 – – 32").wait_for()
    last = page.get_by_role("row", name="words 1 a Embedding")
    assert not last.evaluate(SEEN)
    last.scroll_into_view_if_needed()
    assert last.evaluate(SEEN)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 1280


def test_text_is_coloured_by_depth_on_the_page_and_goes_back_in_time(visit, home, until):
    layer = {"name": "blocks.1", "n_experts": 3, "top_k": None, "recursive": True}
    meta = {"model": {"layers": [layer], "vocabulary": "bytes"}, "cadence": {"routing": 10, "structure": 10}}
    texts = np.full((5, 2, 256), -1, dtype=np.int32)
    texts[:, 0, :100] = np.frombuffer(b"if a:\n    return b\n" * 5 + b"pass \n", dtype=np.uint8)[:100]
    texts[:, 1, :100] = np.random.default_rng(0).integers(0, 4, (5, 100))
    with RunWriter.create(home / "runs" / "recursions", meta) as writer:
        for step in range(41):
            if step % 10 == 0:
                counts = np.bincount(texts[step // 10, 1, :100], minlength=4).astype(np.uint32)
                both = {"depth": counts, "depth_text": texts[step // 10]}
                found = {f"{valid}{name}/blocks.1": both[name] for name in both for valid in ("", "valid/")}
                writer.tensors(step, found)
            writer.scalars(step, {"train/loss": 3.0})
            writer.commit(step)
    page = visit("live?run=recursions", plots=1)
    page.get_by_role("button", name="Depth", exact=True).click()
    page.get_by_text("Text by depth, validation at step 40").first.wait_for()

    def shown(step: int) -> list[float]:
        """The depths in the plot of a step, empty while it is not drawn."""
        plot = plots(page).get(f"Text by depth, validation at step {step}")
        if plot is None:
            return []
        sent = plot["data"][0]["z"]
        values = np.frombuffer(base64.b64decode(sent["bdata"]), sent["dtype"])
        return values[~np.isnan(values)].tolist()

    assert page.evaluate("document.scrollingElement.scrollWidth") <= 1280
    slider = page.locator(".noUi-base").first.bounding_box()
    until(lambda: shown(40) == texts[4, 1, :100].tolist())
    page.mouse.click(slider["x"] + 0.5 * slider["width"], slider["y"] + slider["height"] / 2)
    until(lambda: shown(20) == texts[2, 1, :100].tolist())
    marks = [shape for shape in plots(page)["Depth in training, blocks.1"]["layout"]["shapes"] if shape["visible"]]
    assert [shape["x0"] for shape in marks] == [20]


SEEN = """row => {
  const card = row.closest(".scroll").getBoundingClientRect(), line = row.getBoundingClientRect()
  return line.top >= card.top && line.bottom <= card.bottom + 1
}"""


def test_a_narrow_page_does_not_scroll_sideways_and_its_tables_scroll_in_their_cards(visit):
    page = visit("live?run=first", plots=6)
    page.set_viewport_size({"width": 700, "height": 800})
    last = page.get_by_role("row", name="heavy-tail exponent α")
    page.get_by_role("button", name="Spectra", exact=True).or_(
        page.get_by_role("radio", name="Spectra", exact=True)
    ).click()
    last.wait_for(state="attached")
    assert not last.evaluate(SEEN)
    last.scroll_into_view_if_needed()
    assert last.evaluate(SEEN)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 700
    tabs = page.get_by_role("button", name="Adapters", exact=True).or_(
        page.get_by_role("radio", name="Adapters", exact=True)
    )
    box = tabs.bounding_box()
    assert box["x"] + box["width"] <= 700


FORCE = """() => {
  for (const model of Bokeh.documents[0]._all_models.values()) {
    if (model.label?.includes?.("Stop")) model.disabled = false
  }
}"""


def test_without_the_token_a_page_is_read_only_whatever_its_browser_says(visit, live, until, token):
    for wrong in ("", f"&token={token[:-1]}"):
        page = visit(f"live?run={live.name}{wrong}", plots=6)
        page.get_by_text("read-only: the address with").wait_for()
        stop = page.get_by_role("button", name="Stop")
        assert stop.is_disabled() and page.get_by_label("Learning rate").is_disabled()
        page.evaluate(FORCE)
        until(stop.is_enabled)
        stop.click()
        before = live.last_step
        until(lambda before=before: live.last_step > before + 10)
    assert live.answers() == [] and live.status.state == "running"


def test_tabs_scrubbing_and_the_dark_switch(visit, until):
    page = visit("live?run=first", plots=6)
    page.get_by_role("button", name="Imbalance", exact=True).click()
    page.get_by_text("Load and probability, layer 0").wait_for()
    newest = plots(page)["Load and probability, layer 0"]["data"][0]["y"]
    slider = page.locator(".noUi-base").first.bounding_box()
    page.mouse.click(slider["x"] + 0.3 * slider["width"], slider["y"] + slider["height"] / 2)
    page.get_by_text("of 210").wait_for()
    step = shown_step(page)
    assert 40 <= step <= 90
    until(lambda: plots(page)["Load and probability, layer 0"]["data"][0]["y"] != newest)

    def marks() -> list[tuple]:
        shapes = plots(page)["Expert load over training, layer 0"]["layout"]["shapes"]
        return [(shape["x0"], shape["visible"]) for shape in shapes if shape.get("name") == "step"]

    until(lambda: marks() == [(step, True)])

    page.get_by_role("button", name="Dark").click()
    page.locator(".wb-dark").wait_for()
    until(lambda: papers(page) == {"#161b21"})
    assert "theme=dark" in page.url
    page.get_by_role("button", name="Live").click()
    page.get_by_text("newest").wait_for()


def test_clicking_an_expert_shows_what_it_takes(visit):
    page = visit("imbalance?run=first", plots=3)
    page.get_by_text("Expert load over training").wait_for()
    heat = page.locator(".js-plotly-plot:visible").first.locator(".nsewdrag").bounding_box()
    page.mouse.click(heat["x"] + heat["width"] / 2, heat["y"] + heat["height"] * 0.56)  # the fourth of eight rows
    page.get_by_text("Tokens of expert 3", exact=True).wait_for()


def test_two_runs_stand_side_by_side_on_one_colour_scale(visit, until):
    page = visit("imbalance?run=first&compare=second", plots=2)
    titles = [f"Expert load over training, layer 0 · {name}" for name in ("first", "second")]
    for title in titles:
        page.get_by_text(title).first.wait_for()
    shown = plots(page)
    heats = [shown[title]["data"][0] for title in titles]
    assert heats[0]["zmax"] == heats[1]["zmax"]
    assert heats[0]["colorscale"] == heats[1]["colorscale"]
    assert heats[0]["z"] != heats[1]["z"]
    until(lambda: page.locator(".chip").count() == 2)
    page.get_by_label("Compare").select_option("none")
    page.get_by_text("Expert load over training, layer 0 · second").first.wait_for(state="detached")
    assert "compare" not in page.url


def test_one_expert_per_token_and_an_unknown_run(visit, home, until):
    write_synthetic_run(home / "runs" / "single", 11, n_layers=2, top_k=1)
    page = visit("coactivation?run=single")
    until(lambda: page.get_by_text("undefined for K=1").count() == 2)
    page = visit("conflict?run=singel")
    page.get_by_text("run 'singel' is unknown; did you mean 'single'").wait_for()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_of_verdicts_is_an_app_too(visit, theme):
    page = visit(f"verdicts?theme={theme}", plots=0)
    inside = page.frame_locator("iframe[title=verdicts]")
    inside.locator("#rmoe summary").click()
    assert "gru minus mlp" in inside.locator("#rmoe dl").inner_text()
    assert inside.locator(".system").count() == 70
    assert inside.locator("html").get_attribute("data-theme") == theme


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_of_merges_follows_its_knobs(visit, until, theme):
    data.get("mnist-5k")
    page = visit(f"merging?size=smoke&method=average&theme={theme}", plots=6)
    page.locator(".chip.finished").wait_for()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 1280
    until(lambda: papers(page) == {{"light": "#ffffff", "dark": "#161b21"}[theme]})
    for plot in plots(page).values():
        assert plot["layout"]["title"]["text"] and plot["data"]
    before = {trace["name"]: trace["y"] for trace in plots(page)["Who reads what at λ = 1.00?"]["data"]}
    assert before.keys() == {"base", "merged", "own expert"}

    slider = page.locator(".noUi-base:visible").first.bounding_box()  # an average has no other
    page.mouse.click(slider["x"] + 1, slider["y"] + slider["height"] / 2)
    page.get_by_text("Who reads what at λ = 0.00?").wait_for()
    until(lambda: plots(page)["Who reads what at λ = 0.00?"]["data"][1]["y"] == before["base"])
    assert before["merged"] != before["base"]

    assert page.locator(".noUi-base:visible").count() == 1
    page.get_by_label("Method").select_option("pcb-merging")
    page.get_by_text("ratio 0.20").first.wait_for()
    until(lambda: page.locator(".noUi-base:visible").count() == 2)
    assert "method=pcb-merging" in page.url and "size=smoke" in page.url
    page.get_by_text("pcb-merging · best mean").wait_for()


def test_a_merge_that_is_none_is_named(visit):
    page = visit("merging?size=smoke&method=tis", plots=6)
    page.get_by_text("method 'tis' is unknown; did you mean 'ties'").wait_for()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 1280
    page.get_by_label("Method").select_option("ties")
    page.get_by_text("is unknown").wait_for(state="detached")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_network_answers_while_a_knob_moves(visit, until, theme):
    data.get("photos")
    page = visit(f"sliders?size=smoke&network=deblur&theme={theme}", plots=1)
    page.locator(".chip.finished").wait_for()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 1280
    until(lambda: papers(page) == {{"light": "#ffffff", "dark": "#161b21"}[theme]})

    def shown() -> dict[str, str]:
        return {image.get_attribute("alt"): image.get_attribute("src") for image in page.locator("img[alt]").all()}

    until(lambda: shown().keys() == {"given", "the truth", "made of it", "made − given"})
    for knob in range(page.locator(".noUi-base:visible").count()):
        before, slider = shown(), page.locator(".noUi-base:visible").nth(knob).bounding_box()
        page.mouse.click(slider["x"] + 0.6 * slider["width"], slider["y"] + slider["height"] / 2)
        until(lambda before=before: shown()["made of it"] != before["made of it"])
    before = shown()
    page.get_by_label("Image").select_option("3")
    until(lambda: shown()["the truth"] != before["the truth"])


def test_the_index_lists_the_apps(visit, site, context):
    page = context.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(site)
    links = page.locator("nav a").evaluate_all("links => links.map(link => link.href)")
    assert links == [site + app for app in sorted([*APPS, "merging", "sliders", "verdicts"])]
    assert all(url.startswith((site, "data:")) for url in asked)
    page.close()
