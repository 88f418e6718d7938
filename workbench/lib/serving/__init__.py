"""Serving: experts that do not fit in memory. One file per system."""
