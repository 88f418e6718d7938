"""Which rank holds what when a pyramid of experts is served, and one such layer on its ranks.

    plan = InferencePlan([4, 4, 8, 16], world=8, tp=2)       # DeepSpeed-MoE, 2201.05596, section 5.2
    plan.layers[0]                                           # 4 experts on 8 ranks: each in two slices
    exchange = make_exchange("coordinated", 8, plan.tp)
    layer.experts = ServedExperts(layer.experts, plan.layers[0], rank, exchange)      # on each rank
    y = layer(x)                                             # this rank's tokens, the same on ranks of one TP group

What is no expert is on all ranks, in data parallelism between groups of `tp` ranks. Experts are on all ranks at once,
however many a layer has: with more experts than ranks a rank has several, with fewer each expert is cut along its
hidden width (expert slicing), and the partial outputs of its slices are added where the token came from. So the groups
are others in each layer of a pyramid. That x is the same on all ranks of a group is what tensor parallelism leaves
behind; its own products, of attention and of the fixed MLP, are not cut here.

Tensor letters: T tokens of a rank, D model width, H hidden width, E experts, C places of each, p ranks, S sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.capacity import decode, encode
from workbench.lib.core.distributed.grids import RankGrid, divisors
from workbench.lib.core.distributed.wire import counted
from workbench.lib.core.experts import ExpertWeights, GLUExperts
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routing import Routing
from workbench.lib.core.simulation.hardware import Hardware
from workbench.lib.serving.all_to_all import Exchange, all_to_all_seconds, make_exchange


@dataclass(frozen=True)
class LayerPlan:
    """The experts of one layer on the ranks.

    Attributes:
        n_experts: E.
        world: p.
    """

    n_experts: int
    world: int

    @property
    def slices(self) -> int:
        """Ranks that share each expert; 1 where there are experts enough."""
        return max(1, self.world // self.n_experts)

    @property
    def per_rank(self) -> int:
        """Experts of which a rank has a slice, or the whole."""
        return max(1, self.n_experts // self.world)

    @property
    def grid(self) -> RankGrid:
        """The ranks by the slice and by the experts that they have."""
        return RankGrid({"slice": self.slices, "expert": self.world // self.slices})

    def experts_of(self, rank: int) -> range:
        first = self.grid.coords(rank)["expert"] * self.per_rank
        return range(first, first + self.per_rank)

    def slice_of(self, rank: int) -> int:
        return self.grid.coords(rank)["slice"]


class InferencePlan:
    """The layers of a model on p ranks.

    Attributes:
        layers: a `LayerPlan` for each MoE layer.
        grid: of what is no expert: "tp", then "dp".

    Args:
        experts: E of each MoE layer.
        world: p.
        tp: ranks that hold the same tokens.

    Raises:
        InputError: `tp` does not divide the world; a layer's experts neither divide it nor are a multiple of it.
    """

    def __init__(self, experts: Sequence[int], world: int, tp: int = 1):
        self.world, self.tp = world, tp
        self.grid = RankGrid.filled(world, {"tp": tp, "dp": None})
        for layer, n in enumerate(experts):
            if n < 1 or (world % n and n % world):
                fit = ", ".join(map(str, divisors(world)))
                raise InputError(
                    f"experts[{layer}] is {n} but must divide the world of {world} ranks ({fit}) or be a multiple of it"
                )
        self.layers = [LayerPlan(n, world) for n in experts]


def slice_experts(weights: GLUExperts | ExpertWeights, slices: int, index: int) -> ExpertWeights:
    """One of the slices of each expert along its hidden width: the outputs of all slices add up to the expert's.

    Raises:
        InputError: `slices` does not divide the hidden width.
    """
    hidden = weights.down.shape[-1]
    if slices < 1 or hidden % slices:
        raise InputError(f"slices is {slices} but must divide the hidden width of {hidden}")
    if not 0 <= index < slices:
        raise InputError(f"index is {index} but must be 0 to {slices - 1}")
    own = slice(index * hidden // slices, (index + 1) * hidden // slices)
    gate, up = weights.gate_up.chunk(2, dim=1)
    return ExpertWeights(torch.cat([gate[:, own], up[:, own]], dim=1), weights.down[:, :, own])


class ServedExperts(nn.Module):
    """A bank of experts that is spread over the ranks: one rank's part, called on all of them at once.

    It takes the place of the whole bank in a trained layer, whose router, places and fixed MLP stay as they are. Tokens
    go by table, in E C places, without a (T, E, C) mask; C is what the fullest expert of any rank needs, which all
    ranks tell each other first. Where ranks hold the same tokens, flat and hierarchical exchanges send and compute
    each as often as it is held, the coordinated one once.

    Args:
        bank: the whole one, of which this rank's experts, or slices of them, are copied.
        plan: of this layer.
        rank: this one.
        exchange: see `all_to_all.make_exchange`.
    """

    def __init__(self, bank: GLUExperts, plan: LayerPlan, rank: int, exchange: Exchange):
        super().__init__()
        if bank.n_experts != plan.n_experts:
            raise InputError(f"bank has {bank.n_experts} experts but the plan is of {plan.n_experts}")
        own = plan.experts_of(rank)
        mine = ExpertWeights(*(w.detach()[own.start : own.stop] for w in (bank.gate_up, bank.down)))
        mine = slice_experts(mine, plan.slices, plan.slice_of(rank))
        self.gate_up, self.down = nn.Parameter(mine.gate_up.clone()), nn.Parameter(mine.down.clone())
        self.n_experts, self.plan, self.exchange = plan.n_experts, plan, exchange

    def forward(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Float[Tensor, "tokens dim"]:
        most = routing.counts.max()
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        capacity, dim = max(1, int(most)), x.shape[1]
        rows = encode(x, routing, capacity).repeat_interleave(self.plan.slices, dim=0)
        sent = self.exchange.dispatch(rows.view(self.plan.world, -1, dim))
        y = self.compute(sent.unflatten(1, (self.plan.per_rank, capacity)))
        partial = self.exchange.combine(y.flatten(1, 2)).view(self.n_experts, self.plan.slices, capacity, dim)
        return decode(partial.sum(1), routing)

    def compute(self, rows: Float[Tensor, "sources own places dim"]) -> Float[Tensor, "sources own places dim"]:
        """What this rank's experts, or their slices, say of the rows of each source."""
        gate, up = torch.einsum("secd,ehd->sech", rows, self.gate_up).chunk(2, dim=-1)
        return torch.einsum("sech,edh->secd", F.silu(gate) * up, self.down)


def serve(
    layers: Sequence[MoELayer], plan: InferencePlan, form: str, size: int, x: Float[Tensor, "groups tokens dim"]
) -> tuple[list[Float[Tensor, "tokens dim"]], dict[str, int]]:
    """What each layer says of this rank's tokens, and the messages that it sent for all of them, by collective.

    >>> found = run_processes(serve, 8, layers, plan, "coordinated", 2, x)      # on each of 8 ranks

    Args:
        layers: of the plan; their banks are replaced by this rank's parts.
        form, size: of the exchange, see `all_to_all.make_exchange`.
        x: of every group of tensor parallelism.
    """
    rank, exchange, said = dist.get_rank(), make_exchange(form, plan.world, size), []
    here = x[plan.grid.coords(rank)["dp"]]
    with torch.no_grad(), counted() as traffic:
        for layer, its in zip(layers, plan.layers, strict=True):
            layer.eval()
            layer.experts = ServedExperts(layer.experts, its, rank, exchange)
            said.append(layer(here))
    return said, {kind: sent.messages for kind, sent in traffic.of.items()}


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one MoE layer, by a model: `gate`, both ways of the `exchange`, and the `experts` of the slowest rank.

    Attributes:
        touched: experts whose weights are read on that rank, the mean where it is a mean.
    """

    gate: float
    exchange: float
    experts: float
    touched: float

    @property
    def total(self) -> float:
        return self.gate + self.exchange + self.experts


def touched_experts(n_experts: int, tokens: float) -> float:
    """E (1 - (1 - 1 / E)^T): experts that T tokens, each sent to one at random, need; their mean."""
    return n_experts * (1 - (1 - 1 / n_experts) ** tokens)


def layer_times(
    plan: LayerPlan,
    counts: Sequence[float] | float,
    d_model: int,
    d_hidden: int,
    machine: Hardware,
    form: str,
    size: int = 1,
    tp: int = 1,
    bytes_per_number: int = 2,
) -> LayerTimes:
    """The latency of one MoE layer by a model: a product takes flops / rate, and reading weights bytes / bandwidth.

    Args:
        plan: of the layer.
        counts: tokens of each expert, of all ranks together (copies of tensor parallelism counted once); or their
            number, sent at random.
        machine: with device, node, network and devices_per_node.
        form, size: of the exchange, see `all_to_all.make_exchange`.
        tp: ranks that hold the same tokens.
    """
    machine.need("device", "node", "network", "devices_per_node")
    world, e = plan.world, plan.n_experts
    if isinstance(counts, int | float):
        tokens, load = float(counts), [counts / e] * e
        need = [touched_experts(e, counts) / e] * e
    else:
        if len(counts) != e:
            raise InputError(f"counts has {len(counts)} numbers but the layer has {e} experts")
        tokens, load, need = float(sum(counts)), list(counts), [float(n > 0) for n in counts]
    weights = 3 * d_model * d_hidden / plan.slices
    flops, bandwidth = machine.device.flops, machine.device.memory_bandwidth
    copies = 1 if form == "coordinated" else tp
    seconds = []
    for rank in range(0, world, plan.slices):
        own = plan.experts_of(rank)
        work = 2 * weights * copies * sum(load[i] for i in own) / flops
        read = weights * bytes_per_number * (touched := sum(need[i] for i in own)) / bandwidth
        seconds.append((work + read, touched))
    here = tokens * tp / world
    gate = 2 * here * d_model * e / flops + d_model * e * bytes_per_number / bandwidth
    near, far = machine.node.model, machine.network.model
    # a block has places for the fullest expert of this rank's tokens, of each expert that its receiver has
    block = max(load) * tp / world * plan.per_rank * d_model * bytes_per_number
    ways = (
        all_to_all_seconds(form, block, world, size, near, far, node=machine.devices_per_node, back=back)
        for back in (False, True)
    )
    return LayerTimes(gate, sum(ways), *max(seconds))
