"""Routing imbalance of a run, live: `panel serve apps/imbalance.py`, then /imbalance?run=NAME&theme=dark."""

from workbench.live.views import ImbalanceView
from workbench.live.views.served import serve_page

serve_page(ImbalanceView)
