"""Concrete subspace learning: one mask over the weights, learned on unlabelled inputs, in which tasks are merged.

Tang et al. 2023, "Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion"
(arXiv:2312.06173); public code: tanganke/fusion_bench (`method/concrete_subspace`), tanganke/subspace_fusion. Of n
experts of one base, tau_i = theta_i - theta_0, and logits x of the shape of theta_0, 0 at first:

    m      = sigmoid((x + log u - log(1 - u)) / T),  u ~ U(0, 1)      binary Concrete; one draw for all tasks
    m     <- m / mean m                                               in each tensor by itself
    theta  = theta_0 + sum_i w_i m tau_i                              w one a task, or one a task and tensor
    loss   = sum_i mean entropy of softmax f_theta(a batch of task i)

Concrete task arithmetic learns x by Adam with w fixed, a new draw every step. Concrete AdaMerging learns x on two
levels, of first order: with the draw held, w takes one step of Adam from w_0 on one batch; then x takes one with the
same draw and that w, on another. Last, one mask is drawn and stays, and w is learned from w_0 as AdaMerging learns it.

Where the public code does otherwise this does as the paper says: w is reset BEFORE the inner gradient is taken
(fusion_bench takes it at the last step's w), and inner and outer step have one draw (subspace_fusion draws anew). The
inner rate is 1 there, and the first step of Adam moves every weight by its whole rate, 0.3 to 1.3 or -0.7; here it is
0.1 unless told otherwise.

Tensor letters: n tasks, L merged tensors.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.lib.core.merge.adamerging import (
    Asked,
    MergedModel,
    Unlabelled,
    check_as_many,
    in_pieces,
    learn,
    merged_params,
)
from workbench.lib.core.merge.merger import Merger, Update, merged_state
from workbench.lib.core.merge.vectors import TaskVectors
from workbench.lib.core.train import Hook

METHOD = Method(
    slug="concrete-subspace",
    title="Concrete Subspace Learning: Interference Elimination for Multi-task Model Fusion",
    family="merging",
    year=2023,
    paper="arXiv:2312.06173",
    claim="A shared mask learned on unlabelled data selects a subspace in which task arithmetic and AdaMerging "
    "interfere less.",
    objects=("ConcreteSubspace", "ConcreteMask", "ConcreteModel"),
    kind="merge",
)

Mask = dict[str, Tensor]


def example() -> Callable[[Mapping[str, Tensor], Sequence[Mapping[str, Tensor]]], dict[str, Tensor]]:
    """Merges state dicts of linear layers "0", "1", ..., with a mask learned on random inputs."""

    def merge(base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        weights = [base[f"{i}.weight"] for i in range(len(base)) if f"{i}.weight" in base]
        model = nn.Sequential(*(nn.Linear(w.shape[1], len(w), f"{i}.bias" in base) for i, w in enumerate(weights)))
        for name in base.keys() - model.state_dict().keys():
            model.register_buffer(name, base[name].clone())
        model.load_state_dict(base)
        inputs = torch.randn(8, weights[0].shape[1], generator=torch.Generator().manual_seed(0))
        merger = ConcreteSubspace([[inputs]] * len(experts), mask_lr=0.1, mask_steps=3, lr=0.01, steps=3)
        return merged_state(TaskVectors(model, experts), merger)

    return merge


class ConcreteMask(nn.Module):
    """Bernoulli variables of the shapes of some tensors, relaxed so that their logits x have a gradient.

    Args:
        reference: name -> tensor whose shape, type and device the logits have.
        init_logit: x at first; a weight is kept with probability sigmoid(x).
        temperature: T; towards 0 a draw is 0 or 1.
        tasks: n for a mask of each task's own, (n, *shape): no part of the method, for comparison. None for one.

    Raises:
        InputError: a temperature that is not above 0, logits that are not finite, or tasks of which there are none.
    """

    def __init__(
        self,
        reference: Mapping[str, Tensor],
        init_logit: float = 0.0,
        temperature: float = 0.5,
        tasks: int | None = None,
    ):
        super().__init__()
        check_temperature(temperature)
        if not math.isfinite(init_logit) or (tasks is not None and tasks < 1):
            raise InputError(f"init_logit, tasks are {init_logit}, {tasks} but must be finite and at least 1")
        self.names, self.temperature, self.tasks = tuple(reference), temperature, tasks
        several = () if tasks is None else (tasks,)
        self.logits = nn.ParameterList(
            torch.full((*several, *like.shape), float(init_logit), dtype=like.dtype, device=like.device)
            for like in reference.values()
        )

    def sample(self, hard: bool = False, generator: torch.Generator | None = None) -> Mask:
        """A draw, 0 to 1, with a gradient to the logits; if `hard`, 0 or 1 by the same u, without one."""
        drawn = {}
        for name, x in zip(self.names, self.logits, strict=True):
            u = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            score = x + u.clamp_(torch.finfo(x.dtype).tiny).logit()
            drawn[name] = (score > 0).to(x.dtype) if hard else (score / self.temperature).sigmoid()
        return drawn

    def rescale(self, mask: Mask) -> Mask:
        """Each tensor, of each task, divided by its mean, so that updates keep their size; one of zeros stays zero."""
        scaled = {}
        for name, m in mask.items():
            flat = m.reshape(1 if self.tasks is None else self.tasks, -1)
            mean = flat.mean(1, keepdim=True)
            scaled[name] = torch.where(mean > 0, flat / torch.where(mean > 0, mean, 1), 0).view(m.shape)
        return scaled

    def draw(self, hard: bool = False, generator: torch.Generator | None = None) -> Mask:
        """A draw as it is used: rescaled."""
        return self.rescale(self.sample(hard, generator))

    def probs(self) -> Mask:
        """sigmoid(x)."""
        return {name: x.detach().sigmoid() for name, x in zip(self.names, self.logits, strict=True)}

    def density(self) -> dict[str, float]:
        """The share of each tensor's weights that is kept on average."""
        return {name: float(p.mean()) for name, p in self.probs().items()}


def check_temperature(temperature: float) -> None:
    """Raise `InputError` for one at which nothing can be drawn."""
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature is {temperature} but must be above 0 and finite")


class ConcreteModel(MergedModel):
    """A merged model under a mask that is learned: a draw each step in training, one that stays from `settle` on.

    In evaluation mode its mask is the one that `settle` would draw now. While the mask is learned, the loss is that of
    concrete task arithmetic, or with an `inner_lr` that of the outer level.

    Args:
        mask: of the tensors that `vectors` merge.
        inner_lr: of the inner step of the weights; None for weights that stay.
        seed: of the mask that stays.
        others: as `MergedModel`.
    """

    def __init__(
        self,
        vectors: TaskVectors,
        mask: ConcreteMask,
        granularity: str = "layer",
        init: float = 0.3,
        heads: Sequence[Callable] | None = None,
        inner_lr: float | None = None,
        seed: int = 0,
    ):
        super().__init__(vectors, granularity, init, heads)
        self.mask, self.inner_lr, self.seed = mask, inner_lr, seed
        self.settled: Mask | None = None

    def final_mask(self, hard: bool = False) -> Mask:
        """The mask that is drawn of the logits as they are, with a gradient to them."""
        generator = torch.Generator(self.weights.device).manual_seed(self.seed)
        return self.mask.draw(hard, generator)

    @torch.no_grad()
    def settle(self, hard: bool = False) -> None:
        """Draw the mask that stays."""
        self.settled = self.final_mask(hard)

    def current_mask(self) -> Mask:
        return self.final_mask() if self.settled is None else self.settled

    def loss(self, asked: Asked) -> Float[Tensor, ""]:
        if self.settled is not None or not self.training:
            return self.entropy(asked.now, self._merged(self.weights, self.current_mask()))
        mask = self.mask.draw()
        weights = self.weights.detach() if self.inner_lr is None else self.looked_ahead(mask, asked)
        return self.entropy(asked.now, self._merged(weights, mask))

    def looked_ahead(self, mask: Mask, asked: Asked) -> Float[Tensor, "n ..."]:
        """The weights after the inner step: reset, merged under the draw, and one first step of Adam from there."""
        start = torch.full_like(self.weights, self.init, requires_grad=True)
        held = {name: m.detach() for name, m in mask.items()}
        (g,) = torch.autograd.grad(self.entropy(asked.before, self._merged(start, held)), start)
        return start.detach() - self.inner_lr * g / (g.abs() + 1e-8)

    def _merged(self, weights: Tensor, mask: Mask) -> dict[str, Tensor]:
        return merged_params(self.base, self.tau, weights, mask)


class ConcreteSubspace(Merger):
    """Learn which weights to merge, on inputs without labels, and then how much of each task.

    In memory are all task vectors, the merged model, and logits as large as it with their gradient and moments.

    Args:
        batches, heads: as AdaMerging takes them.
        granularity: the weights of tasks stay at `init` ("fixed": concrete task arithmetic), or are learned under the
            mask, one a task or one a task and tensor (concrete AdaMerging).
        init: every weight at first.
        init_logit, temperature: of the mask.
        hard: whether the mask that stays is of zeros and ones.
        mask_lr, mask_steps: of Adam on the logits; a step on two levels is two passes forward and back.
        inner_lr: of the inner step.
        lr, steps: of Adam on the weights at the end.
        shared: False for a mask of each task's own: no part of the method, for comparison.
        seed: of all draws.
    """

    def __init__(
        self,
        batches: Sequence[Any],
        heads: Sequence[Callable] | None = None,
        granularity: Literal["fixed", "task", "layer"] = "layer",
        init: float = 0.3,
        init_logit: float = 0.0,
        temperature: float = 0.5,
        hard: bool = False,
        mask_lr: float = 1e-2,
        mask_steps: int = 200,
        inner_lr: float = 0.1,
        lr: float = 1e-3,
        steps: int = 200,
        shared: bool = True,
        seed: int = 0,
    ):
        for name, value in (("mask_steps", mask_steps), ("steps", steps)):
            if value < 0:
                raise InputError(f"{name} is {value} but must be at least 0")
        for name, value in (("mask_lr", mask_lr), ("lr", lr)):
            if not 0 < value <= 1:
                raise InputError(f"{name} is {value} but must be above 0 and at most 1")
        if inner_lr < 0:
            raise InputError(f"inner_lr is {inner_lr} but must be at least 0")
        check_temperature(temperature)
        self.batches, self.heads, self.granularity, self.init = batches, heads, granularity, init
        self.init_logit, self.temperature, self.hard, self.shared = init_logit, temperature, hard, shared
        self.mask_lr, self.mask_steps, self.inner_lr = mask_lr, mask_steps, inner_lr
        self.lr, self.steps, self.seed = lr, steps, seed

    @property
    def passes(self) -> int:
        """Passes forward and back, each over a batch of every task."""
        return self.mask_steps if self.granularity == "fixed" else 2 * self.mask_steps + self.steps

    def learned(
        self, vectors: TaskVectors, hooks: Iterable[Hook] = (), task: Unlabelled | None = None
    ) -> ConcreteModel:
        """The merged model with its mask settled.

        Args:
            hooks: as `train` takes them, in the training of the mask and in that of the weights.
            task: the batches with names, for those who watch.

        Raises:
            InputError: as `AdaMerging.learned`; a temperature that is not above 0.
        """
        check_as_many(vectors, batches=self.batches, heads=self.heads)
        model, task = self.model(vectors), task or Unlabelled(self.batches)
        learn(model, task, model.mask.parameters(), self.mask_lr, self.mask_steps, self.seed, hooks)
        model.settle(self.hard)
        if self.granularity != "fixed":
            learn(model, task, [model.weights], self.lr, self.steps, self.seed + 1, hooks)
        return model

    def model(self, vectors: TaskVectors) -> ConcreteModel:
        """The merged model before anything is learned."""
        reference = {name: vectors.deltas(name)[0] for name in vectors.names}
        mask = ConcreteMask(reference, self.init_logit, self.temperature, None if self.shared else vectors.n)
        one, inner = ("task", None) if self.granularity == "fixed" else (self.granularity, self.inner_lr)
        return ConcreteModel(vectors, mask, one, self.init, self.heads, inner, self.seed)

    def update(self, vectors: TaskVectors) -> Update:
        yield from in_pieces(self.learned(vectors).update(), vectors)


MERGER = ConcreteSubspace
