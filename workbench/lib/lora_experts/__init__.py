"""Mixtures of low-rank experts: one core, `lib.core.low_rank` and `lib.core.adapt`, and a file for each system."""
