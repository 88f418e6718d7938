"""The studies of the attention family."""
