"""Optimisers of matrices: what they share, and how a gradient is projected to a low rank."""

from workbench.lib.core.optim.galore import GaLoreAdamW
from workbench.lib.core.optim.matrix import MatrixOptimizer, matrix_shape, parameter_groups
from workbench.lib.core.optim.projected import ProjectedAdamW
from workbench.lib.core.optim.projectors import PROJECTORS, ColumnSelector, Power, Projector, Random, Svd

__all__ = [
    "PROJECTORS",
    "ColumnSelector",
    "GaLoreAdamW",
    "MatrixOptimizer",
    "Power",
    "ProjectedAdamW",
    "Projector",
    "Random",
    "Svd",
    "matrix_shape",
    "parameter_groups",
]
