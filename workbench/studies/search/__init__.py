"""The studies of the search family."""
