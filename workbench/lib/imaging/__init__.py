"""Imaging: experts, subspaces and knobs for images. One file per system."""
