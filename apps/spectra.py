"""Singular spectra of a run, live: `panel serve apps/spectra.py --address 127.0.0.1`,
then /spectra?run=NAME&theme=dark."""

from workbench.live.views import SpectraView
from workbench.live.views.served import serve_page

serve_page(SpectraView)
