"""`workbench live` as a user meets it: a real training, its page in a browser, and the controls that reach it."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from workbench.live.store import Run

pytestmark = pytest.mark.browser
SMALL = "--n-layers 2 --d-model 32 --n-heads 2 --seq-len 32 --batch-size 8 --cap 65536 --steps 100000 --eval-every 20"
VIEWS = ("Imbalance", "Co-activation", "Spectra", "Conflict")
PATIENCE = 300_000  # milliseconds; a busy machine is slow, and this is not about speed


@contextmanager
def live(words: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The command, and the address it prints."""
    command = [sys.executable, "-m", "workbench", "live", "--no-browser", *words.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
        finally:
            process.kill()


@pytest.fixture
def started(home):
    """The command, the address it prints, and its run."""
    with live(SMALL) as (process, address):
        yield process, address, Run(home / "runs" / re.search("run=([^&]+)", address)[1])


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


def test_two_arms_of_a_study_are_watched_on_one_page_and_paused_together(home, browser, until):
    with live("--study rmoe --arm gru linear") as (process, address):
        names = re.findall(r"(?:run|compare)=([^&]+)", address)
        runs = [Run(home / "runs" / name) for name in names]
        assert [run.meta["recipe"]["arm"] for run in runs] == ["gru", "linear"]
        page, wrong = browser.new_page(viewport={"width": 1280, "height": 2400}), []
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.goto(address)
        page.get_by_role("button", name="Pause").click()
        until(lambda: [run.status.state for run in runs] == ["paused", "paused"])
        page.get_by_text("rmoe: gru (small, seed 0)").wait_for()
        page.get_by_text("rmoe: linear (small, seed 0)").wait_for()
        for view, title in (
            ("Imbalance", "Expert load over training"),
            ("Co-activation", "of pairs"),
            ("Spectra", "Sing"),
        ):
            choice = page.get_by_role("button", name=view, exact=True)
            choice.or_(page.get_by_role("radio", name=view, exact=True)).click()
            for arm in ("gru", "linear"):
                page.locator(".gtitle:visible").filter(has_text=title).filter(has_text=f"· {arm}").first.wait_for()
        page.close()
        assert wrong == []
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
        assert process.wait(60) in (0, 130) and all(f"workbench resume {name}" in said for name in names)
        assert [run.status.state for run in runs] == ["stopped", "stopped"]
