"""Search: architectures found, and made by hand. One file per system; cells are in `workbench.lib.core.cells`."""
