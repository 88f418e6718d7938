"""Weights and optimiser states of low rank, a file for each system; the layers are of `lib.core.factored`."""
