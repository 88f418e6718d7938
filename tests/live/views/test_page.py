"""The page: which runs it shows, what it says about them, its controls."""

import pytest

from tests.live.synthetic import write_synthetic_run
from workbench.live.control import Controller
from workbench.live.store import RunWriter
from workbench.live.views import VIEWS, ConflictView, Overview, Workbench
from workbench.live.views.bar import SelectionBar
from workbench.live.views.readings import Readings
from workbench.live.views.selection import Selection
from workbench.live.views.status import probe_share
from workbench.live.views.trainer import TrainerControls


def test_the_newest_run_is_shown_unless_another_is_asked_for(runs_folder):
    assert Workbench(root=runs_folder).selection.run.name == "single"
    page = Workbench(runs_folder / "first", runs_folder / "second", root=runs_folder)
    assert [readings.name for readings in page.selection.shown] == ["first", "second"]
    assert set(page.run.options) == {"first", "second", "single"}
    assert set(page.compare.options) == {"none", "first", "second", "single"}
    assert page.status.object.count('class="chip finished"') == 2


def test_an_unknown_run_is_named_and_the_newest_shown(runs_folder):
    page = Workbench("frist", root=runs_folder)
    assert "frist" in page.status.object and "bad" in page.status.object
    assert page.selection.run.name == "single"


def test_an_unknown_second_run_does_not_take_the_first_away(runs_folder):
    page = Workbench("first", "secnod", root=runs_folder)
    assert "secnod" in page.status.object
    assert [readings.name for readings in page.selection.shown] == ["first"]


def test_choosing_runs_in_the_lists(runs_folder):
    page = Workbench(runs_folder / "first", root=runs_folder)
    page.run.value = page.run.options["second"]
    page.compare.value = page.compare.options["first"]
    assert [readings.name for readings in page.selection.shown] == ["second", "first"]
    page.compare.value = ""
    assert [readings.name for readings in page.selection.shown] == ["second"]


def test_a_page_without_runs_says_how_to_start_one_and_finds_it(tmp_path):
    page = Workbench(root=tmp_path)
    assert "No run yet" in page._stage[0].object
    write_synthetic_run(tmp_path / "new", 1, n_layers=1)
    page.list_runs()
    assert page.selection.run.name == "new"
    assert page.views["Overview"].cards["loss"].figures


def test_each_tab_is_made_when_it_is_first_shown_and_then_kept(runs_folder):
    page = Workbench(runs_folder / "first", root=runs_folder)
    assert list(page.views) == ["Overview"]
    for title in [kind.title for kind in VIEWS]:
        page.tabs.value = title
        assert [view.title for view in page.views.values() if view.visible] == [title]
        assert [body.visible for body in page._stage].count(True) == 1
    assert len(page.views) == len(VIEWS)


def test_a_page_waits_for_the_browser_to_draw_the_view_on_show(growing, monkeypatch):
    growing.grow(1)
    page = Workbench(growing.run, root=growing.run.folder.parent)
    drawn = False
    monkeypatch.setattr(Overview, "settled", property(lambda view: drawn))
    growing.grow(10)
    page.poll()
    assert page.selection.run.last_step == 0
    page.tabs.value = "Loss"  # what is hidden is not waited for
    page.poll()
    assert page.selection.run.last_step == 10


def test_a_page_of_one_view_has_no_tabs(runs_folder):
    page = Workbench(runs_folder / "first", root=runs_folder, views=[ConflictView])
    assert list(page.views) == ["Conflict"]
    assert page.tabs not in list(page._root[1])


def test_dark_is_a_switch(runs_folder):
    page = Workbench(runs_folder / "first", root=runs_folder)
    page.dark.value = True
    assert "wb-dark" in page._root.css_classes and "wb-light" not in page._root.css_classes
    figure = page.views["Overview"].cards["loss"].figures[0]
    assert figure.layout.template.layout.paper_bgcolor == "#161b21"


def test_the_status_follows_the_run(growing):
    page = Workbench(growing.run)
    assert "no step yet" in page.status.object
    growing.grow(3)
    growing.writer.status("paused")
    page.poll()
    assert "paused" in page.status.object and "step <b>2</b>" in page.status.object
    assert "steps/s" in page.status.object


def test_the_probe_share_is_their_time_over_that_of_the_steps(growing):
    growing.grow(4)
    run = growing.run
    parts = {name: run.scalars(name)[1].sum() for name in ("cost/probe_seconds", "cost/store_seconds")}
    share = probe_share(Readings(run))
    assert share == pytest.approx(sum(parts.values()) / run.scalars("train/step_seconds")[1].sum())


# -- scrubbing


def test_scrubbing_stops_following_and_live_follows_again(growing):
    growing.grow(21)
    selection = Selection()
    selection.choose(growing.run)
    bar = SelectionBar(selection)
    assert (bar.slider.end, bar.slider.value, bar.live.value) == (20, 20, True)
    bar.slider.value = 10
    assert (selection.step, bar.live.value) == (10, False)
    growing.grow(10)
    selection.poll()
    assert (selection.step, bar.slider.end, bar.slider.value) == (10, 30, 10)
    bar.live.value = True
    assert (selection.step, bar.slider.value) == (None, 30)
    bar.live.value = False
    assert selection.step == 30
    assert "30" in bar.text.object


def test_the_slider_stands_on_recorded_steps(growing):
    growing.grow(25)
    selection = Selection()
    selection.choose(growing.run)
    bar = SelectionBar(selection)
    assert (bar.slider.end, bar.slider.value, bar.slider.step) == (20, 20, 10)  # routing is recorded every 10 steps
    assert "24" in bar.text.object and selection.step is None


# -- controls


def controls_of(run) -> TrainerControls:
    selection = Selection()
    selection.choose(run)
    return TrainerControls(selection)


def enter(controls: TrainerControls, name: str, typed: str) -> None:
    """Type into a setting, press Enter, and leave it."""
    setting = controls.settings[name]
    setting.param.update(value=typed, value_input=typed)
    setting.enter_pressed = True
    setting.value = typed


def test_a_command_goes_to_the_trainer_and_its_answer_comes_back(growing):
    growing.grow(3)
    controls, controller = controls_of(growing.run), Controller(growing.writer)
    controls.buttons["pause"].clicks += 1
    assert "waiting" in controls.answer.object
    controller.poll(3)
    controls.selection.poll()
    controls.poll()
    assert "pause applied at step 3" in controls.answer.object
    assert controls.buttons["pause"].disabled and not controls.buttons["continue"].disabled
    enter(controls, "learning_rate", "5e-4")
    assert len(growing.run.answers()) == 2
    controller.poll(3)
    controls.poll()
    assert "learning rate = 0.0005 applied" in controls.answer.object
    assert controller.controls.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("name", "typed", "said"),
    [("learning_rate", "5", "learning_rate is 5.0"), ("top_k", "9", "top_k is 9"), ("balance", "much", "'much'")],
)
def test_nonsense_is_refused_in_red_and_never_sent(growing, name, typed, said):
    controls = controls_of(growing.run)
    enter(controls, name, typed)
    assert "bad" in controls.answer.object
    assert said.replace("'", "&#x27;") in controls.answer.object
    assert growing.run.answers() == []


def test_a_refusal_by_the_trainer_is_shown(growing):
    controls = controls_of(growing.run)
    controls.send("top_k", 2)
    (command,) = growing.writer.commands()
    growing.writer.answer(command, 4, error="not now <b>")
    controls.poll()
    assert "not now &lt;b&gt;" in controls.answer.object and "bad" in controls.answer.object


def test_without_leave_nothing_is_sent_whatever_is_clicked(growing):
    growing.grow(3)
    selection = Selection()
    selection.choose(growing.run)
    controls = TrainerControls(selection, allowed=False)
    assert all(part.disabled for part in (*controls.buttons.values(), *controls.settings.values()))
    assert "read-only" in controls.answer.object
    for button in controls.buttons.values():
        button.clicks += 1
    enter(controls, "learning_rate", "5e-4")
    controls.send("stop")
    growing.grow(1)
    selection.poll()
    assert growing.run.answers() == [] and "read-only" in controls.answer.object


def test_controls_of_a_run_that_nobody_trains_are_off(run):
    controls = controls_of(run)
    assert all(part.disabled for part in (*controls.buttons.values(), *controls.settings.values()))
    assert "has finished" in controls.answer.object
    controls.send("pause")
    assert "bad" in controls.answer.object


def test_two_runs_are_controlled_together_or_one_of_them(growing, another):
    growing.grow(1)
    another.grow(1)
    selection = Selection()
    selection.choose(growing.run, another.run)
    controls = TrainerControls(selection)
    controllers = [Controller(run.writer) for run in (growing, another)]
    assert controls.target.visible and controls.target.options == ["both runs", "growing", "another"]
    controls.send("pause")
    for controller in controllers:
        controller.poll(1)
    controls.poll()
    assert [controller.controls.paused for controller in controllers] == [True, True]
    assert controls.answer.object == '<span class="good">✓ pause applied at step 1</span>'
    controls.target.value = "another"
    controls.send("continue")
    for controller in controllers:
        controller.poll(1)
    assert [controller.controls.paused for controller in controllers] == [True, False]
    controls.target.value = "both runs"
    growing.writer.status("stopped")
    selection.poll()
    controls.send("balance", 0.5)  # of the one that is left
    controllers[1].poll(2)
    controls.poll()
    assert "balance = 0.5 applied at step 2" in controls.answer.object and len(growing.run.answers()) == 1


def test_an_answer_that_differs_between_two_runs_says_whose_it_is(growing, another):
    selection = Selection()
    selection.choose(growing.run, another.run)
    controls = TrainerControls(selection)
    controls.send("balance", 0.5)
    Controller(another.writer).poll(7)
    controls.poll()
    first, other = controls.answer.object.split("<br>")
    assert "<b>growing</b>" in first and "waiting" in first and "<b>another</b>" in other and "step 7" in other


def test_an_arm_of_a_study_is_named_on_the_page(tmp_path):
    for arm in ("ours", "theirs"):
        recipe = {"study": "mixlora", "arm": arm, "preset": "small", "seed": 3}
        write_synthetic_run(tmp_path / arm, 5, n_layers=2)
        with RunWriter.open(tmp_path / arm) as writer:
            writer.set_meta("recipe", recipe)
    page = Workbench(tmp_path / "ours", tmp_path / "theirs", root=tmp_path)
    assert "mixlora: ours (small, seed 3)" in page.status.object
    titles = [figure.layout.title.text for figure in page.views["Overview"].cards["load"].figures]
    assert [title.split("·")[-1].split("<")[0].strip() for title in titles] == ["ours", "theirs"]
    alone = Workbench(tmp_path / "ours", root=tmp_path)
    assert "mixlora: ours (small, seed 3)" in alone.status.object
