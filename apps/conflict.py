"""Gradient conflict of a run, live: `panel serve apps/conflict.py --address 127.0.0.1`,
then /conflict?run=NAME&theme=dark."""

from workbench.live.views import ConflictView
from workbench.live.views.served import serve_page

serve_page(ConflictView)
