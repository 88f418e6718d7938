"""Dynamics: learned time series and signals. One file per system."""
