"""SMoRA: every rank of one LoRA is an expert.

Zhao et al. 2025, "Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning"
(arXiv:2501.15103). E LoRAs of rank r behind a router are ONE LoRA of rank R = E r whose rank vector is multiplied by
the gates, each repeated r times (`RankRoutedLoRA.from_lora_experts` makes the one of the other). The size of a block is
therefore free, and SMoRA takes blocks of b = 1: with u = dropout(x), which router and experts share,

    z = sigmoid(Wr u)                          (N, R / b); a score counts for the b ranks of its block
    K(u) = the k / b blocks of largest z + c   c: a bias that balances, no parameter, 0 at the start
    g_j = k z_j / sum of z over the ranks in K(u), for those ranks; their sum is k
    y = W x + (alpha / k) sum_j g_j B[:, j] (A[j] . u)
    c_j += gamma sign(mean load - load_j)      in training; there is no auxiliary loss

In the released code (github.com/StyxXuan/smora) z + c stands for z in the gates as well; `bias_in_gate=True` is that
form. The two cannot be told apart while c is small against z, as it is there: gamma = 1e-5 takes 10,000 steps to
matter. The default here, 1e-3, is meant for short runs.

The released code moves the bias inside the forward pass. Here a forward only counts the load; the bias moves at the end
of the training step, or, in a loop that knows of no such end, at the next forward in training. A forward that
activation checkpointing repeats sees the bias it saw before, and counts nothing.

The sum is computed densely, all R ranks at once and multiplied by the gates: on a CPU nothing is faster while R is not
much above the layer's width. `indexed_low_rank` computes the k ranks alone, to check it by.

Tensor letters: N tokens, I input width, O output width, R ranks, b ranks of a block, k active ranks.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.adapt import Adapter, RoutedLinear
from workbench.lib.core.adapt.layer import plain
from workbench.lib.core.balance import LossFreeBias
from workbench.lib.core.low_rank import LowRankExperts, fitting_rank
from workbench.lib.core.recompute import recomputing
from workbench.lib.core.routers import check_finite, check_tokens, check_top_k
from workbench.lib.core.routing import Context, Routing

METHOD = Method(
    slug="smora",
    title="SMoRA: Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning",
    family="lora_experts",
    year=2025,
    paper="arXiv:2501.15103",
    claim="Routing single ranks of one LoRA beats routing whole LoRAs at equal total and active parameters.",
    objects=("RankRoutedLoRA", "RankRouter", "SMoRA", "indexed_low_rank"),
)

GATES = ("sigmoid", "softmax")
BACKENDS = ("dense", "gather")


def example() -> nn.Module:
    """A linear layer with sixteen ranks beside it, of which each token uses four."""
    layer = RankRoutedLoRA(nn.Linear(32, 32), rank=16, active_rank=4)
    nn.init.normal_(layer.experts.b, std=0.02)
    return layer


def indexed_low_rank(
    x: Float[Tensor, "tokens d_in"],
    a: Float[Tensor, "rank d_in"],
    b: Float[Tensor, "d_out rank"],
    index: Int64[Tensor, "tokens k"],
    weight: Float[Tensor, "tokens k"],
    backend: str = "gather",
) -> Float[Tensor, "tokens d_out"]:
    """y_n = sum over the k ranks j of token n of weight_nj b[:, j] (a[j] . x_n).

    Args:
        index: k different ranks of each token.
        backend: "gather" reads the k rows of each token, at 2 N k (I + O) operations and N k (I + O) numbers of memory;
            "dense" computes all ranks and multiplies by the weights, at 2 N R (I + O) in two matrix products.
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if backend == "dense":
        gates = weight.new_zeros(x.shape[0], a.shape[0]).scatter(1, index, weight)
        return (x @ a.T * gates.to(x.dtype)) @ b.T
    codes = torch.einsum("nki,ni->nk", a[index], x) * weight.to(x.dtype)
    return torch.einsum("nk,nko->no", codes, b.T[index])


class RankRouter(nn.Module):
    """Gates of sum K on the K best blocks of ranks, with a load balanced by a bias on the selection.

    `Routing.probs` are the scores divided by their sum over ALL blocks; the gates are K times their share among the
    chosen ones. `Routing.logits` is Wr u.

    Args:
        n_blocks: R / b.
        top_k: K = k / b.
        gate: "sigmoid" scores as in the paper, or "softmax", which makes a block of ranks an expert of the usual
            mixture of LoRAs with renormalised weights (times K).
        bias_rate: gamma, 0 for no balancing.
        bias_in_gate: the gates are those of z + c, as in the released code.
        router_dim: scores see a learned projection of u to so many dimensions, which makes the size of the router
            almost independent of the number of blocks; None for u itself.
    """

    def __init__(
        self,
        d_in: int,
        n_blocks: int,
        top_k: int,
        gate: str = "sigmoid",
        bias_rate: float = 1e-3,
        bias_in_gate: bool = False,
        router_dim: int | None = None,
    ):
        super().__init__()
        check_top_k(top_k, n_blocks)
        if gate not in GATES:
            raise unknown("gate", gate, GATES)
        if not bias_rate >= 0:
            raise InputError(f"bias_rate is {bias_rate} but must be at least 0")
        if router_dim is not None and router_dim < 1:
            raise InputError(f"router_dim is {router_dim} but must be at least 1, or None for the layer's width")
        self.n_experts, self.top_k, self.gate, self.bias_in_gate = n_blocks, top_k, gate, bias_in_gate
        self.coefficients: dict[str, float] = {}
        self.reduce = nn.Identity() if router_dim is None else nn.Linear(d_in, router_dim, bias=False)
        self.projection = nn.Linear(d_in if router_dim is None else router_dim, n_blocks, bias=False)
        self.bias = LossFreeBias(n_blocks, bias_rate) if bias_rate else None

    def set_top_k(self, top_k: int) -> None:
        """Change K from the next forward on; the scale alpha / k of the update stays."""
        check_top_k(top_k, self.n_experts)
        self.top_k = top_k

    def forward(self, x: Float[Tensor, "tokens d_in"], context: Context | None = None) -> Routing:
        check_tokens(x)
        logits = self.projection(self.reduce(x.to(self.projection.weight.dtype)))
        check_finite(logits)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # in logarithms, because scores that are all tiny still have a share of their sum
        log_z = F.logsigmoid(logits) if self.gate == "sigmoid" else F.log_softmax(logits, -1)
        probs = log_z.softmax(-1)
        counted = self.bias is not None and self.training and not recomputing()
        if counted:
            self.bias.after_step()  # of the last forward, unless the training loop has done it
        if self.bias is None:
            biased = log_z
        else:
            biased = log_z.exp() + (self.bias.bias if context is None or context.bias is None else context.bias)
        index = biased.topk(self.top_k, dim=-1).indices
        if self.bias_in_gate and self.bias is not None:
            chosen = biased.gather(1, index)
            weight = self.top_k * chosen / chosen.sum(-1, keepdim=True)
        else:
            weight = self.top_k * log_z.gather(1, index).softmax(-1)  # z by the sum of the chosen z
        routing = Routing.fixed(index, weight, self.n_experts, probs=probs, logits=logits)
        if counted:
            self.bias.count(routing, None if context is None else context.mask)
        return routing


class RankRoutedLoRA(RoutedLinear):
    """y = W x + (alpha / k) sum over the k active ranks j of g_j B[:, j] (A[j] . u), u = dropout(x).

    `experts` is a bank of R / b LoRAs of rank b, the blocks.

    Args:
        base: the frozen layer.
        rank: R, a multiple of `block_size`.
        active_rank: k, a multiple of `block_size`; not above R or the layer's smaller width.
        block_size: b, ranks that are gated together.
        alpha: numerator of the scale alpha / k. Since the gates have the sum k, alpha is what their weights add up to.
        dropout: of u, which router and experts share.
        router: options of `RankRouter`: gate, bias_rate, bias_in_gate, router_dim.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 64,
        active_rank: int = 8,
        block_size: int = 1,
        alpha: float = 16.0,
        dropout: float = 0.0,
        **router,
    ):
        if block_size < 1:
            raise InputError(f"block_size is {block_size} but must be at least 1")
        for name, value in (("rank", rank), ("active_rank", active_rank)):
            if value < 1 or value % block_size:
                raise InputError(f"{name} is {value} but must be a multiple of block_size = {block_size}, at least 1")
        most = min(rank, base.in_features, base.out_features)
        if active_rank > most:
            raise InputError(f"active_rank is {active_rank} but must be at most rank and the layer's widths: {most}")
        n_blocks, widths = rank // block_size, (base.in_features, base.out_features)
        bank = LowRankExperts(n_blocks, *widths, block_size, alpha * block_size / active_rank)
        super().__init__(base, RankRouter(widths[0], n_blocks, active_rank // block_size, **router), bank, dropout)

    @classmethod
    def from_lora_experts(
        cls,
        base: nn.Linear,
        a: Tensor,
        b: Tensor,
        top_k: int,
        scale: float = 1.0,
        **router,
    ) -> "RankRoutedLoRA":
        """The one LoRA that a mixture of E LoRAs is: y = W x + sum of the top K of scale w_e B_e A_e x, sum w = 1.

        With gate="softmax" and without a bias the weights w are the renormalised top-K softmax of the router.

        Args:
            a, b: (E, r, I) and (E, O, r).
            router: options of `RankRouter`.
        """
        if a.shape[:2] != (b.shape[0], b.shape[2]):
            raise InputError(f"a has shape {tuple(a.shape)} but must be (E, r, I) with b {tuple(b.shape)} = (E, O, r)")
        n_experts, rank, _ = a.shape
        layer = cls(base, n_experts * rank, top_k * rank, rank, scale * rank, **router).to(a)
        with torch.no_grad():
            layer.experts.a.copy_(a)
            layer.experts.b.copy_(b)
        return layer

    def one_lora(self) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
        """A and B of the one LoRA of rank R, B with the scale in it."""
        bank = self.experts
        scaled = bank.b * bank.scale[:, None, None]
        return bank.a.flatten(0, 1), scaled.transpose(0, 1).flatten(1)

    def rank_routing(self, routing: Routing) -> tuple[Int64[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
        """(index, gate) of the k active ranks of each token: what the chosen blocks mean for `one_lora`."""
        b = self.experts.rank
        index = routing.indices[:, :, None] * b + torch.arange(b, device=routing.expert.device)
        return index.flatten(1), routing.weights.repeat_interleave(b, dim=1)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        call, tokens = self.begin(x), self.dropout(plain(x)).reshape(-1, x.shape[-1])
        routing = self.router(tokens, call.context)
        bias = getattr(self.router, "bias", None)  # a router in its place need not have one
        if bias is not None and not call.repeated:
            call.context.bias = bias.bias.clone()  # it may move before a checkpoint repeats this
        self.tell(call, routing, self.router.coefficients)
        return call.carry(self.base(x) + self.experts(tokens, routing, "dense").view(*x.shape[:-1], -1))


class SMoRA(Adapter):
    """SMoRA on every wanted layer. It is told nothing beside the input.

    Args:
        rank: R; default 64, or the layer's smaller width where that is less, rounded down to whole blocks.
        active_rank: k; default an eighth of R, in whole blocks and at least one, as the paper's 8 of 64.
        block_size: b; 1 is SMoRA, r makes LoRAs of rank r the experts.
        alpha: default 2 k, which is the paper's 16 at its k of 8.
        dropout, gate, bias_rate, bias_in_gate, router_dim: see `RankRoutedLoRA` and `RankRouter`.
    """

    slug = "smora"

    def __init__(
        self,
        rank: int | None = None,
        active_rank: int | None = None,
        block_size: int = 1,
        alpha: float | None = None,
        dropout: float = 0.0,
        gate: str = "sigmoid",
        bias_rate: float = 1e-3,
        bias_in_gate: bool = False,
        router_dim: int | None = None,
    ):
        if block_size < 1:
            raise InputError(f"block_size is {block_size} but must be at least 1")
        self.rank, self.active_rank, self.block_size, self.alpha = rank, active_rank, block_size, alpha
        self.dropout = dropout
        self.router = {
            "gate": gate,
            "bias_rate": bias_rate,
            "bias_in_gate": bias_in_gate,
            "router_dim": router_dim,
        }

    def linear(self, layer: nn.Linear, name: str) -> RankRoutedLoRA:
        b, rank, k = self.block_size, self.rank, self.active_rank
        if rank is None:
            rank = max(b, fitting_rank(None, layer, 64) // b * b)
        if k is None:
            k = max(b, rank // (8 * b) * b)
        alpha = 2 * k if self.alpha is None else self.alpha
        return RankRoutedLoRA(layer, rank, k, b, alpha, self.dropout, **self.router)


ADAPTER = SMoRA
