"""The studies of the serving family."""
