"""All live views of a run on one page: `panel serve apps/*.py`, then /live?run=NAME&compare=NAME&theme=dark."""

from workbench.live.views.served import serve_page

serve_page()
