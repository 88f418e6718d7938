"""Routing: which expert takes a token. One file per system; the baselines are in `workbench.lib.core.routers`."""
