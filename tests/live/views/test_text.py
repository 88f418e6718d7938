"""Whatever a record says is shown as text: a name that begins with a tag would make what follows bold."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from html import escape
from pathlib import Path

import numpy as np
import pytest

from tests.live.synthetic import write_synthetic_run
from tests.live.views.texts import strings, texts
from workbench.figures import basic
from workbench.figures.theme import text
from workbench.live.store import RunWriter
from workbench.live.views import Workbench
from workbench.live.views.trainer import TrainerControls

NAMES = {"blocks.0.ffn": "<b>layer0", "blocks.1.ffn": "<b>layer1", "python": "<b>python", "docs": "<b>docs"}
NAMES |= {"names": "<b>names", "experts": "<b>experts", "attention": "<b>attention", "valid/loss": "valid/<b>metric"}
RECIPE = {name: f"<b>{name}" for name in ("study", "arm", "preset", "seed")}


def tagged(folder: Path, arm: str | None) -> Path:
    """A run that failed, with a tag before every text in it."""
    write_synthetic_run(folder, 2, n_layers=2, n_experts=4, n_tokens=64)
    with RunWriter.open(folder) as writer:
        (model,) = writer._db.execute("SELECT value FROM meta WHERE key = 'model'").fetchone()
        for name, mark in NAMES.items():
            model = model.replace(f'"{name}"', f'"{mark}"').replace(f'"{name}.', f'"{mark}.')
        writer.set_meta("model", json.loads(model))
        for name, mark in NAMES.items():
            old = name if "/" in name else f"/{name}"
            writer._db.execute(
                "UPDATE names SET name = replace(name, ?, ?)", (old, mark if "/" in name else f"/{mark}")
            )
            writer._db.execute("UPDATE names SET name = replace(name, ?, ?)", (f"/{name}.", f"/{mark}."))
        writer.set_meta("recipe", RECIPE | {"arm": arm} if arm else {})
        writer.event(1, "control", "<b>event")
        writer.status("failed", "<b>message")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tagged")
    for name, arm in (("<b>run1", "<b>arm1"), ("<b>run2", "<b>arm2"), ("<b>run3", None)):
        tagged(folder / name, arm)
    return folder


def all_of(root: Path, *names: str) -> list[str]:
    page = Workbench(*(root / name for name in names), root=root)
    for title in page._kinds:
        page.tabs.value = title
    return list(texts(page))


def left(shown: list[str], marks: Iterator[str] | list[str]) -> tuple[list[str], list[str]]:
    """The marks that are shown as tags, and those that are not shown at all."""
    marks = list(marks)
    tags = [mark for mark in marks if any(mark in line for line in shown)]
    return tags, [mark for mark in marks if not any(escape(mark) in line for line in shown)]


def test_every_text_of_two_runs_is_shown_as_text(root: Path):
    shown = all_of(root, "<b>run1", "<b>run2")
    marks = ["<b>arm1", "<b>arm2", "<b>run1", "<b>study", "<b>preset", "<b>seed", "<b>message", "<b>event", "<b>metric"]
    assert left(shown, [*marks, *(mark for mark in NAMES.values() if "/" not in mark)]) == ([], [])


def test_the_names_of_runs_are_shown_as_text(root: Path):
    assert left(all_of(root, "<b>run3", "<b>run1"), ["<b>run3", "<b>run1", "<b>layer0"]) == ([], [])


@pytest.mark.parametrize("last", ["<b>state why", "failed <b>why"])
def test_what_a_writer_left_in_its_lock_is_text_and_its_state_a_known_one(root: Path, tmp_path: Path, last: str):
    folder = write_synthetic_run(tmp_path / "run", 2, n_layers=1, n_experts=4, n_tokens=64)
    with closing(sqlite3.connect(folder / "run.sqlite")) as db, db:
        db.execute("UPDATE state SET state = 'running'")
    (folder / "lock").write_text(f"<b>process <b>host\n{last}\n")
    shown = all_of(tmp_path, "run")
    assert not any(
        "<b>state" in line or "<b>why" in line or "<b>process" in line or "<b>host" in line for line in shown
    )
    assert f'class="chip {"failed" if last.startswith("failed") else "died"}"' in shown[0]


def test_a_state_that_is_none_makes_a_damaged_run(root: Path, tmp_path: Path):
    folder = write_synthetic_run(tmp_path / "run", 2, n_layers=1, n_experts=4, n_tokens=64)
    with closing(sqlite3.connect(folder / "run.sqlite")) as db, db:
        db.execute("UPDATE state SET state = '<b>state'")
    shown = all_of(tmp_path, "run")
    assert left(shown, ["<b>state"]) == ([], []) and "state is" in shown[0]


def test_an_answer_is_shown_as_text(growing):
    controls = TrainerControls(Workbench(growing.run).selection)
    controls.send("pause")
    (command,) = growing.writer.commands()
    growing.writer.answer(command, 4, error="<b>error")
    controls.poll()
    assert left([controls.answer.object], ["<b>error"]) == ([], [])


@pytest.mark.parametrize("kind", ["lines", "bars", "intervals", "matrix"])
def test_what_a_notebook_draws_takes_names_as_text(kind: str):
    names, titles = ["<b>one", "<b>two"], {"title": "<b>title", "x_title": "<b>x"}
    if kind == "intervals":
        figure = basic.intervals(names, [0.0, 1.0], [(-1, 1), (0, 2)], **titles)
    elif kind == "matrix":
        figure = basic.matrix(np.eye(2), names, names, y_title="<b>y", unit="", **titles)
    else:
        draw, over = (basic.lines, [0, 1]) if kind == "lines" else (basic.bars, names)
        figure = draw(over, {name: [0.0, 1.0] for name in names}, y_title="<b>y", null=(0.5, "<b>null"), **titles)
    assert left(list(strings(figure.to_plotly_json())), [*names, *titles.values()]) == ([], [])


def test_a_name_is_no_template_of_a_hover_text():
    assert text("%{x} & <b>") == "%&#123;x} &amp; &lt;b&gt;"
