"""Every system with its claim and its verdict: `panel serve apps/verdicts.py`, then /verdicts?theme=dark."""

from workbench.verdicts.served import serve_page

serve_page()
