"""Studies of merging. `tuning` has what they share: the experts of a seed, grids tuned on validation, the metric."""
