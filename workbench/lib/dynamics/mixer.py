"""MixER: a mixture of meta-learners of dynamical systems, behind a gate that is refitted, not trained (2502.05335).

An environment is one value of a system's parameters. It has a few trajectories and a vector xi that is learned with
them, its context; a meta-learner maps a state and a context to the rates of the state. One such learner holds together
environments of one family and fails over several. Here there are M of them (GEPS, `GEPSBank`). Expert m sees only its
chunk xi[m] of the context, and a gate that reads the whole context, and never the state, names one expert for each
environment, whose rates are not multiplied by anything:

    dx/dt = f_m(x, xi[m]),   m = argmax W^T [xi; 1]

Contexts start at zero and all experts start the same. Steps on the contexts alone and on the experts alone take turns,
each held by a proximal term to where the turn began (`Alternation`); in between, the gate is fitted anew to clusters of
the contexts and to what each expert makes of them (`ContextGate`). A new environment is adapted to by its context alone
(`adapt`), and the gate follows the context.

What differs from the public code: fixed-step RK4 and Adam stand for an adaptive method and AdaBelief, and a step sees
all environments, where there it sees one and its nearest in context space. A tie of the gate goes to one expert.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.lib.core.integrate import DivergedError, rk4
from workbench.lib.core.observe import Announcing
from workbench.lib.core.routing import Context
from workbench.lib.dynamics.alternation import Alternation, adapt
from workbench.lib.dynamics.context_gate import ContextGate, GateFit, OracleGate, SoftmaxGate
from workbench.lib.dynamics.geps import GEPSBank, width_for

__all__ = [
    "Alternation",
    "ContextGate",
    "GEPSBank",
    "GateFit",
    "MetaLearner",
    "MixERField",
    "OracleGate",
    "SoftmaxGate",
    "adapt",
    "width_for",
]

METHOD = Method(
    slug="mixer",
    title="MixER: Towards Foundational Models for Dynamical System Reconstruction: Hierarchical Meta-Learning via "
    "Mixture of Experts",
    family="dynamics",
    year=2025,
    paper="arXiv:2502.05335",
    claim="A gate refitted by clustering and least squares learns several families of systems where one meta-learner "
    "or a softmax gate fails.",
    objects=("MetaLearner", "MixERField", "ContextGate", "GateFit", "GEPSBank", "Alternation", "adapt", "SoftmaxGate"),
    example=None,
    kind=None,
)


class MixERField(Announcing):
    """Experts behind a gate over environments; announces, once for a forecast, where it sends each environment.

    Args:
        experts: the bank.
        gate: (xi, environment) -> `Routing`, one expert for each; None for a bank of one.
        gated: whether the rates are multiplied by the weight that the gate gives, as in a mixture that learns its gate.
        balance: weight of the gate's balance loss.

    Attributes:
        d_xi: size of a context: a chunk for each expert.
    """

    top_k = 1

    def __init__(self, experts: GEPSBank, gate: nn.Module | None = None, gated: bool = False):
        super().__init__()
        if gate is None and experts.n_experts > 1:
            raise InputError(f"gate is None but must be given for {experts.n_experts} experts")
        if gate is not None and gate.n_experts != experts.n_experts:
            raise InputError(f"gate has {gate.n_experts} experts but must have the {experts.n_experts} of the bank")
        self.experts, self.gate, self.gated = experts, gate, gated
        self.n_experts, self.d_xi = experts.n_experts, experts.n_experts * experts.context_dim

    def rates(
        self,
        xi: Float[Tensor, "environments context"],
        environment: Int64[Tensor, " environments"],
        context: Context | None = None,
    ):
        """What maps states (environments, starts, n) to their rates, at these contexts."""
        if xi.shape[1] != self.d_xi:
            raise InputError(f"xi has contexts of size {xi.shape[1]} but must have {self.d_xi}")
        context = Context() if context is None else context
        chunks = xi.view(len(xi), self.n_experts, -1)
        if self.gate is None:
            return self.experts.rates(torch.zeros_like(environment), chunks[:, 0])
        routing = self.gate(xi, environment)
        for name, loss in routing.losses.items():
            context.aux = context.aux + getattr(self.gate, name) * loss
        self.announce(routing, context)
        expert = routing.expert
        rates = self.experts.rates(expert, chunks[torch.arange(len(xi)), expert])
        if not self.gated:
            return rates
        weight = routing.weight[:, None, None]
        return lambda x: weight * rates(x)

    def forward(
        self,
        t: Tensor,
        x: Float[Tensor, "environments starts n"],
        xi: Float[Tensor, "environments context"],
        environment: Int64[Tensor, " environments"],
    ) -> Float[Tensor, "environments starts n"]:
        """The rates of states at one moment (the fields do not depend on it)."""
        return self.rates(xi, environment)(x)


class MetaLearner(nn.Module):
    """A field and the contexts of the environments that it is trained on.

    Args:
        field: the field.
        n_environments: E.
        substeps: of RK4 from one point of a grid to the next.
        names: of the environments, for what is said of one that leaves the finite numbers.
    """

    def __init__(self, field: MixERField, n_environments: int, substeps: int = 1, names: Sequence[str] | None = None):
        super().__init__()
        if n_environments < 1:
            raise InputError(f"n_environments is {n_environments} but must be at least 1")
        if isinstance(field.gate, ContextGate) and n_environments < field.n_experts:
            raise InputError(
                f"n_environments is {n_environments} but must be at least the {field.n_experts} experts, one each"
            )
        self.field, self.substeps, self.names = field, substeps, names
        self.table = nn.Embedding.from_pretrained(torch.zeros(n_environments, field.d_xi), freeze=False)
        self.register_buffer("anchor", torch.zeros(sum(p.numel() for p in self.parameters())))

    @property
    def contexts(self) -> nn.Parameter:
        """(environments, d_xi), zero before training."""
        return self.table.weight

    def forward(
        self,
        environment: Int64[Tensor, " batch"],
        x0: Float[Tensor, "batch starts n"],
        times: Float[Tensor, "batch points"],
        context: Context | None = None,
    ) -> Float[Tensor, "batch starts points n"]:
        """Forecasts from the first points at all points of the grids.

        Raises:
            DivergedError: one has left the finite numbers; it says in which environment.
        """
        rates = self.field.rates(self.contexts[environment], environment, context)
        try:
            states = rk4(lambda _, x: rates(x), x0, times[:, None], self.substeps)
        except DivergedError as error:
            row, start = error.where
            number = int(environment[row])
            name = f"environment {number if self.names is None else self.names[number]}, start {start}"
            raise DivergedError(error.where, error.point, error.time, name) from None
        return states.movedim(0, 2)

    @torch.no_grad()
    def expert_losses(
        self, trajectories: Float[Tensor, "environments starts points n"], times: Float[Tensor, "environments points"]
    ) -> Float[Tensor, "environments experts"]:
        """The mean square error of each expert alone on each environment, all integrated in one pass.

        Not finite where the expert leaves the finite numbers.
        """
        count, experts = len(trajectories), self.field.n_experts
        expert = torch.arange(experts).repeat(count)
        rates = self.field.experts.rates(expert, self.contexts.view(count * experts, -1))
        x0 = trajectories[:, :, 0].repeat_interleave(experts, 0)
        grids = times.repeat_interleave(experts, 0)[:, None]
        states = rk4(lambda _, x: rates(x), x0, grids, self.substeps, check=False).movedim(0, 2)
        truth = trajectories.repeat_interleave(experts, 0)
        return (states - truth)[:, :, 1:].square().flatten(1).mean(1).view(count, experts)
