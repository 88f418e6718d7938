"""Every system with its claim and its verdict: `panel serve apps/verdicts.py --address 127.0.0.1`,
then /verdicts?theme=dark."""

from workbench.verdicts.served import serve_page

serve_page()
