"""The studies of the features family."""
