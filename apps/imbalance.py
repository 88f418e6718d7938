"""Routing imbalance of a run, live: `panel serve apps/imbalance.py --address 127.0.0.1`,
then /imbalance?run=NAME&theme=dark."""

from workbench.live.views import ImbalanceView
from workbench.live.views.served import serve_page

serve_page(ImbalanceView)
