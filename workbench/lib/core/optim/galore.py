"""GaLore: Adam's moments of a gradient's leading singular directions, which are found anew every 200 steps.

Zhao et al. 2024, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection" (arXiv:2403.03507); public
code: jiaweizzhao/GaLore, `galore_torch`. That adds eps to sqrt(v) before the bias is corrected, and decays the weights
after the step and not before it; without decay, and for gradients far above eps, the steps are the same.
"""

from collections.abc import Iterable

from workbench.lib.core.optim.projected import ProjectedAdamW


class GaLoreAdamW(ProjectedAdamW):
    """See `ProjectedAdamW`; by default as its authors train: an SVD every 200 steps, 0.25 of the step, no remap."""

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-2,
        rank: int = 128,
        projector: str = "svd",
        update_gap: int = 200,
        scale: float = 0.25,
        remap: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, lr, rank, projector, update_gap, scale, remap, betas, eps, weight_decay)
