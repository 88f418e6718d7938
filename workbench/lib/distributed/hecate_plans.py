"""Who keeps which expert, who has a copy for one step, and which token goes to which copy (2502.02581).

The paper's text was not at hand beyond its abstract: `plan_sharding` and `plan_placement` are reconstructions, held to
the best there is on small cases by the tests. Loads are those that were seen, never those of the step that is planned.

Tensor letters: L layers, D devices, E experts.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.distributed.sparse_shards import check_placement

WINDOW = 5
"""Steps whose mean load is the prediction."""
TRIED = 3
"""Experts, and devices for each, that are tried for the next copy."""


def even_owners(n_layers: int, n_experts: int, devices: int) -> Int64[Tensor, "layers experts"]:
    """As expert parallelism has them: the experts i E / D to (i + 1) E / D of every layer on device i."""
    if min(n_layers, n_experts, devices) < 1:
        raise InputError(f"{n_layers} layers, {n_experts} experts, {devices} devices: all must be at least 1")
    return (torch.arange(n_experts) * devices // n_experts).repeat(n_layers, 1)


def plan_sharding(loads: Float[Tensor, "layers experts"], devices: int) -> Int64[Tensor, "layers experts"]:
    """Owners by which every device has as many chunks in all, to one, and in a layer as even a load as that allows.

    A layer may leave a device without experts. Layers come by falling skew, experts by falling load, each to the device
    with the least load in its layer that still has room.

    Args:
        loads: tokens of each expert, as seen; at least 0 and finite.
    """
    if loads.ndim != 2 or devices < 1 or not bool((loads >= 0).all() and loads.isfinite().all()):
        raise InputError(
            f"loads of shape {tuple(loads.shape)} for {devices} devices: they must be (layers, experts), finite and "
            "not negative, for at least one device"
        )
    n_layers, n_experts = loads.shape
    least, more = divmod(n_layers * n_experts, devices)  # `more` devices have one chunk more
    total, owner = [0] * devices, torch.zeros(n_layers, n_experts, dtype=torch.int64)
    skew = (loads.amax(1) / loads.mean(1).clamp(min=1e-30)).tolist()
    for layer in sorted(range(n_layers), key=lambda layer: -skew[layer]):
        here = [0.0] * devices
        for expert in torch.argsort(loads[layer], descending=True, stable=True).tolist():
            full = sum(count > least for count in total) >= more
            room = [d for d in range(devices) if total[d] < least or (total[d] == least and not full)]
            chosen = min(room, key=lambda d: (here[d], total[d], d))
            owner[layer, expert] = chosen
            here[chosen] += float(loads[layer, expert])
            total[chosen] += 1
    return owner


def level(
    load: Float[Tensor, " experts"], placement: Bool[Tensor, "devices experts"]
) -> Float[Tensor, "devices experts"]:
    """How the tokens of each expert are shared out among those that have it, in parts of tokens.

    Experts with the fewest holders come first; each fills up its holders from the least loaded on. That is near the
    best, not it: an expert that comes later may have had use for a holder that an earlier one has filled.
    """
    # plain numbers: a plan asks this thousands of times, of a few devices
    amounts, columns = load.tolist(), placement.T.tolist()
    holders = [[device for device, has in enumerate(column) if has] for column in columns]
    shares = [[0.0] * len(holders) for _ in range(len(placement))]
    there = [0.0] * len(placement)
    for expert in sorted(range(len(holders)), key=lambda e: (len(holders[e]), -amounts[e], e)):
        among = holders[expert]
        for device, given in zip(among, _fill([there[device] for device in among], amounts[expert]), strict=True):
            shares[device][expert] = given
            there[device] += given
    return torch.tensor(shares, dtype=torch.float64)


def _fill(there: Sequence[float], amount: float) -> list[float]:
    """What each vessel gets of an amount that is poured into all, to one level."""
    if len(there) == 1:
        return [amount]
    ordered = sorted(there)
    total = sum(ordered)
    for count in range(len(ordered), 0, -1):
        height = (amount + total) / count
        if height >= ordered[count - 1]:
            return [max(0.0, height - level) for level in there]
        total -= ordered[count - 1]
    return [0.0] * len(there)


def makespan(load: Float[Tensor, " experts"], placement: Bool[Tensor, "devices experts"]) -> float:
    """Tokens of the device that has most, where they are shared out by `level`."""
    return float(level(load, placement).sum(1).max())


def plan_placement(
    load: Float[Tensor, " experts"],
    owner: Int64[Tensor, " experts"],
    devices: int,
    budget: int,
    memory: int,
    origin: Float[Tensor, "devices experts"] | None = None,
    cost: Callable[[Tensor], float] | None = None,
) -> Bool[Tensor, "devices experts"]:
    """Which experts are copied where for a step: hot ones, as long as the cost falls by it.

    Args:
        load: tokens of each expert, as predicted.
        budget: chunks that may travel.
        memory: copies that a device may have beside its own.
        origin: tokens of each expert by the device that they come from: of devices that gain alike the one with most.
        cost: of a placement, what is to be small; None: `makespan`. With the seconds of a layer, transfers that are not
            hidden included, a copy is made only where what it saves is more than what it takes.
    """
    if budget < 0 or memory < 0:
        raise InputError(f"budget is {budget} and memory {memory} but both must be at least 0")
    placement = owner == torch.arange(devices)[:, None]
    check_placement(owner, placement)
    origin = torch.zeros(placement.shape) if origin is None else origin
    measured = partial(makespan, load) if cost is None else cost
    now = measured(placement)
    for _ in range(budget):
        shares = level(load, placement)
        busy = shares.sum(1)
        busiest, extra = busy.argmax(), (placement & (owner != torch.arange(devices)[:, None])).sum(1)
        found = []
        # only what the busiest device computes can make it less busy, on those that have least to do
        for expert in torch.argsort(shares[busiest], descending=True, stable=True)[:TRIED].tolist():
            if shares[busiest, expert] == 0:
                break
            room = ((~placement[:, expert]) & (extra < memory)).nonzero().flatten()
            for device in room[torch.argsort(busy[room], stable=True)][:TRIED].tolist():
                placement[device, expert] = True
                found.append((measured(placement), -float(origin[device, expert]), device, expert))
                placement[device, expert] = False
        if not found or min(found)[0] >= now:
            break
        now, _, device, expert = min(found)
        placement[device, expert] = True
    return placement


def dispatch_plan(
    counts: Int64[Tensor, "devices experts"],
    placement: Bool[Tensor, "devices experts"],
    per_node: int | None = None,
) -> Int64[Tensor, "devices experts devices"]:
    """How many tokens of an expert each device sends to each that has it; every rank comes to the same plan.

    The shares are those of `level`, in whole tokens. A token stays where it is if its share has room there, else goes
    within its node, else to whoever has room.

    Args:
        counts: tokens on each device for each expert.
        per_node: devices of a node; None: all are near.
    """
    devices, experts = counts.shape
    if placement.shape != counts.shape or not bool(placement.any(0).all()):
        raise InputError("placement must be (devices, experts) as counts and have each expert somewhere")
    shares = level(counts.sum(0).double(), placement)
    plan = torch.zeros(devices, experts, devices, dtype=torch.int64)
    node = torch.arange(devices) // (per_node or devices)
    for expert in range(experts):
        room, left = _whole(shares[:, expert], int(counts[:, expert].sum())), counts[:, expert].tolist()
        for near in (lambda a, b: a == b, lambda a, b: node[a] == node[b], lambda a, b: True):
            for source in range(devices):
                for target in range(devices):
                    if left[source] and room[target] and near(source, target):
                        moved = min(left[source], room[target])
                        plan[source, expert, target] += moved
                        left[source] -= moved
                        room[target] -= moved
    return plan


def _whole(shares: Float[Tensor, " devices"], total: int) -> list[int]:
    """Whole numbers of sum `total` next to the shares: the largest remainders are rounded up."""
    low = shares.floor().long()
    order: Sequence[int] = torch.argsort(shares - low, descending=True, stable=True).tolist()
    for device in order[: total - int(low.sum())]:
        low[device] += 1
    return low.tolist()
