"""RMoE: a router with a memory that runs over depth.

Qiu et al. 2024, "Layerwise Recurrent Router for Mixture-of-Experts" (arXiv:2408.06793), section 3. In a stack of MoE
layers l = 1..L every router usually decides alone. Here each hands the next what it knew of the same token:

    r_l = x_l W1_l                         x_l (N, D) the normed input of the MoE layer, W1_l (D, p), no activation
    h_l = GRU(r_l, h_{l-1}),  h_0 = 0      one cell for all layers; the state is not detached
    p_l = softmax(h_l W2_l)                W2_l (p, E); over all E, then the top K, weights renormalised
    y_l = sum_k w_k expert_k(x_l)          experts see x_l, never h_l

W1 and W2 belong to a layer, the cell to the model: L (p D + E p) + 6 p^2 + 6 p routing parameters, where linear routers
have L D E. Nothing recurs over time: tokens do not meet in the router, and in decoding the state of a new token is
computed from layer 1 on, so it is no part of a key-value cache. Against a router that is merely deeper, the new things
are the information of the earlier decisions and a gradient path between the routers (`router_state_flow`).

`Context.state` carries h_l from layer to layer, through any layers in between, and starts empty in every forward pass.

Tensor letters: N tokens, D model width, E experts, K active experts per token, L MoE layers, p router width.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.models import ResidualStack
from workbench.lib.core.modes import evaluating
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import TopKRouter, check_tokens
from workbench.lib.core.routing import Context, Routing

METHOD = Method(
    slug="rmoe",
    title="RMoE: Layerwise Recurrent Router for Mixture-of-Experts",
    family="routing",
    year=2024,
    paper="arXiv:2408.06793",
    claim="A recurrent cell that hands each router the state of the router below gives better language models than "
    "routers that decide alone, at nearly the same cost.",
    objects=("RecurrentRouter", "recurrent_routers", "router_state_flow"),
)

CELLS = ("gru", "rnn", "none")


def example() -> nn.Module:
    """Two MoE layers, one after the other, whose routers share one cell."""
    routers = recurrent_routers(2, d_model=32, n_experts=4, top_k=2, d_router=8)
    return ResidualStack(MoELayer(router, GLUExperts(4, 32, 32)) for router in routers)


def recurrent_cell(kind: str, d_router: int) -> nn.Module | None:
    """The cell that all routers of a model share: "gru", "rnn" (tanh), or "none", which is None.

    Recurrent weights are orthogonal for each gate, biases zero.
    """
    if kind not in CELLS:
        raise unknown("cell", kind, CELLS)
    if d_router < 1:
        raise InputError(f"d_router is {d_router} but must be at least 1")
    if kind == "none":
        return None
    cell = nn.GRUCell(d_router, d_router) if kind == "gru" else nn.RNNCell(d_router, d_router)
    for gate in cell.weight_hh.detach().split(d_router):
        nn.init.orthogonal_(gate)
    nn.init.zeros_(cell.bias_ih)
    nn.init.zeros_(cell.bias_hh)
    return cell


class RecurrentRouter(TopKRouter):
    """One layer's router: h = cell(x W1, state), logits = h W2; `Routing.state` is h. Options as in `TopKRouter`.

    The balance loss is E sum_e f_e P_e with f_e the share of all N K assignments, 1 at perfect balance, of each layer
    and summed over the layers. In the released code f_e counts the assignments of a token, so that K is balance, and
    the loss is the mean over the layers: a coefficient c there is c K / L here.

    Build the routers of a model together, with `recurrent_routers`: they must share one cell.

    Args:
        d_router: p.
        cell: maps (r (N, p), h (N, p)) to the new h; None for h = tanh(r), a two-layer router without a memory.
        projection: the map D -> p to use for W1; default: one of this layer's own.
        detach_state: cut the gradient between routers; the information still flows.
        shuffle_state: give each token the state of a random other one (torch's global generator): the same parameters
            and gradients, without the information.

    W2 starts so large that the logits have the spread of a linear router's, whatever the cell and p.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        d_router: int,
        cell: nn.Module | None,
        *,
        projection: nn.Linear | None = None,
        detach_state: bool = False,
        shuffle_state: bool = False,
        **options,
    ):
        super().__init__(n_experts, top_k, **options)
        self.cell = cell
        self.detach_state, self.shuffle_state = detach_state, shuffle_state
        self.projection = projection if projection is not None else _projection(d_model, d_router)
        self.readout = nn.Linear(d_router, n_experts, bias=False)
        with torch.no_grad():
            sample = torch.randn(256, d_model, generator=torch.Generator().manual_seed(0))
            spread = self.step(self.projection(sample), None).square().mean().sqrt()
        nn.init.normal_(self.readout.weight, std=0.02 * float((d_model / d_router) ** 0.5 / spread))

    def forward(self, x: Float[Tensor, "tokens dim"], context: Context | None = None) -> Routing:
        check_tokens(x)
        state, r = context.state if context is not None else None, self.projection(x)
        if state is not None and state.shape != r.shape:
            raise InputError(f"context.state has shape {tuple(state.shape)} but must be {tuple(r.shape)}, (tokens, p)")
        h = self.step(r, state)
        routing = self.route(self.readout(h), None if context is None else context.mask)
        routing.state = h if self.cell is not None else None
        return routing

    def step(self, r: Float[Tensor, "tokens p"], state: Float[Tensor, "tokens p"] | None) -> Float[Tensor, "tokens p"]:
        """h_l from r_l and h_{l-1}; None is the zero state of the first MoE layer."""
        if self.cell is None:
            return torch.tanh(r)
        if state is None:
            return self.cell(r, torch.zeros_like(r))
        if self.detach_state:
            state = state.detach()
        if self.shuffle_state:
            state = state[torch.randperm(state.shape[0], device=state.device)]
        return self.cell(r, state)


def recurrent_routers(
    n_layers: int,
    d_model: int,
    n_experts: int,
    top_k: int,
    d_router: int,
    cell: str = "gru",
    *,
    share_projection: bool = False,
    **options,
) -> list[RecurrentRouter]:
    """The routers of a model's L MoE layers, with one cell among them (and one W1, if `share_projection`).

    >>> routers = recurrent_routers(4, d_model=64, n_experts=8, top_k=2, d_router=16)
    >>> ffn = lambda layer: MoELayer(routers[layer], GLUExperts(8, 64, 128))  # for `DecoderLM`
    """
    if n_layers < 1:
        raise InputError(f"n_layers is {n_layers} but must be at least 1")
    shared = recurrent_cell(cell, d_router)
    projection = _projection(d_model, d_router) if share_projection else None
    return [
        RecurrentRouter(d_model, n_experts, top_k, d_router, shared, projection=projection, **options)
        for _ in range(n_layers)
    ]


def matched_width(n_layers: int, d_model: int, n_experts: int, d_router: int) -> int:
    """The width p' at which memoryless two-layer routers have as many parameters as GRU routers of width p.

    L p' (D + E) = L p (D + E) + 6 p^2 + 6 p, rounded.
    """
    per_layer = d_router * (d_model + n_experts)
    return round((per_layer + 6 * d_router * (d_router + 1) / n_layers) / (d_model + n_experts))


def router_state_flow(model: nn.Module, inputs: Tensor) -> Float[Tensor, "layers layers"]:
    """The gradient paths between routers: entry (l, m) is the mean over tokens of ||d logits_l / d r_m||_F.

    Only the path through the states counts: the router inputs x_l are recorded from `model(inputs, context)` in eval
    mode and then held fixed. Zero above the diagonal, and below it for `detach_state` or without a cell.
    """
    routers, seen = [], []

    def record(router: RecurrentRouter, args: tuple) -> None:
        routers.append(router)
        seen.append(args[0].detach())

    hooks = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, RecurrentRouter)]
    if not hooks:
        raise InputError(f"model is a {type(model).__name__} without a RecurrentRouter, so no state flows")
    try:
        with evaluating(model):
            model(inputs, Context())
    finally:
        for hook in hooks:
            hook.remove()
    flow = seen[0].new_zeros(len(routers), len(routers))
    state, r = None, []
    with torch.enable_grad():
        for layer, (router, x) in enumerate(zip(routers, seen, strict=True)):
            r.append(router.projection(x).detach().requires_grad_())
            state = router.step(r[-1], state)
            logits = router.readout(state)
            squares = [torch.zeros_like(x[:, 0]) for _ in r]
            for expert in range(router.n_experts):  # tokens do not meet, so a sum over them keeps their rows apart
                rows = torch.autograd.grad(logits[:, expert].sum(), r, retain_graph=True, allow_unused=True)
                squares = [s if g is None else s + g.square().sum(-1) for s, g in zip(squares, rows, strict=True)]
            flow[layer, : len(r)] = torch.stack([s.sqrt().mean() for s in squares])
    return flow


def _projection(d_model: int, d_router: int) -> nn.Linear:
    """W1, drawn from N(0, 0.02)."""
    projection = nn.Linear(d_model, d_router, bias=False)
    nn.init.normal_(projection.weight, std=0.02)
    return projection
