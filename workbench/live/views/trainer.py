"""Controls that reach the running trainer, and its answers."""

from html import escape

import panel as pn

from workbench.errors import InputError
from workbench.live.views import style
from workbench.live.views.bar import text, widget
from workbench.live.views.readings import Nothing
from workbench.live.views.selection import Selection

BUTTONS = {"pause": "❚❚ Pause", "continue": "▶ Continue", "step": "❚▶ Step", "stop": "■ Stop"}
SETTINGS = {"learning_rate": "Learning rate", "balance": "Balance coefficient", "top_k": "Top-k"}
SHOWN = {"failed": "has failed", "died": "died", "finished": "has finished", "stopped": "was stopped"}


class TrainerControls(pn.viewable.Viewer):
    """Sends commands to the trainer of the selected run and shows what became of the last one.

    Disabled for a run that nobody trains. A value is sent with Enter.
    """

    def __init__(self, selection: Selection):
        super().__init__()
        self.selection = selection
        self.buttons = {name: widget(pn.widgets.Button, 88, label=label) for name, label in BUTTONS.items()}
        self.settings = {
            name: widget(pn.widgets.TextInput, width, label=label)
            for (name, label), width in zip(SETTINGS.items(), (166, 190, 100), strict=True)
        }
        self.answer = text(min_width=280)
        self._sent: tuple[str, int] | None = None  # run and id of the command whose answer is awaited
        self._row = pn.Row(
            *self.buttons.values(),
            *self.settings.values(),
            self.answer,
            stylesheets=[style.BAR],
            sizing_mode="stretch_width",
            margin=0,
        )
        for name, button in self.buttons.items():
            button.on_click(lambda _, name=name: self.send(name))
        for name, setting in self.settings.items():
            setting.param.watch(lambda event, name=name: self._entered(name), "enter_pressed")  # not on leaving it
        selection.param.watch(lambda *_: self.follow(), ["run", "news"])
        self.follow()

    def follow(self) -> None:
        """Show what the run's state allows, and the answer to the last command."""
        run = self.selection.run
        state = run.status.state if run else None
        live = run is not None and run.status.live and run.meta.get("kind") != "watch"
        for part in (*self.buttons.values(), *self.settings.values()):
            part.disabled = not live
        self.buttons["pause"].disabled = not live or state == "paused"
        self.buttons["continue"].disabled = not live or state == "running"
        if self._sent and run and self._sent[0] == run.name:
            self._show_answer()
        elif run is None:
            self.answer.object = '<span class="muted">no run to control</span>'
        elif run.meta.get("kind") == "watch" and run.status.live:
            self.answer.object = '<span class="muted">a watched model: its own program is in control</span>'
        elif not live:
            self.answer.object = f'<span class="muted">run {SHOWN.get(state, state)}: nothing to control</span>'
        else:
            self.answer.object = '<span class="muted">type a value and press Enter</span>'

    def send(self, name: str, value: float | str | None = None) -> None:
        """Send a command; an error is shown in red, never raised."""
        run = self.selection.run
        try:
            self._sent = (run.name, run.run.send(name, value))
            self._show_answer()
        except InputError as error:
            self._sent = None
            self.answer.object = f'<span class="bad">{escape(str(error))}</span>'

    def poll(self) -> None:
        """Look for the awaited answer."""
        if self._sent:
            self._show_answer()

    def _entered(self, name: str) -> None:
        typed = self.settings[name].value_input.strip()
        try:
            value = float(typed)
        except ValueError:
            value = typed  # refused by the rule of the command, in its words
        self.send(name, value)

    def _show_answer(self) -> None:
        run, id_ = self.selection.run, self._sent[1]
        try:
            answer = next(answer for answer in reversed(run.run.answers()) if answer.id == id_)
        except (InputError, Nothing, StopIteration):
            return
        value = "" if answer.value is None else f" = {answer.value:g}"
        what = escape(answer.name.replace("_", " ") + value)
        if answer.error:
            self.answer.object = f'<span class="bad">{what}: {escape(answer.error)}</span>'
        elif answer.step is None:
            self.answer.object = f'<span class="muted">{what}: sent, waiting for the trainer …</span>'
        else:
            self.answer.object = f'<span class="good">✓ {what} applied at step {answer.step:,}</span>'

    def __panel__(self):
        return self._row
