"""All live views of a run on one page: `panel serve apps/*.py --address 127.0.0.1`, then
/live?run=NAME&compare=NAME&theme=dark. It is read-only without the token, which the server says with its first page."""

from workbench.live.views.served import serve_page

serve_page()
