"""The studies of the distributed family."""
