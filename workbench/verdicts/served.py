"""The page of verdicts as a page of `panel serve`: ``/verdicts?theme=dark``."""

from contextlib import suppress
from functools import cache
from html import escape

import panel as pn

from workbench.errors import InputError
from workbench.figures.theme import THEMES
from workbench.live import guard
from workbench.verdicts import packaged, page

FRAME = '<iframe srcdoc="{}" title="verdicts" style="display: block; width: 100%; height: 100vh; border: 0"></iframe>'


def serve_page() -> None:
    """Show the very page that `workbench verdicts` writes; it has a document of its own, and so its own styles."""
    pn.extension(raw_css=["html, body { margin: 0; }"])
    if not guard.enter():
        return
    theme = None
    with suppress(InputError):
        theme = guard.asked().get("theme")
    frame = pn.pane.HTML(_frame(theme if theme in THEMES else None), sizing_mode="stretch_width", margin=0)
    frame.servable(title="workbench verdicts")


@cache
def _frame(theme: str | None) -> str:
    return FRAME.format(escape(page(*packaged(), theme=theme)))
