"""The studies of the routing family."""
