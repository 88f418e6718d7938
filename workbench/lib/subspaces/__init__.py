"""Subspaces: tasks that share one space and conflict in it. One file per system."""
