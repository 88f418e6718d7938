"""The studies of the sharing family."""
