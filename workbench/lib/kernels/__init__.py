"""Systems close to the hardware; the operators they run on are in `workbench.kernels`."""
