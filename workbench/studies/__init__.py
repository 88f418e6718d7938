"""A paper's claim as a runnable comparison: `workbench/studies/<family>/<slug>.py` with `STUDY`."""
