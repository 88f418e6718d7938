"""Gradient conflict of a run, live: `panel serve apps/conflict.py`, then /conflict?run=NAME&theme=dark."""

from workbench.live.views import ConflictView
from workbench.live.views.served import serve_page

serve_page(ConflictView)
