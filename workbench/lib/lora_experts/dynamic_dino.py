"""Dynamic-DINO: a trained feed-forward block becomes a mixture of slices of its own copies, and starts as what it was.

Lu et al. 2025, "Dynamic-DINO: Fine-Grained Mixture of Experts Tuning for Real-time Open-Vocabulary Object Detection"
(arXiv:2507.17436; no code is public). "MoE-Tuning" of F(x) = W2 phi(W1 x + b1) + b2, W1 (H, D), W2 (D, H):

    experts  N copies of F, each cut into k slices: rows block j of W1 and b1, columns block j of W2, and b2 / k.
             phi is element-wise, so the k slices of a copy sum to F. A gated block has its gate and up cut together.
    router   Wr (N k, D): N random rows ("centroids"), each repeated k times. At the start the k slices of a copy tie.
    gate     p = softmax(Wr x); the k largest of all N k:  w_i = k p_i / (sum of these p),   y = sum_i w_i E_i(x)
    loss     + 0.01 times the Switch loss of each layer, N k sum_e f_e P_e

A token costs one block whatever N and k are, and N (2 D H + H + k D) + N k D parameters are trained. At the start all
slices of one copy are chosen with weight 1 each: y = F(x). The scale k is inferred from that property (plain
renormalised weights give F / k). From there the task can only break ties inside a copy: its gradient, summed over the
router rows of a copy, is 0 while w depends on the ratios inside the copy, and the balance loss alone moves probability
between copies. For k = 1 the weight is the constant 1 (sparse upcycling), and the task never reaches the router.

Since every expert starts with k - 1 fixed partners, "experts that always work together" after training may be ties that
were never broken: compare with the start and with a null (`same_copy_share`, `measures.coactivation`, `curveball`).

The paper tunes attention and heads in full beside the mixtures, so every wanted linear layer outside a block gets a
trained copy of its weight. The frozen block stays in the layer, unused, so that the adaptation can be taken off.

Tensor letters: N copies, k slices a copy and active experts, E = N k, D model width, H hidden width of the block.
"""

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.adapt import AdaptedLayer, Adapter, RoutedLayer, adapt
from workbench.lib.core.adapt.feed_forward import FeedForward
from workbench.lib.core.adapt.layer import plain
from workbench.lib.core.balance import balance_losses
from workbench.lib.core.experts import GLU
from workbench.lib.core.routers import TopKRouter, check_finite, check_top_k
from workbench.lib.core.routing import Context, Routing

METHOD = Method(
    slug="dynamic-dino",
    title="Dynamic-DINO: Fine-Grained Mixture of Experts Tuning for Real-time Open-Vocabulary Object Detection",
    family="lora_experts",
    year=2025,
    paper="arXiv:2507.17436",
    claim="Slicing copies of a trained feed-forward into small experts starts as the dense model exactly and ends "
    "better at the same active cost.",
    objects=("DynamicDINO", "SliceExperts", "SliceRouter", "SlicedFeedForward", "same_copy_share"),
)

GATES = ("k_renorm", "renorm", "softmax")


def example() -> nn.Module:
    """A gated block as a mixture of 4 copies in 2 slices each."""
    return adapt(nn.Sequential(GLU(32, 48)), "dynamic-dino", experts=8).model


class SliceExperts(nn.Module):
    """N copies of a block, each cut into k slices; slice j of copy n is expert n k + j.

    Attributes:
        gate, up: (E, H / k, D); gate is None for a block without one.
        down: (E, O, H / k), O the width of the block's output.
        gate_bias, up_bias (E, H / k), down_bias (E, D): None where the block has none.

    Args:
        block: stays as it is.
        copies, slices: N and k; k must divide H.
        allocate: False gives experts with the random weights of a new `nn.Linear` instead, the control.
    """

    def __init__(self, block: FeedForward, copies: int, slices: int, allocate: bool = True):
        super().__init__()
        if copies < 1:
            raise InputError(f"copies is {copies} but must be at least 1")
        if slices < 1 or block.d_hidden % slices:
            raise InputError(f"slices is {slices} but must divide the block's hidden width, {block.d_hidden}")
        self.n_experts, self.slices, self.activation = copies * slices, slices, block.activation
        for name, (weight, bias) in _parts(block).items():
            rows = name != "down"
            weight = torch.stack(weight.detach().chunk(slices, 0 if rows else 1)).repeat(copies, 1, 1)
            if bias is not None:
                bias = bias.detach().view(slices, -1) if rows else (bias.detach() / slices).expand(slices, -1)
                bias = bias.repeat(copies, 1)
            if not allocate:
                bound = weight.shape[-1] ** -0.5
                weight, bias = (
                    None if t is None else torch.empty_like(t).uniform_(-bound, bound) for t in (weight, bias)
                )
            setattr(self, name, nn.Parameter(weight.clone()))
            self.register_parameter(f"{name}_bias", None if bias is None else nn.Parameter(bias.clone()))
        if block.gate is None:
            self.gate = self.gate_bias = None

    def forward(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Float[Tensor, "tokens d_out"]:
        """The weighted sum over each token's experts; every expert computes its own tokens only."""
        routing = routing.served()
        order = torch.argsort(routing.expert, stable=True)
        token, counts = routing.token[order], routing.counts.tolist()
        weight = routing.weight.to(x.dtype)[order, None].split(counts)
        names = [name for name in ("gate", "up", "down") if getattr(self, name) is not None]
        names += [f"{name}_bias" for name in names if getattr(self, f"{name}_bias") is not None]
        experts = zip(*(getattr(self, name).to(x.dtype).unbind(0) for name in names), strict=True)
        y = torch.cat(
            [
                self.slice(rows, dict(zip(names, expert, strict=True))) * w
                for rows, expert, w in zip(x[token].split(counts), experts, weight, strict=True)
            ]
        )
        return y.new_zeros(len(x), y.shape[1]).index_add(0, token, y)

    def slice(self, x: Float[Tensor, "tokens dim"], parts: dict[str, Tensor]) -> Float[Tensor, "tokens d_out"]:
        """One expert's output: a narrow block, of its weights and biases by name."""
        hidden = F.linear(x, parts["up"], parts.get("up_bias"))
        if "gate" in parts:
            hidden = self.activation(F.linear(x, parts["gate"], parts.get("gate_bias"))) * hidden
        else:
            hidden = self.activation(hidden)
        return F.linear(hidden, parts["down"], parts.get("down_bias"))

    def extra_repr(self) -> str:
        return (
            f"n_experts={self.n_experts}, slices={self.slices}, d_model={self.up.shape[2]}, d_hidden={self.up.shape[1]}"
        )


class SliceRouter(TopKRouter):
    """The k largest of all N k logits, weighted k softmax over these k, in float32: the weights of a token sum to k.

    Of equal logits the first wins, so that a token for which all copies tie (a zero vector) has one copy's slices too.
    A change of `top_k` leaves the sum of the weights at k: the output stays as large as a block's.

    Args:
        copies, slices: N and k.
        tie: repeat each row for the k slices of a copy; False draws all N k rows, the control.
        gate: "k_renorm"; for comparison "renorm", weights that sum to 1, or "softmax", p as it is.
        std: of the random rows.
        coefficients: of the balance losses, as in `TopKRouter`.
    """

    def __init__(
        self,
        d_model: int,
        copies: int,
        slices: int,
        *,
        tie: bool = True,
        gate: str = "k_renorm",
        std: float = 0.02,
        coefficients: dict[str, float] | None = None,
    ):
        super().__init__(copies * slices, slices, coefficients=coefficients)
        if gate not in GATES:
            raise unknown("gate", gate, GATES)
        self.slices, self.gate = slices, gate
        self.projection = nn.Linear(d_model, copies * slices, bias=False)
        with torch.no_grad():
            rows = torch.randn(copies if tie else copies * slices, d_model) * std
            self.projection.weight.copy_(rows.repeat_interleave(slices, 0) if tie else rows)

    def scores(self, x: Float[Tensor, "tokens dim"], context: Context) -> Float[Tensor, "tokens experts"]:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.linear(x, self.projection.weight.to(x.dtype))

    def route(self, logits: Float[Tensor, "tokens experts"], mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        check_finite(logits)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a half under autocast
        probs = torch.softmax(logits, dim=-1)
        indices = logits.argsort(dim=-1, descending=True, stable=True)[:, : self.top_k]
        if self.gate == "softmax":
            weights = probs.gather(-1, indices)
        else:
            scale = self.slices if self.gate == "k_renorm" else 1
            weights = scale * torch.softmax(logits.gather(-1, indices), dim=-1)
        routing = Routing.fixed(indices, weights, self.n_experts, probs=probs, logits=logits)
        routing.losses = balance_losses(routing, self.coefficients, mask)
        return routing


class SlicedFeedForward(RoutedLayer):
    """y = sum over k of N k slices; the frozen block is kept and takes no part.

    Attributes:
        router: see `SliceRouter`; sees the block's input.
        experts: see `SliceExperts`.
    """

    def __init__(self, block: FeedForward, router: nn.Module, experts: SliceExperts):
        super().__init__(block.module)
        if router.n_experts != experts.n_experts:
            raise InputError(f"router has {router.n_experts} experts but there are {experts.n_experts}")
        self.router, self.experts = router, experts

    @property
    def n_experts(self) -> int:
        return self.router.n_experts

    @property
    def top_k(self) -> int:
        return self.router.top_k

    def forward(self, x: Float[Tensor, "*batch dim"], context: Context | None = None) -> Float[Tensor, "*batch d_out"]:
        """The block is called as it was before."""
        call, tokens = self.begin(x), plain(x).reshape(-1, x.shape[-1])
        routing = self.router(tokens, call.context)
        self.tell(call, routing, self.router.coefficients)
        return call.carry(self.experts(tokens, routing).view(*x.shape[:-1], -1))


class TunedLinear(AdaptedLayer):
    """y = W' x + b: the weight trained in full, from W on; the bias stays, so that W' - W is the whole update."""

    def __init__(self, base: nn.Linear):
        super().__init__(base)
        self.weight = nn.Parameter(base.weight.detach().clone())

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return F.linear(x, self.weight.to(x.dtype), self.base.bias)

    def fixed_update(self) -> Tensor:
        return self.weight.detach() - self.base.weight


class DynamicDINO(Adapter):
    """Slices in place of every feed-forward block whose linear layers are all wanted; full tuning of the other layers.

    A lone linear layer, and so a model without any block the workbench knows, is tuned in full, without a mixture: the
    system cuts along the hidden width, which one matrix does not have. It is told nothing beside the input. One copy in
    one slice (`experts=1`) is full tuning of the whole selection, the dense baseline.

    Args:
        experts: E = N k. The default of 32, with k = 2, is the paper's best, N = 16.
        top_k: k, slices of a copy and experts of a token; must divide E and the hidden width of every block. Default 2
            where that fits, else 1.
        balance: coefficient of the Switch loss; 0 for none.
        gate, tie, allocate: the start from the dense block, as in `SliceRouter` and `SliceExperts`; anything but the
            defaults loses it.
        router_std: of the random rows of the router.
    """

    slug = "dynamic-dino"

    def __init__(
        self,
        experts: int = 32,
        top_k: int | None = None,
        balance: float = 0.01,
        gate: str = "k_renorm",
        tie: bool = True,
        allocate: bool = True,
        router_std: float = 0.02,
    ):
        check_top_k(1 if top_k is None else top_k, experts)
        if top_k is not None and experts % top_k:
            raise InputError(f"top_k is {top_k} but must divide experts = {experts}: whole copies are cut into slices")
        self.experts, self.top_k, self.balance, self.allocate = experts, top_k, balance, allocate
        self.router = {"gate": gate, "tie": tie, "std": router_std}

    def linear(self, layer: nn.Linear, name: str) -> TunedLinear:
        return TunedLinear(layer)

    def feed_forward(self, block: FeedForward, name: str) -> SlicedFeedForward | None:
        if not block.elementwise:  # its hidden units cannot be told apart
            return None
        k = self.top_k
        if k is None:
            k = 1 if self.experts % 2 or block.d_hidden % 2 else 2
        if block.d_hidden % k:
            raise InputError(f"top_k is {k} but must divide the hidden width of {name}, {block.d_hidden}")
        coefficients = {"lbl": self.balance} if self.balance else None
        router = SliceRouter(block.d_model, self.experts // k, k, coefficients=coefficients, **self.router)
        return SlicedFeedForward(block, router, SliceExperts(block, self.experts // k, k, self.allocate))


ADAPTER = DynamicDINO


def same_copy_share(counts: Num[Tensor, "experts experts"], slices: int) -> float:
    """Share of the co-selected pairs of experts that are slices of one copy: 1 at the start; NaN for k = 1.

    (k - 1) / (E - 1) if partners were drawn at random.

    Args:
        counts: N_ij, see `measures.coactivation.coactivation_counts`.
        slices: k.
    """
    counts, copy = counts.double(), torch.arange(counts.shape[0], device=counts.device) // slices
    pairs = counts - counts.diagonal().diag()
    return float((pairs * (copy[:, None] == copy)).sum() / pairs.sum())


def _parts(block: FeedForward) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of "gate" (if there is one), "up" and "down", a layer that holds gate and up cut in two."""
    up, down = block.linears[block.up], block.linears[block.down]
    parts = {"up": (up.weight, up.bias), "down": (down.weight, down.bias)}
    if block.fused:
        biases = (None, None) if up.bias is None else up.bias.chunk(2)
        (gate, up_weight) = up.weight.chunk(2)
        return {"gate": (gate, biases[0]), "up": (up_weight, biases[1]), "down": parts["down"]}
    if block.gate is not None:
        gate = block.linears[block.gate]
        return {"gate": (gate.weight, gate.bias)} | parts
    return parts
