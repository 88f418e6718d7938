"""LLaVA-MoLE: one LoRA expert a token in every feed-forward block, so that domains that conflict are kept apart.

Chen et al. 2024, "LLaVA-MoLE: Sparse Mixture of LoRA Experts for Mitigating Data Conflicts in Instruction Finetuning
MLLMs" (arXiv:2401.16160); public code: forwchen/LLaVA-MoLE. For the tokens x of a block:

    p = softmax(x Wr + b),   j* = argmax p                         the same j* for all linear layers of the block
    each linear layer:  W x + s B_j* A_j* x,  s = alpha / r        its weight is 1, not p
    loss = w mean over samples of sum_j mean(p_j) mean(1[j = j*])  means over the sample's tokens of ALL layers

Without a factor K the loss is 1 / K for uniform p. Attention and other layers outside the blocks get one plain LoRA of
the same rank.

How the router is to learn from the task is the open question. A weight of 1 has no gradient, and the released code
trains the router by the balance loss alone; the paper speaks of learned routing. So `router_grad` is one of

    "straight_through"  the gates are onehot + p - stop(p): the forward of the paper, and to every p_j, chosen or not,
                        the gradient that its update would have had, <dL/dy, s B_j A_j x> summed over the linear layers
    "balance_only"      as released: no gradient from the task
    "prob_scaled"       the chosen update times p_j* (Switch); the frozen block is not scaled
    "dense"             every linear layer adds sum_j p_j s B_j A_j x, in training and in use (the released option)

Straight-through needs the codes A_j x of all K experts while gradients are wanted, K r numbers a token and no output of
any other expert; in use only the chosen expert is computed where K r is above the layer's width (see
`LowRankExperts.forward`), at a cost that does not depend on K.

Tensor letters: N tokens, D model width, K experts, r rank.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.adapt import Adapted, Adapter, LoRALinear, adapt
from workbench.lib.core.adapt.expert_ffn import JointBalance, RoutedFeedForward, activated
from workbench.lib.core.adapt.feed_forward import FeedForward
from workbench.lib.core.experts import GLU
from workbench.lib.core.low_rank import LowRankExperts, fitting_rank
from workbench.lib.core.routers import TopKRouter
from workbench.lib.core.routing import Context, Routing

METHOD = Method(
    slug="llava-mole",
    title="LLaVA-MoLE: Sparse Mixture of LoRA Experts for Mitigating Data Conflicts in Instruction Finetuning MLLMs",
    family="lora_experts",
    year=2024,
    paper="arXiv:2401.16160",
    claim="Top-1 LoRA experts undo the loss that mixing domains causes in one LoRA, at the cost of one LoRA per token.",
    objects=("LLaVAMoLE", "Top1Router", "Top1FeedForward"),
)

ROUTER_GRADS = ("straight_through", "balance_only", "prob_scaled", "dense")


def example() -> nn.Module:
    """A gated block with three LoRA experts on its matrices."""
    return adapt(nn.Sequential(GLU(32, 48)), "llava-mole", rank=4).model


class Top1Router(TopKRouter):
    """The likeliest expert with weight 1, or p_j* ("prob_scaled"), or all of them with weights p ("dense").

    Options as in `TopKRouter`. The map has a bias, and the usual initialisation of a linear layer.
    """

    def __init__(self, d_model: int, n_experts: int, router_grad: str = "straight_through", **options):
        if router_grad not in ROUTER_GRADS:
            raise unknown("router_grad", router_grad, ROUTER_GRADS)
        super().__init__(n_experts, n_experts if router_grad == "dense" else 1, renormalize=False, **options)
        self.router_grad = router_grad
        self.projection = nn.Linear(d_model, n_experts)

    def scores(self, x: Float[Tensor, "tokens dim"], context: Context) -> Float[Tensor, "tokens experts"]:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.linear(x, self.projection.weight.to(x.dtype), self.projection.bias.to(x.dtype))

    def route(self, logits: Float[Tensor, "tokens experts"], mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        routing = super().route(logits, mask)
        if self.router_grad in ("straight_through", "balance_only"):
            routing.weight = torch.ones_like(routing.weight)
        return routing

    def set_top_k(self, top_k: int) -> None:
        """K is part of the rule."""
        if top_k != self.top_k:
            raise InputError(f"top_k is {top_k} but this rule always has {self.top_k}")


class Top1FeedForward(RoutedFeedForward):
    """The updates are mixed in each linear layer, by the gates of one decision.

    With one expert a token that is the same as whole blocks as experts. Dense gates are another function than a dense
    mixture of blocks.

    Attributes:
        path: how a bank computes the updates of chosen experts, see `LowRankExperts.forward`.
    """

    path: str | None = None

    def mix(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Float[Tensor, "tokens d_out"]:
        inputs = dict.fromkeys(name for name in (self.block.gate, self.block.up) if name)
        hidden = activated(self.block, {name: self._linear(name, x, routing) for name in inputs})
        return self._linear(self.block.down, hidden, routing)

    def _linear(self, name: str, x: Float[Tensor, "tokens d_in"], routing: Routing) -> Float[Tensor, "tokens d_out"]:
        bank, dropped, probs = self.experts[name], self.dropout(x), routing.probs
        if self.router.router_grad == "straight_through" and probs.requires_grad:
            update = bank.gated(dropped, routing.dense() + (probs - probs.detach()))
        else:
            update = bank(dropped, routing, self.path)
        return self.block.linears[name](x) + update


class LLaVAMoLE(Adapter):
    """Top-1 experts in every feed-forward block whose linear layers are all wanted, LoRA on the other wanted layers.

    A model without any block the workbench knows becomes an ordinary LoRA, see `mixlora`.

    Args:
        experts: K.
        rank: r of the experts and of the plain LoRAs; default 8, or a layer's smaller width where that is less. (The
            released code has 32 with alpha 64, the name of its checkpoint says 16 and 32.)
        alpha: numerator of the scale; default r, so that the scale is 1.
        dropout: of the updates' input (released: 0.05).
        router_grad: what the router learns from, see the module.
        balance: w; 0 for no balance loss.
    """

    slug = "llava-mole"

    def __init__(
        self,
        experts: int = 3,
        rank: int | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
        router_grad: str = "straight_through",
        balance: float = 0.01,
    ):
        if router_grad not in ROUTER_GRADS:
            raise unknown("router_grad", router_grad, ROUTER_GRADS)
        self.experts, self.rank, self.alpha, self.dropout = experts, rank, alpha, dropout
        self.router_grad, self.balance = router_grad, balance

    def linear(self, layer: nn.Linear, name: str) -> LoRALinear:
        return LoRALinear(layer, fitting_rank(self.rank, layer), self.alpha, self.dropout)

    def feed_forward(self, block: FeedForward, name: str) -> Top1FeedForward:
        coefficients = {"lbl": self.balance} if self.balance else None
        router = Top1Router(block.d_model, self.experts, self.router_grad, coefficients=coefficients)
        banks = {
            key: LowRankExperts(
                self.experts, layer.in_features, layer.out_features, fitting_rank(self.rank, layer), self.alpha
            )
            for key, layer in block.linears.items()
        }
        return Top1FeedForward(block, router, banks, self.dropout)

    def finish(self, adapted: Adapted) -> None:
        JointBalance(sample_value, likeliest, by_sample=True).tie(adapted)


def likeliest(routing: Routing) -> Bool[Tensor, "tokens experts"]:
    """1[j = j*], which is what the loss counts where all experts serve a token ("dense") as well."""
    return F.one_hot(routing.probs.argmax(-1), routing.n_experts).bool()


def sample_value(
    load: Float[Tensor, "samples experts"], probability: Float[Tensor, "samples experts"]
) -> Float[Tensor, " samples"]:
    """sum_j mean(p_j) mean(1[j = j*]); 1 / K with uniform probabilities."""
    return (load * probability).sum(1)


ADAPTER = LLaVAMoLE
