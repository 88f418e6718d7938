"""The page of a merge: a method and how far to go along its update, and six plots that follow."""

import panel as pn
import plotly.graph_objects as go

from workbench.errors import unknown
from workbench.figures import basic
from workbench.figures import merging as figures
from workbench.figures.theme import short_names
from workbench.live.views import style
from workbench.live.views.bar import served, text, widget
from workbench.live.views.card import Card, grid
from workbench.live.views.markup import Markup, html, joined
from workbench.live.views.plot import Pulse
from workbench.live.views.readings import Nothing
from workbench.live.work import Job, begin, opened
from workbench.merging.measure import SCALES, SIZES, Choice, Measured, Merges, methods, open_bed

POLL_MS = 150  # a slider that is dragged is followed this often
HEIGHT = 300

HOW = {
    "curve": "The network is base + λ · (merged − base). At λ = 0 it is the base, at λ = 1 what workbench.merge gives, "
    "beyond that it goes further the same way. A line is a task: the accuracy on its test images, divided by that of "
    "its own expert. The method asks for weights alone; where it keeps only a share of them, the slider above says "
    "which. A λ chosen here was chosen on the test images, so its accuracy is a little too good.",
    "accuracy": "Test accuracy of each task: of the base, which never saw the task, of the merged network at the "
    "chosen λ, and of the task's own expert. Ten digits: by chance it is 0.1. One network has to read all tasks, with "
    "the head of the base.",
    "spectra": "Singular values of what was changed of the chosen layer: by each task's expert, and by the merge, "
    "λ · (merged − base). An average divides what one task alone needs by their number and keeps what all share, so "
    "its line lies below; a merge by singular vectors (TSV-M) has a flat one.",
    "cosines": "A dot is a pair of tasks: the cosine between what their experts changed of a layer. Near 0 they change "
    "other things, and a sum serves both; below 0 they pull against each other. It does not depend on the method.",
    "conflict": "Of the weights of a layer that more than one expert changed, the share that some push up and others "
    "down. The dashed line is what signs by chance give, close to 1 for eight tasks: only what lies well below it is "
    "agreement. It does not depend on the method.",
    "overlap": "How far two tasks' leading right singular vectors of the chosen layer span the same space: whether "
    "they look at the same inputs. The colour bar names what random directions have. It does not depend on the method.",
}

OF_EXPERTS = ("cosines", "conflict")
"""The cards that no choice of a merge changes."""

MEASURING, TRAINING = "being measured", "base and experts are trained once, and then kept"


class MergingPage(pn.viewable.Viewer):
    """Merges of the kept bed, with everything to steer them.

    Args:
        size: one of `SIZES`.
        method: one of `methods()`.
        theme: "light" or "dark".

    Raises:
        InputError: an unknown size or method.
    """

    def __init__(self, size: str = "small", method: str = "average", *, theme: str = "light"):
        super().__init__()
        for name, value, known in (("size", size, SIZES), ("method", method, methods())):
            if value not in known:
                raise unknown(name, value, known)
        select = pn.widgets.Select
        self.size = widget(select, 155, label="Networks", options=list(SIZES), value=size)
        self.method = widget(select, 210, label="Method", options=list(methods()), value=method)
        self.layer = widget(select, 190, label="Layer", options={})
        self.dark = widget(pn.widgets.Toggle, 70, label="◐ Dark", value=theme == "dark")
        look = {"label": "", "show_value": False, "tooltips": False}
        self.share = widget(pn.widgets.FloatSlider, 150, start=0.05, end=1, step=0.05, value=1, **look)
        self.scale = widget(pn.widgets.FloatSlider, start=0, end=SCALES[-1], step=0.05, value=1, **look)
        self.share_text, self.scale_text = text(width=86), text(width=62)
        self.status = text(min_width=400)
        self.cards = {
            "curve": Card("Accuracy against λ", HOW["curve"], span=4, height=HEIGHT),
            "accuracy": Card("Accuracy at the chosen λ", HOW["accuracy"], span=4, height=HEIGHT),
            "spectra": Card("Singular spectra", HOW["spectra"], span=4, height=HEIGHT),
            "cosines": Card("Task-vector cosines", HOW["cosines"], span=4, height=HEIGHT),
            "conflict": Card("Sign conflict", HOW["conflict"], span=4, height=HEIGHT),
            "overlap": Card("Subspace overlap", HOW["overlap"], span=4, height=HEIGHT),
        }
        self._job: Job[Measured] | None = None
        self.measured: Measured | None = None  # of what is chosen, or until it is known, of what was chosen before
        self._choose_method()
        self._choose_size()
        self._root = self._compose()
        self.size.param.watch(lambda _: self._choose_size(), "value")
        self.method.param.watch(lambda _: self._choose_method(), "value")
        self.dark.param.watch(lambda _: self._darken(), "value")
        for slider in (self.share, self.scale):
            slider.param.watch(lambda _: self._name_sliders(), "value")

    @property
    def theme(self) -> str:
        return "dark" if self.dark.value else "light"

    @property
    def bed(self) -> Merges | None:
        """The bed, once it is open."""
        return self._bed.latest if isinstance(self._bed.latest, Merges) else None

    @property
    def settled(self) -> bool:
        """Whether all that is chosen is measured to the end."""
        return self._job is not None and self._job.done and self._choice == self._wanted()

    def tell(self, error: str) -> None:
        """Say on the page what is wrong with what was asked for."""
        self._told = error

    # -- following

    def poll(self) -> None:
        """One look at what was chosen and what is measured: called again and again while the page is open."""
        if self.bed is not None:
            if not self.layer.options:
                matrices = self.bed.matrices
                options = dict(zip(short_names(matrices), matrices, strict=True))
                self.layer.param.update(options=options, value=matrices[-1])
            job, wanted = self._job, self._wanted()
            # what is begun may come to its first result, or a slider that is dragged would show nothing on its way
            over = job is None or job.done
            if job is not None and job.latest is not None:
                self.measured, over = job.latest, True
            if over and wanted != self._choice:
                self.close()
                self._choice, self._job = wanted, begin(self.bed.measure(wanted))
        if all(card.settled for card in self.cards.values()):  # a slow browser is sent no more than it can draw
            self._draw()
        self.status.object = self._status()

    def _wanted(self) -> Choice:
        share = round(self.share.value, 2) if self.share.visible else None
        return Choice(self.method.value, share, round(self.scale.value, 2), self.layer.value)

    def _choose_size(self) -> None:
        self.close()
        size = self.size.value
        self._bed = opened(("merges", size), lambda: open_bed(size))
        self._job, self._choice, self._told = None, None, ""
        self.measured, self.layer.options = None, {}

    def _choose_method(self) -> None:
        self._told, share = "", methods()[self.method.value]
        self.share.visible = self.share_text.visible = share is not None
        if share is not None:
            self.share.value = share[1]
        self._name_sliders()

    def _name_sliders(self) -> None:
        share = methods()[self.method.value]
        for pane, name, slider in (
            (self.share_text, share and share[0], self.share),
            (self.scale_text, "λ", self.scale),
        ):
            pane.object = html('<div class="step">{name} <b>{value}</b></div>', name=name, value=f"{slider.value:.2f}")

    def close(self) -> None:
        """Nobody waits any longer for what was chosen."""
        if self._job is not None:
            self._job.drop()

    def _status(self) -> Markup:
        lines, chip, said = [], "running", ""
        if wrong := self._wrong or self._told:
            lines.append(html('<span class="bad">{wrong}</span>', wrong=wrong))
        bed, found = self.bed, self.measured
        if bed is None:
            said = html("{said}; trained once, then kept", said=self._bed.latest or "another page comes first")
        elif found is None:
            said = "merging"
        else:
            chip = "finished" if self.settled else "running"
            said = html(
                "{choice}: tasks keep <b>{mean}</b> of their experts' accuracy (base {base})",
                choice=found.choice,
                mean=f"{(found.accuracies / bed.own).mean():.3f}",
                base=f"{(bed.before / bed.own).mean():.3f}",
            )
        if not self._wrong:
            word = {"running": "working", "finished": "measured"}[chip]
            lines.append(html(f'<span class="chip {chip}">{word}</span><span>{{said}}</span>', said=said))
        wrapped = '<div class="status" style="flex-wrap: wrap; white-space: normal">{lines}</div>'  # errors are long
        return html(wrapped, lines=joined(lines))

    @property
    def _wrong(self) -> str:
        return self._bed.error or (self._job.error if self._job else "")

    # -- drawing

    def _draw(self) -> None:
        bed, found = self.bed, self.measured
        for name, card in self.cards.items():
            of = None if name in OF_EXPERTS else found
            if bed is None or (of is None and name not in OF_EXPERTS):
                why = self._wrong or (MEASURING if bed else TRAINING)
                card.update(why, lambda why=why: [Nothing(why)], None)
            elif name != "curve" or found.curve or not card.figures:  # that of before stands until there is a point
                draw = getattr(self, f"_{name}")
                card.update((bed, of, self.theme), lambda draw=draw, of=of: [draw(bed, of)], None)

    def _curve(self, bed: Merges, found: Measured) -> go.Figure | Nothing:
        if not found.curve:
            return Nothing(MEASURING)
        kept = {name: [found.curve[s][i] / bed.own[i] for s in found.curve] for i, name in enumerate(bed.tasks)}
        return figures.against_scale(
            list(found.curve),
            kept,
            base=float((bed.before / bed.own).mean()),
            chosen=found.choice.scale,
            subtitle=found.choice.method,
            theme=self.theme,
        )

    def _accuracy(self, bed: Merges, found: Measured) -> go.Figure:
        figure = basic.bars(
            list(bed.tasks),
            {"base": bed.before, "merged": found.accuracies, "own expert": bed.own},
            title=f"Who reads what at λ = {found.choice.scale:.2f}?",
            subtitle=found.choice.method,
            x_title="task",
            y_title="test accuracy",
            theme=self.theme,
        )
        return figure.update_yaxes(range=[0, 1])

    def _spectra(self, bed: Merges, found: Measured) -> go.Figure:
        after = {f"{found.choice.method}, λ = {found.choice.scale:.2f}": found.spectrum}
        title = f"Change of {self._layer_name(found)}"
        figure = figures.spectra(found.layer.spectra, after, theme=self.theme, title=title)
        return figure.update_layout(legend={"x": 1, "xanchor": "right", "y": 1, "yanchor": "top"})

    def _cosines(self, bed: Merges, _: None) -> go.Figure:
        return figures.task_cosines(bed.cosines, list(bed.tasks), theme=self.theme, subtitle="")

    def _conflict(self, bed: Merges, _: None) -> go.Figure:
        return figures.sign_conflict(bed.conflict, bed.vectors.n, theme=self.theme)

    def _overlap(self, bed: Merges, found: Measured) -> go.Figure:
        layer, title = found.layer, f"Do the tasks share directions in {self._layer_name(found)}?"
        return figures.subspace_overlap(
            layer.overlaps, list(bed.tasks), rank=layer.rank, dim=layer.dim, theme=self.theme, title=title
        )

    def _layer_name(self, found: Measured) -> str:
        return found.choice.layer.removesuffix(".weight")

    # -- composition

    def _compose(self) -> pn.Column:
        brand = text('<div class="brand"><span>◆</span> workbench merging</div>', width=175)
        wide = {"sizing_mode": "stretch_width", "margin": 0}
        top = pn.Row(brand, self.size, self.status, self.dark, stylesheets=[style.BAR], **wide)
        knobs = (self.method, self.share_text, self.share, self.scale_text, self.scale, self.layer)
        return pn.Column(
            top,
            pn.Row(*knobs, stylesheets=[style.BAR], **wide),
            grid(list(self.cards.values())),
            Pulse((self.poll, POLL_MS)),
            css_classes=self._classes(),
            stylesheets=[style.ROOT],
            **wide,
        )

    def _darken(self) -> None:
        self._root.css_classes = self._classes()

    def _classes(self) -> list[str]:
        return ["wb", *(["wb-page"] if served() else []), f"wb-{self.theme}"]

    def __panel__(self):
        return self._root
