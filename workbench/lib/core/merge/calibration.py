"""What is asked of a model on data of its task: the inputs of its linear layers, and the Fisher information.

A batch is a tensor (B, ...), or a tuple or dict of them, the model's arguments. A model answers logits (B, ..., C), or
an object that has them as `logits`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from workbench.errors import InputError


def answer(model: Callable[..., Any], batch: Any) -> Any:
    """What a model says to a batch."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def logits_of(answered: Any) -> Tensor:
    """The logits in what a model says."""
    return getattr(answered, "logits", answered)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards every module is as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def gram_matrices(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """X^T X / N of the inputs X (N, I) of every `nn.Linear`, by its name (I, I), in float64.

    Raises:
        InputError: no batch reached a linear layer.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def seen(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = (inputs[0] if inputs else named["input"]).detach().flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [layer.register_forward_pre_hook(seen(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with evaluating(model):
            for batch in batches:
                answer(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not any(counts.values()):
        raise InputError("batches reached no nn.Linear of the model but must reach at least one")
    return {name: total / counts[name] for name, total in sums.items() if counts[name]}


@torch.no_grad()
def fisher_diagonal(
    model: nn.Module, batches: Iterable[Any], labels: Literal["expected", "sampled"] = "expected", seed: int = 0
) -> dict[str, Tensor]:
    """The mean over samples of the squared gradient of log p(y | x), by the parameter's name.

    Args:
        labels: the mean over all y, as the model expects them, exactly; or one y a sample, drawn from the model. Of the
            first a sample costs a backward pass for every class.
        seed: of the draws.

    Raises:
        InputError: no sample in the batches, or an answer that is not finite.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    generator, n = torch.Generator().manual_seed(seed), 0

    def log_p(parameters: dict[str, Tensor], sample: Any) -> Tensor:
        one = _each(sample, lambda x: x[None])
        said = answer(lambda *a, **k: functional_call(model, parameters, a, k), one)
        return logits_of(said)[0].log_softmax(-1)

    def squares(sample: Any, drawn: Tensor) -> dict[str, Tensor]:
        if labels == "sampled":
            grads = jacrev(lambda p: (log_p(p, sample) * drawn).sum())(parameters)
            return {name: grad.square() for name, grad in grads.items()}
        chance = log_p(parameters, sample).exp()
        grads = jacrev(log_p)(parameters, sample)  # (..., C, *parameter)
        return {name: torch.tensordot(chance, grad.square(), chance.ndim) for name, grad in grads.items()}

    with evaluating(model):
        for batch in batches:
            chance = logits_of(answer(model, batch)).softmax(-1)
            if not len(chance):
                continue
            if not chance.isfinite().all():
                raise InputError("batches hold inputs to which the model has no finite answer")
            drawn = torch.multinomial(chance.flatten(0, -2).cpu(), 1, generator=generator).view(chance.shape[:-1])
            drawn = nn.functional.one_hot(drawn, chance.shape[-1]).to(chance)
            found = vmap(squares, chunk_size=16 if labels == "sampled" else 1)(batch, drawn)
            n += len(chance)
            for name, square in found.items():
                total[name] += square.sum(0)
    if not n:
        raise InputError("batches is empty but must hold at least one sample")
    return {name: square / n for name, square in total.items()}


def _each(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, dict):
        return {name: change(x) for name, x in batch.items()}
    return tuple(map(change, batch)) if isinstance(batch, tuple) else change(batch)


def of_experts(
    vectors: Any, given: Any, batches: Any, what: str, measure: Callable[[nn.Module, Any], Any]
) -> list[Any]:
    """One thing an expert: as given, or measured on its batches.

    Raises:
        InputError: neither or both are given, there are not as many as experts, or an expert to be measured is no
            module or not finite.
    """
    if (given is None) == (batches is None):
        raise InputError(f"either {what} or batches must be given, one for each expert")
    name, values = (what, given) if batches is None else ("batches", batches)
    if len(values) != vectors.n:
        raise InputError(f"{name} has {len(values)} entries but must have one for each of {vectors.n} experts")
    if batches is None:
        return list(given)
    for source in vectors.experts:
        if source.model is None:
            raise InputError(f"{source.label} is no module, so that batches cannot be run through it; give {what}")
    check_batches(batches)
    for _ in vectors.pieces():  # a weight that is not finite is the expert's, and not of what is measured
        pass
    return [measure(source.model, own) for source, own in zip(vectors.experts, batches, strict=True)]


def check_batches(batches: Sequence[Any]) -> None:
    """Raise an `InputError` unless each expert has a series of batches: not one batch, whose rows would be taken."""
    for i, own in enumerate(batches):
        if isinstance(own, Tensor | Mapping | str) or not isinstance(own, Iterable):
            raise InputError(f"batches[{i}] is a {type(own).__name__} but must be a list of batches, or alike")
