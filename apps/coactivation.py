"""Expert co-activation of a run, live: `panel serve apps/coactivation.py`, then /coactivation?run=NAME&theme=dark."""

from workbench.live.views import CoactivationView
from workbench.live.views.served import serve_page

serve_page(CoactivationView)
