"""AdaMerging: the weights of task vectors, learned so that the merged model is sure of its answers.

`merged_params` is the merged model as a function of its weights, and of a mask, with a gradient to both.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from workbench.errors import InputError
from workbench.lib.core.merge.calibration import answer, evaluating, logits_of
from workbench.lib.core.merge.merger import Merger, Update
from workbench.lib.core.merge.vectors import TaskVectors


def merged_params(
    base: Mapping[str, Tensor],
    deltas: Mapping[str, Float[Tensor, "n ..."]],
    weights: Float[Tensor, "..."],
    mask: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """base + sum of weight_i * mask * tau_i, for `torch.func.functional_call`; differentiable in weights and mask.

    Args:
        base: every parameter that the model is to have; those without deltas stay as they are.
        deltas: name -> task vectors (n, *shape). No gradient reaches them, or the base.
        weights: one number a task (n,), or one a task and tensor (n, L), L in the order of `deltas`.
        mask: name -> (*shape), shared by all tasks; None for no mask.

    Raises:
        InputError: weights of another shape.
    """
    n = len(next(iter(deltas.values())))
    if weights.shape not in ((n,), (n, len(deltas))):
        raise InputError(f"weights has shape {tuple(weights.shape)} but must be ({n},) or ({n}, {len(deltas)})")
    merged = {name: value.detach() for name, value in base.items()}
    for number, (name, tau) in enumerate(deltas.items()):
        own = weights if weights.ndim == 1 else weights[:, number]
        update = torch.tensordot(own.to(tau.dtype), tau.detach(), 1)
        if mask is not None:
            update = mask[name] * update
        merged[name] = (merged[name] + update).to(merged[name].dtype)
    return merged


def entropy_loss(logits: Float[Tensor, "... C"]) -> Float[Tensor, ""]:
    """The mean Shannon entropy of softmax(logits), in nats: 0 for sure answers, log C for none."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


class AdaMerging(Merger):
    """Learn one weight a task, or one a task and tensor, on inputs without labels (Yang et al. 2023, arXiv:2310.02575).

    In memory are all task vectors, and with them the merged model and its gradient.

    Args:
        batches: of each expert, batches of inputs of its task, all held in memory; each step takes the next of each.
        heads: of each expert, what makes logits of the model's answer; None where it answers them.
        granularity: one weight a task, or one a task and tensor ("layer").
        init: every weight at first.
        lr, steps: of Adam.
    """

    def __init__(
        self,
        batches: Sequence[Any],
        heads: Sequence[Callable] | None = None,
        granularity: Literal["task", "layer"] = "layer",
        init: float = 0.3,
        lr: float = 1e-3,
        steps: int = 100,
    ):
        if steps < 0:
            raise InputError(f"steps is {steps} but must be at least 0")
        self.batches, self.heads, self.granularity = batches, heads, granularity
        self.init, self.lr, self.steps = init, lr, steps

    def fit(self, vectors: TaskVectors) -> Float[Tensor, "n L"]:
        """The learned weights; of one a task, L are equal.

        Raises:
            InputError: the base is no module, or there are not as many batches or heads as experts.
        """
        model = vectors.base.model
        if model is None:
            raise InputError(f"{vectors.base.label} is no module, but must be one that batches can be run through")
        for name, given in (("batches", self.batches), ("heads", self.heads)):
            if given is not None and len(given) != vectors.n:
                raise InputError(f"{name} has {len(given)} entries but must have one for each of {vectors.n} experts")
        batches = [list(own) for own in self.batches]
        if [] in batches:
            raise InputError(f"batches[{batches.index([])}] is empty but must hold at least one batch")
        deltas = {name: vectors.deltas(name) for name in vectors.names}
        base = {name: vectors.base.whole(name) for name in vectors.names}
        shape = (vectors.n,) if self.granularity == "task" else (vectors.n, len(deltas))
        weights = torch.full(shape, self.init, device=next(iter(base.values())).device, requires_grad=True)
        optimizer = torch.optim.Adam([weights], lr=self.lr)
        with torch.enable_grad(), evaluating(model):
            for step in range(self.steps):
                optimizer.zero_grad()
                merged = merged_params(base, deltas, weights)
                next_ones = [own[step % len(own)] for own in batches]
                sum(self._entropy(model, merged, task, batch) for task, batch in enumerate(next_ones)).backward()
                optimizer.step()
        weights = weights.detach()
        return weights if weights.ndim == 2 else weights[:, None].expand(-1, len(deltas))

    def _entropy(self, model: nn.Module, merged: dict[str, Tensor], task: int, batch: Any) -> Tensor:
        said = answer(lambda *a, **k: functional_call(model, merged, a, k), batch)
        return entropy_loss(logits_of(said if self.heads is None else self.heads[task](said)))

    def update(self, vectors: TaskVectors) -> Update:
        weights = dict(zip(vectors.names, self.fit(vectors).T, strict=True))
        for place, tau in vectors.pieces():
            yield place, weights[place.name].to(tau.dtype) @ tau
