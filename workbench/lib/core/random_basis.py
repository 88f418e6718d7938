"""A fixed random basis that is known by its seed alone: the operator that sums it, its numbers, and their generator."""

from workbench.kernels.random_basis import philox, random_basis, uniform

__all__ = ["philox", "random_basis", "uniform"]
