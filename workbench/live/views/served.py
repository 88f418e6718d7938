"""A page of `panel serve`, made from the address: ``?run=NAME&compare=NAME&theme=dark``."""

from urllib.parse import urlencode

import panel as pn

from workbench.figures.theme import THEMES
from workbench.live.store import run_name
from workbench.live.views import style
from workbench.live.views.page import Workbench
from workbench.live.views.plot import Plot
from workbench.live.views.view import View


def serve_page(*views: type[View]) -> Workbench:
    """Show the given views (all of them, if none) in this server session, and keep the address up to date.

    Unknown runs are named on the page; an unknown theme is the light one.
    """
    pn.extension(raw_css=[style.PAGE], js_files={"plotly": Plot.script()})
    asked = {name: values[-1].decode() for name, values in pn.state.session_args.items() if values}
    theme = asked.get("theme", "light")
    page = Workbench(
        asked.get("run"), asked.get("compare"), theme=theme if theme in THEMES else "light", views=views or None
    )

    def keep_address(*_) -> None:
        chosen = page.selection
        shown = {"run": chosen.run, "compare": chosen.compare}
        query = {key: run_name(readings.run.folder, page.root) for key, readings in shown.items() if readings}
        if chosen.theme == "dark":
            query["theme"] = "dark"
        if pn.state.location is not None:
            pn.state.location.search = f"?{urlencode(query)}" if query else ""

    page.selection.param.watch(keep_address, ["run", "compare", "theme"])
    pn.state.on_session_destroyed(lambda _: page.selection.close())
    name = views[0].title.lower() if len(views) == 1 else "live"
    page.servable(title=f"workbench {name}")
    return page
