"""SonicMoE: an expert layer whose memory does not grow with granularity, and routing that fills whole tiles.

Guo et al. 2025, "SonicMoE: Accelerating MoE with IO and Tile-aware Optimizations" (arXiv:2512.14080); the routing rules
follow the public code, Dao-AILab/sonic-moe (`benchmarks/moe-token-rounding.py`, `sonicmoe/moe.py`).

Router (`SonicRouter`): the top K of the logits, then a softmax over these K values in float32, so that the weights of a
token sum to 1 (token choice, TC). The balance loss is Switch's, E sum_e P_e f_e.

Experts: `GLUExperts`, which runs through `workbench.kernels.moe_mlp`. Of a forward pass it keeps x (N, D), the values
before the activation (P, 2H), the weights and the index lists. The gathered rows, the activated hidden values and the
expert outputs are never kept: the gradient of a combine weight is sum_i U_i A_i with U = dO W2, not <dO, Y>. With H K
held fixed the kept bytes of x and of the hidden values do not change when experts get finer (`predicted_saved_bytes`).

Token rounding (`token_rounding`): a grouped matrix product computes tiles of M rows, so an expert with f rows pays for
ceil(f / M) M. Rounding gives each expert g rows, a multiple of M near f, so that no row is wasted:

    nearest   g = M round(f / M)                            down   g = M floor(f / M)          up   g = M ceil(f / M)
    stochastic   floor(f / M) or one more tile, with probability f / M - floor(f / M), so that E[g] = f

Rows are kept in order of preference: the pairs the router chose by weight, then the others by probability. Rounding
down drops an expert's lowest chosen pairs; rounding up adds its best other tokens, at weight p (softmax over all E).
Only training rounds. In evaluation a token's experts must not depend on the batch it comes in, so that is plain TC.

Tensor letters: N tokens, D model width, H expert hidden width, E experts, K active experts per token, P routed pairs,
M rows of a tile.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.kernels.topk_softmax import topk_softmax
from workbench.lib.core.balance import balance_losses
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter, check_finite, check_top_k
from workbench.lib.core.routing import Routing

METHOD = Method(
    slug="sonicmoe",
    title="SonicMoE: Accelerating MoE with IO and Tile-aware Optimizations",
    family="kernels",
    year=2025,
    paper="arXiv:2512.14080",
    claim="A backward pass that needs no gathered activations makes memory independent of granularity, and rounding "
    "tokens to tiles wastes no rows at equal quality.",
    objects=(
        "SonicMoE",
        "SonicRouter",
        "token_rounding",
        "topk_routing",
        "rounded_counts",
        "padded_fraction",
        "predicted_saved_bytes",
    ),
)

ROUTINGS = ("tc", "rounding")
MODES = ("nearest", "down", "up", "stochastic")


def example() -> nn.Module:
    """A layer of four experts, two to a token."""
    return SonicMoE(32, n_experts=4, top_k=2, d_hidden=32)


class SonicRouter(LinearRouter):
    """logits = x W; the top K of them, weighed by a softmax over the K; in training rounded to tiles if asked for.

    With top_k = 1 the weight is the constant 1 and only the balance loss trains the router, as in the public code.
    The balance loss is of what the router chose, before rounding.

    Args:
        routing: "tc" (token choice), or "rounding": `token_rounding` in training mode and token choice in evaluation.
        tile: M, the rows of a tile; a training batch must have at least as many tokens.
        mode: "nearest", "down", "up" or "stochastic"; the last draws from torch's global generator.
        coefficients: weight of each balance loss, as in `TopKRouter`.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        *,
        routing: str = "tc",
        tile: int = 128,
        mode: str = "nearest",
        coefficients: dict[str, float] | None = None,
    ):
        super().__init__(d_model, n_experts, top_k, coefficients=coefficients)
        if routing not in ROUTINGS:
            raise unknown("routing", routing, ROUTINGS)
        check_rounding(tile, mode)
        self.routing, self.tile, self.mode = routing, tile, mode

    def route(self, logits: Float[Tensor, "tokens experts"], mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        routing = topk_routing(logits, self.top_k)
        losses = balance_losses(routing, self.coefficients, mask)
        if self.routing == "rounding" and self.training:
            routing = token_rounding(routing, self.tile, self.mode)
        routing.losses = losses
        return routing


class SonicMoE(MoELayer):
    """A `SonicRouter` with a bank of SwiGLU experts: (..., D) -> (..., D), watched like every `MoELayer`.

    >>> layer = SonicMoE(256, n_experts=64, top_k=8, d_hidden=64, routing="rounding", tile=128)
    >>> y = layer(x, context)  # the balance loss is added to context.aux

    Args:
        d_hidden: H.
        routing, tile, mode: as in `SonicRouter`.
        balance: weight of the balance loss.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        d_hidden: int,
        *,
        routing: str = "tc",
        tile: int = 128,
        mode: str = "nearest",
        balance: float = 0.01,
    ):
        options = {"routing": routing, "tile": tile, "mode": mode, "coefficients": {"lbl": balance}}
        super().__init__(SonicRouter(d_model, n_experts, top_k, **options), GLUExperts(n_experts, d_model, d_hidden))


def topk_routing(logits: Float[Tensor, "tokens experts"], top_k: int) -> Routing:
    """Token choice: the K highest logits of each token, weighed by a softmax over them in float32 (or wider).

    Of equal logits the first expert's wins.

    `probs` is the softmax over all E, which balance losses and rounding need.
    """
    check_top_k(top_k, logits.shape[-1])
    check_finite(logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights, indices = topk_softmax(logits, top_k)
    return Routing.fixed(indices, weights, logits.shape[-1], probs=torch.softmax(logits, dim=-1), logits=logits)


def token_rounding(
    routing: Routing, tile: int = 128, mode: str = "nearest", generator: torch.Generator | None = None
) -> Routing:
    """The routing with a multiple of `tile` tokens for every expert; tokens then differ in their number of experts.

    Kept pairs keep their weight (a token that loses one is not renormalised); added pairs get their probability. Equal
    preferences are kept in the order of the tokens.

    Args:
        routing: of all the tokens of a batch, with `probs`: the counts are rounded as they are here.
        tile, mode, generator: see `rounded_counts`.
    """
    if routing.probs is None:
        raise InputError("routing.probs is None but rounding up needs a probability for every expert of a token")
    counts = rounded_counts(routing.counts, tile, mode, routing.n_tokens, generator)
    chosen, weights, probs = routing.mask(), routing.dense(), routing.probs.to(routing.weight.dtype)
    # Chosen pairs have a weight >= 0, the others a probability - 1 < 0: one order for dropping and for adding. In
    # float32 all small probabilities would become -1 and lose their order.
    preference = torch.where(chosen, weights.detach().double(), probs.detach().double() - 1)
    order = torch.argsort(preference, dim=0, descending=True, stable=True)
    within = torch.arange(routing.n_tokens, device=order.device)[:, None] < counts
    kept = torch.zeros_like(chosen).scatter_(0, order, within)
    parts = {"probs": routing.probs, "logits": routing.logits, "losses": routing.losses, "state": routing.state}
    return Routing.ragged(kept, torch.where(chosen, weights, probs), **parts)


def rounded_counts(
    counts: Int64[Tensor, " experts"],
    tile: int,
    mode: str,
    n_tokens: int,
    generator: torch.Generator | None = None,
) -> Int64[Tensor, " experts"]:
    """(E,) multiples of `tile` near `counts`.

    An expert cannot have more rows than there are tokens: where the rule asks for more than the largest multiple of
    `tile` within `n_tokens`, that multiple is the answer. This happens only where n_tokens is no multiple itself.

    Args:
        counts: f, tokens of each expert.
        tile: M; 1 leaves the counts as they are.
        mode: "nearest" (a half to the even multiple), "down", "up" or "stochastic".
        n_tokens: N, at least `tile`.
        generator: for "stochastic"; default: torch's global one.
    """
    check_rounding(tile, mode)
    if n_tokens < tile:
        raise InputError(f"n_tokens is {n_tokens} but must be at least tile = {tile}: no expert could fill one tile")
    tiles = counts.double() / tile
    match mode:
        case "nearest":
            tiles = tiles.round()
        case "down":
            tiles = tiles.floor()
        case "up":
            tiles = tiles.ceil()
        case "stochastic":
            draw = torch.rand(tiles.shape, dtype=tiles.dtype, device=tiles.device, generator=generator)
            tiles = tiles.floor() + (draw < tiles - tiles.floor())
    return (tiles.long() * tile).clamp(max=n_tokens // tile * tile)


def padded_fraction(counts: Int64[Tensor, "*batch experts"], tile: int) -> Float[Tensor, "*batch"]:
    """Rows that tiles of `tile` rows compute for nothing, over the rows that are there: sum(ceil(f/M) M - f) / sum f.

    0 where there are no rows at all.
    """
    if tile < 1:
        raise InputError(f"tile is {tile} but must be at least 1")
    return (-counts % tile).sum(-1) / counts.sum(-1).clamp(min=1)


def predicted_saved_bytes(
    n_tokens: int,
    d_model: int,
    d_hidden: int,
    n_experts: int,
    n_pairs: int,
    *,
    itemsize: int = 4,
    ragged: bool = False,
) -> dict[str, int]:
    """Bytes that the expert layer keeps for its backward pass besides its weights: "x", "hidden", "score", "plan".

    x is N D values and the hidden values before the activation are P 2H; scores are float32; the plan has three int32
    a pair, one for each expert and one more, and for `ragged` routing (K varies) one for each token and one more. With
    P = N K the first two, which are nearly all of it, depend on H K but not on how it is split.

    Args:
        itemsize: bytes of a value: 4 for float32, 2 for bfloat16.
    """
    lists = 3 * n_pairs + n_experts + 1 + (n_tokens + 1 if ragged else 0)
    hidden = n_pairs * 2 * d_hidden * itemsize
    return {"x": n_tokens * d_model * itemsize, "hidden": hidden, "score": 4 * n_pairs, "plan": 4 * lists}


def check_rounding(tile: int, mode: str) -> None:
    """Raise `InputError` unless tile >= 1 and mode is known."""
    if tile < 1:
        raise InputError(f"tile is {tile} but must be at least 1")
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
