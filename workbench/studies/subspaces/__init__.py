"""The studies of the family of subspaces."""
