"""Training by turns: contexts alone, then weights alone, each held to where the turn began; and adaptation.

A turn minimises loss + beta / 2 ||p - p_old||^2 over the contexts, and the next over the weights. The gradient of the
second term is added before each step of the optimiser, after the gradient of the loss was clipped.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.integrate import rk4
from workbench.lib.core.observe import quiet
from workbench.lib.core.train import Hook, State
from workbench.lib.dynamics.context_gate import ContextGate, GateFit


class Alternation(Hook):
    """The turns of a `MetaLearner`, and the refits of its gate if it is a `ContextGate`.

    What a turn is held to is kept in the model's buffers, so that a training that is resumed goes on bit for bit.

    Args:
        trajectories, times: of all environments: what the gate is fitted to.
        on_contexts, on_weights: steps of a turn.
        beta: of the proximal term.
        refit_every: steps from one refit of the gate to the next.
        assignment: of clusters to experts, see `ContextGate.fit`.

    Attributes:
        last_fit: of the gate; None before the first.
    """

    def __init__(
        self,
        trajectories: Float[Tensor, "environments starts points n"],
        times: Float[Tensor, "grids times"],
        on_contexts: int = 5,
        on_weights: int = 5,
        beta: float = 10.0,
        refit_every: int = 5,
        assignment: str = "greedy",
    ):
        for name, value in (("on_contexts", on_contexts), ("on_weights", on_weights), ("refit_every", refit_every)):
            if value < 1:
                raise InputError(f"{name} is {value} but must be at least 1")
        if beta < 0:
            raise InputError(f"beta is {beta} but must be at least 0")
        check_trajectories(trajectories, times)
        self.trajectories, self.times = trajectories, times
        self.on_contexts, self.on_weights, self.beta = on_contexts, on_weights, beta
        self.refit_every, self.assignment = refit_every, assignment
        self.last_fit: GateFit | None = None

    def before_step(self, state: State) -> None:
        if state.step % (self.on_contexts + self.on_weights) == 0:
            with torch.no_grad():
                state.model.anchor.copy_(nn.utils.parameters_to_vector(state.model.parameters()))

    @torch.no_grad()
    def before_update(self, state: State) -> None:
        model, at = state.model, 0
        contexts_turn = state.step % (self.on_contexts + self.on_weights) < self.on_contexts
        for p in model.parameters():
            old, at = model.anchor[at : at + p.numel()].view_as(p), at + p.numel()
            if (p is model.contexts) != contexts_turn:
                p.grad = None
            elif p.grad is not None:
                p.grad.add_(p - old, alpha=self.beta)

    def after_step(self, state: State) -> None:
        gate = state.model.field.gate
        if isinstance(gate, ContextGate) and (state.step + 1) % self.refit_every == 0:
            with quiet(state.model):
                losses = state.model.expert_losses(self.trajectories, self.times)
            self.last_fit = gate.fit(state.model.contexts.detach(), losses, self.assignment)


def check_trajectories(trajectories: Tensor, times: Tensor) -> None:
    """Raise `InputError` unless there is a grid for each environment, with a time for each point, of two or more."""
    if trajectories.shape[::2][:2] != times.shape:
        found = f"{len(trajectories)} environments of {trajectories.shape[2]} points"
        raise InputError(f"times is {tuple(times.shape)} but trajectories has {found}")
    if times.shape[1] < 2:
        raise InputError("trajectories has 1 point but must have at least 2")


def adapt(
    field: nn.Module,
    trajectories: Float[Tensor, "environments starts points n"],
    times: Float[Tensor, "grids times"],
    steps: int,
    lr: float = 1e-2,
    substeps: int = 1,
) -> Float[Tensor, "environments context"]:
    """Contexts of new environments, learned from zero with field and gate as they are; the gate may change its mind.

    Raises:
        InputError: steps is below 1.
    """
    if steps < 1:
        raise InputError(f"steps is {steps} but must be at least 1")
    check_trajectories(trajectories, times)
    environment = torch.arange(len(trajectories))
    xi = trajectories.new_zeros(len(trajectories), field.d_xi).requires_grad_()
    optimizer = torch.optim.Adam([xi], lr=lr)
    with quiet(field):
        for _ in range(steps):
            rates = field.rates(xi, environment)
            states = rk4(lambda _, x: rates(x), trajectories[:, :, 0], times[:, None], substeps)  # noqa: B023
            loss = (states.movedim(0, 2) - trajectories)[:, :, 1:].square().mean()
            (xi.grad,) = torch.autograd.grad(loss, [xi])
            optimizer.step()
    return xi.detach()
