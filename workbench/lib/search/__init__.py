"""Search: architectures found or arranged. One file per system."""
