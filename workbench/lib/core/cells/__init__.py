"""Cells that architectures are made of. One file per cell."""
