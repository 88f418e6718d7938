"""Every architecture with every adapter on all of its layers, with the adapter's defaults: right, or refused.

Right is all of this, for a model whose own behaviour allows the question:

- the start is the model, within `CLOSE`, in evaluation and in training with its dropout;
- trained parameters that are anything give finite gradients, and those of checkpointed layers, reentrant or not, are
  the same, the losses too;
- the logits generated with a cache, by two beams, are those generated without one;
- what is saved, taken off and loaded is the same bit for bit, and so is what is left when it is taken off.
"""

import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import workbench
from tests.sweep.models import NotBuilt, answer, build, one_line, quiet
from workbench.errors import InputError
from workbench.lib.core.adapt import Adapted, LoRA, adapt, load_adapter

ADAPTERS = {"lora": LoRA} | {row.slug: import_module(row.module).ADAPTER for row in workbench.methods() if row.adapts}

CLOSE = 1e-5
"""Of outputs, relative to the largest."""

SAME = 3e-5
"""Of gradients and losses of the same numbers in another order of sums, relative to the largest."""

RIGHT = "right"
REFUSALS = {
    r"must match linear layers": "no linear layer",
    r"has no graph: the layer ran without gradients": "a layer that the model runs without gradients",
    r"the model computes with '\w+' of \S+ itself": "a weight that the model reads itself",
    r"by way of the layer's output, on which no other loss depends": "a layer that no loss depends on, reentrant",
    r"decides for whole sequences, along axis 0": "sequences along another axis",
}
"""The kinds of refusal, by what the message says. One that is not listed is a failure."""

FILE = Path(__file__).with_name("adapters.tsv")


class Wrong(Exception):
    """A number that is not what it must be."""


@dataclass
class Case:
    """An architecture, and what it does by itself.

    Attributes:
        y: its answer in evaluation mode.
        trained: its answer in training mode and the state of the generator afterwards; None where it has none, it is
            not the same twice, or another one by a rounding of its weights.
        learns: whether its own linear layers get gradients.
        checkpoints: the values of `use_reentrant` with which they get the same when layers are checkpointed.
        beams: the number, 2 or 1, with which it generates the same with a cache as without, with other weights too;
            0 for none.
    """

    name: str
    model: nn.Module
    inputs: dict[str, Any]
    y: Tensor
    trained: tuple[Tensor, Tensor] | None = None
    learns: bool = False
    checkpoints: tuple[bool, ...] = ()
    beams: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def restore(self) -> None:
        """The buffers that a forward in training has moved."""
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                if name in self.tensors:
                    buffer.copy_(self.tensors[name])


def case(name: str) -> Case:
    """The architecture, observed.

    Raises:
        NotBuilt: it cannot be.
    """
    model, inputs = build(name)
    model.requires_grad_(True)
    with quiet(), torch.no_grad():
        found = Case(name, model, inputs, answer(model, inputs))
        found.tensors = {key: tensor.clone() for key, tensor in model.state_dict(keep_vars=False).items()}
        found.tensors |= {key: tensor.clone() for key, tensor in model.named_buffers()}
        found.trained = training(found)
        found.beams = next((n for n in ((1,) if name in LEFT_BEHIND else (2, 1)) if generates(found, n)), 0)
    with quiet():
        found.learns = learns(found)
        found.checkpoints = tuple(r for r in (False, True) if found.learns and checkpoints(found, r))
    return found


def outcome(found: Case, slug: str) -> str:
    """`RIGHT`, a kind of refusal, or what is wrong."""
    try:
        with quiet():
            check(found, slug)
        return RIGHT
    except InputError as error:
        return "refused: " + refusal(error)
    except Wrong as error:
        return f"wrong: {error}"
    except Exception as error:
        return f"error: {one_line(error)}"


def refusal(error: InputError) -> str:
    """The kind of a refusal: its message without names and numbers."""
    text = str(error)
    return next((kind for pattern, kind in REFUSALS.items() if re.search(pattern, text)), f"unlisted: {text}")


def check(found: Case, slug: str) -> None:
    model = found.model
    torch.manual_seed(1)
    adapted = adapt(model, slug, "*")
    try:
        with torch.no_grad():
            close(answer(model, found.inputs), found.y, CLOSE, "another start")
            if found.trained is not None:
                started(found, slug)
            disturb(adapted)
            y = answer(model, found.inputs)
        require(bool(y.isfinite().all()), "an answer that is not finite")
        if found.learns:
            same_gradients(found, adapted)
        with torch.no_grad():
            gap = generated_gap(found, found.beams) if found.beams else 0.0
            with tempfile.TemporaryDirectory() as folder:
                adapted.save(f"{folder}/adapter")
                adapted.remove()
                same(answer(model, found.inputs), found.y, "another answer when taken off")
                unchanged(found)
                require(gap <= CLOSE or not steady(found), f"generated with a cache and without, {gap:.0e} apart")
                try:
                    adapted = load_adapter(model, f"{folder}/adapter")
                except InputError as error:
                    raise Wrong(f"saved, and not loaded: {error}") from error
            same(answer(model, found.inputs), y, "another answer when loaded")
    finally:
        model.eval()
        found.restore()
        adapted.remove()
        for p in model.parameters():
            p.grad = None
    unchanged(found)


# -- what is asked


def close(y: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    require(y.shape == expected.shape, f"{what}, of another size")
    gap = float((y - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    require(gap <= tolerance, f"{what}, {gap:.0e} apart")


def same(y: Tensor, expected: Tensor, what: str) -> None:
    require(torch.equal(y, expected), what)


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Wrong(what)


def unchanged(found: Case) -> None:
    """The model's tensors are those it had."""
    state = found.model.state_dict()
    before = {key: tensor for key, tensor in found.tensors.items() if key in state}
    require(len(state) == len(before), "other tensors when taken off")
    require(all(torch.equal(state[key], tensor) for key, tensor in before.items()), "tensors changed when taken off")


def disturb(adapted: Adapted) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, p in adapted.named_parameters().items():
        p.add_(torch.randn(p.shape, generator=generator) * (1.0 if ".router." in name else 0.1))


def started(found: Case, slug: str) -> None:
    """The start in training, which draws for its dropout what the model draws."""
    found.model.train()
    y = answer(found.model, found.inputs)
    state = torch.get_rng_state()
    found.model.eval()
    found.restore()
    before, after = found.trained
    if not draws(slug):
        same(state, after, "other draws in training: dropout is lost")
        close(y, before, CLOSE, "another start in training")


@cache
def draws(slug: str) -> bool:
    """Whether the adapter itself draws in training."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)))
    adapt(model, slug).model.train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)))
    return not torch.equal(before, torch.get_rng_state())


def same_gradients(found: Case, adapted: Adapted) -> None:
    parameters = adapted.named_parameters()
    losses, expected, after = gradients(found, list(parameters.values()), adapted)
    for name, grad in zip(parameters, expected, strict=True):
        require(grad is None or bool(grad.isfinite().all()), f"the gradient of {name} is not finite")
    require(any(grad is not None and bool(grad.any()) for grad in expected), "no gradient")
    for reentrant in found.checkpoints:
        with checkpointed(found.model, reentrant):
            again, checkpointed_grads, after_again = gradients(found, list(parameters.values()), adapted)
        how = "reentrant" if reentrant else "not reentrant"
        close(again, losses, SAME, f"checkpointed ({how}), another loss")
        gap = gradient_gap(checkpointed_grads, expected)
        require(gap <= SAME, f"checkpointed ({how}), gradients {gap:.0e} apart")
        moved = all(torch.allclose(a, b) for a, b in zip(after_again, after, strict=True))
        require(moved, f"checkpointed ({how}), statistics counted otherwise")


def gradients(
    found: Case, parameters: list[nn.Parameter], adapted: Adapted | None = None
) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
    """In training mode, where the model has one: the losses, their gradients, and what the adapter has counted.

    What was counted is put back.
    """
    model = found.model.train(found.trained is not None)
    counted = [] if adapted is None else list(counters(adapted))
    before = [t.clone() for t in counted]
    for p in parameters:
        p.grad = None
    try:
        losses = [answer(model, found.inputs).sin().mean()]
        if adapted is not None:
            losses += adapted.losses().values()
        torch.stack([torch.as_tensor(loss, dtype=torch.float32) for loss in losses]).sum().backward()
        grads, after = [p.grad for p in parameters], [t.clone() for t in counted]
    finally:
        model.eval()
        found.restore()
        for t, value in zip(counted, before, strict=True):
            t.copy_(value)
        for p in parameters:
            p.grad = None
    return torch.stack([torch.as_tensor(loss).detach() for loss in losses]), grads, after


def counters(adapted: Adapted) -> Iterator[Tensor]:
    """What was put in that no gradient trains: biases, loads and statistics, kept or not."""
    for layer in adapted.layers.values():
        yield from (t for name, t in layer.named_buffers() if not name.startswith("base."))


def gradient_gap(grads: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """The largest difference, relative to the largest gradient; infinite where one has a gradient and one has none."""
    pairs = [(a, b) for a, b in zip(grads, expected, strict=True) if a is not None or b is not None]
    if any(a is None or b is None for a, b in pairs):
        return float("inf")
    largest = max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / max(largest, 1e-12)


@contextmanager
def checkpointed(model: nn.Module, reentrant: bool) -> Iterator[None]:
    hooks = [(module, set(module._forward_hooks)) for module in model.modules()]
    try:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        yield
    finally:
        model.gradient_checkpointing_disable()
        for module, before in hooks:  # those that ask for gradients of the input are left there by the library
            for key in module._forward_hooks.keys() - before:
                del module._forward_hooks[key]


# -- what a model does by itself


def training(found: Case) -> tuple[Tensor, Tensor] | None:
    try:
        found.model.train()
        runs = [(answer(found.model, found.inputs), torch.get_rng_state()) for _ in range(2) if not found.restore()]
        same = all(torch.equal(a, b) for a, b in zip(*runs, strict=True)) and bool(runs[0][0].isfinite().all())
        with moved(found.model, ROUNDING):
            gap = float((answer(found.model, found.inputs) - runs[0][0]).abs().max())
        return runs[0] if same and gap <= CLOSE * max(1.0, float(runs[0][0].abs().max())) else None
    except Exception:
        return None
    finally:
        found.model.eval()
        found.restore()


def checkpoints(found: Case, reentrant: bool) -> bool:
    """Whether the model's own linear layers, the rest of it frozen, get the same gradients with checkpointed layers."""
    if not getattr(found.model, "supports_gradient_checkpointing", False) or (reentrant and found.name in NEVER_ENDS):
        return False
    try:
        with matrices(found.model) as parameters:
            _, expected, _ = gradients(found, parameters)
            with checkpointed(found.model, reentrant):
                _, grads, _ = gradients(found, parameters)
        return gradient_gap(grads, expected) <= SAME
    except Exception:
        return False


NEVER_ENDS = {"wavlm"}
"""Whose own backward through reentrant checkpoints recurses without an end."""


def learns(found: Case) -> bool:
    """Whether the model's own linear layers get finite gradients, and any at all."""
    try:
        with matrices(found.model) as parameters:
            _, grads, _ = gradients(found, parameters)
        grads = [grad for grad in grads if grad is not None]
        return any(bool(g.any()) for g in grads) and all(bool(g.isfinite().all()) for g in grads)
    except Exception:
        return False


@contextmanager
def matrices(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The weights of linear layers; everything else is frozen meanwhile, as it is when the model is adapted."""
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    chosen = list({m.weight: None for m in model.modules() if isinstance(m, nn.Linear | Conv1D)}.keys() - tables)
    model.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)
    try:
        yield chosen
    finally:
        model.requires_grad_(True).eval()


def generates(found: Case, beams: int) -> bool:
    try:
        if not found.model.can_generate() or generated_gap(found, beams) > CLOSE:
            return False
        with moved(found.model, 0.1):
            return generated_gap(found, beams) <= CLOSE
    except Exception:
        return False


LEFT_BEHIND = {"recurrent_gemma"}
"""Whose states are not in its cache, and do not go with their beams."""

ROUNDING = 2**-23


def steady(found: Case) -> bool:
    """Whether the model does so with any weights; one that chooses its tokens or experts may choose by a rounding."""
    for seed in range(12):
        with moved(found.model, 0.7, seed):
            if generated_gap(found, found.beams) > CLOSE:
                return False
    return True


@contextmanager
def moved(model: nn.Module, share: float, seed: int = 3) -> Iterator[None]:
    """Inside, the model's matrices are others, by about this share of themselves."""
    generator = torch.Generator().manual_seed(seed)
    before = {p: p.detach().clone() for p in model.parameters() if p.ndim > 1}
    try:
        with torch.no_grad():
            for p in before:
                p.add_(torch.randn(p.shape, generator=generator) * p.square().mean().sqrt() * share)
        yield
    finally:
        with torch.no_grad():
            for p, value in before.items():
                p.copy_(value)


def generated_gap(found: Case, beams: int) -> float:
    """How far the logits of three new tokens are apart, with a cache and without."""
    ways = [generated(found, beams, use_cache) for use_cache in (True, False)]
    if [y.shape for y in ways[0]] != [y.shape for y in ways[1]]:
        return float("inf")
    a, b = (torch.stack(way) for way in ways)
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0))


def generated(found: Case, beams: int, use_cache: bool) -> tuple[Tensor, ...]:
    inputs = {
        key: value.clone() for key, value in found.inputs.items() if key != "decoder_input_ids"
    }  # some write there
    if found.model.config.is_encoder_decoder:
        inputs["decoder_start_token_id"] = 1
    torch.manual_seed(0)
    return found.model.generate(
        **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=beams, use_cache=use_cache,
        return_dict_in_generate=True, output_logits=True, pad_token_id=0,
    ).logits  # fmt: skip


def row(name: str, slugs: Iterable[str] = tuple(ADAPTERS)) -> dict[str, str]:
    """The class of an architecture and the outcome by adapter, or why there is none."""
    try:
        found = case(name)
    except NotBuilt as reason:
        return {"class": f"not built: {reason}"}
    return {"class": type(found.model).__name__} | {slug: outcome(found, slug) for slug in slugs}
