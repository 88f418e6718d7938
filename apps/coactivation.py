"""Expert co-activation of a run, live: `panel serve apps/coactivation.py --address 127.0.0.1`,
then /coactivation?run=NAME&theme=dark."""

from workbench.live.views import CoactivationView
from workbench.live.views.served import serve_page

serve_page(CoactivationView)
