"""The studies of the kernels family."""
