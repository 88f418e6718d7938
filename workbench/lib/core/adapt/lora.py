"""LoRA (Hu et al. 2021, 2106.09685): one low-rank update of a frozen linear layer. The baseline of the adapters."""

from jaxtyping import Float
from torch import Tensor, nn

from workbench.lib.core.adapt.adapted import Adapter
from workbench.lib.core.adapt.layer import AdaptedLayer
from workbench.lib.core.low_rank import LowRankExperts, MadeFactors, fitting_rank


class LoRALinear(AdaptedLayer):
    """y = W x + s B A dropout(x), s = alpha / r: a bank of one expert that every token uses."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float | None = None, dropout: float = 0.0):
        super().__init__(base)
        self.experts = LowRankExperts(1, base.in_features, base.out_features, rank, alpha)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        a, b = self.experts.a[0], self.experts.scale[0] * self.experts.b[0]
        return self.base(x) + (self.dropout(x) @ a.to(x.dtype).T) @ b.to(x.dtype).T

    def fixed_update(self) -> Tensor:
        return self.experts.delta(0)


class MadeLinear(AdaptedLayer):
    """y = W x + s B A dropout(x), with A and B as the `MadeFactors` make them."""

    def __init__(self, base: nn.Linear, experts: MadeFactors, dropout: float = 0.0):
        super().__init__(base)
        self.experts = experts
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        a, b = self.experts()
        return self.base(x) + (self.dropout(x) @ a.to(x.dtype).T) @ (self.experts.scale * b).to(x.dtype).T

    def fixed_update(self) -> Tensor:
        return self.experts.delta()


class LoRA(Adapter):
    """Plain LoRA on every wanted layer.

    Args:
        rank: r; default 8, or a layer's smaller width where that is less.
        alpha: numerator of the scale; default r, so that the scale is 1.
        dropout: of the update's input.
    """

    slug = "lora"

    def __init__(self, rank: int | None = None, alpha: float | None = None, dropout: float = 0.0):
        self.rank, self.alpha, self.dropout = rank, alpha, dropout

    def linear(self, layer: nn.Linear, name: str) -> LoRALinear:
        return LoRALinear(layer, fitting_rank(self.rank, layer), self.alpha, self.dropout)
