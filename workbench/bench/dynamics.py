"""Fixed-step RK4 of a bank of learned fields: in one pass, in loops, and by torchdiffeq's fixed-step method.

Every environment is integrated by every expert, as a refit of MixER's gate needs it. "workbench" makes the matrices of
all pairs of an expert and a context once and steps all of them together. The loops do the same steps of the same
fields: over the experts (each has all environments in one pass) and over the pairs. torchdiffeq is called in a loop
over the experts, and once for the whole bank, which is its own best case. Its "rk4" is the rule of 3/8, of the same
order and with as many evaluations: results agree to the error of the steps.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from workbench.bench.core import FORWARD, OURS, Case, Contestants
from workbench.lib.core.integrate import rk4
from workbench.lib.dynamics.mixer import GEPSBank

REPEATS = 7
QUICK = ((2, 3, 2, 4),)
SHAPES = ((4, 20, 8, 6), (10, 50, 4, 20))
"""Experts, environments, starts, points: of MixER's small study, and of as many families as the paper has at most."""
WIDTH, DEPTH, CONTEXT = 32, 2, 2
EXPERTS, PAIRS = "loop over experts", "loop over experts and environments"
PEER, PEER_BANK = "torchdiffeq, loop over experts", "torchdiffeq, the bank at once"


def cases(quick: bool = False) -> list[Case]:
    shapes = QUICK if quick else SHAPES
    return [Case("M={} E={} starts={} points={}".format(*s), partial(_contestants, s), (FORWARD,)) for s in shapes]


def tables(quick: bool = False) -> dict[str, list[dict]]:
    """{"left_out": rows {implementation, reason}}: torchdiffeq, where it is not installed."""
    missing = (
        [] if torchdiffeq() else [{"implementation": name, "reason": "not installed"} for name in (PEER, PEER_BANK)]
    )
    return {"left_out": missing}


def torchdiffeq() -> Callable[..., Tensor] | None:
    """The peer's `odeint`; None where it is not installed."""
    try:
        from torchdiffeq import odeint
    except ImportError:
        return None
    return odeint


def _contestants(shape: tuple[int, int, int, int], direction: str) -> Contestants:
    """Each gives the states (points, experts, environments, starts, 2)."""
    experts, environments, starts, points = shape
    torch.manual_seed(0)
    bank = GEPSBank(experts, 2, WIDTH, DEPTH, CONTEXT)
    xi = torch.randn(experts, environments, CONTEXT)
    x0, times = torch.randn(environments, starts, 2), torch.linspace(0, 1, points)

    def rates(chosen: list[int], which: slice) -> Callable[[Tensor, Tensor], Tensor]:
        contexts = xi[chosen, which]
        field = bank.rates(torch.tensor(chosen).repeat_interleave(contexts.shape[1]), contexts.flatten(0, 1))
        return lambda _, x: field(x)

    def at_once(integrate: Callable[..., Tensor]) -> Tensor:
        states = integrate(rates([*range(experts)], slice(None)), x0.repeat(experts, 1, 1), times)
        return states.unflatten(1, (experts, environments))

    def by_expert(integrate: Callable[..., Tensor]) -> Tensor:
        return torch.stack([integrate(rates([m], slice(None)), x0, times) for m in range(experts)], 1)

    def by_pair() -> Tensor:
        parts = [
            rk4(rates([m], slice(e, e + 1)), x0[e : e + 1], times) for m in range(experts) for e in range(environments)
        ]
        return torch.cat(parts, 1).unflatten(1, (experts, environments))

    made = {OURS: partial(at_once, rk4), EXPERTS: partial(by_expert, rk4), PAIRS: by_pair}
    if (odeint := torchdiffeq()) is not None:
        fixed = partial(odeint, method="rk4")
        made |= {PEER: partial(by_expert, fixed), PEER_BANK: partial(at_once, fixed)}
    return {name: torch.no_grad()(call) for name, call in made.items()}
