"""Controls that reach the running trainer, and its answers."""

import panel as pn

from workbench.errors import InputError
from workbench.live.views import style
from workbench.live.views.bar import text, widget
from workbench.live.views.markup import Markup, html, joined
from workbench.live.views.readings import Nothing, Readings
from workbench.live.views.selection import Selection

BUTTONS = {"pause": "❚❚ Pause", "continue": "▶ Continue", "step": "❚▶ Step", "stop": "■ Stop"}
SETTINGS = {"learning_rate": "Learning rate", "balance": "Balance coefficient", "top_k": "Top-k"}
SHOWN = {"failed": "has failed", "died": "died", "finished": "has finished", "stopped": "was stopped"}
BOTH = "both runs"
READ_ONLY = "read-only: the address with the server's token controls the run"


class TrainerControls(pn.viewable.Viewer):
    """Sends commands to the trainer of the selected run, or of both on show, and shows what became of the last one.

    Disabled for a run that nobody trains. A value is sent with Enter. Where ``allowed`` is False nothing is sent,
    whatever a browser says was clicked.
    """

    def __init__(self, selection: Selection, allowed: bool = True):
        super().__init__()
        self.selection, self.allowed = selection, allowed
        self.buttons = {name: widget(pn.widgets.Button, 88, label=label) for name, label in BUTTONS.items()}
        self.settings = {
            name: widget(pn.widgets.TextInput, width, label=label)
            for (name, label), width in zip(SETTINGS.items(), (166, 190, 100), strict=True)
        }
        self.target = widget(pn.widgets.Select, 190, label="Control", options=[BOTH], visible=False)
        self.answer = text(min_width=280)
        self._sent: dict[Readings, int | str] = {}  # id of the command whose answer is awaited, or why it was refused
        self._row = pn.Row(
            self.target,
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
        self.target.param.watch(lambda _: self.follow(), "value")
        selection.param.watch(lambda *_: self.follow(), ["run", "compare", "news"])
        self.follow()

    @property
    def controlled(self) -> list[Readings]:
        """The runs that a command goes to: of those on show that are being trained, the chosen one or both."""
        trained = [run for run in self.selection.shown if run.status.live and run.meta.get("kind") != "watch"]
        return [run for run in trained if self.target.value in (BOTH, self.selection.short_name(run))]

    def follow(self) -> None:
        """Show what the runs' states allow, and the answers to the last command."""
        self._offer_targets()
        runs, run = self.controlled, self.selection.run
        states = {run.status.state for run in runs}
        for part in (*self.buttons.values(), *self.settings.values()):
            part.disabled = not runs or not self.allowed
        self.buttons["pause"].disabled = not states - {"paused"} or not self.allowed
        self.buttons["continue"].disabled = not states - {"running"} or not self.allowed
        if not self.allowed:
            self._say(READ_ONLY)
        elif self._sent and set(self._sent) <= set(self.selection.shown):
            self._show_answers()
        elif runs:
            self._say("type a value and press Enter")
        elif run is None:
            self._say("no run to control")
        elif run.status.live:
            self._say("a watched model: its own program is in control")
        else:
            state = run.status.state
            self._say(f"run {SHOWN.get(state, state)}: nothing to control")

    def _say(self, what: str) -> None:
        self.answer.object = html('<span class="muted">{what}</span>', what=what)

    def _offer_targets(self) -> None:
        names = [self.selection.short_name(run) for run in self.selection.shown]
        options = [BOTH, *names] if len(names) > 1 else [BOTH]
        if self.target.options != options:
            self.target.param.update(options=options, value=BOTH, visible=len(names) > 1)

    def send(self, name: str, value: float | str | None = None) -> None:
        """Send a command; an error is shown in red, never raised."""
        self._sent = {}
        if not self.allowed:
            return
        for run in self.controlled or [self.selection.run]:
            try:
                self._sent[run] = run.run.send(name, value)
            except InputError as error:
                self._sent[run] = str(error)
        self._show_answers()

    def poll(self) -> None:
        """Look for the awaited answers."""
        if self._sent:
            self._show_answers()

    def _entered(self, name: str) -> None:
        typed = self.settings[name].value_input.strip()
        try:
            value = float(typed)
        except ValueError:
            value = typed  # refused by the rule of the command, in its words
        self.send(name, value)

    def _show_answers(self) -> None:
        found = {run: self._answer(run, sent) for run, sent in self._sent.items()}
        if len(set(found.values())) == 1:  # one run, or both alike
            lines = [next(iter(found.values()))]
        else:
            names = {run: self.selection.short_name(run) for run in found}
            lines = [line and html("<b>{name}</b> {line}", name=names[run], line=line) for run, line in found.items()]
        if any(lines):
            self.answer.object = joined(filter(None, lines), "<br>")

    def _answer(self, run: Readings, sent: int | str) -> Markup:
        """What became of a command, "" where that cannot be read."""
        if isinstance(sent, str):
            return html('<span class="bad">{why}</span>', why=sent)
        try:
            answer = next(answer for answer in reversed(run.run.answers()) if answer.id == sent)
        except (InputError, Nothing, StopIteration):
            return Markup()
        value = "" if answer.value is None else f" = {answer.value:g}"
        what = answer.name.replace("_", " ") + value
        if answer.error:
            return html('<span class="bad">{what}: {why}</span>', what=what, why=answer.error)
        if answer.step is None:
            return html('<span class="muted">{what}: sent, waiting for the trainer …</span>', what=what)
        return html('<span class="good">✓ {what} applied at step {step}</span>', what=what, step=f"{answer.step:,}")

    def __panel__(self):
        return self._row
