"""Data mixtures: what to train on, and in which proportion. One file per system."""
