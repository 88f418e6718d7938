"""MixLoRA: every feed-forward block of a frozen model becomes a sparse mixture of whole blocks with LoRAs.

Li et al. 2024, "MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts"
(arXiv:2404.15159); public code: TUDB-Labs/MixLoRA (inference) and TUDB-Labs/MoE-PEFT (training). For the tokens h:

    p = softmax(h Wg)  in float32, Wg (D, E) from N(0, 0.02);  the K largest, divided by their sum: w
    y = sum_k w_k FFN_e(k)(h),   FFN_e: the frozen block with W + s B_e A_e for each of its matrices W,  s = alpha / r
    loss = c E sum_e f_e P_e,    f_e how often a token chose e (sums to K), P_e the mean of p_e, over ALL layers at once

The frozen block is inside every expert and the weights sum to 1: nothing is added to y, and B = 0 changes nothing.
With perfect balance the loss is c K. Because of the division, K = 1 gives the router no gradient but the balance
loss's. With DoRA (Liu et al. 2024, 2402.09353) an expert's layer is (m_e / |W + s B_e A_e|) (W + s B_e A_e), norms by
row and without a gradient, m_e trained. What is no feed-forward block, attention above all, gets a plain LoRA (or DoRA)
of its own rank, so a model without any block the workbench knows becomes an ordinary LoRA: OPT, for one, whose layers
compute theirs among other things (`report()` says why). Of packed experts, as Mixtral has, each is a block.

Apart from the published code: the output layer, too, runs once a token (LoRA only; see `RoutedFeedForward`); dropout's
mask is the same forward and backward; jitter changes what the router sees, not what the experts see. The balance
coefficient is the paper's 0.01 (the code's default is 0.001). Of the variants in the training code, top-p routing,
capacity limits and the router's z-loss are left out.

An expert can be written as a LoRA that peft loads, and read from one: `expert_loras`, `set_expert` of
`lib.core.adapt.expert_ffn`. Several adapters over one base are trained at once by `lib.lora_experts.multi_adapter`.

Tensor letters: N tokens, D model width, E experts, K active experts per token, r rank, O outputs, P routed pairs.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.lib.core.adapt import Adapted, AdaptedLayer, Adapter, LoRALinear, adapt
from workbench.lib.core.adapt.expert_ffn import JointBalance, RoutedFeedForward, combine
from workbench.lib.core.adapt.feed_forward import FeedForward
from workbench.lib.core.experts import GLU
from workbench.lib.core.low_rank import LowRankExperts, fitting_rank
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context, Routing

METHOD = Method(
    slug="mixlora",
    title="MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts",
    family="lora_experts",
    year=2024,
    paper="arXiv:2404.15159",
    claim="LoRA experts in every feed-forward block, chosen per token by a top-k router, beat one LoRA on several "
    "tasks at a comparable number of parameters.",
    objects=("MixLoRA", "MixLoRARouter", "DoRAExperts"),
)


def example() -> nn.Module:
    """A gated block whose experts have LoRAs on both of its matrices."""
    return adapt(nn.Sequential(GLU(32, 48)), "mixlora", experts=4, rank=4).model


class MixLoRARouter(LinearRouter):
    """Softmax in float32 over all experts, the K largest renormalised, for K = 1 too. Options as in `LinearRouter`."""

    def __init__(self, d_model: int, n_experts: int, top_k: int, **options):
        super().__init__(d_model, n_experts, top_k, renormalize=True, **options)

    def scores(self, x: Float[Tensor, "tokens dim"], context: Context) -> Float[Tensor, "tokens experts"]:
        x = self.jittered(x.to(torch.promote_types(x.dtype, torch.float32)))
        return F.linear(x, self.projection.weight.to(x.dtype))


class DoRAExperts(LowRankExperts):
    """A bank whose experts are DoRAs of one frozen matrix W (O, I): it has the lengths of their rows as well.

    Attributes:
        magnitude: (E, O) m_e, first the lengths of the rows of W.
    """

    def __init__(self, n_experts: int, weight: Float[Tensor, "d_out d_in"], rank: int, alpha: float | None = None):
        super().__init__(n_experts, weight.shape[1], weight.shape[0], rank, alpha)
        self.magnitude = nn.Parameter(weight.detach().norm(dim=1).to(self.a.dtype).repeat(n_experts, 1))

    def row_scales(self, weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "experts d_out"]:
        """m_e / |W + s B_e A_e|, the norm without a gradient. A row of length 0 stays 0."""
        exact = torch.autocast(weight.device.type, enabled=False)
        with torch.no_grad(), exact:  # |w + b A|^2 = |w|^2 + 2 b (A w) + b (A A^T) b, without the E full matrices
            b, weight = self.b * self.scale[:, None, None], weight.to(self.a.dtype)
            cross = 2 * (b * (self.a @ weight.T).transpose(1, 2)).sum(-1)
            square = weight.square().sum(1) + cross + (b @ (self.a @ self.a.transpose(1, 2)) * b).sum(-1)
            norm = square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()
        return self.magnitude / norm


class DoRAFeedForward(RoutedFeedForward):
    """The experts are DoRAs. Their rows have lengths of their own, so the output layer runs once for each pair."""

    def updated(
        self, name: str, frozen: Float[Tensor, "pairs d_out"], x: Float[Tensor, "pairs d_in"], pairs: Routing
    ) -> Float[Tensor, "pairs d_out"]:
        layer, bank = self.block.linears[name], self.experts[name]
        bias = 0.0 if layer.bias is None else layer.bias.to(frozen.dtype)
        scales = bank.row_scales(layer.weight)[pairs.expert].to(frozen.dtype)
        return scales * (frozen - bias + bank(self.dropout(x), pairs)) + bias

    def output(
        self, hidden: Float[Tensor, "pairs hidden"], pairs: Routing, routing: Routing
    ) -> Float[Tensor, "tokens d_out"]:
        down = self.block.down
        return combine(self.updated(down, self.block.linears[down](hidden), hidden, pairs), routing)


class DoRALinear(AdaptedLayer):
    """One DoRA of one linear layer."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float | None = None, dropout: float = 0.0):
        super().__init__(base)
        self.experts = DoRAExperts(1, base.weight, rank, alpha)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        bank, frozen = self.experts, self.base(x)
        bias = 0.0 if self.base.bias is None else self.base.bias.to(frozen.dtype)
        update = (self.dropout(x) @ bank.a[0].to(x.dtype).T) @ (bank.scale[0] * bank.b[0]).to(x.dtype).T
        return bank.row_scales(self.base.weight)[0].to(frozen.dtype) * (frozen - bias + update) + bias

    def fixed_update(self) -> Tensor:
        weight = self.base.weight
        return self.experts.row_scales(weight)[0, :, None] * (weight + self.experts.delta(0)) - weight


class MixLoRA(Adapter):
    """A mixture in every feed-forward block whose linear layers are all wanted, LoRA on the other wanted layers.

    Trained: of a block E r (inputs + outputs) summed over its matrices, and E D of its router; with DoRA E times the
    outputs more.

    Args:
        experts: E.
        rank: r of the experts; default 8, or a layer's smaller width where that is less.
        top_k: K; default 2, or E where that is less.
        alpha: numerator of the scale; default r, so that the scale is 1.
        dropout: of the updates' input.
        rslora: divide by the root of r instead of r (Kalajdzievski 2023, 2312.03732).
        dora: DoRA in place of LoRA, in the experts and beside them.
        attention_rank, attention_alpha: r and alpha of the layers outside the blocks; default as in the experts.
        balance: c; 0 for no balance loss.
        jitter: see `LinearRouter`.
    """

    slug = "mixlora"

    def __init__(
        self,
        experts: int = 8,
        rank: int | None = None,
        top_k: int | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        attention_rank: int | None = None,
        attention_alpha: float | None = None,
        balance: float = 0.01,
        jitter: float = 0.0,
    ):
        self.experts, self.rank, self.alpha = experts, rank, alpha
        self.top_k = min(2, experts) if top_k is None else top_k
        self.dropout, self.rslora, self.dora = dropout, rslora, dora
        self.attention_rank = rank if attention_rank is None else attention_rank
        self.attention_alpha = alpha if attention_alpha is None else attention_alpha
        self.balance, self.jitter = balance, jitter

    def linear(self, layer: nn.Linear, name: str) -> AdaptedLayer:
        rank = fitting_rank(self.attention_rank, layer)
        kind = DoRALinear if self.dora else LoRALinear
        return kind(layer, rank, self._alpha(rank, self.attention_alpha), self.dropout)

    def feed_forward(self, block: FeedForward, name: str) -> RoutedFeedForward:
        coefficients = {"lbl": self.balance} if self.balance else None
        router = MixLoRARouter(block.d_model, self.experts, self.top_k, jitter=self.jitter, coefficients=coefficients)
        banks = {key: self._bank(layer) for key, layer in block.linears.items()}
        return (DoRAFeedForward if self.dora else RoutedFeedForward)(block, router, banks, self.dropout)

    def finish(self, adapted: Adapted) -> None:
        JointBalance(switch_value).tie(adapted)

    def _bank(self, layer: nn.Linear) -> LowRankExperts:
        rank = fitting_rank(self.rank, layer)
        alpha = self._alpha(rank, self.alpha)
        if self.dora:
            return DoRAExperts(self.experts, layer.weight, rank, alpha)
        return LowRankExperts(self.experts, layer.in_features, layer.out_features, rank, alpha)

    def _alpha(self, rank: int, alpha: float | None) -> float | None:
        """What divided by r gives the scale."""
        return (rank if alpha is None else alpha) * math.sqrt(rank) if self.rslora and rank > 0 else alpha


def switch_value(
    load: Float[Tensor, "groups experts"], probability: Float[Tensor, "groups experts"]
) -> Float[Tensor, " groups"]:
    """E sum_e f_e P_e; K with uniform probabilities."""
    return load.shape[1] * (load * probability).sum(1)


ADAPTER = MixLoRA
