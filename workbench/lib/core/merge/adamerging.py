"""AdaMerging: the weights of task vectors, learned so that the merged model is sure of its answers.

`merged_params` is the merged model as a function of its weights, and of a mask, with a gradient to both; `MergedModel`
is it as a module whose parameters are those of the merge, and `Unlabelled` is what it is trained on.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from workbench.errors import InputError
from workbench.lib.core.merge.calibration import answer, check_batches, evaluating, logits_of
from workbench.lib.core.merge.merger import Merger, Update
from workbench.lib.core.merge.vectors import TaskVectors
from workbench.lib.core.routing import Context
from workbench.lib.core.train import Hook, TrainConfig, train


def merged_update(
    deltas: Mapping[str, Float[Tensor, "n ..."]],
    weights: Float[Tensor, "..."],
    mask: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """sum of weight_i * mask * tau_i by name; arguments as in `merged_params`."""
    n = len(next(iter(deltas.values())))
    if weights.shape not in ((n,), (n, len(deltas))):
        raise InputError(f"weights has shape {tuple(weights.shape)} but must be ({n},) or ({n}, {len(deltas)})")
    update = {}
    for number, (name, tau) in enumerate(deltas.items()):
        own = (weights if weights.ndim == 1 else weights[:, number]).to(tau.dtype)
        if mask is None:
            update[name] = torch.tensordot(own, tau.detach(), 1)
        elif mask[name].ndim < tau.ndim:  # one for all tasks: the sum first, a task vector less to go through
            update[name] = mask[name] * torch.tensordot(own, tau.detach(), 1)
        else:
            update[name] = torch.tensordot(own, mask[name] * tau.detach(), 1)
    return update


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
        mask: name -> (*shape), shared by all tasks, or (n, *shape), each task's own; None for no mask.

    Raises:
        InputError: weights of another shape.
    """
    merged = {name: value.detach() for name, value in base.items()}
    for name, update in merged_update(deltas, weights, mask).items():
        merged[name] = (merged[name] + update).to(merged[name].dtype)
    return merged


def entropy_loss(logits: Float[Tensor, "... C"]) -> Float[Tensor, ""]:
    """The mean Shannon entropy of softmax(logits), in nats: 0 for sure answers, log C for none."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


Inputs = Mapping[int, Any]
"""Task number -> a batch of its inputs."""


@dataclass(frozen=True)
class Asked:
    """What a step asks of the merged model: a batch of each task, and `before` others, for a step that looks ahead."""

    now: Inputs
    before: Inputs

    def __len__(self) -> int:
        return sum(map(_rows, self.now.values()))


class Unlabelled:
    """Batches of inputs of each task, without labels, as a task that `train` takes; metric: entropy, mean over tasks.

    A batch is drawn from those given, of every task the one of the same number: a split or a size is not asked for.

    Args:
        batches: of each task, all held in memory.
        domains: names of the tasks.
        manifest: of the data.

    Raises:
        InputError: a task without batches, or a batch without rows.
    """

    name, metric, unit, higher_is_better = "unlabelled", "entropy", "nats", False

    def __init__(
        self, batches: Iterable[Iterable[Any]], domains: Sequence[str] | None = None, manifest: dict | None = None
    ):
        batches = list(batches)
        check_batches(batches)
        self.inputs = [list(own) for own in batches]
        for i, own in enumerate(self.inputs):
            if not own or not all(map(_rows, own)):
                raise InputError(f"batches[{i}] is empty, or has an empty batch, but must hold at least one with a row")
        self.domains = tuple(domains or map(str, range(len(self.inputs))))
        self.manifest = manifest or {}

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Asked:
        wanted = range(len(self.inputs)) if domain is None else [domain]
        draws = torch.randint(2**31, (2,), generator=generator).tolist()
        return Asked(*({i: self.inputs[i][draw % len(self.inputs[i])] for i in wanted} for draw in draws))

    def batches(self, split: str, size: int) -> Iterator[Asked]:
        for i, own in enumerate(self.inputs):
            for batch in own:
                yield Asked({i: batch}, {i: batch})

    def loss(self, model: "MergedModel", batch: Asked) -> tuple[Tensor, Context]:
        return model.loss(batch), Context()

    def evaluate(
        self, model: "MergedModel", split: str = "validation", max_batches: int | None = None
    ) -> dict[str, float]:
        merged, found = model.merged(), {}
        for i, own in enumerate(self.inputs):
            asked = own[:max_batches]
            total = sum(float(model.entropy({i: batch}, merged)) * _rows(batch) for batch in asked)
            found[f"{self.metric}/{self.domains[i]}"] = total / sum(map(_rows, asked))
        return {self.metric: sum(found.values()) / len(found)} | found


class MergedModel(nn.Module):
    """A merged model whose parameters are those of the merge: `weights`, one a task, or one a task and tensor.

    Base, task vectors and heads are constants: no gradient reaches them, and they are no part of its state.

    Args:
        vectors: of a base that is a module.
        granularity: "task" or "layer".
        init: every weight at first.
        heads: of each expert, what makes logits of the base's answer; None where it answers them.

    Raises:
        InputError: the base is no module, or there are not as many heads as experts.
    """

    def __init__(
        self,
        vectors: TaskVectors,
        granularity: str = "layer",
        init: float = 0.3,
        heads: Sequence[Callable] | None = None,
    ):
        super().__init__()
        if vectors.base.model is None:
            raise InputError(f"{vectors.base.label} is no module, but must be one that batches can be run through")
        self.tau = {name: vectors.deltas(name) for name in vectors.names}
        model = vectors.base.model
        self.base = {name: p.detach() for name, p in model.named_parameters()}
        self.base |= {name: vectors.base.whole(name) for name in vectors.names}
        self._fixed = (model, None if heads is None else list(heads))  # in a tuple, which nn.Module does not register
        shape = (vectors.n,) if granularity == "task" else (vectors.n, len(self.tau))
        self.init = init
        self.weights = nn.Parameter(torch.full(shape, float(init), device=vectors.device))

    def update(self) -> dict[str, Tensor]:
        """What the merge adds to the base, by name, as it is now."""
        with torch.no_grad():
            return merged_update(self.tau, self.weights, self.current_mask())

    def current_mask(self) -> Mapping[str, Tensor] | None:
        """The mask of the merge; none here."""
        return None

    def merged(self) -> dict[str, Tensor]:
        """The weights of the merged model, as it is now."""
        with torch.no_grad():
            return merged_params(self.base, self.tau, self.weights, self.current_mask())

    def loss(self, asked: Asked) -> Float[Tensor, ""]:
        """The sum over tasks of the mean entropy of the answers."""
        return self.entropy(asked.now, merged_params(self.base, self.tau, self.weights))

    def entropy(self, inputs: Inputs, merged: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """The sum over tasks of the mean entropy of what the model says with these weights."""
        model, heads = self._fixed

        def call(*args: Any, **named: Any) -> Any:
            return functional_call(model, dict(merged), args, named)

        batches = list(inputs.values())
        if heads is None and all(torch.is_tensor(x) and x.shape == batches[0].shape for x in batches):
            return len(batches) * entropy_loss(logits_of(answer(call, torch.cat(batches))))  # one pass for all
        total = 0
        for task, batch in inputs.items():
            said = answer(call, batch)
            total = total + entropy_loss(logits_of(said if heads is None else _frozen(heads[task])(said)))
        return total

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Inside, base and heads are in evaluation mode, and gradients are on."""
        model, heads = self._fixed
        with ExitStack() as stack:
            for module in (model, *(heads or ())):
                if isinstance(module, nn.Module):
                    stack.enter_context(evaluating(module))
            stack.enter_context(torch.enable_grad())
            yield


def learn(
    model: MergedModel,
    task: Unlabelled,
    trained: Iterable[nn.Parameter],
    lr: float,
    steps: int,
    seed: int = 0,
    hooks: Iterable[Hook] = (),
) -> None:
    """Train some of a merged model's parameters by Adam at one rate; the others stay. No steps leave all as it is."""
    trained = list(trained)
    if steps == 0:
        return
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is one for one in trained))
    config = TrainConfig(steps, 1, lr, warmup=0, final_lr=1.0, clip=math.inf, seed=seed, eval_every=None)
    with torch.random.fork_rng(devices=[]), model.learning():
        train(model, task, config, hooks, optimizer=torch.optim.Adam(trained, lr=lr))


class AdaMerging(Merger):
    """Learn one weight a task, or one a task and tensor, on inputs without labels (Yang et al. 2023, arXiv:2310.02575).

    In memory are all task vectors, and with them the merged model and its gradient.

    Args:
        batches: of each expert, batches of inputs of its task, all held in memory; each step draws one of each.
        heads: of each expert, what makes logits of the model's answer; None where it answers them.
        granularity: one weight a task, or one a task and tensor ("layer").
        init: every weight at first.
        lr, steps: of Adam.
        seed: of the draws.
    """

    def __init__(
        self,
        batches: Sequence[Any],
        heads: Sequence[Callable] | None = None,
        granularity: Literal["task", "layer"] = "layer",
        init: float = 0.3,
        lr: float = 1e-3,
        steps: int = 100,
        seed: int = 0,
    ):
        if steps < 0:
            raise InputError(f"steps is {steps} but must be at least 0")
        self.batches, self.heads, self.granularity = batches, heads, granularity
        self.init, self.lr, self.steps, self.seed = init, lr, steps, seed

    def learned(self, vectors: TaskVectors, hooks: Iterable[Hook] = (), task: Unlabelled | None = None) -> MergedModel:
        """The merged model with the learned weights.

        Args:
            hooks: as `train` takes them.
            task: the batches with names, for those who watch.

        Raises:
            InputError: the base is no module, or there are not as many batches or heads as experts.
        """
        check_as_many(vectors, batches=self.batches, heads=self.heads)
        model = MergedModel(vectors, self.granularity, self.init, self.heads)
        task = task or Unlabelled(self.batches)
        learn(model, task, [model.weights], self.lr, self.steps, self.seed, hooks)
        return model

    def fit(self, vectors: TaskVectors) -> Float[Tensor, "n L"]:
        """The learned weights; of one a task, L are equal. Raises as `learned`."""
        weights = self.learned(vectors).weights.detach()
        return weights if weights.ndim == 2 else weights[:, None].expand(-1, len(vectors.names))

    def update(self, vectors: TaskVectors) -> Update:
        yield from in_pieces(self.learned(vectors).update(), vectors)


def check_as_many(vectors: TaskVectors, **given: Sequence[Any] | None) -> None:
    """Raise an `InputError` where something that is given is not one for each expert."""
    for name, values in given.items():
        if values is not None and len(values) != vectors.n:
            raise InputError(f"{name} has {len(values)} entries but must have one for each of {vectors.n} experts")


def in_pieces(update: Mapping[str, Tensor], vectors: TaskVectors) -> Update:
    """An update by name as a `Merger` yields it."""
    for place in vectors.places():
        yield place, update[place.name].reshape(-1)[place.start : place.stop]


def _rows(batch: Any) -> int:
    """Rows of a batch: those of its first tensor."""
    if isinstance(batch, dict):
        batch = next(iter(batch.values()))
    return len(batch[0] if isinstance(batch, tuple) else batch)


def _frozen(head: Callable) -> Callable:
    """A head to whose own parameters no gradient goes."""
    if not isinstance(head, nn.Module):
        return head
    state = {name: p.detach() for name, p in head.named_parameters()}
    return lambda x: functional_call(head, state, (x,))
