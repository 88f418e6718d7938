"""A page of `panel serve`, made from the address: ``?run=NAME&compare=NAME&theme=dark&token=...``."""

from pathlib import Path
from urllib.parse import urlencode

import panel as pn

from workbench.errors import InputError
from workbench.figures.theme import THEMES
from workbench.live import guard
from workbench.live.store import Run, kept, run_name
from workbench.live.views import style
from workbench.live.views.page import Workbench
from workbench.live.views.plot import Plot
from workbench.live.views.view import View


def serve_page(*views: type[View]) -> Workbench | None:
    """Show the given views (all of them, if none) in this server session, and keep the address up to date.

    Only runs that are kept, by name; unknown ones are named on the page. An unknown theme is the light one. Without
    the token of the server the page is read-only. None where the session is to show nothing; see `guard.enter`.
    """
    pn.extension(raw_css=[style.PAGE], js_files={"plotly": Plot.script()})
    if not guard.enter():
        return None
    asked, wrong = {}, ""
    try:
        asked = guard.asked()
    except InputError as error:
        wrong = str(error)
    theme, token = asked.get("theme", "light"), asked.get(guard.TOKEN)
    control = guard.may_control(token)
    if token and not control:
        wrong = f"the {guard.TOKEN} in the address is not that of this server, so this page is read-only"
    page = Workbench(
        asked.get("run"),
        asked.get("compare"),
        theme=theme if theme in THEMES else "light",
        views=views or None,
        control=control,
        lookup=_by_name,
    )
    if wrong:
        page.tell(wrong)

    def keep_address(*_) -> None:
        chosen = page.selection
        runs = {"run": chosen.run, "compare": chosen.compare}
        query = {key: run_name(readings.run.folder, page.root) for key, readings in runs.items() if readings}
        if chosen.theme == "dark":
            query["theme"] = "dark"
        if control:
            query[guard.TOKEN] = token
        if pn.state.location is not None:
            pn.state.location.search = f"?{urlencode(query)}" if query else ""

    page.selection.param.watch(keep_address, ["run", "compare", "theme"])
    pn.state.on_session_destroyed(lambda _: page.selection.close())
    name = views[0].title.lower() if len(views) == 1 else "live"
    page.servable(title=f"workbench {name}")
    return page


def _by_name(name: str, root: Path) -> Run:
    """A run of `root`, or the one that the server was started for; an address leads to no other folder."""
    return Run(guard.shown[name]) if name in guard.shown else kept(name, root)
