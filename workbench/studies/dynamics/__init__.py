"""The studies of the dynamics family."""
