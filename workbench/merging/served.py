"""The page of a merge as a page of `panel serve`: ``/merging?method=ties&size=smoke&theme=dark``."""

import panel as pn

from workbench.live import guard
from workbench.live.views import address, style
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
    given, wrong = address.chosen({"size": SIZES, "method": methods()})
    page = MergingPage(**given)
    page.tell(wrong)
    address.keep({"size": page.size, "method": page.method}, page.dark)
    pn.state.on_session_destroyed(lambda _: page.close())
    page.servable(title="workbench merging")
    return page
