"""What may be asked of a running trainer, and what the trainer does about it."""

import math
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.live.control import COMMANDS, Command, Controller, Controls, validate
from workbench.live.store import Run, RunWriter

META = {
    "kind": "train",
    "model": {"layers": [{"name": n, "n_experts": e, "top_k": 2} for n, e in (("a", 8), ("b", 4))]},
}


# -- what is allowed


@pytest.mark.parametrize(
    ("name", "value", "sent"),
    [
        ("pause", None, None),
        ("learning_rate", 1, 1.0),
        ("learning_rate", np.float32(0.5), 0.5),
        ("balance", 0, 0.0),
        ("balance", 10.0, 10.0),
        ("top_k", 1, 1),
        ("top_k", 4.0, 4),
        ("top_k", np.int64(3), 3),
    ],
)
def test_allowed_values(name, value, sent):
    checked = validate(name, value, META)
    assert checked == sent and type(checked) is type(sent)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", 0.0, "learning_rate is 0.0 but must be a number above 0 and at most 1"),
        ("learning_rate", 1.001, "above 0 and at most 1"),
        ("learning_rate", math.nan, "learning_rate is nan but must be a number above 0"),
        ("learning_rate", "1e-3", "learning_rate is '1e-3' but must be a number"),
        ("learning_rate", None, "learning_rate is None but must be a number"),
        ("balance", -0.1, "balance is -0.1 but must be a number between 0 and 10"),
        ("balance", math.inf, "balance is inf but"),
        ("balance", True, "balance is True but must be a number"),
        ("top_k", 5, "top_k is 5 but must be a whole number between 1 and 4"),  # the smallest layer has four experts
        ("top_k", 0, "top_k is 0 but must be a whole number between 1 and 4"),
        ("top_k", 2.5, "top_k is 2.5 but must be a whole number"),
        ("top_k", math.inf, "top_k is inf but must be a whole number"),
        ("pause", 1.0, "command pause takes no value but got 1.0"),
        ("learningrate", 1e-3, "command 'learningrate' is unknown; did you mean 'learning_rate'"),
    ],
)
def test_what_is_not_allowed_is_named(name, value, message):
    with pytest.raises(InputError) as raised:
        validate(name, value, META)
    assert message in str(raised.value)


@given(name=st.sampled_from(sorted(COMMANDS)), value=st.none() | st.floats() | st.integers() | st.text(max_size=3))
def test_every_value_is_refused_or_inside(name, value):
    try:
        sent = validate(name, value, META)
    except InputError:
        return
    assert sent is None or (COMMANDS[name].low <= sent <= (4 if name == "top_k" else COMMANDS[name].high))


@pytest.mark.parametrize("model", [None, {}, {"layers": []}, {"layers": [{"n_experts": 4, "top_k": None}]}])
def test_top_k_needs_a_layer_that_has_one(model):
    with pytest.raises(InputError, match="top_k cannot be set: no layer of this run has a fixed number"):
        validate("top_k", 1, {"model": model})


def test_a_refused_command_is_not_written(tmp_path):
    with RunWriter.create(tmp_path / "run", META) as writer, Run(writer.folder) as run:
        with pytest.raises(InputError):
            run.send("top_k", 5)
        assert run.answers() == [] and writer.commands() == []


# -- what the trainer does


@pytest.fixture
def live(tmp_path):
    with RunWriter.create(tmp_path / "run", META) as writer, Run(writer.folder) as run:
        yield run, writer, Controller(writer)


def test_settings_are_applied_answered_and_noted(live):
    run, _, controller = live
    assert controller.before_step(0) == Controls()
    sent = [run.send("learning_rate", 1e-3), run.send("balance", 0.5), run.send("top_k", 1)]
    assert controller.before_step(7) == Controls(learning_rate=1e-3, balance=0.5, top_k=1)
    assert type(controller.controls.top_k) is int
    assert [(answer.id, answer.step, answer.error) for answer in run.answers()] == [(id_, 7, None) for id_ in sent]
    assert [event[:3] for event in run.events()] == [
        (7, "control", "learning_rate = 0.001"),
        (7, "control", "balance = 0.5"),
        (7, "control", "top_k = 1"),
    ]


def test_the_last_of_several_values_holds(live):
    run, _, controller = live
    for value in (0.1, 0.2, 0.3):
        run.send("balance", value)
    assert controller.before_step(0).balance == 0.3


def test_stop_ends_it_and_refuses_the_rest(live):
    run, _, controller = live
    run.send("stop")
    run.send("balance", 1.0)
    controls = controller.before_step(3)
    assert controls.stop and controls.balance is None
    assert [answer.error for answer in run.answers()] == [None, "the run is stopping"]


class Training:
    """A trainer in a thread: it counts the steps that the controller lets through."""

    def __init__(self, controller: Controller, until):
        self.controller, self.done, self.until = controller, 0, until
        self.thread = threading.Thread(target=self.train, daemon=True)
        self.thread.start()

    def train(self):
        while not self.controller.before_step(self.done).stop:
            self.done += 1
            time.sleep(0.001)


def answered(run: Run, id_: int) -> bool:
    return next(answer for answer in run.answers() if answer.id == id_).step is not None


def test_pause_step_continue_stop(live, until):
    run, _, controller = live
    training = Training(controller, until)
    training.until(lambda: training.done > 3)
    paused = run.send("pause")
    training.until(lambda: answered(run, paused))
    assert run.status.state == "paused"
    at = run.answers()[-1].step
    assert training.done == at  # the step before which it waits

    for expected in (1, 2):
        run.send("step")
        training.until(lambda expected=expected: training.done == at + expected)
    run.send("step"), run.send("step")  # two at once are two
    training.until(lambda: training.done == at + 4)

    lr = run.send("learning_rate", 0.25)  # heard while it waits
    training.until(lambda: answered(run, lr))
    time.sleep(3 * 0.05)
    assert training.done == at + 4 and controller.controls.learning_rate == 0.25
    assert run.status.state == "paused"

    run.send("continue")
    training.until(lambda: training.done > at + 20)
    assert run.status.state == "running"

    run.send("pause")
    training.until(lambda: run.status.state == "paused")
    run.send("stop")  # ends a paused run too
    training.thread.join()


def test_step_from_full_speed_lets_one_through_and_waits(live, until):
    run, _, controller = live
    run.send("step")
    training = Training(controller, until)
    training.until(lambda: training.done == 1)
    time.sleep(0.1)
    assert training.done == 1 and run.status.state == "paused"
    run.send("stop")
    training.thread.join()


def test_pause_takes_back_the_steps_that_were_owed(live, until):
    run, _, controller = live
    for name in ("pause", "step", "step", "pause", "step"):
        run.send(name)
    training = Training(controller, until)
    training.until(lambda: training.done == 1)
    time.sleep(0.1)
    assert training.done == 1
    run.send("stop")
    training.thread.join()


def test_a_resumed_run_keeps_its_settings_and_goes(live):
    _, writer, _ = live
    saved = Controls(paused=True, stop=True, learning_rate=0.1, top_k=1)
    controls = Controller(writer, saved).before_step(0)
    assert controls == Controls(learning_rate=0.1, top_k=1)
    assert saved.paused  # the caller's is not changed


def test_a_controller_works_with_anything_that_has_the_channel():
    class Channel:
        def __init__(self):
            self.waiting, self.log = [Command(1, "top_k", 2), Command(2, "pause"), Command(3, "continue")], []

        def commands(self):
            waiting, self.waiting = self.waiting, []
            return waiting

        def answer(self, command, step, error=None):
            self.log.append(("answer", command.id, step, error))

        def event(self, step, kind, text):
            self.log.append(("event", text))

        def status(self, state, message=""):
            self.log.append(("status", state))

    channel = Channel()
    assert Controller(channel).before_step(5) == Controls(top_k=2)
    assert channel.log == [
        ("event", "top_k = 2"),
        ("answer", 1, 5, None),
        ("event", "pause"),
        ("status", "paused"),
        ("answer", 2, 5, None),
        ("event", "continue"),
        ("status", "running"),
        ("answer", 3, 5, None),
    ]
