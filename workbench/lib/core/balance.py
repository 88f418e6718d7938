"""Losses and controllers that keep the load of the experts even.

All losses are per layer, unweighted scalars; the router's `coefficients` weigh them. N tokens, E experts, K active.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from workbench.errors import InputError, unknown
from workbench.lib.core.recompute import recomputing
from workbench.lib.core.replicas import ALONE, Replicas
from workbench.lib.core.routing import Routing


def switch_lbl(probs: Float[Tensor, "tokens experts"], counts: Int64[Tensor, " experts"]) -> Float[Tensor, ""]:
    """Load-balancing loss E * sum_i f_i P_i (Fedus et al. 2021, Switch Transformer, eq. 4).

    f is the share of assignments (no gradient), P the mean probability; the value is 1 at perfect balance, and also 1
    whenever P is uniform, whatever the load: it must never be read as a measure of balance on its own.
    """
    share = counts.to(probs.dtype) / counts.sum()
    return counts.numel() * (share * probs.mean(0)).sum()


def top1_lbl(logits: Float[Tensor, "tokens experts"], temperature: float = 1.0) -> Float[Tensor, ""]:
    """Top-1 load-balancing loss E * sum_i f_i^2 / mean_t max_i p_ti with f = mean_t p_t (Sigma-MoE-Tiny, 2512.16248).

    Between 1 (one-hot and balanced) and E (uniform probabilities, or one-hot and collapsed); gradient flows through
    numerator and denominator.
    """
    p = torch.softmax(logits / temperature, dim=-1)
    return logits.shape[-1] * p.mean(0).square().sum() / p.amax(-1).mean()


def z_loss(logits: Float[Tensor, "tokens experts"]) -> Float[Tensor, ""]:
    """Mean squared log-partition of the router, which keeps its logits small (Zoph et al. 2022, ST-MoE, eq. 5)."""
    return torch.logsumexp(logits, dim=-1).square().mean()


def band_loss(probs: Float[Tensor, "tokens experts"], low: float = 0.25, high: float = 4.0) -> Float[Tensor, ""]:
    """E^2 * mean_i(relu(low/E - P_i)^2 + relu(P_i - high/E)^2): zero while every mean probability is inside the band.

    `low` and `high` are multiples of the uniform share 1/E (Ternovtsii, semantic-resonance).
    """
    p = probs.mean(0) * probs.shape[-1]
    return (torch.relu(low - p).square() + torch.relu(p - high).square()).mean()


BALANCE_LOSSES = {
    "lbl": lambda routing, replicas: switch_lbl(routing.probs, replicas.total(routing.counts)),
    "top1": lambda routing, _: top1_lbl(routing.logits),
    "band": lambda routing, _: band_loss(routing.probs),
    "z": lambda routing, _: z_loss(routing.logits),
}

SHARED_OUT = ("lbl", "z")
"""Those whose mean over the shares of a batch is that of the batch: of the others every share has one of its own."""


def balance_losses(
    routing: Routing, names: Iterable[str], mask: Bool[Tensor, " tokens"] | None = None, replicas: Replicas = ALONE
) -> dict[str, Float[Tensor, ""]]:
    """The named losses of one routing: "lbl", "top1", "band", "z"; of the tokens where `mask` holds, 0 without any.

    The load in "lbl" is that of all `replicas`.
    """
    routing = routing.only(mask)
    if not routing.n_tokens:
        return {name: routing.logits.sum() for name in names}
    return {name: BALANCE_LOSSES[name](routing, replicas) for name in names}


def check_coefficients(coefficients: dict[str, float] | None) -> dict[str, float]:
    """The coefficients as a fresh dict; an unknown loss or a negative coefficient is an `InputError`."""
    for name, value in (coefficients or {}).items():
        if name not in BALANCE_LOSSES:
            raise unknown("balance loss", name, BALANCE_LOSSES)
        if not value >= 0:
            raise InputError(f"coefficients[{name!r}] is {value} but must be at least 0")
    return dict(coefficients or {})


class LossFreeBias(nn.Module):
    """Auxiliary-loss-free balancing: a bias per expert that enters the selection only (Wang et al. 2024, 2408.15664).

    After each optimizer step the bias of every expert moves by `rate` towards the mean load of the tokens routed in
    training mode since the last step: b_i += rate * sign(mean load - load_i). Combine weights never see it.

    Args:
        n_experts: E.
        rate: step of the bias, in units of the selection score.
    """

    replicas: Replicas = ALONE

    def __init__(self, n_experts: int, rate: float = 1e-3):
        super().__init__()
        if not rate > 0:
            raise InputError(f"rate is {rate} but must be above 0")
        self.rate = rate
        self.register_buffer("bias", torch.zeros(n_experts))
        self.register_buffer("load", torch.zeros(n_experts, dtype=torch.int64), persistent=False)

    def _apply(self, fn, recurse=True):
        """The bias stays in float32 when the model becomes a half: steps of `rate` would be lost."""
        before = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype.itemsize < 4:
            self.bias = before.to(self.bias.device)
        return self

    @torch.no_grad()
    def count(self, routing: Routing, mask: Bool[Tensor, " tokens"] | None = None) -> None:
        """Add a routing, of the tokens where `mask` holds, to the load of the step; for training batches.

        What a checkpoint repeats counts once.
        """
        if not recomputing():
            self.load += routing.only(mask).counts

    def update(self, load: Tensor) -> None:
        """One step of the bias for a given load (E,); in place, so that a checkpoint holds the live buffer."""
        load = load.to(self.bias.dtype)
        self.bias += self.rate * torch.sign(load.mean() - load)

    def after_step(self) -> None:
        """Called by the training loop after each optimizer step."""
        load = self.replicas.total(self.load)
        if int(load.sum()):
            self.update(load)
            self.load.zero_()
