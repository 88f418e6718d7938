"""Z-code M3: mixtures of experts that train in many languages at once: who is served, grown and pruned models.

Kim et al. 2021, "Scalable and Efficient MoE Training for Multitask Multilingual Models" (arXiv:2109.10465); system and
random token selection are public in DeepSpeed. A top-1 gate gives each expert C = ceil(c N / E) places. Three parts:

    random token selection   an overfull expert serves any C of its tokens (`Capacity(c, "random")`), where the first C
                             of the batch would leave out whoever comes late, always
    aggregation of experts   two models of E experts become one of 2E: experts and rows of the gate side by side, all
                             else the mean; both have to come from one ancestor, or the mean of their trunks is none
    pruning                  of E experts the E' of highest utilisation stay: the share of held-out tokens they are sent

The third is measured before any token is dropped and on data that was not trained on. In the mean of a model with
itself every expert has a twin, whose logit is the same: the softmax is over twice as many, and what the chosen expert
says counts half of what it did. Nothing here makes up for that; training on does.

The system: expert and data groups with ZeRO are `expert_groups`, AdamW in host memory `core.optim.offloaded`, bytes by
device and host `expert_memory`. That the recipe has an input jitter of 0.01, a balance loss of 0.01 and a capacity of
1 in training and 2 in evaluation is from memory of the paper.

Tensor letters: N tokens, D model width, E experts, C places of each.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.capacity import Capacity
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.modes import evaluating
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.observe import observing
from workbench.lib.core.recompute import recomputing
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.task import Batch, Task

METHOD = Method(
    slug="z-code-m3",
    title="Z-code M3: Scalable and Efficient MoE Training for Multitask Multilingual Models",
    family="distributed",
    year=2021,
    paper="arXiv:2109.10465",
    claim="Random token selection, aggregated experts and multitask training make multilingual MoE converge faster and "
    "prune well.",
    objects=("ServedMoELayer", "served_layer", "aggregate_experts", "prune_experts", "utilisation"),
)

CRITERIA = ("utilisation", "random", "weight")
TRUNKS = ("mean", "a")
RECIPE = Capacity(1.0, "random", evaluation=2.0)
PARTS = 8
"""Of a batch, by position: where the share of served pairs is told."""


def example() -> nn.Module:
    """Four experts with the paper's gate."""
    return served_layer(32, 4, 16)


class ServedMoELayer(MoELayer):
    """A `MoELayer` with a `Capacity` that tells whoever watches where in a batch, and by whom, tokens were served.

    Attributes:
        served: (2, PARTS + E) pairs kept and pairs there were in the last training batch that was watched, in each part
            of the batch, in order, and at each expert.
    """

    def __init__(self, router: LinearRouter, experts: GLUExperts, capacity: Capacity | None):
        super().__init__(router, experts, capacity_factor=capacity)
        self.register_buffer("served", torch.zeros(2, PARTS + router.n_experts), persistent=False)

    def serve(self, tokens: Float[Tensor, "tokens dim"], routing: Routing, context: Context) -> Tensor:
        y = super().serve(tokens, routing, context)
        if self.training and self.observed and not recomputing():
            self.served = served_shares(routing)
        return y

    def form_now(self) -> dict[str, Tensor]:
        kept, pairs = self.served
        share = kept / pairs  # NaN where there was none
        return {"served by place in the batch": share[:PARTS], "served by expert": share[PARTS:]}


def served_shares(routing: Routing) -> Float[Tensor, "2 places"]:
    """Pairs kept and pairs there are: in each of `PARTS` parts of the tokens, then at each expert."""
    part = routing.token * PARTS // routing.n_tokens
    place = torch.cat([part, PARTS + routing.expert])
    kept = torch.ones_like(routing.expert, dtype=torch.bool) if routing.kept is None else routing.kept
    n = PARTS + routing.n_experts
    return torch.stack([torch.bincount(place[kept.repeat(2)], minlength=n), torch.bincount(place, minlength=n)]).float()


def served_layer(
    d_model: int,
    n_experts: int,
    d_hidden: int,
    capacity: Capacity | None = RECIPE,
    balance: float = 0.01,
    jitter: float = 0.01,
) -> ServedMoELayer:
    """A layer by the paper's recipe: top-1 of a softmax, with a balance loss and a jitter of the gate's input.

    Args:
        capacity: None for no limit.
    """
    router = LinearRouter(d_model, n_experts, 1, coefficients={"lbl": balance}, jitter=jitter)
    return ServedMoELayer(router, GLUExperts(n_experts, d_model, d_hidden), capacity)


@torch.no_grad()
def aggregate_experts(a: nn.Module, b: nn.Module, trunk: str = "mean") -> nn.Module:
    """One model of the experts of two: of each MoE layer the experts and router rows of `a`, then those of `b`.

    Args:
        trunk: all other parameters: "mean" of the two, or those of "a". Buffers are those of `a`.

    Raises:
        InputError: the models differ in the names or shapes of their parameters, or a layer is none of a `LinearRouter`
            without a bias and `GLUExperts`.
    """
    if trunk not in TRUNKS:
        raise unknown("trunk", trunk, TRUNKS)
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (a, b)]
    if shapes[0] != shapes[1]:
        differing = [name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)]
        raise InputError(f"b has other parameters than a, or of other shapes: {', '.join(differing[:4])}")
    made, others = deepcopy(a), dict(b.named_parameters())
    if trunk == "mean":
        for name, parameter in made.named_parameters():
            parameter.copy_((parameter + others[name]) / 2)
    banks = [moe_layers(model) for model in (a, b)]
    for name, layer in _linear_layers(made).items():
        mine = [_rows(bank[name]) for bank in banks]
        _set_rows(layer, [torch.cat(pair) for pair in zip(*mine, strict=True)])
    return made


@torch.no_grad()
def prune_experts(
    model: nn.Module,
    keep: int,
    criterion: str = "utilisation",
    stats: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A copy of a model with `keep` experts in each MoE layer, in their order, and the router rows of these.

    Args:
        criterion: which stay: of highest "utilisation", of equal ones the first; "random" ones; those of the largest
            "weight", the norm of all their matrices.
        stats: layer -> (E,), see `utilisation`, which needs it.
        generator: of "random"; None for torch's global one.

    Raises:
        InputError: fewer than one expert or the top-k would stay, more than there are, `stats` lacks a layer, or layers
            share a bank, of which each would keep others.
    """
    if criterion not in CRITERIA:
        raise unknown("criterion", criterion, CRITERIA)
    made = deepcopy(model)
    layers, owner = _linear_layers(made), {}
    for name, layer in layers.items():
        if (first := owner.setdefault(layer.experts, name)) != name:
            raise InputError(f"{name} shares its experts with {first} but must have its own to be pruned")
    for name, layer in layers.items():
        if not layer.top_k <= keep <= layer.n_experts:
            raise InputError(
                f"keep is {keep} but must be from top_k = {layer.top_k} to the {layer.n_experts} experts of {name}"
            )
        if criterion == "utilisation":
            score = (stats or {}).get(name)
            if score is None or score.shape != (layer.n_experts,):
                raise InputError(f"stats has not the ({layer.n_experts},) utilisation of {name}: see `utilisation`")
        elif criterion == "random":
            score = torch.rand(layer.n_experts, generator=generator)
        else:
            score = sum(part.flatten(1).float().square().sum(1) for part in _rows(layer)[1:])
        stay = score.argsort(descending=True, stable=True)[:keep].sort().values
        _set_rows(layer, [part[stay.to(part.device)] for part in _rows(layer)])
    return made


def utilisation(model: nn.Module, task: Task, batches: Iterable[Batch]) -> dict[str, Float[Tensor, " experts"]]:
    """The share of the pairs of some batches that each expert is sent, before any is dropped; 1 in all in each layer.

    Of held-out batches, or what is popular in training is counted. The model runs in evaluation mode.
    """
    layers = moe_layers(model)
    with observing(layers.values(), lambda routing, _: routing.counts) as seen, evaluating(model):
        for batch in batches:
            task.loss(model, batch)
    if unseen := [name for name, layer in layers.items() if not seen[layer]]:
        raise InputError(f"batches brought no token to {unseen[0]} but must reach every layer")
    counts: dict[str, Int64[Tensor, " experts"]] = {name: sum(seen[layer]) for name, layer in layers.items()}
    return {name: count.double() / count.sum() for name, count in counts.items()}


def _linear_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers of a model, whose experts can be told from their router's rows."""
    layers = moe_layers(model)
    if not layers:
        raise InputError(f"model is a {type(model).__name__} without a MoELayer")
    for name, layer in layers.items():
        router, experts = layer.router, layer.experts
        if not isinstance(router, LinearRouter) or router.bias is not None or type(experts) is not GLUExperts:
            raise InputError(
                f"{name} is of a {type(router).__name__} and {type(experts).__name__} but must be of a LinearRouter "
                "without a bias and GLUExperts"
            )
    return layers


def _rows(layer: MoELayer) -> list[Tensor]:
    """What each expert has of its own: its row of the router, and its matrices."""
    return [layer.router.projection.weight, layer.experts.gate_up, layer.experts.down]


def _set_rows(layer: MoELayer, rows: list[Tensor]) -> None:
    """Give a layer other experts; as many as there are rows."""
    owners = ((layer.router.projection, "weight"), (layer.experts, "gate_up"), (layer.experts, "down"))
    for (owner, name), part in zip(owners, rows, strict=True):
        setattr(owner, name, nn.Parameter(part.clone(), requires_grad=getattr(owner, name).requires_grad))
    n_experts = layer.router.n_experts = layer.experts.n_experts = layer.router.projection.out_features = len(rows[0])
    if isinstance(layer, ServedMoELayer):
        layer.served = layer.served.new_zeros(2, PARTS + n_experts)
