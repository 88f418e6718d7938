"""The page of a merge as a page of `panel serve`: ``/merging?method=ties&size=smoke&theme=dark``."""

from urllib.parse import urlencode

import panel as pn

from workbench.errors import InputError, unknown
from workbench.live import guard
from workbench.live.views import style
from workbench.live.views.plot import Plot
from workbench.merging.measure import SIZES, methods
from workbench.merging.page import MergingPage


def serve_page() -> MergingPage | None:
    """Show the page in this server session, and keep the address up to date.

    What is unknown in the address is named on the page. None where the session is to show nothing; see `guard.enter`.
    """
    pn.extension(raw_css=[style.PAGE], js_files={"plotly": Plot.script()})
    if not guard.enter():
        return None
    asked, wrong = {}, ""
    try:
        asked = guard.asked()
    except InputError as error:
        wrong = str(error)
    given = {}
    for name, known in (("size", SIZES), ("method", methods())):
        if asked.get(name) in known:
            given[name] = asked[name]
        elif name in asked:
            wrong = str(unknown(name, asked[name], known))
    page = MergingPage(**given, theme="dark" if asked.get("theme") == "dark" else "light")
    page.tell(wrong)

    def keep_address(*_) -> None:
        query = {"size": page.size.value, "method": page.method.value}
        if page.theme == "dark":
            query["theme"] = "dark"
        if pn.state.location is not None:
            pn.state.location.search = f"?{urlencode(query)}"

    for widget in (page.size, page.method, page.dark):
        widget.param.watch(keep_address, "value")
    pn.state.on_session_destroyed(lambda _: page.close())
    page.servable(title="workbench merging")
    return page
