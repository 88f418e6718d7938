"""The page of sliders as a page of `panel serve`: ``/sliders?network=deblur&theme=dark``."""

import panel as pn

from workbench.live import guard
from workbench.live.views import address, style
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
    given, wrong = address.chosen({"network": NETWORKS, "size": SIZES})
    page = SlidersPage(**given)
    page.tell(wrong)
    address.keep({"network": page.network}, page.dark, size=page.size)
    page.servable(title="workbench sliders")
    return page
