"""The page: runs to choose, how they stand, controls of the trainer, and the views one tab each."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import panel as pn

from workbench.errors import InputError
from workbench.live.store import DATABASE, DamagedRun, Run, find, newest, run_name, runs
from workbench.live.views import style
from workbench.live.views.adaptation import AdaptationView
from workbench.live.views.bar import SelectionBar, served, text, widget
from workbench.live.views.coactivation import CoactivationView
from workbench.live.views.conflict import ConflictView
from workbench.live.views.depth import DepthView
from workbench.live.views.imbalance import ImbalanceView
from workbench.live.views.loss import LossView
from workbench.live.views.markup import html, joined
from workbench.live.views.overview import Overview
from workbench.live.views.plot import Pulse
from workbench.live.views.processes import ProcessesView
from workbench.live.views.readings import Readings
from workbench.live.views.selection import Selection
from workbench.live.views.spectra import SpectraView
from workbench.live.views.status import status_line
from workbench.live.views.trainer import TrainerControls
from workbench.live.views.view import POLL_MS, View
from workbench.paths import home

VIEWS = (
    Overview,
    ImbalanceView,
    CoactivationView,
    DepthView,
    SpectraView,
    ConflictView,
    LossView,
    ProcessesView,
    AdaptationView,
)
"""The tabs of the page, in order."""

LIST_MS = 4000  # how often the list of runs is read again
NONE = "none"
NO_RUN = """<div class="empty"><b>No run yet</b><span>Start one with <code>workbench live</code>, or in Python with
<code>workbench.watch(model)</code>. It appears here by itself.</span></div>"""


def _files(root: Path) -> Iterator[tuple[Path, int]]:
    """The runs below a folder, and which file each is: one that is written anew under its name is another."""
    for path in root.glob(f"*/{DATABASE}"):
        with suppress(OSError):  # it goes as we look
            yield path, path.stat().st_ino


class Workbench(pn.viewable.Viewer):
    """Views of one run, or of two side by side, with everything to steer them; one path for the apps and notebooks.

    Args:
        run: a run, its name or its path; None shows the newest, as soon as there is one.
        compare: a second run, shown beside it.
        theme: "light" or "dark".
        views: the view classes, a tab each; all of them if left out.
        root: folder of the runs to choose from; the user's own if left out.
        control: whether commands may be sent to the trainer; if left out, in a notebook alone.
        lookup: finds a run by its name or path and the root.
    """

    def __init__(
        self,
        run: Run | Path | str | None = None,
        compare: Run | Path | str | None = None,
        *,
        theme: str = "light",
        views: Sequence[type[View]] | None = None,
        root: Path | str | None = None,
        control: bool | None = None,
        lookup: Callable[[Path | str, Path], Run] = find,
    ):
        super().__init__()
        self.root, self.selection = Path(root or home() / "runs").expanduser().absolute(), Selection(theme=theme)
        self._lookup = lookup
        self._error = ""
        self._listed: tuple = ()  # the runs there and those on show, when the lists were last filled
        kinds = list(views or VIEWS)
        self._kinds = {kind.title: kind for kind in kinds}
        self.views: dict[str, View] = {}  # made when first shown
        self.selection.settled = self._settled
        self.tabs = widget(pn.widgets.RadioButtonGroup, 100 * len(kinds), options=list(self._kinds))
        self.tabs.stylesheets = [*self.tabs.stylesheets, style.TABS]
        self.run = widget(pn.widgets.Select, 240, label="Run", options={})
        self.compare = widget(pn.widgets.Select, 240, label="Compare", options={NONE: ""})
        self.dark = widget(pn.widgets.Toggle, 70, label="◐ Dark", value=theme == "dark")
        self.status = text(min_width=400)
        self.trainer = TrainerControls(self.selection, not served() if control is None else control)
        self._stage = pn.Column(sizing_mode="stretch_width", margin=0)
        self._open(run, compare)
        self._listen()
        self._root = self._compose(kinds)
        self._follow()
        if served():  # while the browser loads its scripts: the page itself is answered at once
            pn.state.curdoc.add_next_tick_callback(self._show_tab)
        else:
            self._show_tab()

    # -- composition

    def _compose(self, kinds: Sequence[type[View]]) -> pn.Column:
        name = "" if len(kinds) > 1 else f" {kinds[0].title.lower()}"
        brand = text(f'<div class="brand"><span>◆</span> workbench{name}</div>', width=112 + 9 * len(name))
        top = pn.Row(
            brand, self.run, self.compare, self.status, self.dark, stylesheets=[style.BAR], sizing_mode="stretch_width"
        )
        top.margin = 0
        bar = SelectionBar(self.selection, *([self.tabs] if len(kinds) > 1 else []))
        return pn.Column(
            top,
            bar,
            self.trainer,
            self._stage,
            Pulse((self.poll, POLL_MS), (self.list_runs, LIST_MS)),
            css_classes=self._classes(),
            stylesheets=[style.ROOT],
            sizing_mode="stretch_width",
            margin=0,
        )

    def _classes(self) -> list[str]:
        return ["wb", *(["wb-page"] if served() else []), f"wb-{self.selection.theme}"]

    def _listen(self) -> None:
        self.run.param.watch(lambda event: self._choose(event.new, self.compare.value), "value")
        self.compare.param.watch(lambda event: self._choose(self.run.value, event.new), "value")
        self.dark.param.watch(self._darken, "value")
        self.tabs.param.watch(lambda _: self._show_tab(), "value")
        self.selection.param.watch(lambda *_: self._follow(), ["run", "compare", "theme", "news"])
        self.selection.param.watch(lambda _: self._show_tab(), "run")

    def _darken(self, event) -> None:
        self.selection.theme = "dark" if event.new else "light"

    def _show_tab(self) -> None:
        """Show the chosen view. Those shown before stay on the page, hidden, where they cost nothing."""
        chosen = self.tabs.value
        if self.selection.run is None:
            self._stage.objects = [text(NO_RUN)]
            return
        if chosen not in self.views:
            self.views[chosen] = self._kinds[chosen](selection=self.selection)
        for title, view in self.views.items():
            view.visible = view.body().visible = title == chosen
        bodies = [view.body() for view in self.views.values()]
        if list(self._stage) != bodies:
            self._stage.objects = bodies

    # -- runs

    def _open(self, run: Run | Path | str | None, compare: Run | Path | str | None) -> None:
        """Show the runs asked for; where one cannot be shown, say so and do without it, or show the newest."""
        for first, second in ((run, compare), (run, None), (None, None)):
            try:
                self.selection.choose(self._found(first) or newest(self.root), self._found(second))
                break
            except InputError as error:
                self._error = self._error or str(error)
        self.list_runs()

    def _found(self, run: Run | Path | str | None) -> Run | None:
        return self._lookup(run, self.root) if isinstance(run, Path | str) else run

    def list_runs(self) -> None:
        """Read the list of runs anew, if there are others than before; the newest is shown if none is yet."""
        there = sorted(_files(self.root))
        if self.selection.run is None and there and (first := newest(self.root)):
            self.selection.choose(first)
        shown = [str(run.run.folder) if run else "" for run in (self.selection.run, self.selection.compare)]
        if (there, shown) == self._listed:
            return
        self._listed = (there, shown)
        found = runs(self.root)
        self._reopen(found)
        known = {run.name: str(run.folder) for run in found}
        for readings in self.selection.shown:
            known.setdefault(run_name(readings.run.folder, self.root), str(readings.run.folder))
        for select, options, value in ((self.run, known, shown[0]), (self.compare, {NONE: ""} | known, shown[1])):
            select.param.update(options=options, value=value)

    def _reopen(self, found: Sequence[Run]) -> None:
        """Show a run that was written anew under its name in place of the one that it replaced."""
        there = {run.folder: run for run in found if not isinstance(run, DamagedRun)}

        def now(readings: Readings | None) -> Readings | Run | None:
            run = readings and there.get(readings.run.folder)
            return run if run and run.created != readings.run.created else readings

        self.selection.choose(now(self.selection.run), now(self.selection.compare))

    def _choose(self, run: str, compare: str) -> None:
        """Show the runs chosen in the lists, from their first layer and newest step."""
        shown = {str(readings.run.folder): readings for readings in self.selection.shown}
        if not run or [run, *filter(None, [compare])] == list(shown):  # set by list_runs, not by the reader
            return
        try:
            second = shown.get(compare, compare) if compare else None
            self.selection.choose(shown.get(run, run), second, layer=0, step=None)
            self._error = ""
        except InputError as error:
            self._error = str(error)
            self._follow()

    def tell(self, error: str) -> None:
        """Say on the page what is wrong with what was asked for."""
        self._error = error
        self._follow()

    # -- following

    def _settled(self) -> bool:
        """Whether the browser has drawn the view on show: a slow one is sent no more than it can draw."""
        view = self.views.get(self.tabs.value)
        return view is None or view.settled

    def poll(self) -> None:
        """One look at the runs: called every few tenths of a second while the page is open."""
        self.selection.poll()
        self.trainer.poll()

    def _follow(self) -> None:
        shown = self.selection.shown
        lines = [status_line(readings, named=len(shown) > 1) for readings in shown]
        if self._error:
            lines.insert(0, html('<div class="status"><span class="bad">{error}</span></div>', error=self._error))
        self.status.object = joined(lines)
        if self._root.css_classes != self._classes():
            self._root.css_classes = self._classes()

    def __panel__(self):
        return self._root
