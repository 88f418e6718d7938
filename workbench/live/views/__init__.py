"""The live views of a run: imbalance, co-activation, depth, spectra, gradient conflict, loss, processes, adaptation.

Each is one class, the same for notebooks and apps: ``ImbalanceView(run)`` in a cell shows it. ``Workbench`` puts them
on one page, with the runs to choose from and the controls of the trainer.
"""

import sys

import panel as pn

from workbench.live.views.adaptation import AdaptationView
from workbench.live.views.coactivation import CoactivationView
from workbench.live.views.conflict import ConflictView
from workbench.live.views.depth import DepthView
from workbench.live.views.imbalance import ImbalanceView
from workbench.live.views.loss import LossView
from workbench.live.views.overview import Overview
from workbench.live.views.page import VIEWS, Workbench
from workbench.live.views.processes import ProcessesView
from workbench.live.views.spectra import SpectraView

__all__ = [
    "VIEWS",
    "AdaptationView",
    "CoactivationView",
    "ConflictView",
    "DepthView",
    "ImbalanceView",
    "LossView",
    "Overview",
    "ProcessesView",
    "SpectraView",
    "Workbench",
]

if getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)() is not None:
    # a notebook: its output cells need the scripts, and from here, not from the network; a server session loads its own
    pn.extension("plotly", inline=True)
