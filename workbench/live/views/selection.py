"""What is shown: one run or two, which layer, which step, which theme. The views of a page share one selection."""

from pathlib import Path

import param

from workbench.figures.theme import THEMES
from workbench.live.records import DIVISIONS, Division
from workbench.live.store import Run, find
from workbench.live.views.readings import Readings


class Selection(param.Parameterized):
    """The reader's choices; views redraw when any of them changes.

    ``layer`` counts from 0. ``by`` is what measures of parts are split by, see ``division``. ``step`` None follows the
    newest step. ``news`` counts the polls that found something new.
    """

    run = param.ClassSelector(class_=Readings, allow_None=True)
    compare = param.ClassSelector(class_=Readings, allow_None=True)
    layer = param.Integer(default=0, bounds=(0, None))
    by = param.Selector(default="domain", objects=list(DIVISIONS))
    step = param.Integer(default=None, allow_None=True)
    theme = param.Selector(default="light", objects=list(THEMES))
    news = param.Integer(default=0)

    settled = param.Callable(default=lambda: True, doc="whether the browser has drawn what is on show")

    CHOICES = ("run", "compare", "layer", "by", "step", "theme", "news")

    @property
    def division(self) -> Division:
        """What is split, by domain or by modality."""
        return DIVISIONS[self.by]

    @property
    def shown(self) -> list[Readings]:
        """The runs on show, at most two."""
        return [readings for readings in (self.run, self.compare) if readings is not None]

    @property
    def last_step(self) -> int:
        """The last step of the runs on show; -1 where there is none."""
        return max((readings.last_step for readings in self.shown), default=-1)

    def short_name(self, run: Readings) -> str:
        """A run's arm where that tells those on show apart, or else its name."""
        arms = {shown.arm for shown in self.shown}
        return run.arm if None not in arms and len(arms) == len(self.shown) else run.name

    def poll(self) -> None:
        """Look at the runs again, unless what was drawn last is still under way; redraws if there is anything new."""
        if self.settled() and any([readings.poll() for readings in self.shown]):  # a list: each of them is polled
            self.news += 1

    def choose(self, run: Run | Path | str | None = None, compare: Run | Path | str | None = None, **more) -> None:
        """Show ``run`` and beside it ``compare`` (a run, its name or its path); ``InputError`` for an unknown one."""
        opened = {"run": opened_run(run), "compare": opened_run(compare)}
        for readings in self.shown:
            if readings not in opened.values():
                readings.run.close()
        self.param.update(**opened, **more)

    def close(self) -> None:
        """Let go of the files."""
        for readings in self.shown:
            readings.run.close()


def opened_run(run: Run | Readings | Path | str | None) -> Readings | None:
    """Readings of a run given as itself, by name or by path."""
    if run is None or isinstance(run, Readings):
        return run
    return Readings(run if isinstance(run, Run) else find(run))
