"""The studies of the imaging family."""
