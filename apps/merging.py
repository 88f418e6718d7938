"""Merges of eight experts, live: `panel serve apps/merging.py --address 127.0.0.1`,
then /merging?method=ties&theme=dark."""

from workbench.merging.served import serve_page

serve_page()
