"""The page of sliders as a page of `panel serve`: ``/sliders?network=deblur&theme=dark``."""

from urllib.parse import urlencode

import panel as pn

from workbench.errors import InputError, unknown
from workbench.live import guard
from workbench.live.views import style
from workbench.live.views.plot import Plot
from workbench.sliders.opening import NETWORKS, SIZES
from workbench.sliders.page import SlidersPage


def serve_page() -> SlidersPage | None:
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
    for name, known in (("network", NETWORKS), ("size", SIZES)):
        if asked.get(name) in known:
            given[name] = asked[name]
        elif name in asked:
            wrong = str(unknown(name, asked[name], known))
    page = SlidersPage(**given, theme="dark" if asked.get("theme") == "dark" else "light")
    page.tell(wrong)

    def keep_address(*_) -> None:
        query = {"network": page.network.value, "size": page.size}
        if page.theme == "dark":
            query["theme"] = "dark"
        if pn.state.location is not None:
            pn.state.location.search = f"?{urlencode(query)}"

    for control in (page.network, page.dark):
        control.param.watch(keep_address, "value")
    page.servable(title="workbench sliders")
    return page
