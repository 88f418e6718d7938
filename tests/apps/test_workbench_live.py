"""`workbench live` as a user meets it: a real training, its page in a browser, and the controls that reach it."""

import re
import signal
import subprocess
import sys

import pytest

from workbench.live.store import Run

pytestmark = pytest.mark.browser
SMALL = "--n-layers 2 --d-model 32 --n-heads 2 --seq-len 32 --batch-size 8 --cap 65536 --steps 100000 --eval-every 20"
VIEWS = ("Imbalance", "Co-activation", "Spectra", "Conflict")
PATIENCE = 300_000  # milliseconds; a busy machine is slow, and this is not about speed


@pytest.fixture
def started(home):
    """The command, the address it prints, and its run."""
    command = [sys.executable, "-m", "workbench", "live", "--no-browser", *SMALL.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
            yield process, address, Run(home / "runs" / address.split("run=")[1])
        finally:
            process.kill()


def shown_step(page) -> int:
    return int(page.locator(".step b").first.inner_text().replace(",", ""))


def test_a_real_training_is_watched_steered_and_ended(started, browser, until):
    process, address, run = started
    page, wrong, asked = browser.new_page(viewport={"width": 1280, "height": 800}), [], []
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    for view in VIEWS:  # every view fills with what the trainer records
        page.get_by_role("button", name=view, exact=True).or_(page.get_by_role("radio", name=view, exact=True)).click()
        page.locator(".js-plotly-plot .main-svg:visible").first.wait_for()

    before = shown_step(page)
    until(lambda: shown_step(page) > before + 5)
    page.get_by_role("button", name="Pause").click()
    page.get_by_text("pause applied at step").wait_for()
    stopped = run.last_step
    until(lambda: shown_step(page) == stopped)
    page.wait_for_timeout(800)
    assert run.last_step == stopped == shown_step(page)

    page.get_by_label("Top-k").fill("1")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Continue").click()
    page.get_by_text("continue applied").wait_for()
    until(lambda: run.last_step >= stopped + 20)
    layer = run.meta["model"]["layers"][0]["name"]
    _, loads = run.tensors(f"load/{layer}", start=stopped + 10)
    assert loads[-1].sum() == 8 * 32  # one expert for each token, where there were two
    page.close()
    assert wrong == []
    assert [url for url in asked if not re.match(r"(http|ws)://localhost:|blob:|data:", url)] == []

    process.send_signal(signal.SIGINT)
    said = process.stdout.read()
    assert process.wait() in (0, 130) and str(run.folder) in said and "resume" in said
    assert run.status.state == "stopped"
