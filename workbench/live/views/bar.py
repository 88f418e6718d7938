"""The controls every view shares: layer, live or scrubbed back, step."""

import panel as pn

from workbench.figures.theme import short_names
from workbench.live.records import DIVISIONS
from workbench.live.views import style
from workbench.live.views.selection import Selection

SETTLE_MS = 30  # a slider sends many positions a second; those that come while one is drawn become one


def widget(kind: type, width: int | None = None, label: str = "", **more):
    """A Panel widget in the house style, of a fixed width or as wide as there is room."""
    named = "label" if "label" in kind.param else "name"  # as Panel called it before 1.9
    return _styled(kind, style.WIDGET, width, **{named: label}, **more)


def text(html: str = "", width: int | None = None, **more) -> pn.pane.HTML:
    """HTML in the house style, of a fixed width or as wide as there is room."""
    return _styled(pn.pane.HTML, style.TEXT, width, object=html, **more)


def _styled(kind: type, sheet: str, width: int | None, **more):
    size = {"width": width} if width else {"sizing_mode": "stretch_width"}
    return kind(stylesheets=[sheet], margin=0, align="center", **size, **more)


def layer_select(selection: Selection) -> pn.widgets.Select:
    """A widget that chooses the layer of a selection, and follows it; every view about layers has one."""
    select = widget(pn.widgets.Select, 250, label="Layer", options={"–": 0})

    def follow(*_) -> None:
        layers = next((run.layers for run in selection.shown if run.layers), [])
        if layers:
            names = short_names([layer.name for layer in layers])
            sizes = [f"{x.n_experts} {'recursions' if x.recursive else 'experts'}" for x in layers]
            options = {f"{name} ({sizes[i]})": i for i, name in enumerate(names)}
            select.param.update(options=options, value=min(selection.layer, len(layers) - 1))

    select.param.watch(lambda event: selection.param.update(layer=event.new), "value")
    selection.param.watch(follow, ["run", "compare", "layer"])
    follow()
    return select


def division_select(selection: Selection) -> pn.widgets.RadioButtonGroup:
    """A widget that chooses whether measures are split by domain or by modality; where a run on show has only one of
    them it is hidden, and that one is chosen; with neither, domains, which then are said to be missing."""
    options = {f"by {name}": name for name in DIVISIONS}
    select = widget(pn.widgets.RadioButtonGroup, 190, options=options, value=selection.by)

    def follow(*_) -> None:
        there = [name for name, by in DIVISIONS.items() if any(len(by.names(run.model)) > 1 for run in selection.shown)]
        select.visible = len(there) > 1
        if selection.by not in there:
            selection.by = (*there, *DIVISIONS)[0]
        select.value = selection.by

    select.param.watch(lambda event: selection.param.update(by=event.new), "value")
    selection.param.watch(follow, ["run", "compare", "by", "news"])
    follow()
    return select


def served() -> bool:
    """Whether this is a session of a server, not a notebook."""
    return pn.state.curdoc is not None and pn.state.curdoc.session_context is not None


class SelectionBar(pn.viewable.Viewer):
    """Chooses the step on show: the newest ("live"), or one to scrub back to. ``extra`` stands at the left end."""

    def __init__(self, selection: Selection, *extra: pn.viewable.Viewable):
        super().__init__()
        self.selection = selection
        self.live = widget(pn.widgets.Toggle, 72, label="● Live", value=True)
        self.slider = widget(pn.widgets.IntSlider, label="", start=0, end=1, value=0, show_value=False, tooltips=False)
        self.text = text(width=134)
        self._wanted: int | None = None  # where the reader has scrubbed to; not drawn yet
        self._position = 0  # where the slider was put
        self._scheduled = False
        parts = (*extra, self.live, self.slider, self.text)
        self._row = pn.Row(*parts, stylesheets=[style.BAR], sizing_mode="stretch_width", margin=0)
        self._follow()
        self.live.param.watch(self._toggled, "value")
        self.slider.param.watch(self._scrubbed, "value")
        selection.param.watch(lambda *_: self._follow(), ["run", "compare", "step", "news"])

    def _follow(self) -> None:
        """Show the selection as it is."""
        run, step, last = self.selection.run, self.selection.step, self.selection.last_step
        self.live.value = step is None
        every = int(((run.meta.get("cadence") or {}).get("routing") if run else None) or 1)
        end = max(last, 0) // every * every  # a slider whose ends are not on its own grid moves by itself
        self._position = end if step is None else step
        self.slider.param.update(end=max(end, 1), step=every, value=self._position, disabled=end < 1)
        at, state = (last, "newest") if step is None else (step, f"of {last:,}")
        self.text.object = f'<div class="step">step <b>{at:,}</b> {state}</div>' if last >= 0 else "no step yet"

    def _toggled(self, event) -> None:
        if event.new:
            self.selection.step = None
        elif self.selection.step is None:  # not when scrubbing switched it off
            self.selection.step = max(self.selection.last_step, 0)

    def _scrubbed(self, event) -> None:
        if event.new == self._position:  # set by _follow, not by the reader
            return
        self._wanted = event.new
        if served():
            self._schedule()
        else:
            self.selection.step = event.new

    def _scrub(self) -> None:
        self._scheduled = False
        if self.selection.settled():
            self.selection.step = self._wanted
        else:
            self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            pn.state.curdoc.add_timeout_callback(self._scrub, SETTLE_MS)

    def __panel__(self):
        return self._row
